"""A dataset folder of this stage as the source of another: its splits are taken over, not drawn again."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from softpref.data.config import FURTHER, DataConfig
from softpref.data.rows import Preference
from softpref.data.splits import SPLITS, WITH_JUDGE, prompt_key
from softpref.disk import DAMAGED
from softpref.errors import ConfigError, DataError
from softpref.records.dataset import (
    OUTCOMES_FILE,
    REJECTED_FILE,
    REWARD_FILE,
    DatasetStats,
    read_dataset,
    read_stats,
)

if TYPE_CHECKING:
    from datasets import DatasetDict

logger = logging.getLogger(__name__)

_COLUMNS = {"prompt", "completions", "kind", "probability", "source_row"}
_TAKEN = (*WITH_JUDGE, "dataset_dict.json", *FURTHER, OUTCOMES_FILE, REWARD_FILE)
# the parameters that choose or change preferences while they are read
_OF_READING = (
    *("columns", "dimensions", "preference_values", "score_scale", "implicit_prompt", "implicit_prompt_end"),
    *("transcripts", "list_kind", "group_size", "labels", "ties", "min_votes", "duplicates"),
    *("contradictions", "max_characters", "max_source_rows", "degree_ranking_weight"),
)
_OF_ALL_READING = ("prompt_template", "as_messages", "system_prompt")  # also of further sources


class Finished(NamedTuple):
    """A dataset that was taken over: its statistics, the split of each prompt by its key, and its splits."""

    stats: DatasetStats
    split_of: dict[bytes, str]
    dataset: DatasetDict


def is_finished(folder: Path) -> bool:
    """Whether a folder is a dataset that this stage wrote."""
    try:
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return read_stats(folder)["stage"] == "data" and sorted(splits) in (
            sorted(SPLITS),
            sorted(WITH_JUDGE),
        )
    except DAMAGED:
        return False


def take_over(source: Path, config: DataConfig, folder: Path) -> Finished:
    """Copy the splits of a finished dataset, and what lies beside them, into `folder`.

    Its demonstrations, prompts and unpaired completions are left out where the configuration gives others.

    Raises:
        ConfigError: the configuration would change its rows.
        DataError: its rows are not those that its `stats.json` describes.
    """
    stats = read_stats(source)
    _check_unchanged_reading(config, sum(stats["rows"].values()))
    replaced = config.further_sources.keys()
    for name in FURTHER:
        if (source / name).is_dir() and name not in replaced:
            read_dataset(source / name)  # it is what its stats.json describes
    for name in _TAKEN:
        if (source / name).is_dir() and name not in replaced:
            shutil.copytree(source / name, folder / name)
        elif (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / REJECTED_FILE).is_file():
        lines = (source / REJECTED_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["source"] not in replaced]
        (folder / REJECTED_FILE).write_text("".join(kept), encoding="utf-8")
    dataset: DatasetDict = read_dataset(folder)
    split_of: dict[bytes, str] = {}
    hashes = []
    for split in (split for split in WITH_JUDGE if split in dataset):
        if {*dataset[split].column_names} - {"weight", "dimension", "source", "degree"} != _COLUMNS:
            raise DataError(
                f"{config.source} has a stats.json of this stage, but its split {split} has the columns "
                f"{', '.join(dataset[split].column_names)}; give split to read one as any other source"
            )
        digest = hashlib.sha256()
        for record in dataset[split]:
            row = Preference(**{name: record[name] for name in Preference._fields if name in record})
            digest.update(row_bytes(row, record.get("weight")))
            split_of[prompt_key(row.prompt)] = split
        hashes.append(digest.hexdigest())
    if dataset_hash(hashes) != stats["dataset_hash"]:
        raise DataError(
            f"the rows of {config.source} were changed after it was made: their hash is not the one in its "
            "stats.json; make it anew, or give split to read one of its splits as any other source"
        )
    logger.warning(
        "%s is a finished dataset: its %d rows and their splits are taken over as they are; "
        "validation_fraction, test_fraction, judge_fraction and seed have no effect",
        config.source,
        sum(map(len, dataset.values())),
    )
    return Finished(stats, split_of, dataset)


def row_bytes(row: Preference, weight: float | None = None) -> bytes:
    """What a row adds to the hash of its split."""
    *values, dimension = row
    beside = [*([] if weight is None else [weight]), *([dimension] if dimension else [])]
    return json.dumps([*values, *beside], sort_keys=True).encode() + b"\n"


def dataset_hash(hashes: list[str]) -> str:
    """The hash of a dataset from those of its splits, in the order of `WITH_JUDGE`."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _check_unchanged_reading(config: DataConfig, rows: int) -> None:
    names = _OF_READING if config.further_sources else (*_OF_READING, *_OF_ALL_READING)
    defaults = DataConfig()
    given = [name for name in names if getattr(config, name) != getattr(defaults, name)]
    if config.rows is not None and config.rows < rows:
        given.append("rows")
    if given:
        raise ConfigError(
            f"source {config.source} is a finished dataset, whose rows are taken over as they are, and "
            f"{', '.join(given)} would change them; leave that out, or give split to read one of its splits "
            "as any other source"
        )
