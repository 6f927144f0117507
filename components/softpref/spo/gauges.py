"""What is measured between two logs of training: running means and the time that sampling takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from softpref.objectives import length_accuracy


class Means:
    """Running means on the device; read once per log, so that no step waits for a copy."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[Tensor, int]] = {}  # sum and number

    def add(self, name: str, values: Tensor) -> None:
        total, number = values.detach().float().sum(), values.numel()
        if name in self._values:
            before, count = self._values[name]
            total, number = before + total, count + number
        self._values[name] = total, number

    def take(self, sum_over_processes: Callable[[float], float]) -> dict[str, float]:
        means = {}
        for name in sorted(self._values):  # one order on every process
            total, number = (sum_over_processes(float(mine)) for mine in self._values[name])
            if number:  # none if no row of the steps took part
                means[name] = total / number
        self._values.clear()
        return means


class WeightSums:
    """Σ w, Σ w² and the number of importance weights, as logarithms: far from 1 they would leave fp32."""

    def __init__(self, device: torch.device | str) -> None:
        self._sums = self._none = torch.full((3,), -torch.inf, device=device)

    def add(self, log_weights: Tensor) -> None:
        """Add weights given as logarithms, `[n]`."""
        powers = log_weights.detach() * torch.tensor([[1.0], [2.0], [0.0]], device=log_weights.device)
        self._sums = self._sums.logaddexp(powers.logsumexp(-1))

    def take(self, gather: Callable[[Tensor], Tensor]) -> float | None:
        """The effective sample size `(Σw)² / (n Σw²)` since the last call, a fraction; None of no weights.

        Args:
            gather: from this process's `[1, 3]` to all processes' `[processes, 3]`.
        """
        total, squares, count = gather(self._sums[None]).logsumexp(0).tolist()
        self._sums = self._none
        return None if count == -math.inf else min(1.0, math.exp(2 * total - squares - count))


class LengthLevels:
    """How many texts of each length and degree level there were, for the accuracy of length alone.

    Args:
        longest: tokens of a text, at most.
        levels: how many there are.
    """

    def __init__(self, longest: int, levels: int, device: torch.device | str) -> None:
        self._counts = torch.zeros(longest + 1, levels, device=device)

    def add(self, lengths: Tensor, levels: Tensor) -> None:
        """Add texts: `[texts]` each."""
        self._counts.index_put_((lengths, levels), self._counts.new_ones(len(lengths)), accumulate=True)

    def take(self, sum_over_processes: Callable[[Tensor], Tensor]) -> float | None:
        """The accuracy since the last call, see `length_accuracy`; None of no texts."""
        counts = sum_over_processes(self._counts).cpu()
        self._counts = torch.zeros_like(self._counts)
        return length_accuracy(counts) if bool(counts.any()) else None


class SamplingClock:
    """Time and tokens that sampling took since the last log."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._since, self._seconds, self._tokens = time.perf_counter(), 0.0, 0

    def add(self, seconds: float, tokens: int) -> None:
        self._seconds += seconds
        self._tokens += tokens

    def take(self) -> dict[str, float]:
        metrics = {"sampling/time_fraction": self._seconds / max(time.perf_counter() - self._since, 1e-9)}
        if self._seconds:
            metrics["sampling/tokens_per_second"] = self._tokens / self._seconds
        self._reset()
        return metrics
