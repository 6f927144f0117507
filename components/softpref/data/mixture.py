"""Several sources with shares in one dataset: how each is read, how many rows it gives. Reads no data."""

from __future__ import annotations

import copy
import math
import operator
import os
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from softpref.config import build_config, closest, shown
from softpref.data.config import EMBEDDED, DataConfig
from softpref.errors import ConfigError, DataError
from softpref.remote import public_url

# What says where rows lie. It belongs to one source, so the others do not take it over from `source`.
_OF_A_PLACE = ("format", "subset", "split", "revision")
# What says how a row is read. The others take it over unless they have their own. Duplicates, contradictions,
# lengths, samples and splits concern the whole dataset.
_OF_A_ROW = (
    *("columns", "preference_values", "score_scale", "prompt_template", "implicit_prompt"),
    *("implicit_prompt_end", "transcripts", "as_messages", "system_prompt", "list_kind", "group_size"),
    *("labels", "ties", "min_votes", "max_source_rows"),
)
_STORY = (
    "mixture: story and storyteller cannot be mixed, for what is known of an embedded source holds for its "
    "own rows alone; write it with `softpref data` first, and give that folder with one of its splits"
)
_OPTIONS = {"share", "source", *_OF_A_PLACE, *_OF_A_ROW}


class Part(NamedTuple):
    """One source of a dataset.

    Attributes:
        name: how records call it.
        share: of the dataset's rows.
        config: how it is read, with its place as `source` and no mixture.
    """

    name: str
    share: Fraction
    config: DataConfig


class Draw(NamedTuple):
    """How many rows each source gives.

    Attributes:
        counts: by source.
        binding: whether a source has no more rows for a larger dataset of these shares, by source.
    """

    counts: list[int]
    binding: list[bool]


def parts_of(config: DataConfig) -> list[Part]:
    """The sources of a configuration: `source`, with what the others leave of the dataset, and the others.

    Raises:
        ConfigError: a share out of range, an unknown option, a source twice, or one that cannot be mixed.
    """
    if not config.mixture:
        return [Part(public_url(config.source), Fraction(1), config)]
    if config.embedded:
        raise ConfigError(_STORY)
    others = [_part(config, str(name), given) for name, given in config.mixture.items()]
    rest = Fraction(1) - sum(part.share for part in others)
    if rest <= 0:
        raise ConfigError(
            f"the shares of mixture add up to {float(1 - rest):g}; their sum must stay below 1, for source "
            "has the rest"
        )
    first = copy.copy(config)
    first.mixture = {}
    parts = [Part(public_url(config.source), rest, first), *others]
    names: dict[str, str] = {}
    places: dict[Any, str] = {}
    for part in parts:
        place = _identity(part.config)
        if part.name in names or place in places:
            other = places.get(place) or part.name
            raise ConfigError(
                f"mixture: {part.name} and {other} are one source; give each once. Another split or subset "
                f'of it needs a name: {{"NAME": {{"source": "{public_url(part.config.source)}", "split": …, '
                '"share": …}}'
            )
        names[part.name] = places[place] = part.name
    return parts


def divide_rows(parts: Sequence[Part], available: Sequence[int], rows: int | None = None) -> Draw:
    """The rows that each source gives to the largest dataset with these shares, rounded to whole rows.

    Args:
        parts: the sources.
        available: the rows that each one has.
        rows: of the dataset; None: as many as there can be.

    Raises:
        DataError: a source has too few rows for its share.
    """
    possible = [count / part.share for part, count in zip(parts, available, strict=True)]
    most = math.ceil(min(possible))
    if any(map(operator.gt, _rounded(parts, most), available)):
        most = math.floor(min(possible))
    binding = [total == min(possible) for total in possible]
    if rows is not None and rows > most:
        first = binding.index(True)
        raise DataError(
            f"rows = {rows:,} with the shares of mixture need more than {available[first]:,} usable rows of "
            f"{parts[first].name}, a share of {float(parts[first].share):g}; at most {most:,} have these "
            "shares: lower rows, or that share"
        )
    total = most if rows is None else rows
    counts = _rounded(parts, total)
    if 0 in counts:
        part = parts[counts.index(0)]
        raise DataError(
            f"{part.name} has a share of {float(part.share):g}, and of {total:,} rows"
            f"{', as many as have the shares of mixture,' * (rows is None)} that is not one; raise the share"
        )
    return Draw(counts, [rows is None and one for one in binding])


def _rounded(parts: Sequence[Part], total: int) -> list[int]:
    """Whole numbers that add up to `total`, each the share's or its neighbour; the largest rests round up."""
    exact = [part.share * total for part in parts]
    counts = [int(number) for number in exact]
    by_rest = sorted(range(len(parts)), key=lambda index: counts[index] - exact[index])
    for index in by_rest[: total - sum(counts)]:
        counts[index] += 1
    return counts


def public_mixture(mixture: Mapping[str, Any]) -> dict[str, Any]:
    """A mixture as it may be recorded: URLs can hold a password or a signature."""
    return {
        public_url(name): {**given, "source": public_url(given["source"])}
        if isinstance(given, Mapping) and "source" in given
        else given
        for name, given in mixture.items()
    }


def label(part: Part) -> str:
    """How messages call the parameter that gives a further source."""
    return f"mixture[{part.name!r}]"


def _part(config: DataConfig, name: str, given: Any) -> Part:
    where = f"mixture[{public_url(name)!r}]"
    options = dict(given) if isinstance(given, Mapping) else {"share": given}
    share = _share(options.pop("share", None), where)
    for option in options:
        if option not in _OPTIONS:
            raise ConfigError(f"{where} has no option {option!r}{closest(option, _OPTIONS)}")
    if options.get("source", name) in EMBEDDED:
        raise ConfigError(_STORY)
    part = copy.copy(config)
    part.mixture = {}
    try:
        own = build_config(DataConfig, {"source": name, **options})
        for option in ("source", *_OF_A_PLACE, *options):
            setattr(part, option, getattr(own, option))
        part.check()
    except ConfigError as error:
        raise ConfigError(f"{where}, read as source where it says nothing else: {error}") from error
    return Part(public_url(name), share, part)


def _share(value: Any, where: str) -> Fraction:
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not 0 < number < 1:
        raise ConfigError(
            f"{where} needs its share of the dataset, a number between 0 and 1, as in 0.3 or "
            f'{{"share": 0.3, "split": "train"}}; got {shown(value)}'
        )
    return Fraction(repr(number))  # 0.3 as it is written, so that sums and counts are exact


def _identity(config: DataConfig) -> tuple[Any, ...]:
    """What is the same for two spellings of one source."""
    place = re.sub("^(file|local)://", "", config.source)
    place = os.path.realpath(place) if os.path.exists(place) else place
    return place, config.subset, config.split or "train", config.revision
