"""A measured value with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """One measured value.

    Attributes:
        value: the estimate, None where it is unknown.
        low, high: ends of its interval, None for fewer than two prompts.
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


Figures = Mapping[str, Figure]


def figures_of(values: Mapping[str, Mapping[str, Any]] | None) -> Figures | None:
    """Figures by name, from JSON; None stays."""
    return None if values is None else {name: Figure.of(one) for name, one in values.items()}
