"""What the pages' script draws and lets readers browse, as JSON. Draws, measures and decides nothing."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from softpref.evaluation.curves import (
    Curve,
    all_exact,
    curves,
    parameter,
    softmax_points,
    theory_point,
    theory_points,
)
from softpref.evaluation.frontier import look
from softpref.evaluation.meanings import LABELS, of_reference, title
from softpref.fitness import number
from softpref.judges.reward_model import lower_scores
from softpref.records.evaluation import DrawnText, Evaluation, Reliability

MOST_PROMPTS = 200
_MOST_SAMPLES = 8  # of a model, for a prompt
_MOST_CHARACTERS = 1_500_000  # in one page

_SYMBOLS = {  # matplotlib's markers and lines, as Plotly calls them
    "o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "v": "triangle-down", "P": "cross",
    "X": "x", "h": "hexagon",
}  # fmt: skip
_DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
_VIEWS = (
    ("Entropy for reward", "exact/expected_reward", "exact/entropy"),
    ("Reward for KL", "kl_sequence", "expected_reward"),
    ("Win rate for KL", "kl_sequence", "win_rate"),
    ("Entropy for reward, of samples", "expected_reward", "entropy_sequence"),
    ("Good variety for reward", "expected_reward", "good_diversity"),
)

_KEYS = (*LABELS, *(f"exact/{name}" for name in LABELS))


class Calibrated(NamedTuple):
    """A model on the reliability diagram."""

    name: str
    color: str
    bins: Sequence[Reliability]


def frontier_data(members: Sequence[Evaluation], chosen: str | None) -> dict[str, object]:
    """A sweep's figures by curve, the axes to choose from, theory's lines and optima, and the reference.

    Figures of samples have their own names, exact ones `exact/NAME`; a value is `[value, low, high]`.

    Args:
        chosen: name of the member to ring.
    """
    drawn = curves(members)
    known = {key: unit for member in members for key, (_, unit) in _figures(member).items()}
    known = {key: known[key] for key in (*_KEYS, *known) if key in known}  # in the order of the labels
    views = [(name, x, y) for name, x, y in (*_trade_offs(known), *_VIEWS) if x in known and y in known]
    if not all_exact(members):
        views = [view for view in views if "exact/" not in view[1] or "reward/" in view[1]]
        if not theory_points(members):  # as the drawing: entropy for reward comes first
            views.sort(key=lambda view: view[2] != "entropy_sequence")
    return {
        "axes": [{"key": key, "title": _title(key), "unit": unit} for key, unit in known.items()],
        "views": [{"title": name, "x": x, "y": y} for name, x, y in views],
        "curves": [_curve(curve, drawn, chosen) for curve in drawn],
        "reference": _reference(members[0]) if members else {},
        "lines": [
            {"title": name, "x": x, "y": y, "points": points}
            for name, x, y, points in (
                (
                    "most entropy possible: softmax(reward / τ)",
                    "exact/expected_reward",
                    "exact/entropy",
                    [list(point) for point in softmax_points(members)] if all_exact(members) else [],
                ),
                (
                    "most reward possible: π_ref · exp(reward / τ)",
                    "kl_sequence",
                    "expected_reward",
                    [list(point) for point in theory_points(members)],
                ),
            )
            if points
        ],
    }


def _trade_offs(known: Collection[str]) -> list[tuple[str, str, str]]:
    """A view of each two dimensions of preference: expected reward by one against that by the other."""
    found = []
    for prefix, note in (("exact/expected_reward/", ""), ("expected_reward/", ", of samples")):
        names = [key.removeprefix(prefix) for key in known if key.startswith(prefix)]
        found += [
            (f"{second} for {first}{note}", prefix + first, prefix + second)
            for first, second in itertools.combinations(names, 2)
        ]
    return found


def calibrated(members: Sequence[Evaluation]) -> list[Calibrated]:
    """Those of the members that have bins, in the colour of their method: lighter, the larger α or β."""
    drawn = curves(members)
    return [
        Calibrated(
            member.name,
            _shade(look(curve, drawn)["color"], place / max(1, len(curve.members) - 1)),
            member.reliability,
        )
        for curve in drawn
        for place, member in enumerate(curve.members)
        if member.reliability
    ]


def _shade(colour: str, lightness: float) -> str:
    """A hexadecimal colour, from a little darker at lightness 0 to nearly half way to white at 1."""
    share, target = (lightness - 0.25) * 0.6, 255 if lightness > 0.25 else 0
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + abs(share) * (target - part)):02x}" for part in parts)


def samples_data(
    sides: Sequence[tuple[str, Sequence[Sequence[DrawnText]]]], prompts: Sequence[str], *, of: int
) -> dict[str, object]:
    """Samples by prompt, of the reference and of models; as many prompts as fit in a page.

    Args:
        sides: a title and the samples of each prompt; one that ends early has none for the rest.
        prompts: in the same order.
        of: how many prompts there were.
    """
    shown: list[dict[str, object]] = []
    judged, sure, left = False, False, _MOST_CHARACTERS
    for i, prompt in enumerate(prompts):
        drawn = [list(side[i][:_MOST_SAMPLES]) if i < len(side) else [] for _, side in sides]
        left -= len(prompt) + sum(len(sample.text) for side in drawn for sample in side)
        if shown and left < 0:
            break
        surely = iter(_surely([sample for side in drawn for sample in side]))
        told = [[_sample(sample) | next(surely) for sample in side] for side in drawn]
        sure |= any("surely" in sample for side in told for sample in side)
        judged |= any("score" in sample or "win" in sample for side in told for sample in side)
        shown.append({"prompt": prompt, "sides": told})
    return {
        "sides": [title for title, _ in sides],
        "prompts": shown,
        "of": of,
        "judged": judged,
        "sure": sure,
    }


def _surely(samples: Sequence[DrawnText]) -> list[dict[str, float]]:
    """Of each sample of a prompt the score that nine of ten heads of the judge exceed, if it has several."""
    if not samples or not all(sample.heads for sample in samples):
        return [{} for _ in samples]
    found = lower_scores(np.array([sample.heads for sample in samples]))
    return [{"surely": value} for value in found.tolist()]


def _sample(sample: DrawnText) -> dict[str, object]:
    """What a reader sees of a sample; what a judge did not give is left out."""
    values = sample._asdict()
    wanted = ("text", "score", "tokens", "truncated", "win", "reason")
    return {name: value for name in wanted if (value := values.get(name)) is not None}


def _curve(curve: Curve, drawn: Sequence[Curve], chosen: str | None) -> dict[str, object]:
    return {"name": f"{curve.name} ({curve.symbol})", **_look(curve, drawn)} | {
        "members": [
            {
                "name": member.name,
                "label": "" if (value := parameter(member)) is None else f"{value:g}",
                "chosen": member.name == chosen,
                "values": {key: values for key, (values, _) in _figures(member).items()},
                "optimum": _optimum(member),
            }
            for member in curve.members
        ]
    }


def _look(curve: Curve, drawn: Sequence[Curve]) -> dict[str, object]:
    """The colour, marker and line that the drawing gives a curve."""
    style = look(curve, drawn)
    return {
        "color": style["color"],
        "symbol": _SYMBOLS[style["marker"]] + ("-open" if style["markerfacecolor"] == "none" else ""),
        "dash": _DASHES.get(style["linestyle"], "longdashdot"),
    }


def _figures(member: Evaluation) -> dict[str, tuple[list[float | None], str]]:
    """Value, low and high, and unit, of each figure whose value is known and that is a model's own."""
    others = {of_reference(name) for name in LABELS}
    return {
        f"{group}{name}": ([figure.value, figure.low, figure.high], figure.unit)
        for group, figures in (("", member.metrics), ("exact/", member.exact or {}))
        for name, figure in figures.items()
        if figure.value is not None
        and name.partition("/")[0] not in others
        and not name.startswith("optimum_")
    }


