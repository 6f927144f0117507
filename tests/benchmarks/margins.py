"""How many pairs are saturated at the start, by base measure: none, one of length alone, the reference.

    softpref sft … --keep_reference_logps true --output reference
    python tests/benchmarks/margins.py reference/rows/train

A margin is α · (log π(chosen)/ν(chosen) − log π(rejected)/ν(rejected)) with the policy still there;
beyond 5 nats the loss is flat or straight, and softness has no effect. With ν = π_ref all margins are 0.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from softpref.lm.row_files import read_rows

SATURATED = 5.0  # nats
SOFTNESS = (0.25, 0.5, 1.0, 2.0)


class Margins(NamedTuple):
    """Differences of the reference's log-probabilities within pairs.

    Attributes:
        plain: `[pairs]`, nats.
        by_length: the same under the base measure e^(c · tokens), with the c that makes them smallest.
        nats_per_token: −c.
    """

    plain: np.ndarray
    by_length: np.ndarray
    nats_per_token: float


def margins(logps: np.ndarray, lengths: np.ndarray) -> Margins:
    """Of pairs, chosen first: `[pairs, 2]` each."""
    difference, longer = logps[:, 0] - logps[:, 1], (lengths[:, 0] - lengths[:, 1]).astype(float)
    slope = float(difference @ longer) / max(float(longer @ longer), 1.0)
    return Margins(difference, difference - slope * longer, -slope)


def table(found: Margins) -> str:
    explained = 1 - found.by_length.var() / found.plain.var()
    lines = [
        f"{len(found.plain)} pairs; a token costs {found.nats_per_token:.2f} nats, which explains "
        f"{explained:.0%} of the differences' variance: standard deviation {found.plain.std():.1f} nats, and "
        f"{found.by_length.std():.1f} without it.",
        "",
        "| α | saturated with anchor 0 | with a base of length alone | with anchor 1 |",
        "| --: | --: | --: | --: |",
    ]
    for alpha in SOFTNESS:
        plain, by_length = (np.mean(np.abs(alpha * one) > SATURATED) for one in found[:2])
        lines.append(f"| {alpha:g} | {plain:.0%} | {by_length:.0%} | 0% |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rows", type=Path, help="a split's folder of rows with log-probabilities")
    rows = [row for row in read_rows(parser.parse_args().rows) if len(row) == 2]
    scored = [row for row in rows if all(one.reference_logp is not None for one in row)]
    if not scored:
        sys.exit("no pair there has log-probabilities; make the reference with --keep_reference_logps true")
    logps = np.array([[one.reference_logp for one in row] for row in scored])
    print(table(margins(logps, np.array([[len(one.completion) for one in row] for row in scored]))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
