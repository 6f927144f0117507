"""Theory where completions cannot be enumerated: importance sampling from the reference. Runs no model.

With a known reward, samples of the reference represent all completions: the optimum of an objective is a
distribution over them (the density ratio to the reference), as long as enough of them carry weight.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from softpref.evaluation.exact import Objective, optimum
from softpref.intervals import DEFAULT_BOOTSTRAP, Bootstrap, over_prompts
from softpref.records.figures import Figure

TRUSTED = 0.1
"""Effective share of the samples above which the optimum's figures can be compared."""


class ReferenceSamples(NamedTuple):
    """`n` samples of the reference for a prompt.

    Attributes:
        rewards: `[n]`, the expert's.
        logps: `[n]`, log-probabilities of the whole samples, nats.
        sequences: `n` pairs of prompt and completion ids, for the policy to score.
        dimensions: by name, `[n]` each, the rewards of each dimension of preference, where there are several.
    """

    rewards: np.ndarray
    logps: np.ndarray
    sequences: Sequence[tuple[list[int], list[int]]]
    dimensions: Mapping[str, np.ndarray] = MappingProxyType({})


class SampledPrompt(NamedTuple):
    """One prompt: `n` samples of the reference, and what the policy did.

    Attributes:
        rewards: `[n]`, the expert's.
        reference_logps, policy_logps: `[n]`, log-probabilities of the whole samples, nats.
        optimum: `[n]`, log-probabilities of the optimum over the samples; NaN where it is not known.
        policy_reward, policy_kl: means over the policy's own samples, nats.
        dimensions: as in `ReferenceSamples`.
    """

    rewards: np.ndarray
    reference_logps: np.ndarray
    policy_logps: np.ndarray
    optimum: np.ndarray
    policy_reward: float
    policy_kl: float
    dimensions: Mapping[str, np.ndarray] = MappingProxyType({})


def sampled_prompt(
    rewards: np.ndarray,
    reference_logps: np.ndarray,
    policy_logps: np.ndarray,
    objective: Objective,
    *,
    dimensions: Mapping[str, np.ndarray] = MappingProxyType({}),
    policy_reward: float,
    policy_kl: float,
    seed: int = 0,
) -> SampledPrompt:
    """Find the optimum of `objective` over samples of the reference, each of which has a share 1/n of it.

    Assumes that pairs and groups of the data were drawn from the reference too.
    """
    count = len(rewards)
    # a sample represents 1 / (n π_ref) completions like it
    stands_for = -np.log(count) - np.asarray(reference_logps, dtype=np.float64)
    best = optimum(
        rewards,
        reference_logps,
        np.full(count, 1 / count),
        objective,
        dimensions=dimensions,
        stands_for=stands_for,
        seed=seed,
    )
    return SampledPrompt(rewards, reference_logps, policy_logps, best, policy_reward, policy_kl, dimensions)


def sampled_figures(
    prompts: Sequence[SampledPrompt], bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
) -> dict[str, Figure]:
    """Means over prompts, each with its interval.

    With weights w of the optimum over n samples of the reference: expected reward Σ w r, KL to the reference
    Σ w log(n w), entropy −Σ w (log(n w) + log π_ref), effective sample size 1 / (n Σ w²). With the policy's
    v = π / (n π_ref), KL(optimum ‖ policy) is Σ (w log(w / v) − w + v): v − w has the mean 0, and leaves no
    term below 0.
    """

    figure = functools.partial(over_prompts, bootstrap=bootstrap)
    weights = [np.exp(p.optimum) for p in prompts]
    ratios = [p.optimum + np.log(len(p.optimum)) for p in prompts]
    of = list(zip(prompts, weights, ratios, strict=True))
    return {
        "expected_reward": figure([p.policy_reward for p in prompts]),
        "kl": figure([p.policy_kl for p in prompts]),
        "optimum_expected_reward": figure([float(w @ p.rewards) for p, w, _ in of]),
        "optimum_kl": figure([float(w @ ratio) for _, w, ratio in of]),
        "kl_optimum_to_policy": figure([_kl_to_policy(p) for p in prompts]),
        "optimum_entropy": figure([float(-(w @ (ratio + p.reference_logps))) for p, w, ratio in of]),
        "effective_sample_size": figure([float(1 / (len(w) * (w @ w))) for w in weights], "fraction"),
        "reference_expected_reward": figure([float(p.rewards.mean()) for p in prompts]),
        **{
            f"optimum_expected_reward/{name}": figure([float(w @ p.dimensions[name]) for p, w, _ in of])
            for name in prompts[0].dimensions
        },
    }


def _kl_to_policy(prompt: SampledPrompt) -> float:
    ratio = prompt.policy_logps - prompt.reference_logps - np.log(len(prompt.optimum))
    weights = np.exp(prompt.optimum)
    return float((weights * (prompt.optimum - ratio) - weights + np.exp(ratio)).sum())


def reward_frontier(prompts: Sequence[SampledPrompt]) -> list[list[float]]:
    """The most expected reward that any policy can have at each KL to the reference.

    It is reached by π_ref · exp(reward / τ) with one τ for all prompts, as estimated from the samples.

    Returns:
        `[KL, expected reward]` pairs in nats, from the reference on.
    """
    points: list[list[float]] = []
    for sharpness in (0.0, *np.geomspace(0.05, 10.0, 40)):
        found = []
        for prompt in prompts:
            logits = sharpness * prompt.rewards
            shifted = np.exp(logits - logits.max())
            weights = shifted / shifted.sum()
            if 1 / (weights @ weights) < TRUSTED / 2 * len(weights):
                return points
            kl = weights @ (np.log(weights.clip(1e-300)) + np.log(len(weights)))
            found.append((float(kl), float(weights @ prompt.rewards)))
        points.append(np.mean(found, axis=0).tolist())
    return points
