"""Drawings of one model for its report, and how all drawings look. Writes no page and decides nothing.

Inline drawings are SVG with a transparent ground whose ink follows the page's text colour, light or dark.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from softpref.evaluation.exact import ExactPrompt, entropy, expected_reward

if TYPE_CHECKING:
    from matplotlib.figure import Figure

from softpref.records.evaluation import Reliability

POLICY, REFERENCE, OPTIMUM = "#2f7fc1", "#8c8c8c", "#e0822c"
INK = "#0a0b0c"  # stands for the page's text colour in inline drawings


def reward_distribution(
    policy: Sequence[float], reference: Sequence[float], exact: Sequence[ExactPrompt] = ()
) -> str:
    """SVG of the judge's scores of policy and reference samples, with the exact optimum's where known."""
    plt = pyplot()
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
    return svg(figure)


def reliability_diagram(models: Sequence[tuple[str, str, Sequence[Reliability]]]) -> str:
    """SVG: the share of votes for what a model prefers, by how sure it is; the diagonal is calibration.

    Args:
        models: name, colour and bins of each.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(5.6, 4.2))
    axes.plot([0.5, 1], [0.5, 1], color=OPTIMUM, linewidth=1.4, label="calibrated")
    for name, colour, bins in models:
        x, y = np.array([[one.confidence, one.share] for one in bins]).T
        arms = np.array(
            [
                (0.0, 0.0)
                if one.low is None or one.high is None
                else (one.share - one.low, one.high - one.share)
                for one in bins
            ]
        )
        axes.errorbar(
            x,
            y,
            yerr=np.maximum(arms.T, 0),
            color=colour,
            ecolor=f"{colour}66",
            marker="o",
            markersize=4,
            linewidth=1.2,
            label=name.replace("$", r"\$"),
        )
    axes.set(xlabel="confidence of the model", ylabel="share of votes", xlim=(0.48, 1.02))
    axes.legend(frameon=False, loc="upper left")
    return svg(figure)


def optimum_against_policy(exact: Sequence[ExactPrompt]) -> str:
    """SVG: probabilities by rank, and policy against optimum for every completion, on log axes."""
    plt = pyplot()
    figure, (ranks, scatter) = plt.subplots(1, 2, figsize=(9.2, 3.6))
    shortest = min(len(prompt.rewards) for prompt in exact)
    order = [np.argsort(-prompt.optimum)[:shortest] for prompt in exact]
    optimum = np.exp(np.array([p.optimum[rank] for p, rank in zip(exact, order, strict=True)])).mean(0)
    position = np.arange(1, len(optimum) + 1)
    for side, colour, label in (("reference", REFERENCE, "reference"), ("policy", POLICY, "policy")):
        # at the optimum's ranks: a curve that follows the optimum's means the same completions are likely
        logps = np.array([getattr(p, side)[rank] for p, rank in zip(exact, order, strict=True)])
        centres, means = _log_bins(position, np.exp(logps).mean(0))
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
    return svg(figure)


def entropy_and_reward(exact: Sequence[ExactPrompt]) -> str:
    """SVG: exact entropy and expected reward of reference, policy and optimum, means over prompts."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 1.8))
    sides = [("optimum", OPTIMUM), ("policy", POLICY), ("reference", REFERENCE)]
    sides = [side for side in sides if np.isfinite(getattr(exact[0], side[0])).all()]
    entropies = [np.mean([entropy(getattr(p, side)) for p in exact]) for side, _ in sides]
    rewards = [np.mean([expected_reward(getattr(p, side), p.rewards) for p in exact]) for side, _ in sides]
    for panel, title, means in (
        (axes[0], "entropy on the set, nats", entropies),
        (axes[1], "expected reward, nats", rewards),
    ):
        bars = panel.barh(
            [side for side, _ in sides], means, color=[colour for _, colour in sides], alpha=0.8, height=0.6
        )
        panel.bar_label(bars, fmt="%.2f", padding=4, color=INK)
        panel.set_title(title, loc="left")
        panel.margins(x=0.15)
        panel.spines["bottom"].set_visible(False)
        panel.tick_params(bottom=False, labelbottom=False, left=False)
    return svg(figure)


def _log_bins(position: np.ndarray, mass: np.ndarray, bins: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Means within bins of equal width on a log axis, so that the rare end is not a cloud of noise."""
    edges = np.unique(np.round(np.geomspace(1, len(position) + 1, bins + 1)).astype(int))
    cells = [slice(low - 1, high - 1) for low, high in itertools.pairwise(edges)]
    centres, means = ([values[cell].mean() for cell in cells] for values in (position, mass))
    return np.array(centres), np.array(means)


def pyplot() -> ModuleType:
    """`matplotlib.pyplot`, which draws without a screen and in our style."""
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
                ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
            ),
        }
    )
    return plt


def svg(figure: Figure, *, tight: bool = True) -> str:
    """The figure as an inline SVG element; closes it."""
    if tight:
        figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, dpi=150, metadata={"Date": None})
    pyplot().close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    return text.replace(INK, "currentColor").replace("<svg ", '<svg class="chart" ', 1)
