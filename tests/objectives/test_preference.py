"""The preference loss against its formulas, written a second time in numpy, and what must not change it."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import expit, logsumexp, softmax
from softpref.objectives import log_group_weights, ordered_pairs, preference_loss

pytestmark = pytest.mark.fast

KINDS = ("pairwise", "best_of_n", "ranking")
EPSILON = 2.0**-24
"""What rounding to fp32 may change, relative to a value."""


def best_of_n_by_hand(logps, alpha):
    """−(1/α) [α logp_best − log Σ exp(α logp_j)] and its slopes."""
    first = np.eye(len(logps))[0]
    if alpha == 0:
        return logps.mean() - logps[0], 1 / len(logps) - first
    return -(alpha * logps[0] - logsumexp(alpha * logps)) / alpha, softmax(alpha * logps) - first


def ranking_by_hand(logps, alpha):
    value, slopes = 0.0, np.zeros(len(logps))
    for k in range(len(logps) - 1):
        part, part_slopes = best_of_n_by_hand(logps[k:], alpha)
        value, slopes[k:] = value + part, slopes[k:] + part_slopes
    return value, slopes


def pair_by_hand(margin, alpha):
    """−(1/α) log σ(α Δ) and its slope."""
    if alpha == 0:
        return -margin / 2, -0.5
    return np.logaddexp(0, -alpha * margin) / alpha, -expit(-alpha * margin)


def soft_pair_by_hand(logps, alpha, p, soft_labels):
    margin = logps[0] - logps[1]
    if soft_labels == "geometric":
        value, slope = pair_by_hand((2 * p - 1) * margin, alpha)
        slope *= 2 * p - 1
    else:
        (kept, kept_slope), (flipped, flipped_slope) = (
            pair_by_hand(margin, alpha),
            pair_by_hand(-margin, alpha),
        )
        value, slope = p * kept + (1 - p) * flipped, p * kept_slope - (1 - p) * flipped_slope
    return value, np.array([slope, -slope])


def by_hand(groups, *, alpha, kinds, probabilities=None, soft_labels="linear", exponent=0.0, scores=None):
    """Losses `[groups]` and the slopes of each group's loss, one array per group, all in float64."""
    groups = [np.asarray(group, dtype=np.float64) for group in groups]
    found = []
    for i, (group, kind) in enumerate(zip(groups, kinds, strict=True)):
        if probabilities is not None and len(group) == 2:
            found.append(soft_pair_by_hand(group, alpha, probabilities[i], soft_labels))
        else:
            formula = ranking_by_hand if kind == "ranking" else best_of_n_by_hand
            found.append(formula(group, alpha))
    scores = groups if scores is None else scores
    log_weights = exponent * np.array([logsumexp(np.asarray(each, dtype=np.float64)) for each in scores])
    weights = np.exp(log_weights - logsumexp(log_weights) + math.log(len(groups)))
    losses = np.array([value for value, _ in found])
    return losses * weights, [w * slopes for w, (_, slopes) in zip(weights, found, strict=True)], weights


def flat(groups, dtype=torch.float64):
    return torch.tensor([value for group in groups for value in group], dtype=dtype)


def sizes_of(groups):
    return torch.tensor([len(group) for group in groups])


def value_and_gradient(groups, *, dtype=torch.float64, probabilities=None, **options):
    logps = flat(groups, dtype).requires_grad_(True)
    if probabilities is not None:
        options["probabilities"] = torch.tensor(probabilities, dtype=dtype)
    losses = preference_loss(logps, sizes_of(groups), **options)
    assert losses.dtype == dtype
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(gradient).all()
    return losses.detach().double().numpy(), gradient.double().numpy()


