"""What training leaves: a model folder's own account of itself, and where models of earlier rounds are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from softpref.disk import flush_below, remove_parts, write_whole
from softpref.records.files import read_if_there

METADATA_FILE = "softpref.json"
REWARD_STAGE = "judge"  # the stage of a model folder that is a reward model
ROUND_FOLDER = "round-"  # and its number: a model of an earlier round on another dimension of preference


class DimensionRound(TypedDict):
    """A round of training on one dimension of preference; options are named as in training.

    Attributes:
        dimension_weights: λ of each round before it.
        reference: the model that it began with, which is its reference, too.
        reference_hash: of that model's weights; empty where they were not in a folder.
    """

    dimension: str
    dimension_weights: list[float]
    reference: str
    reference_hash: str
    dataset_hash: str
    method: str
    alpha: float
    anchor: float
    beta: float
    kl_beta: float
    kl_on: str
    preference_kind: str
    soft_labels: str
    weight_exponent: float
    label_smoothing: float


class ModelMetadata(TypedDict, total=False):
    """What later stages read of a model folder: `softpref.json`. Options are named as in training.

    Attributes:
        lineage: the rounds behind a model that was trained on one dimension after another, its own last.
        row_counts: what was counted of the rows of each split.
        saturated: share of saturated margins at the end of training.
        split, heads, max_length: of a reward model: what it learned from, its heads, tokens that it reads.
    """

    name: str
    stage: str
    base_model: str
    run_id: str | None
    dataset_hash: str
    code_version: str
    method: str
    alpha: float
    anchor: float
    beta: float
    kl_beta: float
    kl_on: str
    rounds: int
    train_on: str
    preference_kind: str
    extrapolation: float
    lineage: list[DimensionRound]
    adapter: bool
    cut_rows: str
    row_counts: dict[str, dict[str, int]]
    saturated: float | None
    max_prompt_length: int | None
    max_completion_length: int
    split: str
    heads: int
    max_length: int


def save_metadata(folder: str | Path, values: Mapping[str, object]) -> None:
    """Write what later stages need to know of a model folder (`softpref.json`), its last file."""
    remove_parts(folder)
    flush_below(folder)
    write_whole(Path(folder) / METADATA_FILE, json.dumps(values, indent=2) + "\n")


def load_metadata(folder: str | Path) -> ModelMetadata:
    """Read `softpref.json` of a model folder; empty for a model that softpref did not write.

    Raises:
        DataError: it is damaged.
    """
    metadata: ModelMetadata = read_if_there(Path(folder) / METADATA_FILE)
    return metadata


def earlier_folders(folder: str | Path) -> list[Path]:
    """The folders `round-N` in a model folder, or of their evaluations in an evaluation's, in order."""
    found = [path for path in Path(folder).glob(f"{ROUND_FOLDER}*") if path.is_dir()]
    return sorted(found, key=lambda path: (len(path.name), path.name))
