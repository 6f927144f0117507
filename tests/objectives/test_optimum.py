"""The exact optimum against theory, against other solvers, and against an objective written a second time."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from softpref.objectives import exact_optimum, ipo_loss, ipo_optimum, preference_loss

pytestmark = pytest.mark.fast

COUNT = 12
GENERATOR = torch.Generator().manual_seed(7)
REWARDS = torch.randn(COUNT, generator=GENERATOR, dtype=torch.float64) * 1.5
REFERENCE = torch.randn(COUNT, generator=GENERATOR, dtype=torch.float64).log_softmax(0)
SMALL = REWARDS[:6]
SMALL_REFERENCE = REFERENCE[:6].log_softmax(0)
TRIPLES = torch.tensor(list(itertools.combinations(range(6), 3)))
PAIRS = torch.rand(COUNT, COUNT, generator=GENERATOR, dtype=torch.float64)


def objective(logits, rewards, ref_logps, *, alpha, beta, pairs=None):
    """L_pref + β KL over all ordered pairs; outcomes behind the rewards' end are mentioned by no pair."""
    logps = logits.log_softmax(0)
    count = len(rewards)
    frequencies = torch.ones(count, count, dtype=torch.float64) if pairs is None else pairs.clone()
    frequencies.fill_diagonal_(0)
    p = torch.sigmoid(rewards[:, None] - rewards)
    margins = alpha * (logps[:count, None] - logps[:count])
    losses = -(p * margins.sigmoid().log() + (1 - p) * (-margins).sigmoid().log()) / alpha
    preference = (frequencies * losses).sum() / frequencies.sum()
    return preference + beta * (logps.exp() * (logps - ref_logps)).sum()


def group_objective(logits, rewards, ref_logps, *, alpha, beta, groups, kind):
    """L_pref + β KL, the loss of every order of every group times the chance that experts give it."""
    logps = logits.log_softmax(0)
    size = groups.shape[1]
    orders = torch.cat([groups[:, list(order)] for order in itertools.permutations(range(size))])
    strengths = rewards[orders]
    chances = sum(strengths[:, k] - strengths[:, k:].logsumexp(1) for k in range(size - 1)).exp()
    losses = preference_loss(
        logps[orders.flatten()], torch.full((len(orders),), size), alpha=alpha, kind=kind
    )
    return (chances * losses).sum() / len(groups) + beta * (logps.exp() * (logps - ref_logps)).sum()


def minimise(function, count):
    """Log-probabilities at which `function(logits)` is least, found by scipy."""

    def value_and_gradient(x):
        logits = torch.tensor(x, requires_grad=True)
        value = function(logits)
        value.backward()
        return value.item(), logits.grad.numpy()

    result = minimize(value_and_gradient, np.zeros(count), jac=True, method="BFGS", options={"gtol": 1e-9})
    return torch.tensor(result.x).log_softmax(0)


def solve_with_scipy(rewards, ref_logps, **options):
    return minimise(lambda logits: objective(logits, rewards, ref_logps, **options), len(ref_logps))


@pytest.mark.parametrize("alpha", [0.1, 1.0, 5.0])
def test_without_regulariser_it_is_softmax_of_reward_over_alpha(alpha):
    optimum = exact_optimum(REWARDS, REFERENCE, alpha=alpha, pair_probabilities=PAIRS)
    torch.testing.assert_close(optimum, (REWARDS / alpha).log_softmax(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("asked", ["pairs", "best_of_n", "ranking"])
def test_with_a_base_measure_it_minimises_the_loss_of_scores_above_it(alpha, beta, asked):
    base = torch.tensor([-9.0, 0.5, -2.0, -4.0, 1.0, -0.3], dtype=torch.float64)
    groups = {} if asked == "pairs" else {"groups": TRIPLES, "kind": asked}
    options = {"alpha": alpha, "beta": beta, **groups}
    optimum = exact_optimum(SMALL, SMALL_REFERENCE, base_logps=base, **options)
    if beta == 0:
        torch.testing.assert_close(optimum, (base + SMALL / alpha).log_softmax(0), rtol=1e-12, atol=1e-12)
        return
    loss = objective if asked == "pairs" else group_objective

    def above(logits):  # the same objective, of logits less the base, whose KL is that of the logits
        logps = logits.log_softmax(0)
        divergence = (logps.exp() * (logps - SMALL_REFERENCE)).sum()
        return loss(logits - base, SMALL, SMALL_REFERENCE, **{**options, "beta": 0.0}) + beta * divergence

    torch.testing.assert_close(optimum, minimise(above, 6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 2.0, 50.0])
@pytest.mark.parametrize("beta", [0.02, 0.5])
@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["even pairs", "uneven pairs"])
def test_with_regulariser_the_gradient_vanishes_and_no_neighbour_is_better(alpha, beta, pairs):
    optimum = exact_optimum(REWARDS, REFERENCE, alpha=alpha, beta=beta, pair_probabilities=pairs)
    assert float(optimum.exp().sum()) == pytest.approx(1, rel=1e-12)
    logits = optimum.clone().requires_grad_(True)
    value = objective(logits, REWARDS, REFERENCE, alpha=alpha, beta=beta, pairs=pairs)
    value.backward()
    assert float(logits.grad.abs().max()) < 1e-7 * max(1.0, alpha)  # curvature grows with α
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1e-1, 1.0):
        for _ in range(2):
            moved = optimum + scale * torch.randn(COUNT, generator=generator, dtype=torch.float64)
            assert float(objective(moved, REWARDS, REFERENCE, alpha=alpha, beta=beta, pairs=pairs)) > value


