"""The figures of the reports, drawn with matplotlib. Returns drawings; writes no page and decides nothing.

Inline drawings are SVG with a transparent ground whose ink follows the page's text colour, light or dark.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softpref.evaluation.exact import ExactPrompt, entropy

POLICY, REFERENCE, OPTIMUM, BASELINE, CHOSEN = "#2f7fc1", "#8c8c8c", "#e0822c", "#7a5ea8", "#2a9d5c"
_INK = "#0a0b0c"  # stands for the page's text colour in inline drawings


def reward_distribution(
    policy: Sequence[float], reference: Sequence[float], exact: Sequence[ExactPrompt] = ()
) -> str:
    """SVG of the judge's scores of policy and reference samples, with the exact optimum's where known."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7.2, 2.9))
    values = np.concatenate(
        [np.asarray(policy), np.asarray(reference), *(prompt.rewards for prompt in exact)]
    )
    edges = np.linspace(values.min() - 1e-9, values.max() + 1e-9, 33)
    for scores, colour, label in ((reference, REFERENCE, "reference"), (policy, POLICY, "policy")):
        share = np.full(len(scores), 1 / len(scores))
        axes.hist(scores, edges, weights=share, color=colour, alpha=0.35)
        axes.hist(scores, edges, weights=share, histtype="step", color=colour, linewidth=1.3)
        mean = float(np.mean(scores))
        axes.axvline(mean, color=colour, linewidth=1.6, label=f"{label}, mean {mean:.2f}")
    known = [prompt for prompt in exact if np.isfinite(prompt.optimum).all()]
    if known:
        rewards = np.concatenate([prompt.rewards for prompt in known])
        masses = np.concatenate([np.exp(prompt.optimum) for prompt in known]) / len(known)
        label = f"exact optimum, mean {rewards @ masses:.2f}"
        axes.hist(rewards, edges, weights=masses, histtype="step", color=OPTIMUM, linewidth=1.6, label=label)
    axes.set_xlabel("judge's score, nats")
    axes.set_ylabel("share of samples")
    axes.legend(frameon=False, loc="upper left")
    return _svg(figure)


def optimum_against_policy(exact: Sequence[ExactPrompt]) -> str:
    """SVG: probabilities by rank, and policy against optimum for every completion, on log axes."""
    plt = _pyplot()
    figure, (ranks, scatter) = plt.subplots(1, 2, figsize=(9.2, 3.6))
    shortest = min(len(prompt.rewards) for prompt in exact)
    order = [np.argsort(-prompt.optimum)[:shortest] for prompt in exact]
    optimum = np.exp(np.array([p.optimum[rank] for p, rank in zip(exact, order, strict=True)])).mean(0)
    position = np.arange(1, len(optimum) + 1)
    for side, colour, label in (("reference", REFERENCE, "reference"), ("policy", POLICY, "policy")):
        # at the optimum's ranks: a curve that follows the optimum's means the same completions are likely
        mass = np.exp(np.array([getattr(p, side)[rank] for p, rank in zip(exact, order, strict=True)])).mean(
            0
        )
        centres, means = _log_bins(position, mass)
        ranks.plot(centres, means, color=colour, linewidth=1.6, marker="o", markersize=2.5, label=label)
    ranks.plot(position, optimum, color=OPTIMUM, linewidth=1.8, label="exact optimum")
    ranks.set(xscale="log", yscale="log", xlabel="rank under the optimum", ylabel="mean probability")
    ranks.legend(frameon=False)
    x = np.exp(np.concatenate([prompt.optimum for prompt in exact]))
    y = np.exp(np.concatenate([prompt.policy for prompt in exact]))
    low = max(min(x.min(), y.min()), 1e-9)
    scatter.scatter(x, y, s=4, alpha=0.25, color=POLICY, linewidths=0, rasterized=True)
    scatter.plot([low, 1], [low, 1], color=OPTIMUM, linewidth=1.2)
    scatter.set(
        xscale="log",
        yscale="log",
        xlim=(low / 1.5, max(x.max(), y.max()) * 1.5),
        ylim=(low / 1.5, max(x.max(), y.max()) * 1.5),
        xlabel="probability under the optimum",
        ylabel="under the policy",
    )
    return _svg(figure)


