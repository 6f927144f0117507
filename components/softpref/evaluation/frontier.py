"""The drawing of a sweep: its members against one another and against theory. Decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from softpref.evaluation.charts import INK, REFERENCE, pyplot, svg
from softpref.evaluation.curves import (
    Curve,
    Point,
    all_exact,
    curves,
    exact_point,
    most_entropy,
    parameter,
    point,
    shortfall,
    softmax_points,
    theory_point,
    theory_points,
)
from softpref.evaluation.labels import Labels
from softpref.fitness import number
from softpref.records.evaluation import Evaluation
from softpref.records.figures import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that the colour-blind tell apart, on light and dark pages (after Okabe and Ito), and markers.
_METHODS = {
    "spo": ("#0072b2", "o"),
    "dpo": ("#d55e00", "s"),
    "ipo": ("#009e73", "D"),
    "rdpo": ("#e69f00", "^"),
    "slic": ("#cc79a7", "v"),
    "tdpo": ("#56b4e9", "P"),
    "sppo": ("#8a8325", "X"),
    # further ones share the colours, with markers of their own
    "tdpo1": ("#56b4e9", "p"),
    "ropo": ("#e69f00", "<"),
    "apo_zero": ("#cc79a7", ">"),
    "apo_down": ("#cc79a7", "d"),
    "simpo": ("#009e73", "*"),
    "cpo": ("#d55e00", "H"),
    "orpo": ("#8a8325", "8"),
    "kto": ("#0072b2", "h"),
}


def frontier(members: Sequence[Evaluation], chosen: str | None, png: Path) -> str:
    """Draw a sweep's members against each other; write it to `png` and return it as inline SVG.

    First comes entropy against expected reward, which is what softness trades, with exact figures and theory
    where they are known; or where theory is known by samples, expected reward against KL. Then win rate and
    expected reward against KL, and SPO's entropy by α.

    Args:
        chosen: name of the member to ring.
    """
    plt = pyplot()
    drawn = curves(members)
    exact = all_exact(members)
    maximum = softmax_points(members) if exact else []
    swept = [curve for curve in drawn if curve.method == "spo" and curve.plain]
    figure = plt.figure(figsize=(11.6, 9.6))
    grid = figure.add_gridspec(2, 12, height_ratios=(1.3, 1))
    upper = [figure.add_subplot(grid[0, :7] if maximum else grid[0, :])]
    theory = not maximum and bool(theory_points(members))
    below = [("win_rate", "win rate"), ("expected_reward", "expected reward")]
    if theory:
        panels = [_against_kl(upper[0], drawn, chosen, "expected_reward", "expected reward")]
    elif any(point(member, exact) for member in members):
        panels = [_entropy_and_reward(upper[0], drawn, chosen, maximum, exact)]
    else:  # a judge that gives no scores
        panels = [_against_kl(upper[0], drawn, chosen, *below[0])]
        below = []
    if maximum:
        panels.append(_shortfall(figure.add_subplot(grid[0, 7:]), drawn, chosen, maximum))
    wide = 12 // max(1, len(below) + bool(swept))
    for place, (metric, title) in enumerate(below):
        axes = figure.add_subplot(grid[1, wide * place : wide * (place + 1)])
        if theory and metric == "expected_reward":  # it is above, and large
            panels.append(_entropy_and_reward(axes, drawn, chosen, maximum, exact, noted=False))
        else:
            panels.append(_against_kl(axes, drawn, chosen, metric, title))
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if "chosen" in handles:
        handles["chosen"] = handles.pop("chosen")  # last, behind the methods
    if swept:
        _entropy_by_alpha(figure.add_subplot(grid[1, wide * len(below) :]), swept)
    columns = min(5, len(handles))
    figure.legend(
        handles.values(),
        handles,
        loc="upper center",
        ncols=columns,
        frameon=False,
        bbox_to_anchor=(0.5, 1.0),
        columnspacing=1.6,
        handlelength=2.6,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.985 - 0.021 * -(-len(handles) // columns)), h_pad=1.8)
    for labels in panels:
        labels.place(figure)
    figure.savefig(png, dpi=140, facecolor="white")
    return svg(figure, tight=False)


def look(curve: Curve, drawn: Sequence[Curve]) -> dict[str, Any]:
    """Colour and marker by method; variants of it are hollow, with dashes of their own."""
    colour, marker = _METHODS.get(curve.method, (REFERENCE, "h"))
    variant = [one for one in drawn if one.method == curve.method].index(curve)
    return {
        "color": colour,
        "marker": marker,
        "linestyle": ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))[variant % 5],
        "markerfacecolor": colour if variant == 0 else "none",
        "markersize": 6.5,
        "linewidth": 1.5,
        "label": f"{curve.name} ({curve.symbol})",
    }


def _curve(
    labels: Labels,
    axes: Axes,
    curve: Curve,
    drawn: Sequence[Curve],
    chosen: str | None,
    place_of: Callable[[Evaluation], Point | None],
) -> list[Point]:
    """Draw one curve where `place_of` puts its members, the chosen ringed; labels say the parameter."""
    known = [(member, place) for member in curve.members if (place := place_of(member))]
    places = [place for _, place in known]
    if places:
        axes.plot(*zip(*places, strict=True), zorder=4, **look(curve, drawn))
        labels.keep_clear(places)
    for member, place in known:
        value, ringed = parameter(member), member.name == chosen
        text = _literal(member.name) if value is None else f"{value:g}"
        labels.add(place, text, radius=8.5 if ringed else 4.0)
        if ringed:
            axes.plot(
                *place, "o", markersize=15, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.6,
                label="chosen", zorder=5,
            )  # fmt: skip
    return places


def _entropy_and_reward(
    axes: Axes,
    drawn: Sequence[Curve],
    chosen: str | None,
    maximum: Sequence[Point],
    exact: bool,
    *,
    noted: bool = True,
) -> Labels:
    """Entropy against expected reward, the reference, each exact optimum, and what is possible at all."""
    labels = Labels(axes)
    places: list[Point] = []
    optima = 0
    for curve in drawn:
        places += _curve(labels, axes, curve, drawn, chosen, lambda member: point(member, exact))
        for member in curve.members if exact else ():
            ours, best = point(member, exact), exact_point(member, "optimum")
            if ours and best:
                optima += 1
                colour = look(curve, drawn)["color"]
                axes.plot(*zip(ours, best, strict=True), color=colour, linewidth=0.9, zorder=2)
                axes.plot(*best, color=colour, marker="_", markersize=11, markeredgewidth=2, zorder=2)
    if exact and drawn and (reference := exact_point(drawn[0].members[0], "reference")):
        axes.plot(
            *reference, color=REFERENCE, marker="*", markersize=11, linestyle="", label="reference", zorder=3
        )
        labels.add(reference, radius=5.5)
        places.append(reference)
    if maximum and places:
        x, y = np.array(places).T
        rewards = np.linspace(maximum[0].reward, maximum[-1].reward, 400)
        most = most_entropy(rewards, maximum)
        axes.plot(
            rewards, most, color=INK, linewidth=1.0, alpha=0.55, zorder=1,
            label="softmax(reward / τ), the most possible",
        )  # fmt: skip
        labels.keep_clear(list(map(Point, rewards, most))[::8])
        top = max(y.max(), np.interp(x.min(), rewards, most))
        for (low, high), limit in (((x.min(), x.max()), axes.set_xlim), ((y.min(), top), axes.set_ylim)):
            margin = max(0.06 * (high - low), 0.02)
            limit(low - margin, high + margin)
    if noted:
        _note(axes, 0.02, 0.03, "Bars: the exact optimum that a point should reach." if optima else "")
    axes.set_title(
        f"Entropy kept at each expected reward, {'on the set, exact' if exact else 'of samples'}", loc="left"
    )
    axes.set(xlabel="expected reward, nats", ylabel="entropy, nats")
    return labels


def _shortfall(axes: Axes, drawn: Sequence[Curve], chosen: str | None, maximum: Sequence[Point]) -> Labels:
    """The same, magnified: what each member lacks of the most entropy that its reward allows."""
    from matplotlib.ticker import LogLocator, NullLocator

    labels = Labels(axes)

    def lacking(member: Evaluation) -> Point | None:
        ours = point(member, exact=True)
        return ours and Point(ours.reward, max(shortfall(ours, maximum), 1e-3))

    for curve in drawn:
        _curve(labels, axes, curve, drawn, chosen, lacking)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(0.09)
    axes.set_title("Entropy short of the most possible", loc="left")
    axes.set(xlabel="expected reward, nats", ylabel="nats; lower is better")
    return labels


def _against_kl(axes: Axes, drawn: Sequence[Curve], chosen: str | None, metric: str, title: str) -> Labels:
    """A figure of the samples against KL to the reference, with intervals, and theory's where known."""
    labels = Labels(axes)

    def place_of(member: Evaluation) -> Point | None:
        x, y = (number(member.metrics, name) for name in ("kl_sequence", metric))
        return None if x is None or y is None else Point(x, y)

    for curve in drawn:
        _curve(labels, axes, curve, drawn, chosen, place_of)
        known = [(member.metrics, place) for member in curve.members if (place := place_of(member))]
        if known:
            x, y = np.array([place for _, place in known]).T
            axes.errorbar(
                x,
                y,
                xerr=_arms([metrics["kl_sequence"] for metrics, _ in known]),
                yerr=_arms([metrics[metric] for metrics, _ in known]),
                ecolor=look(curve, drawn)["color"] + "66",  # intervals step back behind the points
                elinewidth=1.2,
                linestyle="",
                zorder=2,
            )
    members = [member for curve in drawn for member in curve.members]
    if metric == "expected_reward" and (most := theory_points(members)):
        axes.plot(
            *zip(*most, strict=True), color=INK, linewidth=1.0, alpha=0.55, zorder=1,
            label="π_ref · exp(reward / τ), the most possible",
        )  # fmt: skip
        labels.keep_clear([Point(*pair) for pair in most])
        optima = 0
        for curve in drawn:
            for member in curve.members:
                ours, best = place_of(member), theory_point(member)
                if ours and best:
                    optima += 1
                    style = {"color": look(curve, drawn)["color"], "zorder": 2}
                    axes.plot(*zip(ours, best, strict=True), linewidth=0.9, **style)
                    axes.plot(*best, marker="_", markersize=11, markeredgewidth=2, **style)
        if optima:
            _note(axes, 0.98, 0.12, "Bars: the optimum of each one's own objective.", side="right")
    _spread(axes, [number(member.metrics, "kl_sequence") for member in members])
    axes.set_title(f"{title.capitalize()} of samples", loc="left")
    axes.set(xlabel="KL to the reference, nats", ylabel=title if metric == "win_rate" else f"{title}, nats")
    rewards = [number(member.metrics, "reference_expected_reward") for member in members]
    known_rewards = [reward for reward in rewards if reward is not None]
    level = 0.5 if metric == "win_rate" else float(np.mean(known_rewards or np.nan))
    if len(known_rewards) == len(rewards) or metric == "win_rate":
        axes.axhline(level, color=REFERENCE, linewidth=0.9, linestyle=":", zorder=0)
        axes.annotate(
            "reference", (0.995, level), xycoords=("axes fraction", "data"), ha="right", va="bottom",
            color=REFERENCE, fontsize=8,
        )  # fmt: skip
    return labels


