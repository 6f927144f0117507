"""What a judge without scores says of samples, pair by pair. Draws nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from softpref.intervals import DEFAULT_BOOTSTRAP, Bootstrap, interval
from softpref.judges.protocol import Judge, Verdict, is_telling
from softpref.judges.reliability import ask, unjudged
from softpref.records.evaluation import DrawnText
from softpref.records.figures import Figures


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
    found = ask(
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


def _consistent(verdict: Verdict) -> float:
    """1 where both orders give the same verdict, 0 where they do not; NaN where either has none."""
    if verdict.orders is None:
        return float("nan")
    one, other = verdict.orders
    return float(np.sign(one - 0.5) == np.sign(other - 0.5))
