"""How far a judge can be trusted: its agreement with held-out preferences, beside that of length alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypedDict

import numpy as np

from softpref.intervals import DEFAULT_BOOTSTRAP, Bootstrap, interval
from softpref.judges.protocol import Judge, Verdict, is_scoring, is_telling, verdicts_of
from softpref.judges.texts import TextRow, preference_pairs
from softpref.progress import progress
from softpref.records.figures import Figure

_AT_ONCE = 64  # pairs that a judge without scores is asked of, between which the bar moves


class Agreement(TypedDict, total=False):
    """Shares of held-out pairs; empty where no pair is decided. See `agreement`."""

    accuracy: Figure
    longer_accuracy: Figure
    length_accuracy: Figure
    over_length: Figure


def agreement(
    judge: Judge, rows: Iterable[TextRow], bootstrap: Bootstrap = DEFAULT_BOOTSTRAP, *, most: int = 0
) -> tuple[Agreement, list[str]]:
    """How often a judge prefers what most people preferred, and how often length alone would have.

    Every pair that a row decides counts once, to its majority's side; a tie of the judge, or of lengths,
    counts ½; a pair of as many votes for either is left out, and one of which the judge has no verdict.
    Intervals are over prompts.

    Args:
        most: pairs that the judge is asked of, drawn by the bootstrap's seed; 0 takes all.

    Returns:
        `accuracy`, of the judge; `longer_accuracy`, of "the longer one is better" (in characters);
        `length_accuracy`, of the better of "longer" and "shorter" on these very pairs, which is the fair
        opponent of a judge that could learn either; `over_length`, the judge's less that one, pair by pair.
        And warnings.
    """
    pairs = decided_pairs(rows)
    if most and len(pairs) > most:
        drawn = np.random.default_rng(bootstrap.seed).choice(len(pairs), most, replace=False)
        pairs = [pairs[place] for place in sorted(drawn.tolist())]
    # the better one first would make a judge that always names the first look perfect
    turned = np.random.default_rng(bootstrap.seed).random(len(pairs)) < 0.5
    asked = [
        (prompt, worse, better) if turn else (prompt, better, worse)
        for (prompt, better, worse), turn in zip(pairs, turned, strict=True)
    ]
    found = ask(judge, asked, "held-out preferences, judged")
    warnings = unjudged(judge, found, "held-out preferences")
    chances = np.array([one.probability for one in found])
    chances = np.where(turned, 1 - chances, chances)
    pairs = [pair for pair, chance in zip(pairs, chances, strict=True) if not np.isnan(chance)]
    if not pairs:
        return {}, warnings
    prompts = [prompt for prompt, _, _ in pairs]
    own = right(chances[~np.isnan(chances)] - 0.5)
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
    }, warnings


def ask(judge: Judge, pairs: Sequence[tuple[str, str, str]], title: str) -> list[Verdict]:
    """What a judge says of `(prompt, first, second)`, with a progress bar if it may take long."""
    at_once = max(1, len(pairs)) if is_scoring(judge) else _AT_ONCE
    found: list[Verdict] = []
    with progress(title, total=len(pairs), unit="pair", disable=is_scoring(judge)) as loop:
        for start in range(0, len(pairs), at_once):
            some = pairs[start : start + at_once]
            prompts, first, second = (list(part) for part in zip(*some, strict=True))
            found += verdicts_of(judge, prompts, first, second)
            loop.update(len(some))
    return found


def unjudged(judge: Judge, found: Sequence[Verdict], what: str) -> list[str]:
    """Warnings: verdicts that are missing, and answers that could not be read."""
    warnings = []
    if missing := sum(np.isnan(one.probability) for one in found):
        reason = f": {judge.ended}" if is_telling(judge) and judge.ended else ""
        warnings.append(
            f"The judge left {missing} of {len(found)} {what} unjudged{reason}. Its figures come from the "
            "others alone."
        )
    if unread := sum(one.unread for one in found):
        warnings.append(
            f"{unread} of the judge's answers about {what} could not be read; each counts as a tie."
        )
    return warnings


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