def _optimum(member: Evaluation) -> dict[str, float]:
    """Where the optimum of a member's own objective lies, by theory."""
    exact = member.exact or {}
    names = ["entropy", *(name for name in exact if name.partition("/")[0] == "expected_reward")]
    found = {f"exact/{name}": number(exact, f"optimum_{name}") for name in names}
    if best := theory_point(member):
        found |= dict(zip(("kl_sequence", "expected_reward"), best, strict=True))
        theory = member.theory or {}
        found |= {
            name.removeprefix("optimum_"): number(theory, name)
            for name in theory
            if name.startswith("optimum_expected_reward/")
        }
    return {key: value for key, value in found.items() if value is not None}


def _reference(member: Evaluation) -> dict[str, float]:
    """The reference's figures, as far as one evaluation knows them."""
    groups = {"": member.metrics, "exact/": member.exact or {}}
    found = {
        f"{group}{name}": number(figures, of_reference(name))
        for group, figures in groups.items()
        for name in (*LABELS, *(name for name in figures if "/" in name))
    }
    found |= {"kl_sequence": 0.0, "kl_token": 0.0, "win_rate": 0.5, "length_controlled_win_rate": 0.5}
    return {key: value for key, value in found.items() if value is not None}


def _title(key: str) -> str:
    name = key.removeprefix("exact/")
    return f"{title(name)}, exact" if key.startswith("exact/expected_reward") else title(name)
