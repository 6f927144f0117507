"""The preference losses against theory and against formulas written a second time, in plain Python."""

import itertools
import math

import pytest
import torch
from softpref.objectives import dpo_loss, log_group_weights, preference_loss

REWARDS = torch.tensor([1.5, 0.2, -0.7, 0.9, -1.4, 0.0], dtype=torch.float64)
ALPHAS = (0.1, 0.5, 1.0, 2.0, 5.0)


def pairs_of(count):
    return torch.tensor(list(itertools.combinations(range(count), 2)))


def minimise(loss, count):
    """Log-probabilities of the table of outputs that L-BFGS finds for `loss(logps)`."""
    logits = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=400, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(logits.log_softmax(0))
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().log_softmax(0)


def divergence(logps, other):
    return float((logps.exp() * (logps - other)).sum())


def expected_pair_loss(logps, frequencies, **options):
    """The expected loss of Bradley-Terry labels when pair k is asked with `frequencies[k]`."""
    pairs = pairs_of(len(logps))
    labels = torch.sigmoid(REWARDS[pairs[:, 0]] - REWARDS[pairs[:, 1]])
    sizes = torch.full((len(pairs),), 2)
    losses = preference_loss(logps[pairs.flatten()], sizes, probabilities=labels, **options)
    return (frequencies * losses).sum()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("uneven", [False, True])
def test_pairwise_minimiser_is_softmax_of_reward_over_alpha_whatever_pairs_are_asked(alpha, uneven):
    pairs = len(pairs_of(len(REWARDS)))
    frequencies = torch.full((pairs,), 1 / pairs, dtype=torch.float64)
    if uneven:
        frequencies = torch.linspace(1, 12, pairs, dtype=torch.float64)
        frequencies /= frequencies.sum()
    learned = minimise(lambda logps: expected_pair_loss(logps, frequencies, alpha=alpha), len(REWARDS))
    assert divergence((REWARDS / alpha).log_softmax(0), learned) <= 1e-4


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kind", ["best_of_n", "ranking"])
def test_plackett_luce_minimiser_is_softmax_of_reward_over_alpha(alpha, kind):
    rewards = REWARDS[:5]
    orders = torch.tensor(list(itertools.permutations(range(5), 3)))
    strengths = rewards[orders]
    # P(order) under Plackett-Luce; best-of-3 ignores the tail of the order, so its labels follow too
    chances = sum(strengths[:, k] - strengths[:, k:].logsumexp(1) for k in range(2)).exp()
    sizes = torch.full((len(orders),), 3)

    def loss(logps):
        losses = preference_loss(logps[orders.flatten()], sizes, alpha=alpha, kind=kind)
        return (chances * losses).sum() / chances.sum()

    assert divergence((rewards / alpha).log_softmax(0), minimise(loss, 5)) <= 1e-4


@pytest.mark.parametrize("alpha", ALPHAS)
def test_symmetric_weights_keep_the_minimiser(alpha):
    logits = (REWARDS / alpha).clone().requires_grad_(True)
    frequencies = torch.ones(len(pairs_of(len(REWARDS))), dtype=torch.float64)
    loss = expected_pair_loss(logits.log_softmax(0), frequencies, alpha=alpha, weight_exponent=0.7)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() < 1e-12


def test_geometric_labels_move_the_minimiser():
    frequencies = torch.ones(len(pairs_of(len(REWARDS))), dtype=torch.float64)
    logits = REWARDS.clone().requires_grad_(True)
    loss = expected_pair_loss(logits.log_softmax(0), frequencies, alpha=1.0, soft_labels="geometric")
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() > 0.05


def best_of_n_by_hand(logps, alpha):
    """−(1/α) [α logp_best − log Σ exp(α logp_j)], the equation as method papers print it."""
    if alpha == 0:
        return sum(other - logps[0] for other in logps) / len(logps)
    return -(alpha * logps[0] - math.log(sum(math.exp(alpha * value) for value in logps))) / alpha


def ranking_by_hand(logps, alpha):
    return sum(best_of_n_by_hand(logps[k:], alpha) for k in range(len(logps) - 1))


