"""The exact optimum against theory, against other solvers, and against an objective written a second time."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from softpref.objectives import exact_optimum

COUNT = 12
GENERATOR = torch.Generator().manual_seed(7)
REWARDS = torch.randn(COUNT, generator=GENERATOR, dtype=torch.float64) * 1.5
REFERENCE = torch.randn(COUNT, generator=GENERATOR, dtype=torch.float64).log_softmax(0)
PAIRS = torch.rand(COUNT, COUNT, generator=GENERATOR, dtype=torch.float64)


def objective(logits, rewards, ref_logps, *, alpha, beta, pairs=None):
    """L_pref + β KL, pair by pair; outcomes behind the rewards' end are mentioned by no pair."""
    logps = logits.log_softmax(0)
    preference, total = 0.0, 0.0
    for i in range(len(rewards)):
        for j in range(len(rewards)):
            if i != j:
                frequency = 1.0 if pairs is None else float(pairs[i, j])
                p = torch.sigmoid(rewards[i] - rewards[j])
                margin = alpha * (logps[i] - logps[j])
                loss = -(p * margin.sigmoid().log() + (1 - p) * (-margin).sigmoid().log()) / alpha
                preference, total = preference + frequency * loss, total + frequency
    return preference / total + beta * (logps.exp() * (logps - ref_logps)).sum()


def solve_with_scipy(rewards, ref_logps, **options):
    def value_and_gradient(x):
        logits = torch.tensor(x, requires_grad=True)
        value = objective(logits, rewards, ref_logps, **options)
        value.backward()
        return value.item(), logits.grad.numpy()

    result = minimize(
        value_and_gradient, np.zeros(len(ref_logps)), jac=True, method="BFGS", options={"gtol": 1e-10}
    )
    return torch.tensor(result.x).log_softmax(0)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 5.0])
def test_without_regulariser_it_is_softmax_of_reward_over_alpha(alpha):
    optimum = exact_optimum(REWARDS, REFERENCE, alpha=alpha, pair_probabilities=PAIRS)
    torch.testing.assert_close(optimum, (REWARDS / alpha).log_softmax(0), rtol=1e-12, atol=1e-12)


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


def test_a_set_of_one_is_certain():
    assert exact_optimum(torch.tensor([0.3]), torch.tensor([-1.0]), alpha=1.0, beta=0.1).tolist() == [0.0]


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.0},
        {"alpha": 1.0, "beta": -0.1},
        {"alpha": 1.0, "ref_logps": torch.zeros(3)},
        {"alpha": 1.0, "beta": 0.1, "pair_probabilities": torch.ones(3, 3)},
    ],
)
def test_what_does_not_fit_is_refused(options):
    with pytest.raises(ValueError, match=r"exact_optimum needs|pair_probabilities must"):
        exact_optimum(**{"rewards": REWARDS, "ref_logps": REFERENCE, **options})