def _entropy_by_alpha(axes: Axes, swept: Sequence[Curve]) -> None:
    """Entropy of SPO's members by softness, beside the exact optimum's where it is known."""
    for curve in swept:
        of = f"{curve.name}, " if len(swept) > 1 else ""
        for group, metric, label, style in (
            ("metrics", "entropy_sequence", "of samples", {}),
            ("exact", "entropy", "on the set, exact", {"linestyle": ":", "markerfacecolor": "none"}),
            (
                "exact",
                "optimum_entropy",
                "exact optimum",
                {"linestyle": "--", "color": INK, "marker": "_", "markersize": 11},
            ),
        ):
            known = [(m.alpha, number(getattr(m, group) or {}, metric)) for m in curve.members]
            known = [(alpha, value) for alpha, value in known if value is not None]
            if known:
                axes.plot(*zip(*known, strict=True), **{**look(curve, swept), **style, "label": of + label})
    alphas = sorted({m.alpha for curve in swept for m in curve.members if m.alpha is not None})
    if len(alphas) > 1 and alphas[0] > 0:
        axes.set_xscale("log")
        axes.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
        axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8.5)
    axes.set_title("SPO's entropy by softness", loc="left")
    axes.set(xlabel="softness α", ylabel="entropy, nats")


def _note(axes: Axes, x: float, y: float, bars: str, side: str = "left") -> None:
    """Say what numbers and bars mean."""
    text = f"Numbers beside points: α of SPO, β of the others.\n{bars}".rstrip()
    axes.text(x, y, text, transform=axes.transAxes, fontsize=8.5, alpha=0.75, linespacing=1.5, ha=side)


def _spread(axes: Axes, values: Sequence[float | None]) -> None:
    """A log axis where values differ by more than a factor of ten, so that one does not squeeze the rest."""
    known = [value for value in values if value is not None and value > 0]
    if len(known) == len(values) and known and max(known) > 10 * min(known):
        axes.set_xscale("log")
        axes.set_xlim(min(known) / 2, max(known) * 3)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _arms(figures: Sequence[Figure]) -> np.ndarray:
    """Lengths of error bars, `[2, n]`; 0 where there is no interval."""
    ends = [(f.value or 0.0, f.low, f.high) for f in figures]
    below = [0.0 if low is None else max(0.0, value - low) for value, low, _ in ends]
    above = [0.0 if high is None else max(0.0, high - value) for value, _, high in ends]
    return np.array([below, above])


def _literal(text: str) -> str:
    """Text that matplotlib must not read as mathematics."""
    return text.replace("$", r"\$")
