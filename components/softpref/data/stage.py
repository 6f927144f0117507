"""Stage 1: a source of preferences becomes a dataset folder with splits, statistics and a page to look at.

`run` describes the folder.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from softpref import __version__
from softpref.artifacts import readable
from softpref.config import without_secrets, write_parameters
from softpref.data.config import EMBEDDED, FURTHER, WITH_ESCAPES, DataConfig, Part, parts_of
from softpref.data.embedded import embedded_preferences, write_known_answers
from softpref.data.extras import write_extras
from softpref.data.finished import is_finished, take_over
from softpref.data.intake import Intake, RejectionLog, Source, check_alike, check_rejections
from softpref.data.mixture import choose_rows
from softpref.data.page import render_page
from softpref.data.sources import SourceRow, fetch, open_source
from softpref.data.splits import WITH_JUDGE, assign_splits, few_prompts
from softpref.data.writing import EXAMPLES, hash_order, write_preferences
from softpref.disk import DAMAGED, flush_below, says_disk_trouble
from softpref.errors import ConfigError, DataError
from softpref.progress import settle_output
from softpref.records.dataset import (
    OUTCOMES_FILE,
    PAGE_FILE,
    REJECTED_FILE,
    REWARD_FILE,
    STATS_FILE,
    ColumnMapping,
    DatasetStats,
    PreferenceRow,
    hashes_in,
    read_stats,
)
from softpref.records.files import PARAMETERS_FILE, TIMINGS_FILE
from softpref.remote import is_url, public_url
from softpref.timings import PhaseTimer

logger = logging.getLogger(__name__)

_WRITTEN = {  # what a dataset folder holds; a run replaces them all
    *(*WITH_JUDGE, "dataset_dict.json", *FURTHER, STATS_FILE, PARAMETERS_FILE, TIMINGS_FILE),
    *(REJECTED_FILE, PAGE_FILE, OUTCOMES_FILE, REWARD_FILE),
}
_SOURCES = ("source", *(f"{name}_source" for name in FURTHER))


@says_disk_trouble
def run(config: DataConfig, output_dir: str, page_path: str | None = None) -> DatasetStats:
    """Make the dataset folder `output_dir`.

    The folder is a saved `datasets.DatasetDict` with the splits train, validation and test, and judge where
    `judge_fraction` asks for it (columns `prompt`, `completions` best first, `kind`, `probability`, `weight`
    where a source has weights, `dimension` where rows have any, `source_row`, `source` where there are many,
    and `degree` where `degree_ranking_weight` makes rows), and beside it `stats.json`, `parameters.yaml`,
    `rejected.jsonl`, `page.html`; `sft/` (a `DatasetDict` of `prompt` and `completion`), `prompts/` (a
    `Dataset` of `prompt`) and `unpaired/` (one of `prompt`, `completion` and `label`) where the configuration
    gives them a source; for the story world `outcomes.jsonl`, for the storyteller `reward.json`. It appears
    under its name only when complete. The same configuration and source give the same rows. Where the source
    is such a folder itself, its splits and what lies beside them are taken over as they are.

    Args:
        config: what to read and how.
        output_dir: the folder to make. One that an earlier run made is replaced.
        page_path: where to put a second copy of `page.html`.

    Returns:
        What `stats.json` holds.

    Raises:
        ConfigError: the source or a column does not exist, `output_dir` holds something else, or the source.
        DataError: no usable row, too many refused ones, or too few prompts. Refused rows are then listed in
            `<output_dir>.rejected.jsonl`.
    """
    settle_output()
    output = Path(os.path.abspath(output_dir))
    _refuse_foreign(output)
    _refuse_source_inside(config, output)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    listing = output.with_name(f"{output.name}.rejected.jsonl")
    shutil.rmtree(partial, ignore_errors=True)
    listing.unlink(missing_ok=True)
    partial.mkdir()
    timer = PhaseTimer("preparing data")
    try:
        stats = _build(config, partial, listing)
        timer.write(partial)
        flush_below(partial)
        _replace(output, partial)
    except DataError:
        if (partial / REJECTED_FILE).is_file():
            os.replace(partial / REJECTED_FILE, listing)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if page_path is not None:
        Path(page_path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(output / PAGE_FILE, page_path)
    return stats


def headline(stats: DatasetStats) -> dict[str, float]:
    """How many rows there are, how many were not taken, and the share of soft labels."""
    labels = stats["labels"]
    return readable(
        {
            **{f"{split}_rows": count for split, count in stats["rows"].items()},
            "refused_rows": sum(stats["rejected"].values()),
            "left_out_rows": sum(stats["left_out"].values()),
            "soft_label_share": labels["soft"] / max(1, sum(labels.values())),
        }
    )


def _build(config: DataConfig, folder: Path, listing: Path) -> DatasetStats:
    work = folder / "work"
    work.mkdir()
    # all are opened, and so known to exist, before any is read
    parts = parts_of(config)
    fetched = [
        fetch(part.config.source, part.config.format) if is_url(part.config.source) else None
        for part in parts
    ]
    place = fetched[0] or Path(config.source)
    finished = not config.embedded and config.split is None and is_finished(place)
    if config.mixture:
        _refuse_finished(parts, fetched)
    preferences = [] if finished else list(map(_preference_rows, (part.config for part in parts), fetched))
    streams = {name: _further_rows(name, source) for name, source in config.further_sources.items()}
    config = _without_secrets(config)
    if finished:
        taken = take_over(place, config, folder)
        stats: DatasetStats = {**taken.stats, "taken_over": config.source}
        split_of, rows = taken.split_of, taken.dataset["train"]
        examples = [rows[index] for index in sorted(hash_order(range(len(rows)), config.seed)[:EXAMPLES])]
    with contextlib.closing(RejectionLog(folder / REJECTED_FILE)) as rejections:
        if not finished:
            stats, split_of, examples = _divide(config, parts, preferences, folder, rejections, listing)
        stats |= write_extras(config, stats["conversational"], split_of, streams, folder, rejections, listing)
        write_known_answers(config, folder)
    known_reward = any((folder / name).is_file() for name in (OUTCOMES_FILE, REWARD_FILE))
    for sentence in few_prompts(split_of, known_reward):
        logger.warning("%s", sentence)
    stats["files"] = hashes_in(folder)
    (folder / STATS_FILE).write_text(json.dumps(stats, indent=2, ensure_ascii=False), encoding="utf-8")
    escaped = {name: getattr(config, name).replace("\\", "\\\\") for name in WITH_ESCAPES}
    write_parameters(_changed(config, escaped), folder)
    (folder / PAGE_FILE).write_text(render_page(stats, examples), encoding="utf-8")
    shutil.rmtree(work)
    return stats


def _without_secrets(config: DataConfig) -> DataConfig:
    """The configuration as it may be recorded and shown: URLs can hold a password or a signature."""
    sources = {name: public_url(source) for name in _SOURCES if (source := getattr(config, name))}
    return _changed(config, {**sources, "mixture": without_secrets(config.mixture)})


def _changed(config: DataConfig, values: Mapping[str, object]) -> DataConfig:
    changed = copy.copy(config)  # a new instance would read the escapes of its texts again
    for name, value in values.items():
        setattr(changed, name, value)
    return changed


def _divide(
    config: DataConfig,
    parts: Sequence[Part],
    preferences: Sequence[Iterator[SourceRow]],
    folder: Path,
    rejections: RejectionLog,
    listing: Path,
) -> tuple[DatasetStats, dict[bytes, str], list[PreferenceRow]]:
    """Read the preferences and write their splits; returns statistics, each prompt's split, and examples."""
    sources = [Source(rows, part.config, part.name) for rows, part in zip(preferences, parts, strict=True)]
    check_alike(sources)
    names = [part.name for part in parts] if config.mixture else []
    intake = Intake(config, folder / "work" / "rows.jsonl", rejections, names)
    taken = []
    for source in sources:
        taken.append(intake.take(source))
        check_rejections(taken[-1], source.name, config, listing)
    kept, mixed = choose_rows(intake, config, parts)
    keys = intake.prompt_keys
    split_of = assign_splits(
        {keys[intake.prompt_ids[index]] for index in kept},
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        judge_fraction=config.judge_fraction,
        seed=config.seed,
    )
    splits = {id: split_of[key] for id, key in enumerate(keys) if key in split_of}
    weighted = any("weight" in source.layout.columns for source in sources)
    judged = any(source.has_dimensions for source in sources)
    summary, examples = write_preferences(
        intake, config, kept, splits, folder, rejections, weighted=weighted, dimensions=judged, names=names
    )
    mappings = [_mapping(source) for source in sources]
    stats: DatasetStats = {
        "stage": "data",
        "code_version": __version__,
        "source": config.source,
        "config": dataclasses.asdict(config),
        "mapping": mappings[0],
        "conversational": bool(intake.conversational),
        "rows_read": sum(one.rows_read for one in taken),
        "duplicates": intake.duplicates,
        "contradictions": {
            "sets": len(intake.contradictory),
            "rows": sum(id in intake.contradictory for id in intake.set_ids),
        },
        "rejected": dict(rejections.refused.most_common()),
        "left_out": dict(rejections.left_out.most_common()),
        **summary,
    }
    if config.mixture:
        for one, counts in zip(taken, mixed, strict=True):  # these were found when all had been read
            one.left_out.update(contradiction=one.accepted - counts["usable"])
        stats["mixture"] = [
            {
                "name": part.name,
                "source": public_url(part.config.source),
                "share": float(part.share or counts["rows"] / len(kept)),
                "rows_read": one.rows_read,
                "rejected": dict(one.refused.most_common()),
                "left_out": dict((+one.left_out).most_common()),
                **counts,
                "mapping": mapping,
            }
            for part, one, counts, mapping in zip(parts, taken, mixed, mappings, strict=True)
        ]
    return stats, split_of, examples


