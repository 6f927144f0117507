"""What a judge without scores says of samples, pair by pair. Draws nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from softpref.evaluation.intervals import DEFAULT_BOOTSTRAP, Bootstrap, interval
from softpref.evaluation.metrics import PreferenceMetric
from softpref.judges.protocol import Judge, Verdict, is_telling, verdicts_of
from softpref.judges.texts import TextRow, preference_pairs
from softpref.progress import progress
from softpref.records import DrawnText, Figure, Figures

_AT_ONCE = 64  # pairs, between which the bar moves


def compare_samples(
    judge: Judge,
    prompts: Sequence[str],
    samples: Sequence[Sequence[DrawnText]],
    reference: Sequence[Sequence[DrawnText]],
    per_prompt: int,
    bootstrap: Bootstrap = DEFAULT_BOOTSTRAP,
) -> tuple[list[list[DrawnText]], Figures, list[str]]:
    """Compare the n-th sample of each prompt with the n-th of the reference, for the first `per_prompt`.

    All prompts' first pairs are judged before their second ones, so that a judge that ends early has seen as
    many prompts as it could.

    Returns:
        the samples with `win` and `reason`; the figures `win_rate`, and `position_consistency` (the share of
        pairs whose verdict is the same in both orders) of a judge that tells it; and warnings about pairs
        that were not judged, or not understood.
    """
    asked = [
        (place, number)
        for number in range(per_prompt or max(map(len, samples), default=0))
        for place, group in enumerate(samples)
        if number < len(group)
    ]
    found = _verdicts(
        judge,
        [
            (prompts[place], samples[place][number].text, reference[place][number].text)
            for place, number in asked
        ],
        "comparisons",
    )
    judged = [list(group) for group in samples]
    for (place, number), verdict in zip(asked, found, strict=True):
        if not np.isnan(verdict.probability):
            judged[place][number] = judged[place][number]._replace(
                win=verdict.probability, reason=verdict.reason
            )
    labels = [place for place, _ in asked]
    figures = {
        "win_rate": interval(
            [one.probability for one in found], labels, unit="probability", bootstrap=bootstrap
        )
    }
    if is_telling(judge):
        consistent = [_consistent(one) for one in found]
        figures["position_consistency"] = interval(
            consistent, labels, unit="probability", bootstrap=bootstrap
        )
    return judged, figures, unjudged(judge, found, "pairs of samples")


def agreement(
    judge: Judge, rows: Iterable[TextRow], most: int, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
) -> tuple[Figure, list[str]]:
    """How often a judge without scores agrees with held-out preferences, and warnings.

    Args:
        rows: of the validation split.
        most: pairs that it is asked of, drawn by the bootstrap's seed; 0 takes all.
    """
    pairs = [pair for pair in preference_pairs(rows) if pair[3] != 0.5]
    if most and len(pairs) > most:
        drawn = np.random.default_rng(bootstrap.seed).choice(len(pairs), most, replace=False)
        pairs = [pairs[place] for place in sorted(drawn.tolist())]
    found = _verdicts(judge, [pair[:3] for pair in pairs], "held-out preferences, judged")
    judged = [(pair, one) for pair, one in zip(pairs, found, strict=True) if not np.isnan(one.probability)]
    accuracy = PreferenceMetric.figures(
        bootstrap,
        scores=[[one.probability, 0.5] for _, one in judged],
        kind=["pairwise"] * len(judged),
        probability=[pair[3] for pair, _ in judged],
        prompt=[pair[0] for pair, _ in judged],
    )["preference_accuracy"]
    return accuracy, unjudged(judge, found, "held-out preferences")


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


def _verdicts(judge: Judge, pairs: Sequence[tuple[str, str, str]], title: str) -> list[Verdict]:
    found: list[Verdict] = []
    with progress(title, total=len(pairs), unit="pair") as loop:
        for start in range(0, len(pairs), _AT_ONCE):
            some = pairs[start : start + _AT_ONCE]
            prompts, first, second = (list(part) for part in zip(*some, strict=True))
            found += verdicts_of(judge, prompts, first, second)
            loop.update(len(some))
    return found


def _consistent(verdict: Verdict) -> float:
    """1 where both orders give the same verdict, 0 where they do not; NaN where either has none."""
    if verdict.orders is None:
        return float("nan")
    one, other = verdict.orders
    return float(np.sign(one - 0.5) == np.sign(other - 0.5))
