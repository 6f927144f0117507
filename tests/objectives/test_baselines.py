"""The losses of other methods against their formulas and slopes, written a second time in numpy."""

import numpy as np
import pytest
import torch
from scipy.special import expit
from softpref.objectives import (
    apo_down_loss,
    apo_zero_loss,
    dpo_loss,
    group_of,
    ipo_loss,
    rdpo_loss,
    ropo_loss,
    slic_loss,
    sppo_loss,
    tdpo1_loss,
    tdpo_loss,
)

pytestmark = pytest.mark.fast

LABELS = (None, "linear", "geometric")
EPSILON = 2.0**-24
"""What rounding to fp32 may change, relative to a value."""


def softplus(x):
    """−log σ(−x)."""
    return np.logaddexp(0, x)


# ℓ(h) and ℓ'(h) of each method that knows the margin alone, given β and ε
FORMULAS = {
    dpo_loss: (
        lambda h, b, e: (1 - e) * softplus(-b * h) + e * softplus(b * h),
        lambda h, b, e: b * (-(1 - e) * expit(-b * h) + e * expit(b * h)),
    ),
    rdpo_loss: (
        lambda h, b, e: ((1 - e) * softplus(-b * h) - e * softplus(b * h)) / (1 - 2 * e),
        lambda h, b, e: -b * ((1 - e) * expit(-b * h) + e * expit(b * h)) / (1 - 2 * e),
    ),
    ipo_loss: (lambda h, b, e: (h - 1 / (2 * b)) ** 2, lambda h, b, e: 2 * (h - 1 / (2 * b))),
    slic_loss: (lambda h, b, e: np.maximum(0, 1 - b * h), lambda h, b, e: np.where(b * h < 1, -b, 0.0)),
    ropo_loss: (  # a = 14: 4a / (1 + a)² = 56 / 225
        lambda h, b, e: 56 / 225 * (softplus(-b * h) + 14 * expit(-b * h)),
        lambda h, b, e: -b * 56 / 225 * expit(-b * h) * (1 + 14 * expit(b * h)),
    ),
}
SMOOTHING = [
    (loss, e) for loss in FORMULAS for e in ((0.0, 0.2) if loss in (dpo_loss, rdpo_loss) else (0.0,))
]


def margins_by_hand(logps, ref_logps):
    """h of each pair, from flat log-probabilities."""
    ratios = np.asarray(logps, dtype=np.float64) - np.asarray(ref_logps, dtype=np.float64)
    return ratios[::2] - ratios[1::2]


def by_hand(loss, h, beta, smoothing, p, labels):
    """Values and slopes in h, both `[pairs]`."""
    value, slope = (lambda x, f=f: f(x, beta, smoothing) for f in FORMULAS[loss])
    if labels is None:
        return value(h), slope(h)
    if labels == "geometric":
        return value((2 * p - 1) * h), (2 * p - 1) * slope((2 * p - 1) * h)
    return p * value(h) + (1 - p) * value(-h), p * slope(h) - (1 - p) * slope(-h)


def tdpo_by_hand(h, d_first, d_second, beta, a, p, labels):
    """Values, and slopes in h and in both divergences, the winner's being a constant."""

    def one(h, loser, winner):
        margin = beta * h - beta * a * (loser - winner)
        return softplus(-margin), -beta * expit(-margin), beta * a * expit(-margin)

    if labels != "linear":
        scale = 1.0 if labels is None else 2 * p - 1
        value, slope, loser_slope = one(scale * h, d_second, d_first)
        return value, scale * slope, 0 * h, loser_slope
    kept, kept_slope, second_slope = one(h, d_second, d_first)
    flipped, flipped_slope, first_slope = one(-h, d_first, d_second)
    slopes = p * kept_slope - (1 - p) * flipped_slope
    return p * kept + (1 - p) * flipped, slopes, (1 - p) * first_slope, p * second_slope


def label_options(labels, p, dtype):
    return {} if labels is None else {"probabilities": torch.tensor(p, dtype=dtype), "soft_labels": labels}