def entropy_and_reward(exact: Sequence[ExactPrompt]) -> str:
    """SVG: exact entropy and expected reward of reference, policy and optimum, means over prompts."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 1.8))
    sides = [("optimum", OPTIMUM), ("policy", POLICY), ("reference", REFERENCE)]
    sides = [side for side in sides if np.isfinite(getattr(exact[0], side[0])).all()]
    for panel, title, function in (
        (axes[0], "entropy on the set, nats", lambda logps, rewards: entropy(logps)),
        (axes[1], "expected reward, nats", lambda logps, rewards: float(np.exp(logps) @ rewards)),
    ):
        means = [np.mean([function(getattr(p, side), p.rewards) for p in exact]) for side, _ in sides]
        bars = panel.barh(
            [side for side, _ in sides], means, color=[colour for _, colour in sides], alpha=0.8, height=0.6
        )
        panel.bar_label(bars, fmt="%.2f", padding=4, color=_INK)
        panel.set_title(title, loc="left")
        panel.margins(x=0.15)
        panel.spines["bottom"].set_visible(False)
        panel.tick_params(bottom=False, labelbottom=False, left=False)
    return _svg(figure)


def frontier(members: Sequence[Mapping[str, Any]], chosen: str | None, png: Path) -> str:
    """Draw a sweep's members against each other; write it to `png` and return it as inline SVG.

    Args:
        members: summaries with `name`, `method`, `alpha`, `metrics` and `exact`.
        chosen: name of the member to ring.
    """
    plt = _pyplot()
    figure, panels = plt.subplots(2, 2, figsize=(10.4, 7.4))
    layout = (
        (panels[0, 0], "kl_sequence", "win_rate", "KL to the reference, nats", "win rate"),
        (
            panels[0, 1],
            "kl_sequence",
            "expected_reward",
            "KL to the reference, nats",
            "expected reward, nats",
        ),
        (
            panels[1, 0],
            "entropy_sequence",
            "expected_reward",
            "sequence entropy, nats",
            "expected reward, nats",
        ),
    )
    swept = sorted((m for m in members if _is_swept(m)), key=lambda member: member["alpha"])
    others = [member for member in members if not _is_swept(member)]
    for axes, x, y, x_label, y_label in layout:
        _points(axes, swept, others, chosen, lambda m, x=x: m["metrics"][x], lambda m, y=y: m["metrics"][y])
        axes.set(xlabel=x_label, ylabel=y_label)
        if x == "kl_sequence":
            _spread(axes, [member["metrics"][x]["value"] for member in members])
        if y == "win_rate":
            axes.axhline(0.5, color=REFERENCE, linewidth=0.9, linestyle=":", zorder=0)
        reference = [m["metrics"]["reference_expected_reward"]["value"] for m in members]
        if y == "expected_reward" and None not in reference:
            axes.axhline(np.mean(reference), color=REFERENCE, linewidth=0.9, linestyle=":", zorder=0)
            axes.annotate(
                "reference", (0.995, np.mean(reference)), xycoords=("axes fraction", "data"), ha="right",
                va="bottom", color=REFERENCE, fontsize=8,
            )  # fmt: skip
    _entropy_by_alpha(panels[1, 1], swept, others, chosen)
    handles, labels = panels[1, 1].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper center", ncols=6, frameon=False, bbox_to_anchor=(0.5, 1.0), fontsize=9
    )
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    figure.savefig(png, dpi=140, facecolor="white")
    return _svg(figure, tight=False)


def _entropy_by_alpha(
    axes: Any, swept: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], chosen: str | None
) -> None:
    """Entropy of each member by softness, beside the exact optimum's where it is known."""
    _points(
        axes,
        swept,
        [],
        chosen,
        lambda member: {"value": member["alpha"], "low": None, "high": None},
        lambda member: member["metrics"]["entropy_sequence"],
        named=False,
    )
    for metric, label, style in (
        ("optimum_entropy", "exact optimum", {"color": OPTIMUM, "marker": "D", "linestyle": "--"}),
        (
            "entropy",
            "on the set, exact",
            {"color": POLICY, "marker": "o", "linestyle": ":", "markerfacecolor": "none"},
        ),
    ):
        known = [(m["alpha"], m["exact"][metric]["value"]) for m in swept if m["exact"]]
        known = [(alpha, value) for alpha, value in known if value is not None]
        if known:
            axes.plot(*zip(*known, strict=True), label=label, markersize=5, linewidth=1.4, zorder=2, **style)
    low, high = axes.get_ylim()
    for member in others:
        value = member["metrics"]["entropy_sequence"]["value"]
        if value is not None:
            # a collapsed baseline must not flatten the curves that the panel is there for
            outside = not 2 * low - high <= value <= 2 * high - low
            label = f"{member['name']}: {value:.1f}, off the panel" if outside else member["name"]
            axes.axhline(value, color=BASELINE, linewidth=1.2, linestyle="-.", label=_literal(label))
            if outside:
                axes.set_ylim(low, high)
    alphas = [member["alpha"] for member in swept if member["alpha"] > 0]
    if len(alphas) > 1 and len(alphas) == len(swept):
        axes.set_xscale("log")
        axes.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
        axes.minorticks_off()
    axes.set(xlabel="softness α", ylabel="sequence entropy, nats")


