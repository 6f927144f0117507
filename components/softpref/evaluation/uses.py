"""Which model serves which use: the best by the figure that the use asks for, and those that cannot be told
from it, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from softpref.fitness import ailments, judge_doubt
from softpref.intervals import interval
from softpref.records.comparison import BestFor
from softpref.records.evaluation import Evaluation
from softpref.records.figures import Figure


class _Use(NamedTuple):
    """What a model is wanted for.

    Attributes:
        figures: that tell; the first one that is known counts.
        judged: whether they rest on a judge.
        least: whether the least value is the best.
    """

    title: str
    figures: tuple[str, ...]
    judged: bool = True
    least: bool = False


_USES = (
    _Use("one answer", ("expected_reward", "win_rate")),
    _Use("search among eight answers", ("best_of_8",)),
    _Use("many different good answers", ("good_diversity",)),
    _Use("probabilities like people's votes", ("vote_divergence",), judged=False, least=True),
)


def best_for(members: Sequence[Evaluation]) -> list[BestFor]:
    """For each use the best healthy member by the mean over prompts, and the others' differences to it.

    A use is left out where fewer than two healthy members have its figure, or where it rests on a judge that
    may not decide anything.

    Args:
        members: all evaluated alike.
    """
    healthy = [member for member in members if not ailments(member)]
    doubtful = bool(members and judge_doubt(members[0]))
    found = []
    for use in _USES:
        for figure in use.figures:
            having = [
                member
                for member in healthy
                if any(one is not None for one in member.by_prompt.get(figure, ()))
            ]
            if len(having) < 2 or (use.judged and doubtful):
                continue
            means = {
                member.name: float(np.mean([one for one in member.by_prompt[figure] if one is not None]))
                for member in having
            }
            best = (min if use.least else max)(having, key=lambda member: means[member.name])
            differences = {
                member.name: difference(member, best, figure) for member in having if member is not best
            }
            alike = [name for name, one in differences.items() if _may_be_zero(one)]
            found.append(BestFor(use.title, figure, best.name, alike, differences))
            break
    return found


def difference(member: Evaluation, other: Evaluation, figure: str) -> Figure:
    """The member's figure less the other's, prompt by prompt; both were measured on the same prompts."""
    pairs = zip(member.by_prompt[figure], other.by_prompt[figure], strict=True)
    values = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    unit = member.metrics[figure].unit if figure in member.metrics else ""
    return interval(values, range(len(values)), unit=unit)


def _may_be_zero(figure: Figure) -> bool:
    """Whether the interval includes 0; yes where there is none."""
    return figure.low is None or figure.high is None or figure.low <= 0 <= figure.high


def use_lines(found: Sequence[BestFor]) -> list[str]:
    """A line for each use, for a terminal."""
    return [
        f"best for: {one.use}: {one.best}"
        + (f" (not told from it: {', '.join(one.alike)})" if one.alike else "")
        for one in found
    ]