GROUPS = [[-3.0, -4.5], [-2.0, -1.0, -6.0], [-5.0, -4.0], [-1.0, -2.0, -3.0, -0.5]]
PROBABILITIES = [0.8, 1.0, 0.3, 1.0]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("exponent", [0.0, 0.5])
@pytest.mark.parametrize("labels", [None, "linear", "geometric"])
@pytest.mark.parametrize("kind", [*KINDS[1:], ["pairwise", "ranking", "best_of_n", "best_of_n"]], ids=str)
def test_losses_and_gradients_are_those_of_the_formulas(alpha, exponent, labels, kind):
    soft = {} if labels is None else {"probabilities": PROBABILITIES, "soft_labels": labels}
    losses, gradient = value_and_gradient(GROUPS, alpha=alpha, kind=kind, weight_exponent=exponent, **soft)
    kinds = [kind] * len(GROUPS) if isinstance(kind, str) else kind
    expected, slopes, _ = by_hand(GROUPS, alpha=alpha, kinds=kinds, exponent=exponent, **soft)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, np.concatenate(slopes), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_pairs_are_the_case_of_two_of_every_kind(alpha):
    pairs = [GROUPS[0], GROUPS[2]]
    one, other, last = (value_and_gradient(pairs, alpha=alpha, kind=kind)[0] for kind in KINDS)
    expected = [np.logaddexp(0, -alpha * (best - worst)) / alpha for best, worst in pairs]
    for losses in (one, other, last):
        np.testing.assert_allclose(losses, expected, rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("labels", ["linear", "geometric"])
def test_several_kinds_and_sizes_in_one_call_are_as_one_call_for_each(alpha, labels):
    generator = torch.Generator().manual_seed(4)
    plan = [(kind, size) for size in (2, 3, 5, 4) for kind in KINDS if size == 2 or kind != "pairwise"]
    kinds = [kind for kind, _ in plan]
    groups = [(-9 * torch.rand(size, generator=generator)).tolist() for _, size in plan]
    probabilities = [0.1 + 0.2 * i if size == 2 else 1.0 for i, (_, size) in enumerate(plan)]
    options = {"alpha": alpha, "soft_labels": labels}
    together = value_and_gradient(groups, kind=kinds, probabilities=probabilities, **options)
    alone = [
        value_and_gradient([group], kind=kind, probabilities=[p], **options)
        for group, kind, p in zip(groups, kinds, probabilities, strict=True)
    ]
    for values, parts in zip(together, zip(*alone, strict=True), strict=True):
        np.testing.assert_allclose(values, np.concatenate(parts), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", [*KINDS[1:], ["pairwise", "ranking", "best_of_n", "best_of_n"]], ids=str)
def test_groups_in_any_order_have_the_same_losses_and_gradients(kind):
    kinds = [kind] * len(GROUPS) if isinstance(kind, str) else kind
    soft = {"alpha": 0.7, "weight_exponent": 0.5, "soft_labels": "linear"}
    losses, gradient = value_and_gradient(GROUPS, kind=kinds, probabilities=PROBABILITIES, **soft)
    slopes = np.split(gradient, np.cumsum(sizes_of(GROUPS))[:-1])
    for order in itertools.permutations(range(len(GROUPS))):
        moved, moved_gradient = value_and_gradient(
            [GROUPS[i] for i in order],
            kind=[kinds[i] for i in order],
            probabilities=[PROBABILITIES[i] for i in order],
            **soft,
        )
        np.testing.assert_allclose(moved, losses[list(order)], rtol=1e-12)
        expected = np.concatenate([slopes[i] for i in order])
        np.testing.assert_allclose(moved_gradient, expected, rtol=1e-12, atol=1e-15)


def test_a_larger_group_beside_it_pads_a_group_without_changing_it():
    small = [[-3.0, -4.5], [-2.0, -1.0, -6.0]]
    wide = [*small, [-1.0] * 40]
    for kind in ("best_of_n", "ranking"):
        losses, gradient = value_and_gradient(small, alpha=0.7, kind=kind)
        padded, padded_gradient = value_and_gradient(wide, alpha=0.7, kind=kind)
        np.testing.assert_allclose(padded[:2], losses, rtol=1e-12)
        np.testing.assert_allclose(padded_gradient[:5], gradient, rtol=1e-12)


def test_the_order_of_the_losers_matters_to_a_ranking_alone():
    group = [-2.0, -1.0, -6.0, -3.0]
    for alpha, exponent in itertools.product((0.0, 0.5, 3.0), (0.0, 1.0)):
        options = {"alpha": alpha, "weight_exponent": exponent}
        for kind in ("best_of_n", "ranking"):
            losses = [
                float(value_and_gradient([[group[0], *losers]], kind=kind, **options)[0][0])
                for losers in itertools.permutations(group[1:])
            ]
            spread = max(losses) - min(losses)
            assert spread < 1e-12 if kind == "best_of_n" else spread > 0.1


def test_a_shift_of_all_log_probabilities_of_a_group_changes_nothing():
    shifted = [[value - 50 * i for value in group] for i, group in enumerate(GROUPS)]
    for kind in ("best_of_n", "ranking"):
        losses, gradient = value_and_gradient(GROUPS, alpha=0.5, kind=kind)
        moved, moved_gradient = value_and_gradient(shifted, alpha=0.5, kind=kind)
        np.testing.assert_allclose(moved, losses, rtol=1e-12)
        np.testing.assert_allclose(moved_gradient, gradient, rtol=1e-11)


def test_a_probability_of_one_is_a_hard_label_and_turning_pair_and_label_changes_nothing():
    pairs = [GROUPS[0], GROUPS[2]]
    hard = value_and_gradient(pairs, alpha=0.5)
    for soft_labels in ("linear", "geometric"):
        options = {"alpha": 0.5, "soft_labels": soft_labels}
        for found, wanted in zip(
            value_and_gradient(pairs, probabilities=[1.0, 1.0], **options), hard, strict=True
        ):
            np.testing.assert_allclose(found, wanted, rtol=1e-12)
        losses, gradient = value_and_gradient(pairs, probabilities=[0.8, 0.3], **options)
        turned = [group[::-1] for group in pairs]
        turned_losses, turned_gradient = value_and_gradient(turned, probabilities=[0.2, 0.7], **options)
        np.testing.assert_allclose(turned_losses, losses, rtol=1e-12)
        np.testing.assert_allclose(turned_gradient.reshape(2, 2)[:, ::-1].ravel(), gradient, rtol=1e-12)


@pytest.mark.parametrize("exponent", [0.0, 0.4])
@pytest.mark.parametrize("kind", [*KINDS[1:], ["pairwise", "ranking", "best_of_n", "best_of_n"]], ids=str)
def test_alpha_zero_is_the_limit_of_small_alpha_up_to_a_constant(exponent, kind):
    kinds = [kind] * len(GROUPS) if isinstance(kind, str) else kind
    constants = np.array(  # log n of each best-of-n within a group
        [
            sum(math.log(n) for n in range(2, len(group) + 1)) if one == "ranking" else math.log(len(group))
            for group, one in zip(GROUPS, kinds, strict=True)
        ]
    )
    weights = by_hand(GROUPS, alpha=1.0, kinds=kinds, exponent=exponent)[2]
    limit, limit_gradient = value_and_gradient(GROUPS, alpha=0.0, kind=kind, weight_exponent=exponent)
    for alpha in (1e-3, 1e-5):
        losses, gradient = value_and_gradient(GROUPS, alpha=alpha, kind=kind, weight_exponent=exponent)
        np.testing.assert_allclose(losses - weights * constants / alpha, limit, rtol=0, atol=20 * alpha)
        np.testing.assert_allclose(gradient, limit_gradient, rtol=0, atol=10 * alpha)


def test_gradient_scale_does_not_depend_on_alpha_where_the_margin_is_nothing():
    for alpha in (0.0, 0.01, 1.0, 100.0):
        _, gradient = value_and_gradient([[-7.0, -7.0]], dtype=torch.float32, alpha=alpha)
        assert gradient.tolist() == pytest.approx([-0.5, 0.5])


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
    logps, sizes = flat(GROUPS), sizes_of(GROUPS)
    options = {"alpha": 1.0, "kind": "ranking", "weight_exponent": 0.5}
    whole = preference_loss(logps, sizes, **options)
    log_mean = log_group_weights(logps, sizes, weight_exponent=0.5).logsumexp(0) - math.log(len(sizes))
    parts = [
        preference_loss(logps[tokens], sizes[rows], log_mean_weight=log_mean, **options)
        for tokens, rows in ((slice(0, 2), slice(0, 1)), (slice(2, None), slice(1, None)))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_weight_scores_stand_in_for_log_probabilities_and_carry_no_gradient(exponent):
    lengths = torch.tensor([3.0, 4.0, 1.0, 2.0, 5.0, 2.0, 2.0, 4.0, 8.0, 1.0, 3.0], dtype=torch.float64)
    logps = flat(GROUPS).requires_grad_(True)
    scores = logps / lengths
    losses = preference_loss(
        logps, sizes_of(GROUPS), alpha=1.0, kind="ranking", weight_exponent=exponent, weight_scores=scores
    )
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    by_group = [part.detach().numpy() for part in scores.split(sizes_of(GROUPS).tolist())]
    expected, slopes, _ = by_hand(
        GROUPS, alpha=1.0, kinds=["ranking"] * 4, exponent=exponent, scores=by_group
    )
    np.testing.assert_allclose(losses.detach(), expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, np.concatenate(slopes), rtol=1e-12)


# Log-probabilities for fp32: multiples of 1/64, whose differences fp32 holds exactly, so that an error found
# is one of the formulas. Near to nothing, as far as 1e5 nats down, close to each other and far apart.
NEAR = [[0.0, -0.015625], [-2.5, -40.25, -3.0], [-1.0, -1.0, -1.0, -1.0], [-700.5, -690.25]]
DEEP = [[-1e5, -1e5 + 2.5], [-99990.5, -1e5, -99991.0], [-1e5, -1e5], [-1e5, -99995.0, -99998.5, -99990.25]]
APART = [[-1e5, -3.0], [0.0, -1e5], [-9e4, 0.0, -1e5], [-1e5, -9e4, -5.5, -8e4], [-400.0, -1.0, -1.0]]
EXTREMES = {"near": NEAR, "deep": DEEP, "far apart": APART}


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 0.1, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", [None, "linear", "geometric"])
@pytest.mark.parametrize("groups", EXTREMES.values(), ids=EXTREMES)
def test_extreme_log_probabilities_have_the_losses_and_gradients_of_float64(alpha, kind, labels, groups):
    if kind == "pairwise":
        groups = [group for group in groups if len(group) == 2]
    probabilities = [[0.4375, 0.9375][i % 2] if len(group) == 2 else 1.0 for i, group in enumerate(groups)]
    options = {} if labels is None else {"probabilities": probabilities, "soft_labels": labels}
    for exponent in (0.0, 0.5, 1.0):
        losses, gradient = value_and_gradient(
            groups, dtype=torch.float32, alpha=alpha, kind=kind, weight_exponent=exponent, **options
        )
        expected, slopes, weights = by_hand(
            groups, alpha=alpha, kinds=[kind] * len(groups), exponent=exponent, **options
        )
        # a weight is the exponential of a number as large as this, which fp32 rounds
        deepest = exponent * max(abs(value) for group in groups for value in group)
        relative = 1e-5 + 4 * EPSILON * deepest
        # and a sum of exponentials near 1 is known to a rounding error of 1
        absolute = 8 * EPSILON * weights / (alpha or 1)
        assert (abs(losses - expected) <= relative * abs(expected) + absolute + 1e-30).all()
        for found, wanted, weight in zip(
            np.split(gradient, np.cumsum(sizes_of(groups))[:-1]), slopes, weights, strict=True
        ):
            np.testing.assert_allclose(found, wanted, rtol=relative, atol=16 * EPSILON * weight + 1e-30)


def test_hundreds_of_random_groups_in_fp32_agree_with_float64():
    generator = torch.Generator().manual_seed(5)
    sizes = torch.randint(2, 7, (300,), generator=generator).tolist()
    groups = [(torch.randint(-64 * 600, 0, (size,), generator=generator) / 64).tolist() for size in sizes]
    kinds = ["ranking" if i % 2 else "best_of_n" for i in range(len(sizes))]
    for alpha in (1e-3, 0.05, 1.0, 1e3):
        losses, gradient = value_and_gradient(groups, dtype=torch.float32, alpha=alpha, kind=kinds)
        expected, slopes, _ = by_hand(groups, alpha=alpha, kinds=kinds)
        np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=16 * EPSILON / alpha)
        np.testing.assert_allclose(gradient, np.concatenate(slopes), rtol=1e-5, atol=32 * EPSILON)


def test_ordered_pairs_are_all_that_a_ranking_decides_and_the_best_against_each_other_otherwise():
    places, groups = ordered_pairs(
        torch.tensor([2, 3, 3, 4]), ["pairwise", "ranking", "best_of_n", "ranking"]
    )
    assert places.view(-1, 2).tolist() == [
        *([0, 1],),
        *([2, 3], [2, 4], [3, 4]),
        *([5, 6], [5, 7]),
        *([8, 9], [8, 10], [8, 11], [9, 10], [9, 11], [10, 11]),
    ]
    assert groups.tolist() == [0] + [1] * 3 + [2] * 2 + [3] * 6
    for kind in KINDS:
        places, groups = ordered_pairs(torch.tensor([2, 2]), kind)
        assert places.tolist() == [0, 1, 2, 3]
        assert groups.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, "alpha must be at least 0"),
        ({"alpha": 1.0, "group_sizes": torch.tensor([2, 2])}, "sum to 5"),
        ({"alpha": 1.0, "group_sizes": torch.tensor([4, 1])}, "at least 2"),
        ({"alpha": 1.0}, "exactly two"),
        ({"alpha": 1.0, "kind": ["ranking", "pairwise"]}, "exactly two"),
        ({"alpha": 1.0, "kind": "best_of_m"}, "best_of_n"),
        ({"alpha": 1.0, "kind": ["pairwise", "best_of_m"]}, "best_of_n"),
        ({"alpha": 1.0, "kind": ["ranking"]}, "one for each of 2 groups"),
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
