"""A measured value with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

LEAST_PROMPTS = 10
"""Distinct prompts that an interval takes: resampled from fewer, it is too narrow."""


class Figure(NamedTuple):
    """One measured value.

    Attributes:
        value: the estimate, None where it is unknown.
        low, high: ends of its interval, None for fewer than `LEAST_PROMPTS` prompts.
        n: observations behind it: preference pairs, sampled completions or prompts.
        prompts: distinct prompts among them, the independent units.
        unit: `nats`, `probability`, `tokens` …
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    prompts: int | None = None
    unit: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Figure:
        return cls(**{name: values[name] for name in cls._fields if name in values})

    def text(self, digits: int = 2) -> str:
        """`0.71 [0.68, 0.74]`, the value alone where it has no interval, a dash where it is unknown."""
        ends = (self.value, self.low, self.high)
        value, low, high = ("–" if end is None else f"{end:.{digits}f}" for end in ends)
        return value if self.low is None else f"{value} [{low}, {high}]"


Figures = Mapping[str, Figure]


def figures_of(values: Mapping[str, Mapping[str, Any]] | None) -> Figures | None:
    """Figures by name, from JSON; None stays."""
    return None if values is None else {name: Figure.of(one) for name, one in values.items()}
