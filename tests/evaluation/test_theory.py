"""Theory by importance sampling agrees with theory by enumeration, and says where it cannot be trusted."""

import numpy as np
import pytest
from softpref.evaluation.exact import Objective, exact_prompt
from softpref.evaluation.theory import TRUSTED, reward_frontier, sampled_figures, sampled_prompt
from softpref.judges.outcomes import Outcomes

pytestmark = pytest.mark.fast

OUTPUTS, SAMPLES = 30, 600


@pytest.fixture(scope="module")
def world():
    """A reference over few outputs, and samples of it in proportion: each output as often as it is due."""
    random = np.random.default_rng(3)
    counts = random.multinomial(SAMPLES, random.dirichlet(np.ones(OUTPUTS))).clip(1)
    reference = np.log(counts / counts.sum())
    rewards = random.normal(size=OUTPUTS)
    return rewards, reference, np.repeat(np.arange(OUTPUTS), counts)


def twice(logps):
    """Of a policy that is the reference."""
    return logps, logps


def test_the_distance_from_the_optimum_is_estimated_from_samples_of_the_reference():
    """Normal rewards and a policy tilted by part of them: KL between the tilts is (1 − 0.4)² s² / 2."""
    random = np.random.default_rng(2)
    estimates = []
    for _ in range(40):
        rewards, reference = random.normal(scale=0.7, size=192), random.normal(-40.0, 8.0, size=192)
        policy = reference + 0.4 * rewards - 0.5 * 0.4**2 * 0.7**2  # normalised over all outputs
        found = sampled_prompt(
            rewards,
            reference,
            policy,
            Objective("spo", alpha=1.0, anchor=1.0),
            policy_reward=0.0,
            policy_kl=0.0,
        )
        estimates.append(sampled_figures([found])["kl_optimum_to_policy"].value)
    assert min(estimates) > 0
    assert np.mean(estimates) == pytest.approx(0.6**2 * 0.7**2 / 2, rel=0.05)


@pytest.mark.parametrize(
    "objective",
    [
        Objective("spo", alpha=1.0, anchor=1.0),
        Objective("spo", alpha=0.5, anchor=1.0, beta=0.1),
        Objective("spo", alpha=1.0, anchor=0.5, beta=0.2),
        Objective("spo", alpha=2.0, anchor=0.0, beta=0.05),
        Objective("dpo", beta=1.0),
        Objective("dpo", beta=0.5, kl_beta=0.1),
    ],
    ids=lambda objective: (
        f"{objective.method} α={objective.alpha:g} a={objective.anchor:g} β={objective.beta:g}"
    ),
)
def test_samples_tell_the_optimum_that_enumeration_tells(world, objective):
    rewards, reference, drawn = world
    # pairs as samples of the reference make them: two samples, equal outputs among them
    weights = np.exp(reference)
    exact = exact_prompt(Outcomes([""] * OUTPUTS, rewards, weights), reference, reference, objective)
    policy = reference + 0.3 * np.random.default_rng(8).normal(size=OUTPUTS)
    policy -= np.logaddexp.reduce(policy)
    logps = reference[drawn], policy[drawn]
    found = sampled_prompt(rewards[drawn], *logps, objective, policy_reward=0.0, policy_kl=0.0)
    figures = {name: figure.value for name, figure in sampled_figures([found]).items()}
    optimum = np.exp(exact.optimum)
    # pairs of samples name an output as often as samples of it, pairs of outcomes are of distinct ones
    close = 1e-6 if objective.beta == 0 or (objective.method == "dpo" and not objective.kl_beta) else 2e-2
    assert figures["optimum_expected_reward"] == pytest.approx(optimum @ rewards, abs=close)
    assert figures["optimum_kl"] == pytest.approx(optimum @ (exact.optimum - reference), abs=close)
    assert figures["optimum_entropy"] == pytest.approx(-optimum @ exact.optimum, abs=close)
    assert figures["kl_optimum_to_policy"] == pytest.approx(optimum @ (exact.optimum - policy), abs=close)


