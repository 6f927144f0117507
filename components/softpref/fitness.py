"""Whether a model may be chosen or registered, by its own evaluation: health, judge, and limits of the gate.

Compares no models and calls no server.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from softpref.records.evaluation import Evaluation, JudgedBy
from softpref.records.figures import LEAST_PROMPTS, Figure, Figures

# Health: how far a policy may exceed its reference, or fall short of it. Softness moves a model among texts
# that the reference writes too, and explains none of this. Samples count as worse only where the intervals do
# not overlap.

LEAKED = 0.05
"""Probability lost from a known set; healthy models lose up to 0.02. What leaks out counts as entropy."""
MORE_TRUNCATED = 0.05
"""Share of the samples that are cut at the length limit, and so are no answers. Lengths drift, but not so
far."""
MORE_REPEATED = 0.1
"""Share of the 4-grams of tokens within a sample. Human texts repeat about 0.01 of theirs, a model caught in
a loop 0.4 and more (Welleck et al. 2020); a sharper one has favourite phrases, but repeats less than 0.1."""
STRANGER = 1.0
"""Nats per token by which the samples surprise the reference more than its own do: each token e times less
likely. Sharper samples surprise it less, softer ones by some tenths more, random tokens by 5 and more."""
FARTHER = 0.5
"""Nats of KL per token beyond the reference's entropy per token. The sharpest model gives one typical text of
the reference, which puts it at that entropy; a model farther away writes what the reference does not."""
FAR_IN_ALL = 20.0
"""Nats per completion that `STRANGER` and `FARTHER` must amount to: in a short answer, a few unlikely words
may rightly become certain. What the reference says once in e^20 times cannot come from preferences."""
BLATANT = 3
"""Times the allowance by which samples must be worse where their prompts are too few for intervals."""

SATURATED = 5.0
"""Nats of a margin beyond which a logistic loss is straight, to within one per cent of its slope."""
MUCH_SATURATED = 0.25
"""Share of such margins. Measured without an anchor: at a third of them, softness had no effect."""


class Limits(NamedTuple):
    """What the gate asks of a model.

    Attributes:
        min_win_rate: the low end of the win rate's interval must be above this: above ½, the model is better
            than its reference. None or 0 asks for neither the win rate nor a good judge.
        max_kl: nats that the high end of `kl_sequence` may reach; None sets no limit.
    """

    min_win_rate: float | None = None
    max_kl: float | None = None


def gate_failures(evaluation: Evaluation, limits: Limits) -> list[str]:
    """What keeps a model from being registered, one sentence each; empty when the gate is passed."""
    metrics = evaluation.metrics
    failures = [f"it {ailment}" for ailment in ailments(evaluation)]
    if limits.min_win_rate:
        if doubt := judge_doubt(evaluation):
            failures.append(doubt)
        low = number(metrics, "win_rate", "low")
        if low is None:
            failures.append(
                f"the evaluation gives no interval for win_rate, which takes {LEAST_PROMPTS} held-out "
                "prompts; evaluate on more, or set min_win_rate to 0"
            )
        elif low <= limits.min_win_rate:
            failures.append(
                f"win_rate is {figure_text(metrics['win_rate'])}: its low end is not above "
                f"min_win_rate = {limits.min_win_rate:g}"
            )
    if limits.max_kl is not None:
        high = number(metrics, "kl_sequence", "high")
        if high is None:
            failures.append("the evaluation gives no interval for kl_sequence, which max_kl asks for")
        elif high > limits.max_kl:
            failures.append(
                f"kl_sequence is {figure_text(metrics['kl_sequence'])}: its high end is over "
                f"max_kl = {limits.max_kl:g} nats"
            )
    return failures


def judge_doubt(evaluation: Evaluation) -> str:
    """`distrust` of an evaluation's judge."""
    return distrust(evaluation.judge)