def test_another_solver_finds_the_same():
    optimum = exact_optimum(REWARDS, REFERENCE, alpha=0.7, beta=0.1, pair_probabilities=PAIRS)
    other = solve_with_scipy(REWARDS, REFERENCE, alpha=0.7, beta=0.1, pairs=PAIRS)
    torch.testing.assert_close(optimum, other, rtol=0, atol=1e-5)


def test_reference_mass_outside_the_set_is_one_more_outcome_that_no_pair_mentions():
    inside = REFERENCE + np.log(0.6)
    optimum = exact_optimum(REWARDS, inside, alpha=0.7, beta=0.2)
    with_rest = torch.cat([inside, torch.tensor([np.log(0.4)])])
    other = solve_with_scipy(REWARDS, with_rest, alpha=0.7, beta=0.2)
    torch.testing.assert_close(optimum, other[:-1].log_softmax(0), rtol=0, atol=1e-5)
    # and it does matter: the same set under a reference without a rest has another optimum
    without_rest = exact_optimum(REWARDS, REFERENCE, alpha=0.7, beta=0.2)
    assert float((optimum - without_rest).abs().max()) > 1e-3


def test_the_scale_of_pair_probabilities_and_their_diagonal_do_not_matter():
    one = exact_optimum(REWARDS, REFERENCE, alpha=0.5, beta=0.1, pair_probabilities=PAIRS)
    scaled = PAIRS * 1234
    scaled.fill_diagonal_(1e6)
    other = exact_optimum(REWARDS, REFERENCE, alpha=0.5, beta=0.1, pair_probabilities=scaled)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_pairs_asked_in_either_order_count_as_one():
    turned = exact_optimum(REWARDS, REFERENCE, alpha=0.5, beta=0.1, pair_probabilities=PAIRS.T)
    one = exact_optimum(REWARDS, REFERENCE, alpha=0.5, beta=0.1, pair_probabilities=PAIRS)
    torch.testing.assert_close(one, turned, rtol=0, atol=1e-6)


def test_a_strong_regulariser_leads_to_the_reference_and_a_weak_one_to_the_experts():
    strong = exact_optimum(REWARDS, REFERENCE, alpha=1.0, beta=1e4)
    weak = exact_optimum(REWARDS, REFERENCE, alpha=1.0, beta=1e-6)
    torch.testing.assert_close(strong, REFERENCE, rtol=0, atol=1e-3)
    torch.testing.assert_close(weak, REWARDS.log_softmax(0), rtol=0, atol=1e-3)


def test_entropy_rises_with_softness():
    entropies = []
    for alpha in (0.1, 0.5, 1.0, 2.0, 5.0):
        optimum = exact_optimum(REWARDS, REFERENCE, alpha=alpha, beta=0.01)
        entropies.append(float(-(optimum.exp() * optimum).sum()))
    assert entropies == sorted(entropies)


def test_a_thousand_outcomes_are_solved_to_the_same_accuracy():
    generator = torch.Generator().manual_seed(2)
    rewards = torch.randn(1000, generator=generator, dtype=torch.float64)
    reference = torch.randn(1000, generator=generator, dtype=torch.float64).log_softmax(0) + np.log(0.99)
    optimum = exact_optimum(rewards, reference, alpha=1.0, beta=0.05)
    # stationarity given the set: the rest outcome moves no difference of gradients within it
    pi = optimum.exp()
    scaled = optimum[:, None] - optimum
    wins = torch.sigmoid(rewards[:, None] - rewards)
    preference = 2 * (scaled.sigmoid() - wins).sum(1) / (1000 * 999)
    # d/dz_i of β KL is β m π_i (log π_i/ref_i + log m − KL) with m the mass on the set, two unknown scalars
    ratio = optimum - reference
    left, right = preference / pi, torch.stack([ratio, torch.ones_like(ratio)], 1)
    solution = torch.linalg.lstsq(right * pi[:, None], (left * pi)[:, None]).solution
    residual = (left * pi) - (right * pi[:, None]) @ solution[:, 0]
    assert float(residual.abs().max()) < 1e-8
    assert 0.9 * 0.05 < -float(solution[0]) <= 0.05


