"""The curves of a sweep: models of one method by their parameter, and their entropy at equal expected reward.

Draws and chooses nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from softpref.evaluation.theory import TRUSTED
from softpref.fitness import number
from softpref.records.comparison import EqualReward, EqualRewardRow
from softpref.records.evaluation import Evaluation
from softpref.records.figures import Figures


class Curve(NamedTuple):
    """Models that differ in one parameter.

    Attributes:
        name: what a reader calls them, like `SPO` or `SPO, 3 rounds on samples`.
        method: as the training stage names it.
        symbol: of the parameter, `α`, `β` or `λ`.
        members: by that parameter.
    """

    name: str
    method: str
    symbol: str
    members: list[Evaluation]

    @property
    def plain(self) -> bool:
        """Whether the models were trained once, on the preferences alone, and are not extrapolated."""
        return not _variant(self.members[0])


class Point(NamedTuple):
    """Expected reward and entropy of a model, both in nats."""

    reward: float
    entropy: float


def curves(members: Sequence[Evaluation]) -> list[Curve]:
    """Sort members into curves: SPO by α first, then other methods by β, each followed by its variants."""
    spo = [member for member in members if member.method == "spo"]
    several_betas = len({member.beta for member in spo}) > 1
    several_anchors = len({member.anchor for member in spo}) > 1
    groups: dict[tuple[str, ...], list[Evaluation]] = {}
    for member in sorted(members, key=position):
        # SPO's base measure and the strength of its regulariser are named only where they vary
        ours = member.method == "spo"
        anchor = f"anchor {member.anchor:g}" if ours and several_anchors else ""
        beta = f"β = {member.beta:g}" if ours and several_betas else ""
        key = (member.method or "", anchor, beta, *_variant(member))
        groups.setdefault(key, []).append(member)
    found = []
    for (method, *notes), group in groups.items():
        name = ", ".join([method.upper() or "not of softpref", *filter(None, notes)])
        symbol = "λ" if _weight(group[0]) is not None else _strength(group[0])[0]
        found.append(Curve(name, method, symbol, group))
    return found


def position(member: Evaluation) -> tuple[object, ...]:
    """Sorts members: SPO before other methods, each before its variants, by parameter."""
    method = member.method or ""
    value = parameter(member)
    known = value is not None, value or 0.0
    return method != "spo", method, _variant(member), -member.anchor, *known, member.name


def parameter(member: Evaluation) -> float | None:
    """What orders a member within its curve: α of SPO, β of other methods; None where there is none.

    Of one that learned dimensions one after another it is λ, what the earlier ones weigh in the last round.
    """
    weight = _weight(member)
    return _strength(member)[1] if weight is None else weight


def _strength(member: Evaluation) -> tuple[str, float | None]:
    """Softness or strength, and its symbol."""
    return ("α", member.alpha) if member.method == "spo" else ("β", member.beta)


def _weight(member: Evaluation) -> float | None:
    """λ, where it is one for all earlier dimensions."""
    weights = set(member.dimension_weights)
    return weights.pop() if len(weights) == 1 else None


def all_exact(members: Sequence[Evaluation]) -> bool:
    """Whether exact figures of every member are known."""
    return bool(members) and all(member.exact for member in members)


def point(member: Evaluation, exact: bool) -> Point | None:
    """Where a member stands: exactly, given that it stays on the set, or by its samples; None if unknown."""
    group, entropy = ("exact", "entropy") if exact else ("metrics", "entropy_sequence")
    return _point(getattr(member, group) or {}, "expected_reward", entropy)


def exact_point(member: Evaluation, of: Literal["optimum", "reference"]) -> Point | None:
    """Where the optimum of a member's objective, or the reference, stands exactly; None if unknown."""
    return _point(member.exact or {}, f"{of}_expected_reward", f"{of}_entropy")


def theory_point(member: Evaluation) -> tuple[float, float] | None:
    """KL and expected reward of the optimum of a member's objective, where samples estimate them well."""
    figures = member.theory or {}
    if (number(figures, "effective_sample_size") or 0.0) < TRUSTED:
        return None
    kl, reward = (number(figures, name) for name in ("optimum_kl", "optimum_expected_reward"))
    return None if kl is None or reward is None else (kl, reward)


def theory_points(members: Sequence[Evaluation]) -> list[tuple[float, float]]:
    """KL and the most expected reward there, from the first member that knows it; else empty."""
    known = [pairs for member in members if len(pairs := member.reward_frontier or []) > 1]
    return [(kl, reward) for kl, reward in known[0]] if known else []