def test_an_optimum_far_from_the_reference_is_not_trusted():
    random = np.random.default_rng(0)
    rewards, logps = random.normal(size=1000), random.normal(-40.0, 8.0, size=1000)
    for objective, trusted in (
        (Objective("spo", alpha=1.0, anchor=1.0), True),
        (Objective("spo", alpha=0.2, anchor=1.0), False),
        (Objective("spo", alpha=1.0, anchor=0.0), False),  # every text counts alike, however unlikely
    ):
        found = sampled_prompt(rewards, logps, logps, objective, policy_reward=0.0, policy_kl=0.0)
        share = sampled_figures([found])["effective_sample_size"].value
        assert (share >= TRUSTED) is trusted


def test_effective_share_of_normal_rewards_is_the_known_one():
    """For a normal reward of spread s, weights exp(r/α) leave exp(−(s/α)²) of the samples."""
    rewards = np.random.default_rng(1).normal(scale=0.8, size=200_000)
    objective = Objective("spo", alpha=1.0, anchor=1.0)
    none = np.zeros_like(rewards)
    found = sampled_prompt(rewards, none, none, objective, policy_reward=0.0, policy_kl=0.0)
    figures = {name: figure.value for name, figure in sampled_figures([found]).items()}
    assert figures["effective_sample_size"] == pytest.approx(np.exp(-0.64), rel=0.03)
    assert figures["optimum_expected_reward"] == pytest.approx(0.64, rel=0.03)
    assert figures["optimum_kl"] == pytest.approx(0.32, rel=0.03)


def test_no_policy_gains_more_than_the_frontier(world):
    rewards, reference, drawn = world
    prompt = sampled_prompt(
        rewards[drawn],
        *twice(reference[drawn]),
        Objective("spo", alpha=1.0),
        policy_reward=0.0,
        policy_kl=0.0,
    )
    points = np.array(reward_frontier([prompt]))
    assert points[0] == pytest.approx([0.0, rewards[drawn].mean()], abs=1e-9)
    assert (np.diff(points, axis=0) > 0).all()
    random = np.random.default_rng(5)
    for _ in range(50):  # any other policy
        policy = reference + rewards * random.uniform(0, 1) + random.normal(scale=0.3, size=OUTPUTS)
        policy -= np.log(np.exp(policy).sum())
        kl, reward = np.exp(policy) @ (policy - reference), np.exp(policy) @ rewards
        if kl <= points[-1, 0]:
            assert reward <= np.interp(kl, *points.T) + 1e-2


def test_an_unknown_optimum_has_no_figures(world):
    rewards, reference, drawn = world
    prompt = sampled_prompt(
        rewards[drawn],
        *twice(reference[drawn]),
        Objective("slic", beta=1.0),
        policy_reward=0.4,
        policy_kl=0.2,
    )
    figures = sampled_figures([prompt])
    assert figures["optimum_kl"].value is None
    assert figures["kl_optimum_to_policy"].value is None
    assert figures["effective_sample_size"].value is None
    assert figures["expected_reward"].value == 0.4


@pytest.mark.parametrize("method", ["spo", "dpo"])
def test_samples_tell_the_optimum_after_several_rounds(world, method):
    rewards, reference, drawn = world
    second = np.random.default_rng(4).normal(size=OUTPUTS)
    first = Objective(method, alpha=0.8, beta=0.8, anchor=1.0, kl_on="none", dimension="warm")
    last = Objective(method, alpha=1.5, beta=1.5, anchor=1.0, kl_on="none", dimension="short")
    objective = last._replace(weights=(0.6,), earlier=(first,))
    dimensions = {"warm": rewards, "short": second}
    found = sampled_prompt(
        (rewards + second)[drawn],
        *twice(reference[drawn]),
        objective,
        dimensions={name: values[drawn] for name, values in dimensions.items()},
        policy_reward=0.0,
        policy_kl=0.0,
    )
    logits = reference + (1 / 0.8 + 0.6 / 1.5) * rewards + second / 1.5
    expected = np.exp(logits - np.logaddexp.reduce(logits))
    figures = sampled_figures([found])
    for name, values in dimensions.items():
        assert figures[f"optimum_expected_reward/{name}"].value == pytest.approx(expected @ values)
    assert figures["optimum_kl"].value == pytest.approx(expected @ (np.log(expected) - reference))