FOURS = torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5], [5, 1, 0, 4], [5, 1, 0, 4], [3, 0, 2, 5]])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("kind", ["best_of_n", "ranking"])
@pytest.mark.parametrize("groups", [TRIPLES, FOURS], ids=["triples", "some fours, one twice"])
def test_of_groups_it_minimises_the_preference_loss_over_every_order(alpha, kind, groups):
    options = {"alpha": alpha, "beta": 0.1, "groups": groups, "kind": kind}
    optimum = exact_optimum(SMALL, SMALL_REFERENCE, **options)
    assert float(optimum.exp().sum()) == pytest.approx(1, rel=1e-12)
    other = minimise(lambda logits: group_objective(logits, SMALL, SMALL_REFERENCE, **options), 6)
    torch.testing.assert_close(optimum, other, rtol=0, atol=1e-5)
    logits = optimum.clone().requires_grad_(True)
    group_objective(logits, SMALL, SMALL_REFERENCE, **options).backward()
    assert float(logits.grad.abs().max()) < 1e-6
    # the regulariser does move it, away from where both would be without
    assert float((optimum - (SMALL / alpha).log_softmax(0)).abs().max()) > 0.01


@pytest.mark.parametrize("kind", ["pairwise", "best_of_n", "ranking"])
def test_groups_of_two_are_pairs(kind):
    pairs = torch.tensor([[0, 1], [1, 2], [4, 2], [3, 5], [5, 0], [0, 1]])
    frequencies = torch.zeros(6, 6, dtype=torch.float64)
    for i, j in pairs.tolist():
        frequencies[i, j] += 1
    options = {"alpha": 0.5, "beta": 0.1}
    of_groups = exact_optimum(SMALL, SMALL_REFERENCE, groups=pairs, kind=kind, **options)
    of_pairs = exact_optimum(SMALL, SMALL_REFERENCE, pair_probabilities=frequencies, **options)
    torch.testing.assert_close(of_groups, of_pairs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("kind", ["best_of_n", "ranking"])
def test_of_groups_it_tends_to_softmax_of_reward_over_alpha_as_the_regulariser_fades(alpha, kind):
    target = (SMALL / alpha).log_softmax(0)
    apart = [
        float(
            (exact_optimum(SMALL, SMALL_REFERENCE, alpha=alpha, beta=beta, groups=FOURS, kind=kind) - target)
            .abs()
            .max()
        )
        for beta in (0.1, 1e-3, 1e-5, 0.0)
    ]
    assert apart == sorted(apart, reverse=True)
    assert apart[2] < 1e-3
    assert apart[3] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", ["best_of_n", "ranking"])
def test_reference_mass_outside_the_set_is_one_more_outcome_that_no_group_mentions(kind):
    inside = SMALL_REFERENCE + np.log(0.6)
    options = {"alpha": 0.7, "beta": 0.2, "groups": TRIPLES, "kind": kind}
    optimum = exact_optimum(SMALL, inside, **options)
    with_rest = torch.cat([inside, torch.tensor([np.log(0.4)])])
    other = minimise(lambda logits: group_objective(logits, SMALL, with_rest, **options), 7)
    torch.testing.assert_close(optimum, other[:-1].log_softmax(0), rtol=0, atol=1e-5)
    without_rest = exact_optimum(SMALL, SMALL_REFERENCE, **options)
    assert float((optimum - without_rest).abs().max()) > 1e-3


def test_a_ranking_tells_more_than_its_best_and_the_order_of_places_tells_nothing():
    options = {"alpha": 0.7, "beta": 0.2}
    found = {
        kind: exact_optimum(SMALL, SMALL_REFERENCE, groups=FOURS, kind=kind, **options)
        for kind in ("best_of_n", "ranking")
    }
    assert float((found["best_of_n"] - found["ranking"]).abs().max()) > 1e-2
    for kind, optimum in found.items():
        turned = exact_optimum(SMALL, SMALL_REFERENCE, groups=FOURS.flip(1), kind=kind, **options)
        torch.testing.assert_close(turned, optimum, rtol=0, atol=1e-6)


def expected_ipo_loss(logits, rewards, ref_logps, *, beta, pairs=None):
    """Over all ordered pairs, with the probability that the first wins as its label."""
    logps = logits.log_softmax(0)
    places = torch.tensor(list(itertools.permutations(range(len(rewards)), 2)))
    losses = ipo_loss(
        logps[places.flatten()],
        ref_logps[places.flatten()],
        beta=beta,
        probabilities=torch.sigmoid(rewards[places[:, 0]] - rewards[places[:, 1]]),
    )
    weights = torch.ones_like(losses) if pairs is None else pairs[places[:, 0], places[:, 1]]
    return (weights * losses).sum() / weights.sum()


@pytest.mark.parametrize("beta", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["even pairs", "uneven pairs"])
def test_ipo_optimum_minimises_the_ipo_loss(beta, pairs):
    optimum = ipo_optimum(REWARDS, REFERENCE, beta=beta, pair_probabilities=pairs)
    assert float(optimum.exp().sum()) == pytest.approx(1, rel=1e-12)
    other = minimise(
        lambda logits: beta * expected_ipo_loss(logits, REWARDS, REFERENCE, beta=beta, pairs=pairs), COUNT
    )
    torch.testing.assert_close(optimum, other, rtol=0, atol=1e-5)
    logits = optimum.clone().requires_grad_(True)
    expected_ipo_loss(logits, REWARDS, REFERENCE, beta=beta, pairs=pairs).backward()
    assert float(logits.grad.abs().max()) < 1e-10


def test_ipo_optimum_depends_on_which_pairs_are_asked_and_is_not_softmax_of_reward():
    even = ipo_optimum(REWARDS, REFERENCE, beta=0.3)
    uneven = ipo_optimum(REWARDS, REFERENCE, beta=0.3, pair_probabilities=PAIRS)
    assert float((even - uneven).abs().max()) > 1e-3
    assert float((even - (REFERENCE + REWARDS / 0.3).log_softmax(0)).abs().max()) > 0.1


def test_ipo_optimum_of_two_outputs_has_the_margin_of_its_equation():
    rewards, reference = torch.tensor([1.2, -0.3]), torch.tensor([0.4, 0.6]).log()
    optimum = ipo_optimum(rewards, reference, beta=0.5)
    margin = float(optimum[0] - optimum[1] - (reference[0] - reference[1]))
    assert margin == pytest.approx((2 / (1 + np.exp(-1.5)) - 1) / (2 * 0.5), rel=1e-6)


def test_ipo_optimum_given_the_set_does_not_depend_on_the_reference_mass_outside():
    inside = ipo_optimum(REWARDS, REFERENCE + np.log(0.3), beta=0.2)
    torch.testing.assert_close(inside, ipo_optimum(REWARDS, REFERENCE, beta=0.2), rtol=0, atol=1e-9)


def test_a_strong_ipo_regulariser_leads_to_the_reference():
    torch.testing.assert_close(ipo_optimum(REWARDS, REFERENCE, beta=1e5), REFERENCE, rtol=0, atol=1e-4)


def test_a_set_of_one_is_certain():
    assert exact_optimum(torch.tensor([0.3]), torch.tensor([-1.0]), alpha=1.0, beta=0.1).tolist() == [0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "exact_optimum needs"),
        ({"beta": -0.1}, "exact_optimum needs"),
        ({"ref_logps": torch.zeros(3)}, "exact_optimum needs"),
        ({"pair_probabilities": torch.ones(3, 3)}, "pair_probabilities must be"),
        ({"kind": "ranking"}, "needs groups"),
        ({"groups": TRIPLES}, r"must be \[M, 2\]"),
        ({"groups": TRIPLES[0], "kind": "ranking"}, "n at least 2"),
        ({"groups": TRIPLES[:, :1], "kind": "ranking"}, "n at least 2"),
        ({"groups": TRIPLES, "kind": "ranking", "pair_probabilities": PAIRS}, "not both"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        exact_optimum(**{"rewards": REWARDS, "ref_logps": REFERENCE, "alpha": 1.0, "beta": 0.1, **options})


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"ref_logps": torch.zeros(3)}])
def test_ipo_optimum_refuses_what_does_not_fit(options):
    with pytest.raises(ValueError, match="ipo_optimum needs"):
        ipo_optimum(**{"rewards": REWARDS, "ref_logps": REFERENCE, "beta": 0.1, **options})
