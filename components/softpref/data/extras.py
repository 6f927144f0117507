"""Demonstrations and further prompts beside the preferences of a dataset: `sft/` and `prompts/`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from softpref.data.columns import check_present
from softpref.data.config import DataConfig
from softpref.data.embedded import embedded_demonstrations
from softpref.data.intake import RejectionLog, peek
from softpref.data.rows import Demonstration, read_demonstration, read_prompt
from softpref.data.sources import SourceRow
from softpref.data.splits import prompt_key
from softpref.data.texts import LeftOut, Refused
from softpref.data.writing import SplitWriter, demonstration_features
from softpref.errors import DataError
from softpref.records.dataset import JUDGE_SPLIT, DatasetStats


def write_extras(
    config: DataConfig,
    conversational: bool,
    split_of: Mapping[bytes, str],
    streams: Mapping[str, Iterator[SourceRow]],
    folder: Path,
    rejections: RejectionLog,
    listing: Path,
) -> DatasetStats:
    """`sft/` and `prompts/`, where the configuration gives them a source; what `stats.json` says of them.

    Args:
        streams: the rows of the further sources `sft` and `prompts`.
    """
    extras: DatasetStats = {}
    features = demonstration_features(conversational)
    if config.embedded or "sft" in streams:
        demonstrations = streams.get("sft") or embedded_demonstrations(config)
        columns = {"prompt": "prompt", "completion": "completion", **config.sft_columns}
        writer = SplitWriter(folder / "work", ("train", "validation"), features, "sft-")
        held_out = 0
        for row in _extra_rows(demonstrations, columns, config, "sft", conversational, rejections, listing):
            split = split_of.get(prompt_key(row.prompt), "train")
            if split in ("test", JUDGE_SPLIT):  # the reference must not have seen what it is judged on or by
                held_out += 1
                continue
            writer.write(split, row._asdict())
            if not config.embedded and sum(writer.counts.values()) == config.sft_rows:
                break
        if not writer.counts["train"]:
            raise DataError(
                f"{config.sft_source or config.source} gave no demonstration outside the held-out prompts"
            )
        writer.save(folder / "sft", skip_empty=True)
        rejected = dict(rejections.extras["sft"])
        extras["sft"] = {**writer.counts, "held_out": held_out, "rejected": rejected}
    if "prompts" in streams:
        columns = {"prompt": "prompt", **config.prompts_columns}
        writer = SplitWriter(folder / "work", ("train",), {"prompt": features["prompt"]}, "prompts-")
        seen: set[bytes] = set()
        held_out = 0
        for row in _extra_rows(
            streams["prompts"], columns, config, "prompts", conversational, rejections, listing
        ):
            key = prompt_key(row.prompt)
            if split_of.get(key, "train") != "train":
                held_out += 1
            elif key not in seen:
                seen.add(key)
                writer.write("train", {"prompt": row.prompt})
        if not writer.counts["train"]:
            raise DataError(f"{config.prompts_source} gave no prompt outside the held-out prompts")
        writer.dataset("train").save_to_disk(str(folder / "prompts"))
        rejected = dict(rejections.extras["prompts"])
        extras["extra_prompts"] = {**writer.counts, "held_out": held_out, "rejected": rejected}
    return extras


def _extra_rows(
    stream: Iterator[SourceRow],
    columns: dict[str, str],
    config: DataConfig,
    name: str,
    conversational: bool,
    rejections: RejectionLog,
    listing: Path,
) -> Iterator[Demonstration]:
    """Demonstrations, or prompts with an empty completion; what cannot be used is listed under `name`."""
    source = (config.sft_source if name == "sft" else config.prompts_source) or config.source
    _, stream, known, _ = peek(stream, source)
    fields = config.template_fields
    if fields and "prompt" not in (config.sft_columns if name == "sft" else config.prompts_columns):
        columns = {role: column for role, column in columns.items() if role != "prompt"}
        check_present([("prompt_template", field) for field in fields], known, source)
    check_present([(f"{name}_columns[{role!r}]", column) for role, column in columns.items()], known, source)
    read = refused = taken = 0
    for row in stream:
        read += 1
        try:
            if name == "sft":
                record = read_demonstration(row.readable, columns, config)
            else:
                record = Demonstration(read_prompt(row.readable, columns, config), "")
            if isinstance(record.prompt, list) is not conversational:
                raise Refused("plain text and conversations are mixed", "with the preferences")
            taken += 1
            yield record
        except Refused as reason:
            refused += not isinstance(reason, LeftOut)
            rejections.add(row.number, row.place, reason, source=name)
    if not taken or refused > config.max_rejected_fraction * read:
        raise DataError(
            f"{refused} of the {read} rows of {source} ({name}) were refused, max_rejected_fraction is "
            f"{config.max_rejected_fraction}; they are listed in {listing}"
        )
