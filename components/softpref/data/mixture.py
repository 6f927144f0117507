"""Which of the accepted rows a dataset holds, and how many of each of several sources with shares."""

from __future__ import annotations

import itertools
import logging
import math
import operator
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from softpref.data.config import DataConfig, Part
from softpref.data.intake import Intake
from softpref.data.writing import hash_order
from softpref.errors import DataError
from softpref.records.dataset import MixtureCounts

logger = logging.getLogger(__name__)


class Draw(NamedTuple):
    """How many rows each source gives.

    Attributes:
        counts: by source.
        binding: by source, whether it has too few rows for a larger dataset of these shares.
    """

    counts: list[int]
    binding: list[bool]


def divide_rows(
    parts: Sequence[Part], shares: Sequence[Fraction], available: Sequence[int], rows: int | None = None
) -> Draw:
    """How many rows each source gives to the largest dataset with these shares.

    Args:
        parts: the sources.
        shares: of each.
        available: the rows that each one has.
        rows: of the dataset; None: as many as there can be.

    Raises:
        DataError: a source has too few rows for its share.
    """
    possible = [count / share for share, count in zip(shares, available, strict=True)]
    most = math.ceil(min(possible))
    if any(map(operator.gt, _rounded(shares, most), available)):
        most = math.floor(min(possible))
    binding = [total == min(possible) for total in possible]
    if rows is not None and rows > most:
        first = binding.index(True)
        raise DataError(
            f"rows = {rows:,} with the shares of mixture need more than {available[first]:,} usable rows of "
            f"{parts[first].name}, a share of {float(shares[first]):g}; at most {most:,} have these "
            "shares: lower rows, or that share"
        )
    total = most if rows is None else rows
    counts = _rounded(shares, total)
    if 0 in counts:
        part, share = parts[counts.index(0)], shares[counts.index(0)]
        raise DataError(
            f"{part.name} has a share of {float(share):g}, and of {total:,} rows"
            f"{', as many as have the shares of mixture,' * (rows is None)} that is not one; raise the share"
        )
    return Draw(counts, [rows is None and one for one in binding])


def _rounded(shares: Sequence[Fraction], total: int) -> list[int]:
    """The shares of `total` rounded to whole numbers that add up to it; the largest remainders round up."""
    exact = [share * total for share in shares]
    counts = [int(number) for number in exact]
    by_rest = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_rest[: total - sum(counts)]:
        counts[index] += 1
    return counts


def choose_rows(
    intake: Intake, config: DataConfig, parts: Sequence[Part]
) -> tuple[list[int], list[MixtureCounts]]:
    """Indices of the accepted rows to keep, without contradictions and down to a sample, as asked.

    Of a mixture also how many rows each source had, and gave.
    """
    kept = [
        index
        for index, set_id in enumerate(intake.set_ids)
        if config.contradictions == "keep" or set_id not in intake.contradictory
    ]
    left = {intake.sources[index] for index in kept}
    for index, part in enumerate(parts):
        if index not in left:
            raise DataError(f"every row of {part.name} contradicts another; contradictions='keep' keeps them")
    if shares := [part.share for part in parts if part.share is not None]:
        return _mix(kept, intake, config, parts, shares)
    usable = Counter(intake.sources[index] for index in kept)
    if config.rows is not None and config.rows < len(kept) and not config.embedded:
        kept = sorted(hash_order(kept, config.seed)[: config.rows])
    given = Counter(intake.sources[index] for index in kept)
    return kept, [
        {"usable": count, "rows": given[part], "not_sampled": count - given[part], "binding": False}
        for part, count in sorted(usable.items())
    ]


def _mix(
    kept: list[int], intake: Intake, config: DataConfig, parts: Sequence[Part], shares: Sequence[Fraction]
) -> tuple[list[int], list[MixtureCounts]]:
    """A seeded sample with the shares of the mixture, and how many rows each source had, and gave."""
    by_source: list[list[int]] = [[] for _ in parts]
    for index in kept:
        by_source[intake.sources[index]].append(index)
    draw = divide_rows(parts, shares, [len(rows) for rows in by_source], config.rows)
    logger.warning(
        "mixture of %d rows: %s",
        sum(draw.counts),
        "; ".join(
            f"{part.name} {count} of {len(rows)}, share {float(share):g}" + ", which bounds it" * binds
            for part, share, count, rows, binds in zip(
                parts, shares, draw.counts, by_source, draw.binding, strict=True
            )
        ),
    )
    chosen = [
        hash_order(rows, config.seed)[:count] for rows, count in zip(by_source, draw.counts, strict=True)
    ]
    return sorted(itertools.chain.from_iterable(chosen)), [
        {"usable": len(rows), "rows": count, "not_sampled": len(rows) - count, "binding": binds}
        for rows, count, binds in zip(by_source, draw.counts, draw.binding, strict=True)
    ]