def softmax_points(members: Sequence[Evaluation]) -> list[Point]:
    """The most entropy at each expected reward, from the first member that knows it; else empty."""
    known = [pairs for member in members if len(pairs := member.softmax_frontier or []) > 1]
    return [Point(*pair) for pair in known[0]] if known else []


def equal_reward(members: Sequence[Evaluation]) -> EqualReward | None:
    """Entropy of every curve at the expected rewards of the SPO members, interpolated within it.

    By exact figures if every member has them. Where the softmax frontier is known it is the first curve,
    `maximum`. None without SPO members, or with nothing beside them.
    """
    exact = all_exact(members)
    maximum = softmax_points(members) if exact else []
    drawn = curves(members)
    lines = {
        curve.name: points
        for curve in drawn
        if (points := [place for member in curve.members if (place := point(member, exact))])
    }
    rows: list[EqualRewardRow] = []
    for curve in drawn:
        for member in curve.members if curve.method == "spo" and curve.plain else ():
            if (place := point(member, exact)) is None:
                continue
            entropies: dict[str, float | None] = {}
            if maximum:
                entropies["maximum"] = place.entropy + shortfall(place, maximum)
            entropies |= {name: entropy_at(points, place.reward, maximum) for name, points in lines.items()}
            rows.append(
                {
                    "name": member.name,
                    "curve": curve.name,
                    "expected_reward": place.reward,
                    "entropy": entropies,
                }
            )
    if not rows or len(rows[0]["entropy"]) < 2:
        return None
    return {"basis": "exact" if exact else "samples", "curves": list(rows[0]["entropy"]), "rows": rows}


def entropy_at(points: Sequence[Point], reward: float, maximum: Sequence[Point] = ()) -> float | None:
    """Entropy at `reward` between the `points` of a curve, in their order; None outside their range.

    Linear in reward; where the `maximum` is known, the shortfall from it is interpolated, since entropy is
    concave: a straight line between distant points would lie below what the method gives between them. Where
    a curve passes this reward more than once, the highest entropy counts.
    """

    def lacking(place: Point) -> float:
        return shortfall(place, maximum) if maximum else -place.entropy

    found = [lacking(place) for place in points if place.reward == reward]
    for a, b in itertools.pairwise(points):
        if min(a.reward, b.reward) < reward < max(a.reward, b.reward):
            share = (reward - a.reward) / (b.reward - a.reward)
            found.append((1 - share) * lacking(a) + share * lacking(b))
    if not found:
        return None
    return (shortfall(Point(reward, 0.0), maximum) if maximum else 0.0) - min(found)


def shortfall(place: Point, maximum: Sequence[Point]) -> float:
    """Nats of entropy that a point lacks of the most at its expected reward; ≥ 0 up to interpolation."""
    return float(most_entropy(np.array([place.reward]), maximum)[0]) - place.entropy


def most_entropy(rewards: np.ndarray, maximum: Sequence[Point]) -> np.ndarray:
    """The `maximum` at each of `rewards`, smooth between its points and level beyond them; `[n]` nats."""
    from scipy.interpolate import PchipInterpolator

    x, y = np.array(maximum).T
    return np.asarray(PchipInterpolator(x, y)(rewards.clip(x[0], x[-1])))


def _variant(member: Evaluation) -> tuple[str, ...]:
    """What sets a member apart from one trained once on the preferences, in words."""
    notes = [", then ".join(member.dimensions)] if member.dimensions else []
    if _weight(member) is not None:
        symbol, value = _strength(member)
        notes.append(f"{symbol} = {value:g}")
    elif member.dimension_weights:
        notes.append(f"λ = {', '.join(format(weight, 'g') for weight in member.dimension_weights)}")
    strength = member.beta if member.method == "spo" else member.kl_beta
    if member.kl_beta and member.kl_on != "none":
        notes.append(f"KL β = {member.kl_beta:g}")
    if strength and member.kl_on != "samples":
        notes.append("no KL term" if member.kl_on == "none" else f"KL on {member.kl_on}")
    if member.rounds != 1 or member.train_on != "preferences":
        times = f"{member.rounds} round{'s' if member.rounds != 1 else ''}"
        notes.append(f"{times} on {member.train_on.replace('_', '-')}")
    if member.extrapolation:
        notes.append(f"extrapolated by {member.extrapolation:g}")
    return tuple(notes)


def _point(figures: Figures, reward: str, entropy: str) -> Point | None:
    x, y = (number(figures, name) for name in (reward, entropy))
    return None if x is None or y is None else Point(x, y)
