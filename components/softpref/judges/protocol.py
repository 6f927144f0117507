"""What a judge is, and what all share."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypeGuard

import numpy as np

from softpref.errors import ConfigError


class Judge(Protocol):
    """Anything that says which of two completions of a prompt is better.

    It is asked about texts: a conversational prompt as `as_text(prompt, roles=True)`.

    Attributes:
        name: short and stable, like `expert`.
        description: for a reader of the report: what its verdicts are and where they come from.
        fingerprint: changes when its verdicts could change.
    """

    name: str
    description: str
    fingerprint: str

    @abstractmethod
    def probabilities(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> np.ndarray:
        """`[n]`: P(first beats second); NaN where the judge gives no verdict."""


class Verdict(NamedTuple):
    """What a judge says of two completions.

    Attributes:
        probability: P(first beats second); NaN where it gives no verdict.
        orders: the same as the judge said it with the first shown first, and with it shown second; None where
            it was not asked so, or could not be read both times.
        reason: its own words.
        unread: answers that could not be read, each of which counts ½.
    """

    probability: float
    orders: tuple[float, float] | None = None
    reason: str = ""
    unread: int = 0


class TellingJudge(Judge, Protocol):
    """A judge that tells more than probabilities, and what it took.

    Attributes:
        usage: counts by name, such as `requests` and `tokens`.
        ended: why it has ended before all was judged, as a clause; empty as long as it judges.
    """

    usage: Mapping[str, int]
    ended: str

    @abstractmethod
    def verdicts(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[Verdict]:
        """`[n]` verdicts; where it ends early, the pairs that come first have one."""

    def probabilities(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> np.ndarray:
        """`[n]`: P(first beats second), of the verdicts."""
        return np.array([one.probability for one in self.verdicts(prompts, first, second)], dtype=float)


class ScoringJudge(Judge, Protocol):
    """A judge whose comparisons follow from scores of single completions, by Bradley-Terry."""

    @abstractmethod
    def scores(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """`[n]` scores in nats, of which only differences within a prompt mean anything."""

    def probabilities(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> np.ndarray:
        """`[n]`: P(first beats second) = σ(score of first − score of second)."""
        scores = self.scores([*prompts, *prompts], [*first, *second])  # at once: many texts may be the same
        return sigmoid(scores[: len(prompts)] - scores[len(prompts) :])


def is_scoring(judge: Judge) -> TypeGuard[ScoringJudge]:
    """Whether a judge scores single completions, so that every figure can be had of it."""
    return hasattr(judge, "scores")


def is_telling(judge: Judge) -> TypeGuard[TellingJudge]:
    """Whether a judge tells more than probabilities."""
    return hasattr(judge, "verdicts")


def verdicts_of(
    judge: Judge, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
) -> list[Verdict]:
    """What any judge says of `n` pairs.

    Raises:
        ConfigError: the judge answers with anything but a probability, or NaN, for each pair.
    """
    if is_telling(judge):
        found = judge.verdicts(prompts, first, second)
    else:
        found = [
            Verdict(float(one)) for one in np.asarray(judge.probabilities(prompts, first, second)).reshape(-1)
        ]
    chances = np.array([one.probability for one in found])
    if len(found) != len(prompts) or (chances < 0).any() or (chances > 1).any():
        raise ConfigError(
            f"the judge {judge.name!r} was asked to compare {len(prompts)} pairs; its probabilities must be "
            f"as many numbers in [0, 1], or NaN where it has no verdict, got {chances!r:.200}"
        )
    return found


def sigmoid(values: np.ndarray) -> np.ndarray:
    """1 / (1 + e^−x) without overflow."""
    return 0.5 * (1 + np.tanh(values / 2))


def digest(value: object) -> str:
    """A fingerprint of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