def value_and_gradients(loss, *inputs, dtype=torch.float64, **options):
    """Losses, and the gradient of their sum in each input that has one; all finite, in the dtype given."""
    tensors = [torch.tensor(each, dtype=dtype, requires_grad=True) for each in inputs]
    losses = loss(*tensors, **options)
    assert losses.dtype == dtype
    gradients = torch.autograd.grad(losses.sum(), tensors, allow_unused=True)
    for each in (losses, *gradients):
        assert each is None or torch.isfinite(each).all()
    return losses.detach().double().numpy(), [
        None if each is None else each.double().numpy() for each in gradients
    ]


LOGPS = [-3.0, -4.0, -2.5, -1.0, -60.0, -45.0, -7.25, -7.25]
REF_LOGPS = [-3.5, -3.6, -2.0, -2.2, -52.0, -48.0, -7.0, -7.5]
PROBABILITIES = [0.9, 0.35, 0.5, 1.0]
DIVERGENCES = [0.3, 1.7, 0.0, 0.4, 5.0, 2.5, 0.1, 0.1]


@pytest.mark.parametrize("beta", [0.02, 0.1, 1.0])
@pytest.mark.parametrize(("loss", "smoothing"), SMOOTHING, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("labels", LABELS)
def test_losses_and_gradients_are_those_of_the_formulas(beta, loss, smoothing, labels):
    options = label_options(labels, PROBABILITIES, torch.float64)
    if smoothing:
        options["label_smoothing"] = smoothing
    losses, (gradient, ref_gradient) = value_and_gradients(loss, LOGPS, REF_LOGPS, beta=beta, **options)
    h = margins_by_hand(LOGPS, REF_LOGPS)
    expected, slopes = by_hand(loss, h, beta, smoothing, np.array(PROBABILITIES), labels)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient[::2], slopes, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(gradient[1::2], -slopes, rtol=1e-11, atol=1e-14)
    assert ref_gradient is None


@pytest.mark.parametrize("beta", [0.02, 1.0])
@pytest.mark.parametrize("a", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("labels", LABELS)
def test_tdpo_is_its_formula_and_only_the_losers_divergence_has_a_gradient(beta, a, labels):
    options = label_options(labels, PROBABILITIES, torch.float64)
    losses, (gradient, ref_gradient, slopes_of_d) = value_and_gradients(
        tdpo_loss, LOGPS, REF_LOGPS, DIVERGENCES, beta=beta, tdpo_alpha=a, **options
    )
    h, d, p = margins_by_hand(LOGPS, REF_LOGPS), np.array(DIVERGENCES), np.array(PROBABILITIES)
    expected, slopes, first, second = tdpo_by_hand(h, d[::2], d[1::2], beta, a, p, labels)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient[::2], slopes, rtol=1e-11)
    np.testing.assert_allclose(gradient[1::2], -slopes, rtol=1e-11)
    np.testing.assert_allclose(slopes_of_d[::2], first, rtol=1e-11, atol=0)
    np.testing.assert_allclose(slopes_of_d[1::2], second, rtol=1e-11)
    assert ref_gradient is None
    if labels is None:
        assert (slopes_of_d[::2] == 0).all()
        assert (slopes_of_d[1::2] > 0).all() == (a > 0)


def test_tdpo_without_divergences_is_dpo():
    plain = value_and_gradients(dpo_loss, LOGPS, REF_LOGPS, beta=0.3)
    for divergences, a in ((DIVERGENCES, 0.0), ([0.7] * 8, 0.5)):  # equal ones cancel
        losses, gradients = value_and_gradients(
            tdpo_loss, LOGPS, REF_LOGPS, divergences, beta=0.3, tdpo_alpha=a
        )
        np.testing.assert_allclose(losses, plain[0], rtol=1e-12)
        np.testing.assert_allclose(gradients[0], plain[1][0], rtol=1e-12)


@pytest.mark.parametrize("beta", [0.02, 1.0])
@pytest.mark.parametrize("labels", LABELS)
def test_tdpo1_is_its_formula_and_both_divergences_have_a_gradient(beta, labels):
    options = label_options(labels, PROBABILITIES, torch.float64)
    losses, (gradient, ref_gradient, slopes_of_d) = value_and_gradients(
        tdpo1_loss, LOGPS, REF_LOGPS, DIVERGENCES, beta=beta, **options
    )
    d = np.array(DIVERGENCES)
    margins = margins_by_hand(LOGPS, REF_LOGPS) - (d[1::2] - d[::2])
    expected, slopes = by_hand(dpo_loss, margins, beta, 0.0, np.array(PROBABILITIES), labels)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    for found in (gradient, slopes_of_d):
        np.testing.assert_allclose(found[::2], slopes, rtol=1e-11, atol=1e-14)
        np.testing.assert_allclose(found[1::2], -slopes, rtol=1e-11, atol=1e-14)
    assert ref_gradient is None


def test_the_steepest_slope_of_ropo_is_that_of_dpo_and_confident_flips_weigh_little():
    """Its weight of a pair, `4a/(1 + a)² σ(−z)(1 + a σ(z))`, is at most 1, where σ(−z) = (1 + a) / 2a."""
    z = np.linspace(-20, 20, 4001).reshape(-1, 1)
    logps = np.concatenate([z, np.zeros_like(z)], 1).ravel().tolist()
    for a in (1.0, 3.0, 14.0):
        _, (gradient, _) = value_and_gradients(ropo_loss, logps, [0.0] * 8002, beta=1.0, ropo_alpha=a)
        slopes = -gradient[::2]
        assert slopes.max() == pytest.approx(1, abs=1e-4)
        assert slopes[0] == pytest.approx(4 * a / (1 + a) ** 2, rel=1e-4)  # z = −20, where DPO's is 1
        assert slopes[-1] < 1e-7


# ℓ(u_w, u_l) of each method that knows both completions alone, and its slopes in u_w and u_l
ANCHORED = {
    apo_zero_loss: (
        lambda won, lost: 1 - expit(won) + expit(lost),
        lambda won, lost: (-expit(won) * expit(-won), expit(lost) * expit(-lost)),
    ),
    apo_down_loss: (
        lambda won, lost: expit(won) + 1 - expit(won - lost),
        lambda won, lost: (
            expit(won) * expit(-won) - expit(won - lost) * expit(lost - won),
            expit(won - lost) * expit(lost - won),
        ),
    ),
}


def anchored_by_hand(loss, utilities, p, labels):
    """Values and slopes in u of each completion."""
    value, slope = ANCHORED[loss]
    a, b = utilities[::2], utilities[1::2]
    if labels is None:
        return value(a, b), slope(a, b)
    if labels == "geometric":
        mixed = p * a + (1 - p) * b, (1 - p) * a + p * b
        won, lost = slope(*mixed)
        return value(*mixed), (p * won + (1 - p) * lost, (1 - p) * won + p * lost)
    kept, flipped = slope(a, b), slope(b, a)
    slopes = p * kept[0] + (1 - p) * flipped[1], p * kept[1] + (1 - p) * flipped[0]
    return p * value(a, b) + (1 - p) * value(b, a), slopes


@pytest.mark.parametrize("beta", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("loss", ANCHORED, ids=lambda one: one.__name__)
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("moved", [False, True], ids=["plain", "offset"])
def test_anchored_losses_and_their_gradients_are_those_of_the_formulas(beta, loss, labels, moved):
    options = label_options(labels, PROBABILITIES, torch.float64)
    offsets, scale = np.array([0.3, -0.2, 0.0, 0.5, 1.0, -1.0, 0.25, 0.75]) * moved, 1.5 if moved else 1.0
    if moved:
        options |= {"offsets": torch.tensor(offsets), "scale": scale}
    losses, (gradient, ref_gradient) = value_and_gradients(loss, LOGPS, REF_LOGPS, beta=beta, **options)
    utilities = scale * (beta * (np.array(LOGPS) - np.array(REF_LOGPS)) - offsets)
    expected, slopes = anchored_by_hand(loss, utilities, np.array(PROBABILITIES), labels)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient[::2], scale * beta * slopes[0], rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(gradient[1::2], scale * beta * slopes[1], rtol=1e-10, atol=1e-14)
    assert ref_gradient is None


@pytest.mark.parametrize("loss", ANCHORED, ids=lambda one: one.__name__)
@pytest.mark.parametrize("labels", LABELS[1:])
def test_turning_an_anchored_pair_and_its_label_changes_nothing(loss, labels):
    p = torch.tensor(PROBABILITIES, dtype=torch.float64)
    options = {"beta": 0.3, "soft_labels": labels}
    losses, _ = value_and_gradients(loss, LOGPS, REF_LOGPS, probabilities=p, **options)
    other, _ = value_and_gradients(loss, turned(LOGPS), turned(REF_LOGPS), probabilities=1 - p, **options)
    np.testing.assert_allclose(other, losses, rtol=1e-12)


def test_zero_raises_the_winner_and_down_lowers_both():
    for loss, signs in ((apo_zero_loss, (-1, 1)), (apo_down_loss, (1, 1))):
        _, (gradient, _) = value_and_gradients(loss, [-1.0, -4.0], [-3.0, -3.0], beta=1.0)
        assert np.sign(gradient).tolist() == list(signs)


@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_sppo_is_its_formula_summed_over_groups_of_any_size(beta):
    sizes, chances = [2, 1, 4, 1], [0.9, 0.1, 0.5, 0.0, 0.25, 1.0, 0.75, 0.6]
    losses, (gradient, ref_gradient) = value_and_gradients(
        lambda logps, ref: sppo_loss(
            logps, ref, torch.tensor(chances, dtype=torch.float64), torch.tensor(sizes), beta=beta
        ),
        LOGPS,
        REF_LOGPS,
    )
    errors = [
        logp - ref - (chance - 0.5) / beta
        for logp, ref, chance in zip(LOGPS, REF_LOGPS, chances, strict=True)
    ]
    squares = iter([error**2 for error in errors])
    expected = [sum(next(squares) for _ in range(size)) for size in sizes]
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, [2 * error for error in errors], rtol=1e-12)
    assert ref_gradient is None
    assert group_of(torch.tensor(sizes)).tolist() == [0, 0, 1, 2, 2, 2, 2, 3]


def test_sppo_aims_at_the_reference_reweighed_by_the_advantage_over_beta():
    chances, beta = np.array([0.9, 0.2]), 0.5
    aimed = (np.array([-3.0, -4.0]) + (chances - 0.5) / beta).tolist()
    losses, (gradient, _) = value_and_gradients(
        lambda logps, ref: sppo_loss(logps, ref, torch.from_numpy(chances), torch.tensor([2]), beta=beta),
        aimed,
        [-3.0, -4.0],
    )
    assert float(abs(losses).max()) < 1e-24
    assert float(abs(gradient).max()) < 1e-12


def turned(values):
    """Flat pairs with both completions exchanged."""
    return np.reshape(values, (-1, 2))[:, ::-1].ravel().tolist()


@pytest.mark.parametrize("share", [0.05, 0.2, 0.45])
def test_robust_dpo_under_flipped_labels_is_dpo_under_true_ones_in_expectation(share):
    true, (true_gradient, _) = value_and_gradients(dpo_loss, LOGPS, REF_LOGPS, beta=0.3)
    options = {"beta": 0.3, "label_smoothing": share}
    kept, (kept_gradient, _) = value_and_gradients(rdpo_loss, LOGPS, REF_LOGPS, **options)
    flipped, (flipped_gradient, _) = value_and_gradients(
        rdpo_loss, turned(LOGPS), turned(REF_LOGPS), **options
    )
    np.testing.assert_allclose((1 - share) * kept + share * flipped, true, rtol=1e-11)
    mean = (1 - share) * kept_gradient + share * np.array(turned(flipped_gradient))
    np.testing.assert_allclose(mean, true_gradient, rtol=1e-11, atol=1e-14)
    # conservative DPO has no such claim: its expectation is another loss
    smoothed, _ = value_and_gradients(dpo_loss, LOGPS, REF_LOGPS, **options)
    other, _ = value_and_gradients(dpo_loss, turned(LOGPS), turned(REF_LOGPS), **options)
    assert float(abs((1 - share) * smoothed + share * other - true).max()) > 0.01


@pytest.mark.parametrize("loss", FORMULAS, ids=lambda x: x.__name__)
@pytest.mark.parametrize("labels", LABELS[1:])
def test_turning_a_pair_and_its_label_changes_nothing_and_certainty_is_a_hard_label(loss, labels):
    p = np.array(PROBABILITIES)
    options = {"beta": 0.3, "soft_labels": labels}
    losses, (gradient, _) = value_and_gradients(
        loss, LOGPS, REF_LOGPS, probabilities=torch.tensor(p), **options
    )
    turned_losses, (turned_gradient, _) = value_and_gradients(
        loss, turned(LOGPS), turned(REF_LOGPS), probabilities=torch.tensor(1 - p), **options
    )
    np.testing.assert_allclose(turned_losses, losses, rtol=1e-11)
    np.testing.assert_allclose(turned(turned_gradient), gradient, rtol=1e-11, atol=1e-14)
    certain, _ = value_and_gradients(
        loss, LOGPS, REF_LOGPS, probabilities=torch.ones(4, dtype=torch.float64), **options
    )
    np.testing.assert_allclose(certain, value_and_gradients(loss, LOGPS, REF_LOGPS, beta=0.3)[0], rtol=1e-12)


@pytest.mark.parametrize("loss", FORMULAS, ids=lambda x: x.__name__)
def test_linear_soft_labels_are_the_expectation_of_hard_ones(loss):
    p = np.array(PROBABILITIES)
    soft, _ = value_and_gradients(loss, LOGPS, REF_LOGPS, beta=0.3, probabilities=torch.tensor(p))
    kept, _ = value_and_gradients(loss, LOGPS, REF_LOGPS, beta=0.3)
    flipped, _ = value_and_gradients(loss, turned(LOGPS), turned(REF_LOGPS), beta=0.3)
    np.testing.assert_allclose(soft, p * kept + (1 - p) * flipped, rtol=1e-12)


# Multiples of 1/64, whose differences fp32 holds exactly, so that an error found is one of the formulas.
EXTREME_LOGPS = [0.0, -0.015625, -1e5, -3.5, -2.25, -1e5, -99990.5, -99992.0, -700.0, -690.25, -5.0, -5.0]
EXTREME_REF_LOGPS = [0.0, 0.0, -3.5, -3.5, -1e5, -2.25, -99991.5, -99992.0, -650.0, -720.5, -1e5, -1e5]
EXTREME_PROBABILITIES = [0.4375, 0.9375, 0.0625, 0.75, 1.0, 0.5]
BETAS = (1e-3, 0.1, 1.0, 30.0, 1e3)


def assert_close(found, expected, *, scale, rtol=1e-5):
    """fp32 results next to float64 ones; `scale` is that of the terms whose sum or difference they are."""
    assert (abs(found - expected) <= rtol * abs(expected) + 16 * EPSILON * scale + 1e-30).all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("loss", "smoothing"), SMOOTHING, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("labels", LABELS)
def test_extreme_log_probabilities_have_the_losses_and_gradients_of_float64(beta, loss, smoothing, labels):
    options = label_options(labels, EXTREME_PROBABILITIES, torch.float32)
    if smoothing:
        options["label_smoothing"] = smoothing
    losses, (gradient, _) = value_and_gradients(
        loss, EXTREME_LOGPS, EXTREME_REF_LOGPS, dtype=torch.float32, beta=beta, **options
    )
    h, p = margins_by_hand(EXTREME_LOGPS, EXTREME_REF_LOGPS), np.array(EXTREME_PROBABILITIES)
    expected, slopes = by_hand(loss, h, beta, smoothing, p, labels)
    if loss is ipo_loss:  # the square of a difference of these
        scale, slope_scale = np.maximum(abs(h), 1 / (2 * beta)) ** 2, np.maximum(abs(h), 1 / (2 * beta))
    else:
        scale, slope_scale = np.maximum(1, beta * abs(h)), beta
    assert_close(losses, expected, scale=scale)
    assert_close(gradient[::2], slopes, scale=slope_scale)
    assert_close(gradient[1::2], -slopes, scale=slope_scale)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("labels", LABELS)
def test_extreme_tdpo_anchored_losses_and_sppo_are_those_of_float64(beta, labels):
    divergences = [0.0, 3.5, 1e5, 2.0, 0.25, 1e4, 7.5, 7.5, 100.0, 90.0, 1.0, 0.0]
    options = label_options(labels, EXTREME_PROBABILITIES, torch.float32)
    losses, gradients = value_and_gradients(
        tdpo_loss, EXTREME_LOGPS, EXTREME_REF_LOGPS, divergences, dtype=torch.float32, beta=beta, **options
    )
    h, d = margins_by_hand(EXTREME_LOGPS, EXTREME_REF_LOGPS), np.array(divergences)
    expected, slopes, first, second = tdpo_by_hand(
        h, d[::2], d[1::2], beta, 0.5, np.array(EXTREME_PROBABILITIES), labels
    )
    assert_close(losses, expected, scale=np.maximum(1, beta * (abs(h) + d[::2] + d[1::2])))
    assert_close(gradients[0][::2], slopes, scale=beta)
    assert_close(gradients[2][::2], first, scale=beta)
    assert_close(gradients[2][1::2], second, scale=beta)

    utilities = beta * (np.array(EXTREME_LOGPS) - np.array(EXTREME_REF_LOGPS))
    for loss in ANCHORED:
        losses, (gradient, _) = value_and_gradients(
            loss, EXTREME_LOGPS, EXTREME_REF_LOGPS, dtype=torch.float32, beta=beta, **options
        )
        expected, slopes = anchored_by_hand(loss, utilities, np.array(EXTREME_PROBABILITIES), labels)
        scale = np.maximum(1, abs(utilities).reshape(-1, 2).sum(1))  # a sigmoid is as fine as what it is of
        assert_close(losses, expected, scale=scale)
        assert_close(gradient[::2], beta * slopes[0], scale=beta * scale)
        assert_close(gradient[1::2], beta * slopes[1], scale=beta * scale)

    chances = [1.0, 0.0, 0.5, 0.25, 0.75, 1.0, 0.0, 1.0, 0.5, 0.5, 0.125, 1.0]
    sizes = [2, 4, 6]
    losses, (gradient, _) = value_and_gradients(
        lambda logps, ref: sppo_loss(logps, ref, torch.tensor(chances), torch.tensor(sizes), beta=beta),
        EXTREME_LOGPS,
        EXTREME_REF_LOGPS,
        dtype=torch.float32,
    )
    ratios, aims = np.array(EXTREME_LOGPS) - np.array(EXTREME_REF_LOGPS), (np.array(chances) - 0.5) / beta
    parts = np.maximum(abs(ratios), abs(aims))
    starts = np.cumsum([0, *sizes[:-1]])
    assert_close(
        losses, np.add.reduceat((ratios - aims) ** 2, starts), scale=np.add.reduceat(parts**2, starts)
    )
    assert_close(gradient, 2 * (ratios - aims), scale=2 * parts)


REFUSED = [
    *(
        (loss, {"beta": beta})
        for loss in (*FORMULAS, *ANCHORED, tdpo_loss, tdpo1_loss, sppo_loss)
        for beta in (0.0, -1.0, np.nan)
    ),
    *((loss, {"scale": scale}) for loss in (dpo_loss, tdpo1_loss, apo_zero_loss) for scale in (0.0, -1.0)),
    *((ropo_loss, {"ropo_alpha": a}) for a in (0.0, -1.0)),
    *((loss, {"label_smoothing": share}) for loss in (dpo_loss, rdpo_loss) for share in (-0.1, 0.5)),
    (tdpo_loss, {"tdpo_alpha": -0.1}),
]


@pytest.mark.parametrize(("loss", "options"), REFUSED, ids=lambda x: getattr(x, "__name__", str(x)))
def test_what_the_formulas_do_not_allow_is_refused(loss, options):
    inputs = [torch.zeros(2)] * (3 if loss in (tdpo_loss, tdpo1_loss, sppo_loss) else 2)
    sizes = [torch.tensor([2])] if loss is sppo_loss else []
    with pytest.raises(ValueError, match="must be"):
        loss(*inputs, *sizes, **{"beta": 0.1, **options})


@pytest.mark.parametrize("loss", [dpo_loss, tdpo_loss, apo_zero_loss], ids=lambda x: x.__name__)
def test_an_unknown_way_of_soft_labels_is_refused(loss):
    inputs = [torch.zeros(2)] * (3 if loss is tdpo_loss else 2)
    with pytest.raises(ValueError, match="'linear' or 'geometric'"):
        loss(*inputs, beta=0.1, probabilities=torch.ones(1), soft_labels="cubic")
