"""How well the preferences that a model implies agree with people's: accuracy, log-loss, calibration against
shares of votes. Runs no model and asks no judge.

A model trained by SPO or DPO implies P(first beats second) = σ(s · m), where m is the difference of its
scores log π − a · log π_ref, s is α of SPO or β of DPO, and a the anchor of SPO or 1. Where voters differ,
the model that matches them is not the one that is always right but the one whose probabilities are their
shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from softpref.intervals import DEFAULT_BOOTSTRAP, Bootstrap, interval, resampled
from softpref.records.evaluation import Reliability
from softpref.records.figures import LEAST_PROMPTS, Figure

BINS = 10
"""Bins of confidence, with equally many pairs in each."""


class Calibration(NamedTuple):
    """What is found of a model's implied preferences.

    Attributes:
        figures: by name.
        bins: of the reliability diagram, least confident first.
        divergence: mean `vote_divergence` of each prompt, in the order of the sorted prompts.
    """

    figures: dict[str, Figure]
    bins: list[Reliability]
    divergence: list[float]


def calibration(
    margins: Sequence[float] | np.ndarray,
    shares: Sequence[float] | np.ndarray,
    prompts: Sequence[str],
    *,
    bootstrap: Bootstrap = DEFAULT_BOOTSTRAP,
) -> Calibration:
    """Set a model's implied preferences beside shares of votes.

    Figures: `implied_accuracy`, the share of pairs whose majority the model is with (its ties count ½, pairs
    without majority are left out); `implied_log_loss`, −p log q − (1 − p) log(1 − q) in nats, of which
    `vote_entropy` is what the best of models would have; `vote_divergence`, the Jensen-Shannon divergence of
    model and voters in nats (0 where they agree, log 2 where both are sure and differ);
    `overconfidence`, mean confidence less mean share (negative: too cautious); `calibration_error`, the
    expected calibration error over `BINS` bins, and `calibration_floor`, what a calibrated model would show
    by chance with as many pairs, for the error is never 0.

    Args:
        margins: `[n]`, s · m of the first completion against the second; q = σ(margin).
        shares: `[n]` in [0, 1], the share p of votes for the first.
        prompts: `[n]`, which prompt a pair belongs to; prompts are what intervals resample.
    """
    margin, p = (np.asarray(values, dtype=np.float64) for values in (margins, shares))
    q = 0.5 * (1 + np.tanh(margin / 2))
    labels = np.asarray(prompts, dtype=object)
    side = np.sign(p - 0.5)
    decided = side != 0
    right = np.where(margin == 0, 0.5, (np.sign(margin) == side).astype(float))
    log_loss = np.logaddexp(0, margin) - p * margin
    mixed = (p + q) / 2
    divergence = _entropy(mixed) - (_entropy(p) + _entropy(q)) / 2
    # which completion comes first is arbitrary: take the one that the model prefers
    confidence = np.maximum(q, 1 - q)
    share = np.where(margin == 0, 0.5, np.where(margin > 0, p, 1 - p))

    def mean(values: np.ndarray, unit: str, among: np.ndarray | slice = slice(None)) -> Figure:
        return interval(values[among], labels[among], unit=unit, bootstrap=bootstrap)

    figures = {
        "implied_accuracy": mean(right, "probability", decided),
        "implied_log_loss": mean(log_loss, "nats"),
        "vote_entropy": mean(_entropy(p), "nats"),
        "vote_divergence": mean(divergence, "nats"),
        "overconfidence": mean(confidence - share, "probability"),
    }
    order = np.argsort(confidence, kind="stable")
    groups = [group for group in np.array_split(order, BINS) if len(group)]
    bins = []
    for group in groups:
        found = mean(share, "probability", group)
        bins.append(
            Reliability(
                float(confidence[group].mean()), found.value or 0.0, found.low, found.high, len(group)
            )
        )
    _, cluster = np.unique(labels.astype(str), return_inverse=True)
    by_prompt = np.bincount(cluster, divergence) / np.bincount(cluster)
    return Calibration(
        figures | _calibration_error(confidence - share, groups, labels, bootstrap), bins, by_prompt.tolist()
    )


def _calibration_error(
    gaps: np.ndarray, groups: Sequence[np.ndarray], labels: np.ndarray, bootstrap: Bootstrap
) -> dict[str, Figure]:
    """Σ over bins of weight · |mean gap|, and the mean of the same over resamples of gaps centred by bin."""
    if not len(gaps):
        nothing = Figure(None, None, None, 0, 0, "probability")
        return {"calibration_error": nothing, "calibration_floor": nothing}
    _, cluster = np.unique(labels.astype(str), return_inverse=True)
    count = int(cluster.max()) + 1
    sums, centred, sizes = (np.zeros((count, len(groups))) for _ in range(3))
    for column, group in enumerate(groups):
        own = gaps[group]
        sums[:, column] = np.bincount(cluster[group], own, count)
        centred[:, column] = np.bincount(cluster[group], own - own.mean(), count)
        sizes[:, column] = np.bincount(cluster[group], minlength=count)

    def error(table: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        return np.asarray(np.abs(table[drawn].sum(1)).sum(-1) / sizes[drawn].sum((1, 2)))

    value = float(error(sums, np.arange(count)[None])[0])
    if count < LEAST_PROMPTS:
        whole = Figure(value, None, None, len(gaps), count, "probability")
        unknown = whole._replace(value=None)
        return {"calibration_error": whole, "calibration_floor": unknown}
    draws = list(resampled(count, bootstrap, width=len(groups)))
    floor = float(np.mean(np.concatenate([error(centred, drawn) for drawn in draws])))
    found = np.concatenate([error(sums, drawn) for drawn in draws])
    # resampling adds about as much again as chance has added already
    low, high = np.quantile(
        2 * value - found, [(1 - bootstrap.confidence) / 2, (1 + bootstrap.confidence) / 2]
    )
    whole = Figure(value, float(max(low, 0.0)), float(max(high, value)), len(gaps), count, "probability")
    return {
        "calibration_error": whole,
        "calibration_floor": Figure(floor, None, None, len(gaps), count, "probability"),
    }


def _entropy(share: np.ndarray) -> np.ndarray:
    """Entropy of a coin with this probability, nats."""
    from scipy.special import entr

    return np.asarray(entr(share) + entr(1 - share))