def _mapping(source: Source) -> ColumnMapping:
    """What `stats.json` says of how a source's columns are read."""
    labels = {
        name: {role: layout.columns[role] for role in layout.label}
        for name, layout in source.layouts.items()
        if name
    }
    shared: dict[str, str | list[str]] = {
        role: column
        for role, column in source.layout.columns.items()
        if not labels or role not in source.layout.label
    }
    mapping: ColumnMapping = {
        "form": source.layout.form,
        "columns": shared,
        "guessed": source.layout.guessed,
        "unused": list(source.layout.unused),
        "notes": list(source.layout.notes),
        "prompt_template": source.config.prompt_template or None,
    }
    if labels:
        mapping["dimensions"] = labels
    return mapping


def _further_rows(name: str, source: str) -> Iterator[SourceRow]:
    """Those of the source that the parameter `NAME_source` gives, which an error names."""
    try:
        return open_source(source)
    except ConfigError as error:
        raise ConfigError(f"{name}_source: {error}") from error


def _preference_rows(config: DataConfig, fetched: Path | None) -> Iterator[SourceRow]:
    if config.embedded:
        return embedded_preferences(config)
    return open_source(
        config.source,
        format=config.format,
        subset=config.subset,
        split=config.split,
        revision=config.revision,
        fetched=fetched,
    )


