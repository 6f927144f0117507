"""Who may be registered and who becomes champion, as functions of figures. Speaks to no server."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from softpref.registry.config import RegistryConfig

Figure = Mapping[str, Any]
"""One measured figure of `evaluation.json`: value, low, high, n, unit."""


class Champion(NamedTuple):
    """The present champion as the registry knows it; what its version's tags do not say is None.

    Attributes:
        evaluated_on: what its `evaluation_id` is made of, as in `evaluation.json`.
    """

    version: str
    evaluation_id: str | None
    metrics: Mapping[str, Figure]
    evaluated_on: Mapping[str, Any] | None = None


class Verdict(NamedTuple):
    """Whether the champion changes, and the reason in words."""

    moves: bool
    reason: str


def gate_failures(metrics: Mapping[str, Figure], config: RegistryConfig) -> list[str]:
    """What keeps a model from being registered, one sentence per figure; empty when the gate is passed."""
    failures = []
    if config.min_win_rate is not None:
        low = _number(metrics, "win_rate", "low")
        if low is None:
            failures.append(
                "the evaluation gives no interval for win_rate; "
                "evaluate with a judge, or set min_win_rate to null"
            )
        elif low < config.min_win_rate:
            failures.append(
                f"win_rate is {figure_text(metrics['win_rate'])}: its low end is under "
                f"min_win_rate = {config.min_win_rate:g}"
            )
    if config.max_kl is not None:
        high = _number(metrics, "kl_sequence", "high")
        if high is None:
            failures.append("the evaluation gives no interval for kl_sequence, which max_kl asks for")
        elif high > config.max_kl:
            failures.append(
                f"kl_sequence is {figure_text(metrics['kl_sequence'])}: its high end is over "
                f"max_kl = {config.max_kl:g} nats"
            )
    return failures


def challenge(
    metrics: Mapping[str, Figure],
    evaluation_id: str,
    champion: Champion | None,
    config: RegistryConfig,
    evaluated_on: Mapping[str, Any] | None = None,
) -> Verdict:
    """Whether a model that passed the gate takes the champion's place.

    Args:
        evaluated_on: what `evaluation_id` is made of, to say what differs from the champion's.
    """
    if champion is None:
        return Verdict(True, "there was no champion yet and the gate is passed")
    held = f"the champion, version {champion.version},"
    if champion.evaluation_id != evaluation_id:
        return Verdict(
            False,
            f"not comparable: {held} was evaluated "
            f"{_difference(champion.evaluated_on or {}, evaluated_on or {})}; "
            "evaluate the champion as this model was, or move the alias by hand",
        )
    name = config.compare_metric
    mine, theirs = _number(metrics, name, "value"), _number(champion.metrics, name, "value")
    if mine is None or theirs is None:
        return Verdict(False, f"not comparable: {'this model' if mine is None else held} has no {name}")
    against = f"{name} {figure_text(metrics[name])} against {figure_text(champion.metrics[name])} of {held}"
    against = against.rstrip(",")
    if mine <= theirs:
        return Verdict(False, f"it does not beat the champion: {against}")
    if config.beyond_noise:
        low, high = _number(metrics, name, "low"), _number(champion.metrics, name, "high")
        if low is None or high is None or low <= high:
            return Verdict(False, f"it beats the champion by no more than noise: {against}")
    return Verdict(True, f"it beats the champion on the same evaluation: {against}")


_PARTS = ("data", "judge", "reference", "settings")  # of `evaluated_on`


def _difference(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """How the champion was evaluated differently."""
    if any(part not in parts for part in _PARTS for parts in (theirs, mine)):
        return "otherwise; in what, its version does not tell"
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


def figure_text(figure: Figure) -> str:
    """`0.712 [0.684, 0.741], n=400`, as far as the figure has these parts."""
    text = f"{figure['value']:.4g}" if figure.get("value") is not None else "none"
    if figure.get("low") is not None and figure.get("high") is not None:
        text += f" [{figure['low']:.4g}, {figure['high']:.4g}]"
    return text + (f", n={figure['n']:g}" if figure.get("n") is not None else "")


def _number(metrics: Mapping[str, Figure], name: str, part: str) -> float | None:
    value = (metrics.get(name) or {}).get(part)
    return value if value is not None and math.isfinite(value) else None
