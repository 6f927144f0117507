"""What a judge is, and what all share."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np


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
        """`[n]`: P(first beats second)."""


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


def sigmoid(values: np.ndarray) -> np.ndarray:
    """1 / (1 + e^−x) without overflow."""
    return 0.5 * (1 + np.tanh(values / 2))


def digest(value: object) -> str:
    """A fingerprint of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