def _refuse_foreign(output: Path) -> None:
    """Refuse an output folder with something in it that an earlier run of this stage did not write."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        ours = read_stats(output)["stage"] == "data"
    except DAMAGED:
        ours = False
    if not ours:
        raise ConfigError(
            f"output {output} exists and is not a dataset of this stage; give another folder, or remove it"
        )
    if foreign := sorted(path.name for path in output.iterdir() if path.name not in _WRITTEN):
        raise ConfigError(
            f"output {output} is a dataset of this stage, which this run would replace, but it also holds "
            f"{', '.join(foreign)}; give another folder, or move that elsewhere"
        )


def _refuse_source_inside(config: DataConfig, output: Path) -> None:
    """Refuse to read from the folder that will be replaced."""
    given = {name: getattr(config, name) or "" for name in _SOURCES}
    given |= {f"mixture[{part.name!r}]": part.config.source for part in parts_of(config)[1:]}
    for name, source in given.items():
        local = re.sub("^(file|local)://", "", source)
        path = Path(os.path.realpath(local)) if local and local not in EMBEDDED else None
        if path and os.path.exists(path) and Path(os.path.realpath(output)) in (path, *path.parents):
            raise ConfigError(f"{name} {source} lies in the output {output}, which is replaced; give another")


def _refuse_finished(parts: Sequence[Part], fetched: Sequence[Path | None]) -> None:
    """Refuse a finished dataset in a mixture, of which only training rows would be read and split anew."""
    for part, place in zip(parts, fetched, strict=True):
        if part.config.split is None and is_finished(place or Path(part.config.source)):
            raise ConfigError(
                f"{part.name} is a finished dataset, but a mixture is split anew; give split, to read one "
                "of its splits as any other source"
            )


def _replace(output: Path, partial: Path) -> None:
    """Put the finished folder in its place; if killed in between, the old or the new one stays complete."""
    old = output.with_name(f".{output.name}.old")
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(output, old)
    os.replace(partial, output)
    shutil.rmtree(old, ignore_errors=True)
