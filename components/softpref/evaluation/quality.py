"""How good answers are at equal length, and when the best of several counts. Functions of scores and wins."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from softpref.intervals import (
    DEFAULT_BOOTSTRAP,
    Bootstrap,
    over_prompts,
    percentiles,
    resampled,
)
from softpref.judges.protocol import sigmoid
from softpref.judges.reward_model import LOWER
from softpref.records.evaluation import DrawnText
from softpref.records.figures import LEAST_PROMPTS, Figure

SEARCHED = 8
"""Answers of which search takes the best, in the figure `best_of_8`."""
_STEPS = 25  # of Newton's method, which takes four to eight
_TIE = 1e-3  # curvature added, so that length alone that decides every pair gives no infinite effect


def quality(
    samples: Sequence[Sequence[DrawnText]],
    reference: Sequence[Sequence[DrawnText]],
    bootstrap: Bootstrap = DEFAULT_BOOTSTRAP,
) -> dict[str, Figure]:
    """`length_controlled_win_rate` against the reference, `best_of_8`, the expected best score of eight, and
    `sure_win_rate`.

    For the win rate at equal length the n-th sample of a prompt is compared with the n-th of the reference:
    by their scores, or where a judge gave none by its verdict of this pair. Only scores give a `best_of_8`,
    only a judge of several heads a `sure_win_rate`.

    Args:
        samples, reference: of the model that is measured, and of its reference, by prompt.
    """
    pairs = [list(zip(ours, theirs, strict=True)) for ours, theirs in zip(samples, reference, strict=True)]
    figures = {
        f"{prefix}best_of_{SEARCHED}": over_prompts(
            [best_of(scores, SEARCHED) for scores in found], bootstrap=bootstrap
        )
        for prefix, side in (("", samples), ("reference_", reference))
        if (found := scores_of(side)) is not None
    }
    if any(text.heads for group in samples for text in group):
        figures["sure_win_rate"] = sure_win_rate(
            *([np.array([text.heads for text in group]) for group in side] for side in (samples, reference)),
            bootstrap=bootstrap,
        )
    known = [
        [(win, ours.tokens, theirs.tokens) for ours, theirs in row if (win := _win(ours, theirs)) is not None]
        for row in pairs
    ]
    figures["length_controlled_win_rate"] = length_controlled_win_rate(
        *([[one[part] for one in row] for row in known if row] for part in range(3)), bootstrap=bootstrap
    )
    return figures


def scores_of(samples: Sequence[Sequence[DrawnText]]) -> list[list[float]] | None:
    """The judge's scores by prompt; None where it gave none."""
    found = [[text.score for text in group if text.score is not None] for group in samples]
    return found if list(map(len, found)) == list(map(len, samples)) else None


def _win(ours: DrawnText, theirs: DrawnText) -> float | None:
    """P(ours beats theirs); None where it was not judged."""
    if ours.score is None or theirs.score is None:
        return ours.win
    return float(sigmoid(np.array(ours.score - theirs.score)))


def sure_win_rate(
    ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], *, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
) -> Figure:
    """The win rate that nine of ten heads of a judge exceed (`LOWER`): how much of it is sure.

    The win rate of a head is σ(score difference) averaged over all pairs of samples of a prompt, then over
    prompts. Intervals resample prompts.

    Args:
        ours, theirs: `[samples, heads]` of each prompt, scores of the model's samples and the reference's.
    """
    wins = np.array([sigmoid(a[:, None] - b).mean((0, 1)) for a, b in zip(ours, theirs, strict=True)])
    count, heads = wins.shape
    value, samples = float(np.quantile(wins.mean(0), LOWER)), sum(map(len, ours))
    if count < LEAST_PROMPTS:
        return Figure(value, None, None, samples, count, "probability")
    found = [
        np.quantile(wins[drawn].mean(1), LOWER, axis=1) for drawn in resampled(count, bootstrap, width=heads)
    ]
    low, high = percentiles(np.concatenate(found), count, bootstrap.confidence)
    return Figure(value, low, high, samples, count, "probability")


def best_of(scores: Sequence[float], count: int) -> float:
    """Expected greatest score of `count` answers drawn from these without replacement: what search finds.

    An estimate without bias of best-of-`count` sampling, from all subsets at once. NaN where fewer answers
    than `count` are known.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    total = len(ordered)
    if not 1 <= count <= total:
        return float("nan")
    # the i-th smallest is the greatest of C(i - 1, count - 1) subsets
    weights = np.zeros(total)
    weights[-1] = count / total
    for i in range(total - 1, count - 1, -1):
        weights[i - 1] = weights[i] * (i - count + 1) / i
    return float(weights @ ordered)


def length_controlled_win_rate(
    wins: Sequence[Sequence[float]],
    lengths: Sequence[Sequence[float]],
    reference_lengths: Sequence[Sequence[float]],
    *,
    bootstrap: Bootstrap = DEFAULT_BOOTSTRAP,
) -> Figure:
    """The win rate that a model would have if its answers were as long as the reference's.

    A logistic model of a win, with an effect of the model and one of the difference in length; the win rate
    is that at no difference (Dubois et al., "Length-Controlled AlpacaEval", 2024, without their term of a
    prompt's difficulty, which needs many models). The difference is squashed by tanh after division by its
    standard deviation, as there. Intervals resample prompts.

    Args:
        wins: P(the model's answer beats the reference's) of each compared pair, one row per prompt.
        lengths, reference_lengths: of the answers of these pairs, in any one unit.
    """
    sizes = [len(row) for row in wins]
    observations = sum(sizes)
    if not observations:
        return Figure(None, None, None, 0, 0, "probability")
    won, ours, theirs = (
        np.concatenate([np.asarray(row, dtype=np.float64) for row in rows])
        for rows in (wins, lengths, reference_lengths)
    )
    prompt = np.repeat(np.arange(len(sizes)), sizes)
    difference = ours - theirs
    longer = np.tanh(difference / (difference.std() or 1.0))
    value = float(sigmoid(_effects(won, longer, np.ones(observations)))[0])
    count = len(sizes)
    if count < LEAST_PROMPTS:
        return Figure(value, None, None, observations, count, "probability")
    found = []
    for drawn in resampled(count, bootstrap):
        for places in drawn:
            weights = np.bincount(places, minlength=count)[prompt]
            found.append(sigmoid(_effects(won, longer, weights))[0])
    low, high = percentiles(np.array(found), count, bootstrap.confidence)
    return Figure(value, low, high, observations, count, "probability")


def _effects(won: np.ndarray, longer: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`[2]`: log-odds of a win at equal length, and the effect of length, by weighted maximum likelihood."""
    design = np.stack([np.ones_like(longer), longer], axis=1)
    effects = np.zeros(2)
    for _ in range(_STEPS):
        chance = sigmoid(design @ effects)
        slope = design.T @ (weights * (won - chance)) - _TIE * effects
        curvature = (design * (weights * chance * (1 - chance))[:, None]).T @ design + _TIE * np.eye(2)
        step = np.linalg.solve(curvature, slope)
        effects = effects + np.clip(step, -2.0, 2.0)
        if np.abs(step).max() < 1e-9:
            break
    return effects
