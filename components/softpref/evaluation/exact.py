"""Exact figures where every completion can be enumerated: the policy against theory. Runs no model."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from softpref.intervals import DEFAULT_BOOTSTRAP, Bootstrap, over_prompts
from softpref.judges.outcomes import Outcomes
from softpref.records.dataset import DatasetStats
from softpref.records.figures import Figure
from softpref.records.model import ModelMetadata

# Sets are drawn instead of enumerated: so many that the optimum is within about 0.001 nats (KL) of the true
# one, unless the orders of each set are too many.
_GROUPS, _GROUP_TABLE = 8000, 2**17
_LONGEST_RANKING = 6


class ExactPrompt(NamedTuple):
    """One prompt's set of `N` completions, log-probabilities in nats given the set.

    Attributes:
        rewards: `[N]`, the expert's.
        policy, reference, optimum: `[N]` each, normalised over the set.
        policy_mass, reference_mass: probability that each puts on the set.
        dimensions: by name, `[N]` each, the rewards of each dimension, where there are several.
    """

    rewards: np.ndarray
    policy: np.ndarray
    reference: np.ndarray
    optimum: np.ndarray
    policy_mass: float
    reference_mass: float = 1.0
    dimensions: Mapping[str, np.ndarray] = MappingProxyType({})


class Objective(NamedTuple):
    """What determines the optimum of a policy's training.

    Attributes:
        method, alpha, beta, soft_labels, weight_exponent, label_smoothing, nll_weight, rounds, train_on,
            judge, extrapolation, anchor, kl_beta, kl_on: as the training stage names them.
        kind, group_size: what the rows are, and how many completions each holds; `"mixed"` and 0 where they
            differ.
        altered: why labels or rows do not follow the experts' Bradley-Terry or Plackett-Luce model, or empty.
        dimension: of preference that it was trained on, one of several, or empty.
        weights: λ of each earlier round.
        earlier: the objectives of the rounds before, on other dimensions, from the first on.
    """

    method: str = ""
    alpha: float = 0.0
    beta: float = 0.0
    soft_labels: str = "linear"
    weight_exponent: float = 0.0
    label_smoothing: float = 0.0
    nll_weight: float = 0.0
    rounds: int = 1
    train_on: str = "preferences"
    judge: str = "auto"
    extrapolation: float = 0.0
    anchor: float = 0.0
    kl_beta: float = 0.0
    kl_on: str = "samples"
    kind: str = "pairwise"
    group_size: int = 2
    altered: str = ""
    dimension: str = ""
    weights: tuple[float, ...] = ()
    earlier: tuple[Objective, ...] = ()

    @property
    def on_data(self) -> bool:
        """Whether training saw nothing but the preferences of the dataset."""
        return self.rounds == 1 and self.train_on == "preferences"

    @property
    def kl_strength(self) -> float:
        """The factor of the KL term; 0 without one."""
        strength = self.beta if self.method == "spo" else self.kl_beta
        return 0.0 if self.kl_on == "none" else strength


def trained_objective(metadata: ModelMetadata, stats: DatasetStats) -> Objective:
    """The objective of a model folder's `softpref.json`, on a dataset folder's `stats.json`.

    For keys that older folders lack, the default is what was then the only choice.
    """
    kinds, sizes = stats.get("kinds") or {"pairwise": 0}, stats.get("completions_per_row") or {"2": 0}
    kind = next(iter(kinds)) if len(kinds) == len(sizes) == 1 else "mixed"
    size = int(next(iter(sizes))) if kind != "mixed" else 0
    config = stats.get("config") or {}
    altered = ""
    trained = (metadata.get("row_counts") or {}).get("train") or {}
    ours, theirs = metadata.get("dataset_hash"), stats.get("dataset_hash")
    if ours and theirs and ours != theirs:
        altered = "the policy was trained on another dataset"
    elif stats.get("left_out"):
        altered = "rows were left out of the data"
    elif trained.get("left_out"):
        altered = "rows were left out of training"
    elif trained.get("weighted"):
        altered = "rows have weights of their own"
    elif config.get("labels") == "hard" and config.get("votes", 1) != 1:
        altered = "hard labels of several votes are majorities, which do not follow Bradley-Terry"
    read_as = metadata.get("preference_kind") or "auto"
    if read_as not in ("auto", kind) and kind != "pairwise":
        if (kind, read_as) == ("ranking", "best_of_n"):  # the first of a ranking is the best
            kind = read_as
        else:
            altered = f"rows of kind {kind} were read as {read_as}"
    known: dict[str, Any] = {
        key: value for key, value in metadata.items() if key in Objective._fields and value is not None
    }
    lineage = metadata.get("lineage") or []
    judged = len(stats.get("dimensions") or ())
    if not altered and judged > 1 and not lineage:
        altered = "rows of several dimensions were trained on alike"
    elif not altered and any(one["dataset_hash"] != theirs for one in lineage):
        altered = "an earlier round was trained on another dataset"
    hard = (stats.get("labels") or {}).get("soft") == 0

    def made(values: Mapping[str, Any], **others: Any) -> Objective:
        own = {name: value for name, value in values.items() if name in Objective._fields}
        objective = Objective(**{**own, **others, "kind": kind, "group_size": size, "altered": altered})
        # both ways do the same to hard labels
        return objective._replace(soft_labels="linear") if objective.on_data and hard else objective

    rounds = [made(one, weights=tuple(one["dimension_weights"])) for one in lineage]
    last = {"dimension": rounds[-1].dimension, "weights": rounds[-1].weights} if rounds else {}
    return made(known, **last, earlier=tuple(rounds[:-1]))


def why_unknown(objective: Objective) -> str:
    """Why the optimum of `objective` is unknown, to end a sentence with; empty where it is known."""
    method = objective.method
    for number, one in enumerate(objective.earlier, start=1):
        if reason := why_unknown(one):
            return f"round {number} ({one.dimension}): {reason}"
    if method not in ("spo", "dpo", "rdpo", "ipo"):
        return f"method {method!r} has no solution to compare with"
    if objective.extrapolation:
        return "the model is extrapolated from the trained one"
    if objective.altered:
        return objective.altered
    if objective.train_on == "self_play":
        return "self-play has no preferences"
    if not objective.on_data and objective.judge not in ("auto", "expert"):
        return "a learned judge's rewards replaced the experts'"
    if objective.soft_labels != "linear":
        return f"{objective.soft_labels} soft labels move the optimum"
    if objective.kl_strength and objective.kl_on == "data":
        return "a KL term along the dataset's own completions moves the optimum"
    if method == "spo":
        if objective.alpha <= 0:
            return "softness 0 has no optimum other than the experts' favourite"
        if objective.kl_strength == 0 and (objective.on_data or not objective.anchor):
            return ""  # whatever is asked, in whatever rounds and weights: π_ref^anchor · exp(reward / α)
        if objective.weight_exponent:
            return "row weights that follow the policy move the optimum"
        if objective.kind == "ranking" and objective.group_size > _LONGEST_RANKING:
            return f"rankings of more than {_LONGEST_RANKING} have too many orders to enumerate"
    elif objective.beta <= 0:
        return f"{method} has an optimum only for β > 0"
    elif objective.nll_weight:
        return "the likelihood beside the loss moves the optimum"
    elif objective.kl_strength and method == "ipo":
        return "a KL term beside ipo's loss moves the optimum"
    elif objective.label_smoothing and method != "ipo":
        return "label smoothing moves the optimum"
    elif objective.kind == "best_of_n":
        return "pairs of a best against the others do not follow Bradley-Terry"
    if objective.kind == "mixed":
        return "rows are of several kinds or lengths"
    if not objective.on_data:
        return "training saw more than the preferences of the dataset"
    return ""


def exact_prompt(
    outcomes: Outcomes,
    policy_logps: np.ndarray,
    reference_logps: np.ndarray,
    objective: Objective,
    *,
    seed: int = 0,
) -> ExactPrompt:
    """Compare one prompt's policy with the optimum of the objective it was trained on.

    Where the optimum is unknown (`why_unknown`) it is NaN, and its figures become None.

    Args:
        policy_logps, reference_logps: `[N]`, log-probabilities of the whole completions, end token included.
        seed: of the sets drawn; with the same seed, optima of several objectives are comparable.
    """
    best = optimum(
        outcomes.rewards,
        reference_logps,
        outcomes.weights,
        objective,
        dimensions=outcomes.dimensions,
        seed=seed,
    )
    rewards = np.asarray(outcomes.rewards, dtype=np.float64)
    mass, of_reference = (float(np.exp(_logsumexp(logps))) for logps in (policy_logps, reference_logps))
    return ExactPrompt(
        rewards,
        _normalised(policy_logps),
        _normalised(reference_logps),
        best,
        mass,
        of_reference,
        outcomes.dimensions,
    )


def optimum(
    rewards: np.ndarray,
    reference_logps: np.ndarray,
    weights: np.ndarray,
    objective: Objective,
    *,
    dimensions: Mapping[str, np.ndarray] = MappingProxyType({}),
    stands_for: np.ndarray | float = 0.0,
    seed: int = 0,
) -> np.ndarray:
    """The optimum of an objective over a set of completions.

    For `spo` that is the minimiser of L_pref^α + β·KL, of the base measure π_ref^anchor, under the rows of
    the data: sets of distinct completions, drawn one after another by weight. The distribution of pairs is
    known; of larger sets some thousands are drawn. For `dpo`, and `rdpo` without smoothing, it is
    softmax(log π_ref + r/β) under Bradley-Terry, and so for all pairs of a ranking; with a KL term, that of
    `spo` with anchor 1 over these pairs. For `ipo` it is a least-squares fit over them.

    With earlier rounds, each begins with the optimum of the one before, and what those have learned,
    weighted, is a part of the base measure: log ν = anchor · log π_ref + Σ λ_i R̂_i / α.

    Args:
        rewards, reference_logps: `[N]`, the expert's, and those of the reference, in nats; with rounds, of
            the model that the first of them began with.
        weights: `[N]`, the probability that a candidate of a row is this completion; sums to 1.
        dimensions: by name, `[N]` each, the expert's rewards where there are several.
        stands_for: `[N]`, the logarithm of how many completions each is one of; 0 where all are listed.
        seed: of the sets drawn.

    Returns:
        `[N]` log-probabilities that sum to 1; NaN where the optimum is not known.
    """
    rounds = (*objective.earlier, objective)
    if why_unknown(objective) or any(one.dimension and one.dimension not in dimensions for one in rounds):
        return np.full(len(rewards), np.nan)
    logps, learned = np.asarray(reference_logps, dtype=np.float64), np.empty((0, len(rewards)))
    for one in rounds:
        offsets = np.array(one.weights) @ learned if one.weights else np.zeros(len(rewards))
        own = dimensions[one.dimension] if one.dimension else rewards
        best = _optimum_of_round(own, logps, weights, one, offsets, stands_for=stands_for, seed=seed)
        before, logps = logps, best - stands_for
        scale, anchor = (one.alpha, one.anchor) if one.method == "spo" else (one.beta, 1.0)
        learned = np.vstack([learned, scale * (logps - anchor * before) - offsets])
    return best


def _optimum_of_round(
    rewards: np.ndarray,
    reference_logps: np.ndarray,
    weights: np.ndarray,
    objective: Objective,
    offsets: np.ndarray,
    *,
    stands_for: np.ndarray | float,
    seed: int,
) -> np.ndarray:
    """That of one round, whose loss has offsets `[N]`."""
    import torch

    from softpref.objectives import exact_optimum, ipo_optimum

    logps = torch.as_tensor(reference_logps, dtype=torch.float64)
    shift = torch.as_tensor(stands_for, dtype=torch.float64)
    tensors = torch.as_tensor(rewards, dtype=torch.float64), logps + shift
    kind, alpha, anchor, beta = objective.kind, objective.alpha, objective.anchor, objective.kl_strength
    if objective.method in ("dpo", "rdpo"):  # β times the loss of anchor 1 and α = β
        alpha, anchor, beta = objective.beta, 1.0, beta / objective.beta
    groups = None
    if objective.group_size > 2 and (beta > 0 or objective.method == "ipo"):
        cost = 2**objective.group_size if kind == "ranking" else objective.group_size
        count = min(_GROUPS, _GROUP_TABLE // cost)
        groups = draw_groups(weights, count, objective.group_size, np.random.default_rng(seed))
    if objective.method == "ipo":
        pairs = torch.as_tensor(pair_probabilities(weights, groups))
        return ipo_optimum(*tensors, beta=objective.beta, pair_probabilities=pairs).numpy()
    asked: dict[str, Any] = {}
    if groups is not None and objective.method == "spo":
        asked = {"groups": torch.as_tensor(groups), "kind": kind}
    elif beta > 0:
        asked = {"pair_probabilities": torch.as_tensor(pair_probabilities(weights, groups))}
    base = anchor * logps + shift + torch.as_tensor(offsets) / alpha
    return exact_optimum(*tensors, alpha=alpha, beta=beta, base_logps=base, **asked).numpy()


def draw_groups(weights: np.ndarray, count: int, size: int, random: np.random.Generator) -> np.ndarray:
    """Draw sets as the data are drawn: `[count, size]` places of distinct outcomes, one after another.

    Args:
        weights: `[N]`, probability of each outcome; each draw is by weight among those not yet in the set.
    """
    groups = np.empty((count, size), dtype=np.int64)
    for place in range(size):
        again = np.arange(count)
        while again.size:
            groups[again, place] = random.choice(len(weights), again.size, p=weights)
            again = again[(groups[again, :place] == groups[again, place, None]).any(axis=1)]
    return groups


def pair_probabilities(weights: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """How often the outcomes i and j are drawn into one set, in this order: `[N, N]`, diagonal zero.

    Exact for two draws, w_i w_j / (1 − w_i). For larger sets, given as a sample `groups`, each draw counts by
    its probability given those before it, so that outcomes too rare for the sample count too.

    Args:
        weights: `[N]`, probability of each outcome.
        groups: `[M, n]`, as of `draw_groups`.

    Returns:
        Expected number of such pairs in a set, n (n − 1) / 2 in sum.
    """
    pairs: np.ndarray = weights[:, None] * weights / (1 - weights)[:, None]
    if groups is None:
        groups = np.empty((0, 2), dtype=np.int64)
    for place in range(2, groups.shape[1]):
        before = groups[:, :place]
        share = np.repeat(1 / (1 - weights[before].sum(axis=1)) / len(groups), place)
        pairs += np.bincount(before.reshape(-1), share, len(weights))[:, None] * weights
        for other in range(place):  # what is in the set already is not drawn again
            again = np.repeat(before[:, other], place)
            np.subtract.at(pairs, (before.reshape(-1), again), share * weights[again])
    np.fill_diagonal(pairs, 0)
    return pairs.clip(min=0)  # differences of equal sums, up to rounding


def exact_figures(
    prompts: Sequence[ExactPrompt], bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
) -> dict[str, Figure]:
    """Means over prompts, each with its interval; entropies in nats."""
    figure = functools.partial(over_prompts, bootstrap=bootstrap)
    return {
        "kl_optimum_to_policy": figure([float(np.exp(p.optimum) @ (p.optimum - p.policy)) for p in prompts]),
        "entropy": figure([entropy(p.policy) for p in prompts]),
        "optimum_entropy": figure([entropy(p.optimum) for p in prompts]),
        "reference_entropy": figure([entropy(p.reference) for p in prompts]),
        "expected_reward": figure([expected_reward(p.policy, p.rewards) for p in prompts]),
        "optimum_expected_reward": figure([expected_reward(p.optimum, p.rewards) for p in prompts]),
        "reference_expected_reward": figure([expected_reward(p.reference, p.rewards) for p in prompts]),
        "mass_on_set": figure([p.policy_mass for p in prompts], "probability"),
        "least_mass_on_set": Figure(
            min(p.policy_mass for p in prompts), None, None, len(prompts), len(prompts), "probability"
        ),
        "reference_mass_on_set": figure([p.reference_mass for p in prompts], "probability"),
        **{
            f"{whose}expected_reward/{name}": figure(
                [expected_reward(logps, p.dimensions[name]) for p, logps in zip(prompts, each, strict=True)]
            )
            for name in prompts[0].dimensions
            for whose, each in (
                ("", [p.policy for p in prompts]),
                ("optimum_", [p.optimum for p in prompts]),
                ("reference_", [p.reference for p in prompts]),
            )
        },
    }


def softmax_frontier(prompts: Sequence[ExactPrompt]) -> list[list[float]]:
    """The most entropy that any policy on the set can have at each expected reward.

    It is reached by softmax(reward / τ) with one τ for all prompts: both figures are means over prompts.

    Returns:
        `[expected reward, entropy]` pairs in nats, from the uniform distribution to the favourite.
    """
    points: list[list[float]] = []
    for sharpness in (0.0, *np.geomspace(0.05, 30.0, 47)):
        logps = [_normalised(sharpness * prompt.rewards) for prompt in prompts]
        reward = np.mean([np.exp(logp) @ prompt.rewards for logp, prompt in zip(logps, prompts, strict=True)])
        if points and reward < points[-1][0] + 1e-6:
            break  # sharper ones give only the favourite
        points.append([float(reward), float(np.mean([entropy(logp) for logp in logps]))])
    return points


def expected_reward(logps: np.ndarray, rewards: np.ndarray) -> float:
    """Of a normalised distribution given by its log-probabilities."""
    return float(np.exp(logps) @ rewards)


def entropy(logps: np.ndarray) -> float:
    """Entropy in nats of a normalised distribution given by its log-probabilities."""
    return float(-(np.exp(logps) @ logps))


def _logsumexp(values: np.ndarray) -> float:
    values = np.asarray(values, dtype=np.float64)
    return float(values.max() + np.log(np.exp(values - values.max()).sum()))


def _normalised(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    return values - _logsumexp(values)
