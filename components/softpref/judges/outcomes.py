"""Every completion that belongs to a prompt, as a dataset of known rewards lists them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from softpref.disk import DAMAGED, in_brief
from softpref.errors import DataError


class Outcomes(NamedTuple):
    """Every completion that belongs to a prompt.

    Attributes:
        completions: `N` texts.
        rewards: `[N]`, the expert's, in nats.
        weights: `[N]`, the probability that one candidate of a pair is this one; sums to 1.
        dimensions: by name, `[N]` each, the rewards of each dimension, of which `rewards` is the sum; empty
            where there is one reward.
    """

    completions: list[str]
    rewards: np.ndarray
    weights: np.ndarray
    dimensions: Mapping[str, np.ndarray] = MappingProxyType({})


def read_outcomes(path: str | Path) -> dict[str, Outcomes]:
    """Read `outcomes.jsonl`: prompt → every completion that belongs to its set.

    Raises:
        DataError: a line is not JSON, lacks a field, or its lists differ in length.
    """
    outcomes = {}
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                completions, rewards, weights = row["completions"], row["rewards"], row["weights"]
                dimensions = {name: np.asarray(own, float) for name, own in row.get("dimensions", {}).items()}
                entry = Outcomes(
                    completions, np.asarray(rewards, float), np.asarray(weights, float), dimensions
                )
                lengths = {len(completions), len(rewards), len(weights), *map(len, dimensions.values())}
                outcomes[row["prompt"]] = entry
            except DAMAGED as error:
                what = "expected prompt, completions, rewards, weights"
                raise DataError(f"{path}, line {number}: {what} ({in_brief(error)})") from error
            if len(lengths) > 1 or not completions:
                raise DataError(f"{path}, line {number}: completions, rewards and weights differ in length")
    return outcomes