def distrust(judge: JudgedBy) -> str:
    """Why a judge's scores may not decide anything, in a sentence; empty where they may.

    Experts know the reward. Any other judge must agree with held-out preferences more often than a coin, and
    more often than length alone, each by its whole interval: what is no better than counting characters may
    do no more than that, and rewards a policy for length. Where people do want length, figures that need no
    judge say as much.
    """
    if judge.name == "expert":
        return ""
    accuracy, over = judge.accuracy, judge.over_length
    if accuracy is None or accuracy.low is None:
        return (
            "how often the judge agrees with held-out preferences is unknown, so it may be no better than a "
            f"coin; hold out preferences of {LEAST_PROMPTS} prompts or more for validation"
        )
    agrees = f"the judge agrees with {accuracy.text()} of the held-out preferences, "
    if accuracy.low <= 0.5:
        return f"{agrees}no better than a coin by its interval; give more preferences, or another judge"
    if over is None or over.low is None or over.low > 0:
        return ""
    length, longer = judge.length_accuracy or Figure(), judge.longer_accuracy or Figure()
    which = "longer" if length.value == longer.value else "shorter"
    return (
        f"{agrees}and '{which} is better' with {length.text()}: the difference, {over.text()}, is not above "
        "0 by its interval, so the judge may know length alone; train a reward model (softpref judge), give "
        "it more preferences, or hold out more prompts. If length is what people want, no judge is needed: "
        "compare completion_length, and set min_win_rate to 0"
    )


def ailments(evaluation: Evaluation) -> list[str]:
    """What is wrong with a model, as predicates that follow its name in a sentence; empty for a healthy one.

    What an evaluation did not measure is not held against a model.
    """
    metrics, exact = evaluation.metrics, evaluation.exact or {}
    found = []
    mass, usual = (number(exact, name) for name in ("mass_on_set", "reference_mass_on_set"))
    if mass is not None and usual is not None and mass < usual - LEAKED:
        found.append(f"has only {mass:.2f} of its probability on the known set, the reference {usual:.2f}")
    if _more(metrics, "truncated_fraction", MORE_TRUNCATED):
        ours, theirs = _both(metrics, "truncated_fraction")
        found.append(f"has {ours:.0%} of its samples cut at the length limit, the reference {theirs:.0%}")
    if _more(metrics, "repetition", MORE_REPEATED):
        ours, theirs = _both(metrics, "repetition")
        found.append(
            f"repeats itself: {ours:.0%} of the 4-grams in its samples are not new, against {theirs:.0%} in "
            "the reference's"
        )
    length = number(metrics, "completion_length") or 0.0
    ours, theirs = _both(metrics, "cross_entropy")
    if _more(metrics, "cross_entropy", STRANGER) and (ours - theirs) * length > FAR_IN_ALL:
        found.append(
            f"writes what its reference would not: {ours:.2f} nats per token under it, against {theirs:.2f} "
            "for the reference's own samples"
        )
    kl = number(metrics, "kl_token")
    if kl is not None and kl > theirs + FARTHER and kl * length > FAR_IN_ALL:
        found.append(f"is {kl:.2f} nats of KL per token from its reference, whose entropy is {theirs:.2f}")
    return found


def figure_text(figure: Figure) -> str:
    """`0.712 [0.684, 0.741], n=400`, without the parts that the figure lacks."""
    text = f"{figure.value:.4g}" if figure.value is not None else "none"
    if figure.low is not None and figure.high is not None:
        text += f" [{figure.low:.4g}, {figure.high:.4g}]"
    return text + (f", n={figure.n:g}" if figure.n is not None else "")


def number(figures: Figures, name: str, part: str = "value") -> float | None:
    """A part of a figure, None where it is unknown."""
    value = getattr(figures.get(name), part, None)
    return value if value is not None and math.isfinite(value) else None


def _both(metrics: Figures, name: str) -> tuple[float, float]:
    """The policy's value and the reference's, NaN where unknown."""
    ours, theirs = (number(metrics, key) for key in (name, f"reference_{name}"))
    return (math.nan if ours is None else ours), (math.nan if theirs is None else theirs)


def _more(metrics: Figures, name: str, allowed: float) -> bool:
    """Whether the policy's figure exceeds the reference's by more than `allowed`, and beyond chance."""
    low, high = number(metrics, name, "low"), number(metrics, f"reference_{name}", "high")
    ours, theirs = _both(metrics, name)
    if low is None or high is None:
        return ours > theirs + BLATANT * allowed
    return low > high and ours > theirs + allowed


def saturation_warning(share: float) -> str:
    """A sentence on the share of margins that are saturated."""
    return (
        f"{share:.0%} of the pairs have a margin beyond {SATURATED:g} nats, where the loss is straight: "
        "softness has no effect on them"
    )


def saturation_remedy(anchor: float) -> str:
    """What to do about it."""
    return "lower alpha" if anchor >= 1 else "set anchor to 1 (softness relative to the reference)"