GROUPS = [[-3.0, -4.5], [-2.0, -1.0, -6.0], [-5.0, -4.0], [-1.0, -2.0, -3.0, -0.5]]
FLAT = torch.tensor([value for group in GROUPS for value in group], dtype=torch.float64)
SIZES = torch.tensor([len(group) for group in GROUPS])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize(
    ("kind", "by_hand"), [("best_of_n", best_of_n_by_hand), ("ranking", ranking_by_hand)]
)
def test_groups_of_mixed_sizes_have_the_loss_of_the_formula(alpha, kind, by_hand):
    losses = preference_loss(FLAT, SIZES, alpha=alpha, kind=kind)
    expected = torch.tensor([by_hand(group, alpha) for group in GROUPS], dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("kind", ["best_of_n", "ranking"])
def test_a_group_in_a_mixed_batch_has_value_and_gradient_as_if_alone(alpha, kind):
    probabilities = torch.tensor([0.8, 1.0, 0.3, 1.0], dtype=torch.float64)
    together = FLAT.clone().requires_grad_(True)
    losses = preference_loss(together, SIZES, alpha=alpha, kind=kind, probabilities=probabilities)
    losses.sum().backward()
    alone_losses, alone_gradients = [], []
    for group, probability in zip(GROUPS, probabilities, strict=True):
        alone = torch.tensor(group, dtype=torch.float64, requires_grad=True)
        loss = preference_loss(
            alone, torch.tensor([len(group)]), alpha=alpha, kind=kind, probabilities=probability[None]
        )
        loss.sum().backward()
        alone_losses.append(loss.detach())
        alone_gradients.append(alone.grad)
    torch.testing.assert_close(losses.detach(), torch.cat(alone_losses), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together.grad, torch.cat(alone_gradients), rtol=1e-12, atol=1e-12)


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_soft_labels_follow_their_formulas_in_value_and_gradient(alpha):
    first, second, p = -2.0, -2.9, 0.7
    delta = first - second
    expected = {
        "linear": (
            -(p * math.log(sigmoid(alpha * delta)) + (1 - p) * math.log(sigmoid(-alpha * delta))) / alpha,
            -p * sigmoid(-alpha * delta) + (1 - p) * sigmoid(alpha * delta),
        ),
        "geometric": (
            -math.log(sigmoid(alpha * (2 * p - 1) * delta)) / alpha,
            -(2 * p - 1) * sigmoid(-alpha * (2 * p - 1) * delta),
        ),
    }
    for soft_labels, (value, slope) in expected.items():
        logps = torch.tensor([first, second], dtype=torch.float64, requires_grad=True)
        loss = preference_loss(
            logps,
            torch.tensor([2]),
            alpha=alpha,
            probabilities=torch.tensor([p], dtype=torch.float64),
            soft_labels=soft_labels,
        )
        loss.sum().backward()
        assert loss.item() == pytest.approx(value, rel=1e-12)
        assert logps.grad.tolist() == pytest.approx([slope, -slope], rel=1e-12)


def test_a_probability_of_one_is_a_hard_label():
    hard = preference_loss(FLAT[:2], SIZES[:1], alpha=0.5)
    for soft_labels in ("linear", "geometric"):
        soft = preference_loss(
            FLAT[:2], SIZES[:1], alpha=0.5, probabilities=torch.ones(1), soft_labels=soft_labels
        )
        torch.testing.assert_close(soft, hard)


def test_alpha_zero_is_the_limit_with_gradient_of_half_the_margin_times_weight():
    sizes = torch.tensor([2, 2])

    def gradient(alpha):
        logps = torch.tensor([-3.0, -4.0, -1.0, -6.0], dtype=torch.float64, requires_grad=True)
        preference_loss(logps, sizes, alpha=alpha, weight_exponent=0.4).sum().backward()
        return logps.grad

    log_weights = [0.4 * math.log(math.exp(-3) + math.exp(-4)), 0.4 * math.log(math.exp(-1) + math.exp(-6))]
    mean = sum(math.exp(value) for value in log_weights) / 2
    mu = [math.exp(value) / mean for value in log_weights]
    expected = torch.tensor([-mu[0] / 2, mu[0] / 2, -mu[1] / 2, mu[1] / 2], dtype=torch.float64)
    torch.testing.assert_close(gradient(0.0), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(1e-7), expected, rtol=1e-5, atol=0)


def test_gradient_scale_does_not_depend_on_alpha_where_the_margin_is_nothing():
    for alpha in (0.0, 0.01, 1.0, 100.0):
        logps = torch.full((2,), -7.0, requires_grad=True)
        preference_loss(logps, torch.tensor([2]), alpha=alpha).sum().backward()
        assert logps.grad.tolist() == pytest.approx([-0.5, 0.5])


def test_weights_are_symmetric_have_mean_one_and_no_gradient():
    sizes = torch.tensor([2, 3])
    options = {"alpha": 1.0, "kind": "best_of_n"}
    logps = torch.tensor([-3.0, -4.5, -2.0, -1.0, -6.0], dtype=torch.float64, requires_grad=True)
    plain = preference_loss(logps, sizes, **options)
    weighted = preference_loss(logps, sizes, weight_exponent=0.5, **options)
    mu = (weighted / plain).detach()
    assert float(mu.mean()) == pytest.approx(1.0, rel=1e-12)
    assert float(mu[1] / mu[0]) == pytest.approx(
        math.sqrt(sum(map(math.exp, (-2, -1, -6))) / sum(map(math.exp, (-3, -4.5)))), rel=1e-12
    )
    (weighted_gradient,) = torch.autograd.grad(weighted.sum(), logps, retain_graph=True)
    (plain_gradient,) = torch.autograd.grad((plain * mu).sum(), logps)
    torch.testing.assert_close(weighted_gradient, plain_gradient, rtol=1e-12, atol=1e-15)
    swapped = log_group_weights(logps[[1, 0, 4, 2, 3]], sizes, weight_exponent=0.5)
    torch.testing.assert_close(swapped, log_group_weights(logps, sizes, weight_exponent=0.5))
    assert not swapped.requires_grad


def test_weights_of_a_part_with_the_mean_of_all_are_those_of_the_whole():
    whole = preference_loss(FLAT, SIZES, alpha=1.0, kind="ranking", weight_exponent=0.5)
    log_mean = log_group_weights(FLAT, SIZES, weight_exponent=0.5).logsumexp(0) - math.log(len(SIZES))
    parts = [
        preference_loss(
            FLAT[tokens],
            SIZES[rows],
            alpha=1.0,
            kind="ranking",
            weight_exponent=0.5,
            log_mean_weight=log_mean,
        )
        for tokens, rows in ((slice(0, 2), slice(0, 1)), (slice(2, None), slice(1, None)))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=0)


def test_weight_scores_stand_in_for_log_probabilities():
    lengths = torch.tensor([3.0, 4.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    sizes, logps = torch.tensor([2, 3]), FLAT[:5]
    weighted = preference_loss(
        logps, sizes, alpha=1.0, kind="best_of_n", weight_exponent=1.0, weight_scores=logps / lengths
    )
    plain = preference_loss(logps, sizes, alpha=1.0, kind="best_of_n")
    scores = (logps / lengths).exp()
    mu = torch.stack([scores[:2].sum(), scores[2:].sum()])
    torch.testing.assert_close(weighted, plain * mu / mu.mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("exponent", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["best_of_n", "ranking"])
def test_extreme_log_probabilities_give_finite_losses_and_gradients(alpha, exponent, kind):
    logps = torch.tensor([-1e5, -3.0, -2.0, -1e5, -9e4, 0.0, -1e5], requires_grad=True)
    losses = preference_loss(
        logps,
        torch.tensor([2, 3, 2]),
        alpha=alpha,
        kind=kind,
        probabilities=torch.tensor([0.4, 1.0, 1.0]),
        weight_exponent=exponent,
    )
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(logps.grad).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "alpha must be at least 0"),
        ({"alpha": 1.0, "group_sizes": torch.tensor([2, 2])}, "sum to 5"),
        ({"alpha": 1.0, "group_sizes": torch.tensor([4, 1])}, "at least 2"),
        ({"alpha": 1.0}, "exactly two"),
        ({"alpha": 1.0, "kind": "best_of_m"}, "best_of_n"),
        ({"alpha": 1.0, "kind": "ranking", "probabilities": torch.tensor([1.0, 0.5])}, "exactly two"),
        (
            {"alpha": 1.0, "kind": "ranking", "probabilities": torch.ones(2), "soft_labels": "cubic"},
            "linear",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    options = {"group_sizes": torch.tensor([2, 3]), **options}
    with pytest.raises(ValueError, match=message):
        preference_loss(torch.zeros(5), **options)


@pytest.mark.parametrize("beta", [0.05, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("soft_labels", [None, "linear", "geometric"])
def test_dpo_follows_its_formula_in_value_and_gradient(beta, smoothing, soft_labels):
    policy, reference = [-3.0, -4.0, -2.5, -1.0], [-3.5, -3.6, -2.0, -2.2]
    probabilities = [0.9, 0.35]

    def loss_and_slope(h):
        """cDPO's loss at margin h, and its derivative."""
        value = -(1 - smoothing) * math.log(sigmoid(beta * h)) - smoothing * math.log(sigmoid(-beta * h))
        return value, beta * (-(1 - smoothing) * sigmoid(-beta * h) + smoothing * sigmoid(beta * h))

    expected, gradient = [], []
    for row, p in enumerate(probabilities):
        i, j = 2 * row, 2 * row + 1
        h = (policy[i] - reference[i]) - (policy[j] - reference[j])
        if soft_labels is None:
            value, slope = loss_and_slope(h)
        elif soft_labels == "linear":
            (up, up_slope), (down, down_slope) = loss_and_slope(h), loss_and_slope(-h)
            value, slope = p * up + (1 - p) * down, p * up_slope - (1 - p) * down_slope
        else:
            value, slope = loss_and_slope((2 * p - 1) * h)
            slope *= 2 * p - 1
        expected.append(value)
        gradient += [slope, -slope]
    logps = torch.tensor(policy, dtype=torch.float64, requires_grad=True)
    losses = dpo_loss(
        logps,
        torch.tensor(reference, dtype=torch.float64),
        beta=beta,
        label_smoothing=smoothing,
        probabilities=None if soft_labels is None else torch.tensor(probabilities, dtype=torch.float64),
        soft_labels=soft_labels or "linear",
    )
    losses.sum().backward()
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    assert logps.grad.tolist() == pytest.approx(gradient, rel=1e-12)


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"beta": 0.1, "label_smoothing": 0.5}])
def test_dpo_refuses_what_its_formula_does_not_allow(options):
    with pytest.raises(ValueError, match="must be"):
        dpo_loss(torch.zeros(2), torch.zeros(2), **options)
