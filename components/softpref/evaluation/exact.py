"""Exact figures where every completion can be enumerated: the policy against what theory promises.

Works on log-probabilities; runs no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from softpref.evaluation.intervals import DEFAULT_BOOTSTRAP, Bootstrap, Figure, interval
from softpref.judges import Outcomes


class ExactPrompt(NamedTuple):
    """One prompt's set of `N` completions, log-probabilities in nats given the set.

    Attributes:
        rewards: `[N]`, the expert's.
        policy, reference, optimum: `[N]` each, normalised over the set.
        policy_mass: probability that the policy puts on the set.
    """

    rewards: np.ndarray
    policy: np.ndarray
    reference: np.ndarray
    optimum: np.ndarray
    policy_mass: float


def has_optimum(method: str, alpha: float, beta: float) -> bool:
    """Whether the optimum is known: `spo` with α > 0, `dpo` with β > 0."""
    return (method == "spo" and alpha > 0) or (method == "dpo" and beta > 0)


def exact_prompt(
    outcomes: Outcomes,
    policy_logps: np.ndarray,
    reference_logps: np.ndarray,
    *,
    method: str,
    alpha: float,
    beta: float,
) -> ExactPrompt:
    """Set one prompt's policy beside the optimum of the objective it was trained on.

    For `spo` that is the minimiser of L_pref^α + β·KL under the pair distribution of the data (two distinct
    draws by weight); for `dpo` it is softmax(log π_ref + r/β), which holds under Bradley-Terry. Where the
    optimum is not known (`has_optimum`) it is NaN, and figures of it become None.

    Args:
        policy_logps, reference_logps: `[N]`, log-probabilities of the whole completions, end token included.
    """
    import torch

    from softpref.objectives import exact_optimum

    rewards = np.asarray(outcomes.rewards, dtype=np.float64)
    if not has_optimum(method, alpha, beta):
        optimum = np.full_like(rewards, np.nan)
    elif method == "dpo":
        optimum = _normalised(reference_logps + rewards / beta)
    else:
        pairs = None
        if beta > 0:
            weights = torch.as_tensor(outcomes.weights, dtype=torch.float64)
            pairs = torch.outer(weights, weights).fill_diagonal_(0)
        optimum = exact_optimum(
            torch.as_tensor(rewards),
            torch.as_tensor(reference_logps, dtype=torch.float64),
            alpha=alpha,
            beta=beta,
            pair_probabilities=pairs,
        ).numpy()
    mass = float(np.exp(_logsumexp(policy_logps)))
    return ExactPrompt(rewards, _normalised(policy_logps), _normalised(reference_logps), optimum, mass)


def exact_figures(
    prompts: Sequence[ExactPrompt], bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
) -> dict[str, Figure]:
    """Means over prompts, with intervals that say how much they differ between prompts; entropies in nats."""

    def figure(values: Sequence[float], unit: str = "nats") -> Figure:
        return interval(values, np.arange(len(values)), unit=unit, bootstrap=bootstrap)

    def reward(logps: np.ndarray, rewards: np.ndarray) -> float:
        return float(np.exp(logps) @ rewards)

    return {
        "kl_optimum_to_policy": figure([float(np.exp(p.optimum) @ (p.optimum - p.policy)) for p in prompts]),
        "entropy": figure([entropy(p.policy) for p in prompts]),
        "optimum_entropy": figure([entropy(p.optimum) for p in prompts]),
        "reference_entropy": figure([entropy(p.reference) for p in prompts]),
        "expected_reward": figure([reward(p.policy, p.rewards) for p in prompts]),
        "optimum_expected_reward": figure([reward(p.optimum, p.rewards) for p in prompts]),
        "reference_expected_reward": figure([reward(p.reference, p.rewards) for p in prompts]),
        "mass_on_set": figure([p.policy_mass for p in prompts], "probability"),
    }


def entropy(logps: np.ndarray) -> float:
    """Entropy in nats of a normalised distribution given by its log-probabilities."""
    return float(-(np.exp(logps) @ logps))


def _logsumexp(values: np.ndarray) -> float:
    values = np.asarray(values, dtype=np.float64)
    return float(values.max() + np.log(np.exp(values - values.max()).sum()))


def _normalised(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    return values - _logsumexp(values)
