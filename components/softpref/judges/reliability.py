"""How far a judge can be trusted: its agreement with held-out preferences, beside that of length alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

import numpy as np

from softpref.intervals import DEFAULT_BOOTSTRAP, Bootstrap, interval
from softpref.judges.protocol import Judge
from softpref.judges.texts import TextRow, preference_pairs
from softpref.records import Figure


class Agreement(TypedDict, total=False):
    """Shares of held-out pairs; empty where no pair is decided. See `agreement`."""

    accuracy: Figure
    longer_accuracy: Figure
    length_accuracy: Figure
    over_length: Figure


def agreement(judge: Judge, rows: Iterable[TextRow], bootstrap: Bootstrap = DEFAULT_BOOTSTRAP) -> Agreement:
    """How often a judge prefers what most people preferred, and how often length alone would have.

    Every pair that a row decides counts once, to its majority's side; a tie of the judge, or of lengths,
    counts ½; a pair of as many votes for either is left out. Intervals are over prompts.

    Returns:
        `accuracy`, of the judge; `longer_accuracy`, of "the longer one is better" (in characters);
        `length_accuracy`, of the better of "longer" and "shorter" on these very pairs, which is the fair
        opponent of a judge that could learn either; `over_length`, the judge's less that one, pair by pair.
    """
    pairs = decided_pairs(rows)
    if not pairs:
        return {}
    prompts, better, worse = (list(part) for part in zip(*pairs, strict=True))
    own = right(judge.probabilities(prompts, better, worse) - 0.5)
    longer = right(np.array([len(one) - len(other) for _, one, other in pairs], float))
    length = longer if longer.mean() >= 0.5 else 1 - longer

    places: dict[str, int] = {}
    of_prompt = [places.setdefault(prompt, len(places)) for prompt in prompts]

    def share(values: np.ndarray) -> Figure:
        return interval(values, of_prompt, unit="probability", bootstrap=bootstrap)

    return {
        "accuracy": share(own),
        "longer_accuracy": share(longer),
        "length_accuracy": share(length),
        "over_length": share(own - length),
    }


def decided_pairs(rows: Iterable[TextRow]) -> list[tuple[str, str, str]]:
    """`(prompt, better, worse)` by the majority, of every pair that has one."""
    found = []
    for prompt, first, second, share in preference_pairs(rows):
        if share != 0.5:
            found.append((prompt, first, second) if share > 0.5 else (prompt, second, first))
    return found


def right(margins: np.ndarray) -> np.ndarray:
    """1 where the better one has the higher score, ½ for equal scores."""
    values: np.ndarray = (margins > 0) + 0.5 * (margins == 0)
    return values
