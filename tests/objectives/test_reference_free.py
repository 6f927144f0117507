"""Losses without a reference against their formulas and slopes, written a second time in numpy."""

import numpy as np
import pytest
import torch
from softpref.objectives import cpo_loss, log_odds, nll_loss, orpo_loss, preference_loss, simpo_loss

pytestmark = pytest.mark.fast

LOGPS = np.array([-3.0, -4.0, -2.5, -1.0, -60.0, -45.0, -7.25, -7.25])
LENGTHS = np.array([3, 2, 5, 1, 20, 30, 4, 8])
PROBABILITIES = np.array([0.9, 0.35, 0.5, 1.0])
OFFSETS = np.array([0.3, -0.2, 0.0, 0.5, 1.0, -1.0, 0.25, 0.75])
GAMMA, NLL_WEIGHT = 0.4, 0.7
LABELS = (None, "linear", "geometric")


def softplus(x):
    """−log σ(−x)."""
    return np.logaddexp(0, x)


def odds(logps):
    """log(P / (1 − P)) of the mean per token."""
    chances = np.exp(logps / LENGTHS)
    return np.log(chances) - np.log(1 - chances)


def simpo_by_hand(logps, offsets, scale, beta, p, labels):
    z = differences(scale * (beta * logps / LENGTHS - offsets))
    return mixed(lambda m: softplus(GAMMA - m), z, p, labels)


def cpo_by_hand(logps, offsets, scale, beta, p, labels):
    z = differences(scale * (beta * logps - offsets))
    return mixed(lambda m: softplus(-m), z, p, labels) + NLL_WEIGHT * likelihood(logps, p, labels)


def orpo_by_hand(logps, offsets, scale, beta, p, labels):
    z = differences(scale * (odds(logps) - offsets))
    return beta * mixed(lambda m: softplus(-m), z, p, labels) + NLL_WEIGHT * likelihood(logps, p, labels)


def differences(values):
    return values[::2] - values[1::2]


def mixed(loss, z, p, labels):
    if labels is None:
        return loss(z)
    return loss((2 * p - 1) * z) if labels == "geometric" else p * loss(z) + (1 - p) * loss(-z)


def likelihood(logps, p, labels):
    each = -logps / LENGTHS
    return each[::2] if labels is None else p * each[::2] + (1 - p) * each[1::2]


LOSSES = {
    simpo_loss: (simpo_by_hand, {"simpo_gamma": GAMMA}),
    cpo_loss: (cpo_by_hand, {"nll_weight": NLL_WEIGHT}),
    orpo_loss: (orpo_by_hand, {"nll_weight": NLL_WEIGHT}),
}


def slopes_of(function, point, step=1e-6):
    """Central differences of the sum of `function`, one completion at a time."""
    found = []
    for place in range(len(point)):
        moved = np.zeros_like(point)
        moved[place] = step
        found.append((function(point + moved).sum() - function(point - moved).sum()) / (2 * step))
    return np.array(found)


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("moved", [False, True], ids=["plain", "offset"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda one: one.__name__)
def test_losses_and_gradients_are_those_of_the_formulas(loss, moved, labels, beta):
    by_hand, own = LOSSES[loss]
    offsets, scale = OFFSETS * moved, 1.5 if moved else 1.0
    options = dict(own)
    if labels:
        options |= {"probabilities": torch.tensor(PROBABILITIES), "soft_labels": labels}
    if moved:
        options |= {"offsets": torch.tensor(OFFSETS), "scale": scale}
    logps = torch.tensor(LOGPS, requires_grad=True)
    losses = loss(logps, torch.tensor(LENGTHS), beta=beta, **options)

    def expected(point):
        return by_hand(point, offsets, scale, beta, PROBABILITIES, labels)

    np.testing.assert_allclose(losses.detach(), expected(LOGPS), rtol=1e-12)
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    np.testing.assert_allclose(gradient, slopes_of(expected, LOGPS), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("labels", LABELS[1:])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda one: one.__name__)
def test_turning_a_pair_and_its_label_changes_nothing_and_certainty_is_a_hard_label(loss, labels):
    def turned(values):
        return torch.tensor(values.reshape(-1, 2)[:, ::-1].ravel().copy())

    options = {"beta": 0.3, "soft_labels": labels, **LOSSES[loss][1]}
    pair = torch.tensor(LOGPS), torch.tensor(LENGTHS)
    losses = loss(*pair, probabilities=torch.tensor(PROBABILITIES), **options)
    other = loss(turned(LOGPS), turned(LENGTHS), probabilities=torch.tensor(1 - PROBABILITIES), **options)
    torch.testing.assert_close(other, losses)
    certain = loss(*pair, probabilities=torch.ones(4).double(), **options)
    torch.testing.assert_close(certain, loss(*pair, beta=0.3, **LOSSES[loss][1]))


def test_cpo_without_its_likelihood_is_soft_preference_optimization_without_an_anchor():
    logps = torch.tensor(LOGPS, requires_grad=True)
    cpo = cpo_loss(logps, torch.tensor(LENGTHS), beta=0.4, nll_weight=0.0)
    spo = preference_loss(logps, torch.full((4,), 2), alpha=0.4)
    torch.testing.assert_close(cpo, 0.4 * spo)


def test_the_likelihood_is_a_mean_over_tokens_of_the_one_that_is_better():
    pair = torch.tensor(LOGPS), torch.tensor(LENGTHS)
    np.testing.assert_allclose(nll_loss(*pair), [1.0, 0.5, 3.0, 7.25 / 4])
    soft = nll_loss(*pair, torch.tensor([0.25, 0.5, 0.0, 1.0]))
    np.testing.assert_allclose(soft, [0.25 + 1.5, 0.75, 1.5, 7.25 / 4])


def test_odds_are_finite_for_the_certain_and_for_the_impossible_and_right_between():
    logps = torch.tensor([0.0, -1e-5, -0.1, -1.0, -80.0, -1e5], requires_grad=True)
    found = log_odds(logps, torch.ones(6))
    exact = logps.detach().double().numpy()[1:]
    expected = exact - np.log(-np.expm1(exact))
    np.testing.assert_allclose(found.detach()[1:], expected, rtol=1e-6, atol=2e-7)
    assert 15 < float(found[0].detach()) < 17
    (gradient,) = torch.autograd.grad(found.sum(), logps)
    assert torch.isfinite(gradient).all()
    np.testing.assert_allclose(gradient[1:], -1 / np.expm1(exact), rtol=1e-5)


def test_long_completions_in_fp32_have_the_values_of_float64():
    logps = np.array([-1e5, -99990.5, -700.0, -690.25, -0.015625, -3.5])
    lengths = np.array([30000, 20000, 700, 600, 4, 4])
    for loss in LOSSES:
        for beta in (0.01, 1.0, 10.0):
            fine, coarse = (
                loss(torch.tensor(logps, dtype=dtype), torch.tensor(lengths), beta=beta)
                for dtype in (torch.float64, torch.float32)
            )
            torch.testing.assert_close(coarse.double(), fine, rtol=1e-5, atol=1e-6)


REFUSED = [
    *((loss, {"beta": beta}) for loss in LOSSES for beta in (0.0, -1.0, np.nan)),
    (simpo_loss, {"simpo_gamma": -0.1}),
]


@pytest.mark.parametrize(("loss", "options"), REFUSED, ids=lambda x: getattr(x, "__name__", str(x)))
def test_what_the_formulas_do_not_allow_is_refused(loss, options):
    with pytest.raises(ValueError, match="must be"):
        loss(-torch.ones(2), torch.ones(2), **{"beta": 0.1, **options})