def _points(
    axes: Any,
    swept: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]],
    chosen: str | None,
    x_of: Any,
    y_of: Any,
    named: bool = True,
) -> None:
    """Members as points with intervals: the sweep a line by α, baselines squares, the chosen ringed."""
    for group, colour, marker, line, label in (
        (swept, POLICY, "o", "-", "SPO by α"),
        (others, BASELINE, "s", "", "baseline"),
    ):
        known = [m for m in group if x_of(m)["value"] is not None and y_of(m)["value"] is not None]
        if not known:
            continue
        xs, ys = [x_of(m)["value"] for m in known], [y_of(m)["value"] for m in known]
        axes.errorbar(
            xs,
            ys,
            xerr=_arms([x_of(m) for m in known]),
            yerr=_arms([y_of(m) for m in known]),
            color=colour,
            ecolor=colour + "66",  # intervals step back behind the points
            elinewidth=1.2,
            marker=marker,
            markersize=6,
            linestyle=line,
            linewidth=1.3,
            label=label,
            zorder=3,
        )
        for member, x, y in zip(known, xs, ys, strict=True):
            if member["name"] == chosen:
                axes.plot(
                    x, y, "o", markersize=15, markerfacecolor="none", markeredgecolor=CHOSEN,
                    markeredgewidth=2, label="chosen", zorder=4,
                )  # fmt: skip
            if named:
                text = f"α={member['alpha']:g}" if _is_swept(member) else _literal(member["name"])
                axes.annotate(  # beside its point, where it cannot be taken for a neighbour's
                    text,
                    (x, y),
                    xytext=(13 if member["name"] == chosen else 8, -3),
                    textcoords="offset points",
                    fontsize=9,
                    color=_INK,
                )


def _spread(axes: Any, values: Sequence[float | None]) -> None:
    """A log axis where values differ by more than a factor of ten, so that one does not squeeze the rest."""
    known = [value for value in values if value is not None and value > 0]
    if len(known) == len(values) and known and max(known) > 10 * min(known):
        axes.set_xscale("log")
        axes.set_xlim(min(known) / 2, max(known) * 3)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _is_swept(member: Mapping[str, Any]) -> bool:
    return member["method"] == "spo" and member["alpha"] is not None


def _arms(figures: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Lengths of error bars, `[2, n]`; 0 where there is no interval."""
    return np.array(
        [
            [0.0 if f["low"] is None else max(0.0, f["value"] - f["low"]) for f in figures],
            [0.0 if f["high"] is None else max(0.0, f["high"] - f["value"]) for f in figures],
        ]
    )


def _log_bins(position: np.ndarray, mass: np.ndarray, bins: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Means within bins of equal width on a log axis, so that the rare end is not a cloud of noise."""
    edges = np.unique(np.round(np.geomspace(1, len(position) + 1, bins + 1)).astype(int))
    cells = [slice(low - 1, high - 1) for low, high in itertools.pairwise(edges)]
    return np.array([position[cell].mean() for cell in cells]), np.array(
        [mass[cell].mean() for cell in cells]
    )


def _literal(text: str) -> str:
    """Text that matplotlib must not read as mathematics."""
    return text.replace("$", r"\$")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            **dict.fromkeys(
                ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK
            ),
        }
    )
    return plt


def _svg(figure: Any, *, tight: bool = True) -> str:
    """The figure as an inline SVG element; closes it."""
    if tight:
        figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, dpi=150, metadata={"Date": None})
    _pyplot().close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    return text.replace(_INK, "currentColor").replace("<svg ", '<svg class="chart" ', 1)
