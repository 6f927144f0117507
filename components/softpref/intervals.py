"""Estimates with bootstrap intervals over prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from softpref.records.figures import LEAST_PROMPTS, Figure


class Bootstrap(NamedTuple):
    """How intervals are made: number of resamples, coverage, seed."""

    samples: int = 1000
    confidence: float = 0.95
    seed: int = 0


DEFAULT_BOOTSTRAP = Bootstrap()


def interval(
    values: Sequence[float] | np.ndarray,
    prompts: Sequence[str | int] | np.ndarray,
    *,
    weights: Sequence[float] | np.ndarray | None = None,
    unit: str = "",
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
    bootstrap: Bootstrap = DEFAULT_BOOTSTRAP,
) -> Figure:
    """Estimate `transform(Σ values / Σ weights)` with a percentile interval over resampled prompts.

    The percentiles are widened to those of Student's t (the "expanded percentile" interval, Hesterberg 2015),
    since plain ones are too narrow for the ten or so prompts of a small test split. With many prompts there
    is no difference; with fewer than `LEAST_PROMPTS` there is no interval. Simulated 95 % intervals cover
    94 to 96 % of the time from ten prompts on, and about 92 % for ten prompts of which a few are far above
    the others.

    Args:
        values: `[n]`, one per observation; an observation with a NaN is left out.
        prompts: `[n]`, which prompt each belongs to; equal means same prompt.
        weights: `[n]` ≥ 0, 1 each by default.
        transform: monotone function of the ratio, identity by default.
    """
    values = np.asarray(values, dtype=np.float64).reshape(-1)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64).reshape(-1)
    known = np.isfinite(values) & (weights > 0)
    labels = np.asarray(prompts).reshape(-1)[known]
    _, cluster = np.unique(labels, return_inverse=True)
    count = int(cluster.max()) + 1 if len(cluster) else 0
    if not count:
        return Figure(None, None, None, 0, 0, unit)
    sums = np.bincount(cluster, values[known], count)
    totals = np.bincount(cluster, weights[known], count)
    apply = transform or (lambda ratio: ratio)
    value = float(apply(np.asarray(sums.sum() / totals.sum())))
    if count < LEAST_PROMPTS:
        return Figure(value, None, None, len(labels), count, unit)
    ratios = np.concatenate(
        [sums[drawn].sum(1) / totals[drawn].sum(1) for drawn in resampled(count, bootstrap)]
    )
    low, high = percentiles(apply(ratios), count, bootstrap.confidence)
    return Figure(value, low, high, len(labels), count, unit)


def resampled(count: int, bootstrap: Bootstrap, width: int = 1) -> Iterator[np.ndarray]:
    """Places of `count` prompts drawn with replacement, `[resamples, count]`, some resamples at a time.

    Args:
        width: numbers that a caller looks up for each place; bounds memory for large test splits.
    """
    random = np.random.default_rng(bootstrap.seed)
    at_once = max(1, 2_000_000 // (count * width))
    for start in range(0, bootstrap.samples, at_once):
        yield random.integers(count, size=(min(at_once, bootstrap.samples - start), count))


def percentiles(estimates: np.ndarray, count: int, confidence: float) -> tuple[float, float]:
    """Ends of the expanded percentile interval of an estimate over resamples of `count` prompts."""
    from scipy import stats

    spread = np.sqrt(count / (count - 1)) * stats.t.ppf((1 - confidence) / 2, count - 1)
    tail = stats.norm.cdf(spread)
    low, high = np.quantile(estimates, [tail, 1 - tail])
    return float(low), float(high)


def over_prompts(
    values: Sequence[float], unit: str = "nats", bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
) -> Figure:
    """The mean of one value per prompt, with an interval that says how much they differ between prompts."""
    return interval(values, np.arange(len(values)), unit=unit, bootstrap=bootstrap)
