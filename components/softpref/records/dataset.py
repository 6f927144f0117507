"""What the data stage leaves: rows, what is known of them, and the experts' knowledge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from softpref.disk import content_hash, in_brief
from softpref.errors import DataError
from softpref.records.files import read_if_there

STATS_FILE, REJECTED_FILE, PAGE_FILE = "stats.json", "rejected.jsonl", "page.html"
OUTCOMES_FILE, REWARD_FILE = "outcomes.jsonl", "reward.json"
JUDGE_SPLIT = "judge"  # preferences that a judge learns from, and the policy never sees

Message = dict[str, str]
"""A message of a conversation: `role` and `content`."""
Text = str | Sequence[Message]
"""A prompt or a completion: plain text, or messages such as `[{"role": "user", "content": "…"}]`."""


class PreferenceRow(TypedDict):
    """A row of the dataset: completions best first, the probability of a pair with a soft label.

    `degree` is true of rankings that nobody has judged (`degree_ranking_weight` of the data stage). The
    dimension is what they were judged by, where rows are judged by several; empty for a row of none.
    """

    prompt: Text
    completions: list[Text]
    kind: str
    probability: float | None
    source_row: NotRequired[int]
    weight: NotRequired[float | None]
    dimension: NotRequired[str]
    source: NotRequired[str]
    degree: NotRequired[bool]


def judged_rows(rows: Any) -> Any:
    """Of a split of a dataset the rows that were judged: those without `degree`."""
    if "degree" not in rows.column_names:
        return rows
    return rows.filter(lambda made: not made, input_columns="degree", keep_in_memory=True)


class ColumnMapping(TypedDict):
    """How the columns of a source are read."""

    form: str
    columns: dict[str, str | list[str]]
    dimensions: NotRequired[dict[str, dict[str, str | list[str]]]]
    guessed: bool
    unused: NotRequired[list[str]]
    notes: NotRequired[list[str]]
    prompt_template: str | None


class MixtureCounts(TypedDict):
    """Rows that a source had for a mixture, gave, and kept; `binding` where it had none left to give."""

    usable: int
    rows: int
    not_sampled: int
    binding: bool


class MixedSource(MixtureCounts):
    """What became of the rows of one source of a mixture."""

    name: str
    source: str
    share: float
    rows_read: int
    rejected: dict[str, int]
    left_out: dict[str, int]
    mapping: ColumnMapping


class DatasetStats(TypedDict, total=False):
    """What a dataset holds and what became of its source's rows: `stats.json`.

    Counts are by split (`rows`, `prompts`, `sft`, `extra_prompts`, `unpaired`), by reason (`rejected`,
    `left_out`), by kind of row or label, by number of completions, or by dimension (absent where rows have
    none).
    `longer_chosen` is the share of pairs whose better completion has more characters; pairs of equal length
    count half. `degree_rankings` are rows of the training split that were made of others; what is said of
    labels, lengths and prompts leaves them out. `files` has hashes of the files.
    """

    stage: str
    code_version: str
    source: str
    config: dict[str, object]
    mapping: ColumnMapping
    conversational: bool
    rows_read: int
    duplicates: int
    contradictions: dict[str, int]
    rejected: dict[str, int]
    left_out: dict[str, int]
    not_sampled: int
    degree_rankings: int
    rows: dict[str, int]
    prompts: dict[str, int]
    kinds: dict[str, int]
    dimensions: dict[str, int]
    completions_per_row: dict[str, int]
    labels: dict[str, int]
    confidence: dict[str, list[float]]
    characters: dict[str, dict[str, object]]
    longer_chosen: float
    dataset_hash: str
    test_hash: str
    files: dict[str, str]
    mixture: list[MixedSource]
    sft: dict[str, object]
    extra_prompts: dict[str, object]
    unpaired: dict[str, object]
    taken_over: str


def read_stats(folder: str | Path) -> DatasetStats:
    """What `stats.json` says of a dataset; empty where it is absent.

    Raises:
        DataError: it is damaged.
    """
    stats: DatasetStats = read_if_there(Path(folder) / STATS_FILE)
    return stats


def hashes_in(folder: Path) -> dict[str, str]:
    """The hash of each file of rows in a dataset folder, and of what experts know, by its path there."""
    files = [*folder.rglob("data-*.arrow"), folder / OUTCOMES_FILE, folder / REWARD_FILE]  # others are caches
    return {
        file.relative_to(folder).as_posix(): content_hash(file) for file in sorted(files) if file.exists()
    }


def read_dataset(folder: str | Path) -> Any:
    """A dataset, or its splits by name, as the data stage saved them in a folder.

    Raises:
        DataError: a file is absent or damaged, or not the one that `stats.json` describes.
    """
    from datasets import load_from_disk

    whole = next((one for one in (Path(folder), Path(folder).parent) if (one / STATS_FILE).is_file()), None)
    stats = read_stats(whole) if whole else {}
    try:
        for name, digest in stats.get("files", {}).items():
            if whole and (file := whole / name).is_relative_to(folder) and content_hash(file) != digest:
                raise ValueError(f"its {file.relative_to(folder)} is not what was written")
        found: Any = load_from_disk(str(folder))
        splits = found if isinstance(found, dict) else {"": found}
        for rows in splits.values():
            rows.data.validate(full=True)  # else what is damaged within a column is met anywhere, or crashes
    except Exception as error:  # those of datasets, Arrow and JSON are of all kinds
        raise DataError(
            f"the dataset {folder} cannot be read: {in_brief(error)}; make it anew with softpref data"
        ) from error
    return found
