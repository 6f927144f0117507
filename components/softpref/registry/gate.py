"""Who becomes champion, as a function of figures. Who may be registered, `softpref.fitness` says."""

from __future__ import annotations

from typing import NamedTuple

from softpref.fitness import figure_text, judge_doubt, number
from softpref.records.evaluation import EvaluatedOn, Evaluation
from softpref.records.figures import LEAST_PROMPTS, Figures
from softpref.registry.config import RegistryConfig

_JUDGED = ("win_rate", "expected_reward")  # metrics that are only as good as the judge


class Champion(NamedTuple):
    """The current champion as its version's tags describe it; what they lack is None."""

    version: str
    evaluation_id: str | None
    metrics: Figures
    evaluated_on: EvaluatedOn | None = None


class Verdict(NamedTuple):
    """Whether the champion changes, and the reason in words."""

    moves: bool
    reason: str


def challenge(evaluation: Evaluation, champion: Champion | None, config: RegistryConfig) -> Verdict:
    """Whether a model that passed the gate takes the champion's place.

    Nobody is promoted by a judge that is no better than a coin or than length alone, nor by a figure without
    an interval.
    """
    metrics, name = evaluation.metrics, config.compare_metric
    if name in _JUDGED and (doubt := judge_doubt(evaluation)):
        return Verdict(False, f"nobody becomes champion by this judge: {doubt}")
    if name not in metrics:
        return Verdict(
            False,
            f"nobody becomes champion by {name}, which the evaluation lacks; compare_metric names another",
        )
    if number(metrics, name, "low") is None:
        return Verdict(
            False,
            f"nobody becomes champion without an interval of {name}, which takes {LEAST_PROMPTS} held-out "
            "prompts",
        )
    if champion is None:
        return Verdict(True, "there was no champion yet and the gate is passed")
    held = f"the champion, version {champion.version},"
    if champion.evaluation_id != evaluation.evaluation_id:
        return Verdict(
            False,
            f"not comparable: {held} was evaluated "
            f"{_difference(champion.evaluated_on, evaluation.evaluated_on)}; "
            "evaluate the champion as this model was, or move the alias by hand",
        )
    mine, theirs = number(metrics, name), number(champion.metrics, name)
    if mine is None or theirs is None:
        return Verdict(False, f"not comparable: {'this model' if mine is None else held} has no {name}")
    against = f"{name} {figure_text(metrics[name])} against {figure_text(champion.metrics[name])} of {held}"
    against = against.rstrip(",")
    if mine <= theirs:
        return Verdict(False, f"it does not beat the champion: {against}")
    if config.beyond_noise:
        low, high = number(metrics, name, "low"), number(champion.metrics, name, "high")
        if low is None or high is None or low <= high:
            return Verdict(False, f"it beats the champion by no more than noise: {against}")
    return Verdict(True, f"it beats the champion on the same evaluation: {against}")


def _difference(theirs: EvaluatedOn | None, mine: EvaluatedOn | None) -> str:
    """How the champion was evaluated differently."""
    if not theirs or not mine or not EvaluatedOn.__required_keys__ <= theirs.keys() & mine.keys():
        return "otherwise; its version does not say how"
    found = []
    if theirs["data"] != mine["data"]:
        found.append("on other test rows")
    if theirs["judge"] != mine["judge"]:
        names = theirs["judge"].split()[0], mine["judge"].split()[0]
        same = f"another {names[0]} judge (its scores differ)"
        found.append(f"by {same if names[0] == names[1] else f'the {names[0]} judge (here {names[1]})'}")
    if theirs["reference"] != mine["reference"]:
        found.append("against another reference (its weights differ)")
    changed = [
        f"{name} = {theirs['settings'].get(name)} (here {value})"
        for name, value in mine["settings"].items()
        if theirs["settings"].get(name) != value
    ]
    if changed:
        found.append(f"with {', '.join(changed)}")
    return " and ".join(found) or "otherwise"
