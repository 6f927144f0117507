"""What lies beside the preferences of a dataset: demonstrations, further prompts, unpaired completions."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from softpref.data.columns import check_present, further_columns, value_at
from softpref.data.config import FURTHER, DataConfig
from softpref.data.embedded import embedded_demonstrations, embedded_prompts
from softpref.data.intake import RejectionLog, peek
from softpref.data.rows import Demonstration, Judged, read_demonstration, read_judged, read_prompt
from softpref.data.sources import SourceRow
from softpref.data.splits import prompt_key
from softpref.data.texts import LeftOut, Refused, may_instruct
from softpref.data.writing import SplitWriter, further_features
from softpref.errors import DataError
from softpref.records.dataset import JUDGE_SPLIT, DatasetStats

logger = logging.getLogger(__name__)


def write_extras(
    config: DataConfig,
    conversational: bool,
    split_of: Mapping[bytes, str],
    streams: Mapping[str, Iterator[SourceRow]],
    folder: Path,
    rejections: RejectionLog,
    listing: Path,
) -> DatasetStats:
    """`sft/`, `prompts/`, `unpaired/`, where the configuration gives them a source; what `stats.json` says of
    them.

    Args:
        streams: the rows of the further sources, by the name of the folder.
    """
    extras: DatasetStats = {}
    features = further_features(conversational)
    of = {name: {role: features[role] for role in roles} for name, roles in FURTHER.items()}
    if config.embedded or "sft" in streams:
        demonstrations = streams.get("sft") or embedded_demonstrations(config)
        writer = SplitWriter(folder / "work", ("train", "validation"), of["sft"], "sft-")
        held_out = 0
        for row in _extra_rows(demonstrations, config, "sft", conversational, rejections, listing):
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
    unjudged = embedded_prompts(config) if config.embedded else []
    if unjudged or "prompts" in streams:
        prompts = streams.get("prompts") or iter(unjudged)
        writer = SplitWriter(folder / "work", ("train",), of["prompts"], "prompts-")
        seen: set[bytes] = set()
        held_out = 0
        for row in _extra_rows(prompts, config, "prompts", conversational, rejections, listing):
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
    if "unpaired" in streams:
        rows = _extra_rows(streams["unpaired"], config, "unpaired", conversational, rejections, listing)
        writer = SplitWriter(folder / "work", ("train",), of["unpaired"], "unpaired-")
        extras["unpaired"] = _write_unpaired(rows, config, split_of, writer, folder / "unpaired")
        extras["unpaired"]["rejected"] = dict(rejections.extras["unpaired"])
    return extras


def _write_unpaired(
    rows: Iterator[Demonstration | Judged],
    config: DataConfig,
    split_of: Mapping[bytes, str],
    writer: SplitWriter,
    folder: Path,
) -> dict[str, object]:
    """Save those whose prompt the preferences lack, and say how many there are."""
    digest = hashlib.sha256()
    shared_prompt = desirable = 0
    for row in rows:
        if prompt_key(row.prompt) in split_of:  # held out, or learned from already
            shared_prompt += 1
            continue
        assert isinstance(row, Judged)
        writer.write("train", row._asdict())
        desirable += row.label
        digest.update(json.dumps(row).encode() + b"\n")
    if not writer.counts["train"]:
        raise DataError(
            f"every prompt of {config.unpaired_source} is also among the preferences, so none of its "
            "completions is left"
        )
    if shared_prompt:
        logger.warning(
            "%d of %d completions of %s are left out: their prompts are also among the preferences",
            shared_prompt,
            shared_prompt + writer.counts["train"],
            config.unpaired_source,
        )
    writer.dataset("train").save_to_disk(str(folder))
    return {
        **writer.counts,
        "desirable": desirable,
        "shared_prompt": shared_prompt,
        "hash": digest.hexdigest(),
    }


def _extra_rows(
    stream: Iterator[SourceRow],
    config: DataConfig,
    name: str,
    conversational: bool,
    rejections: RejectionLog,
    listing: Path,
) -> Iterator[Demonstration | Judged]:
    """What the further source `name` gives: demonstrations, prompts (with an empty completion) or unpaired
    completions. What cannot be used is listed.
    """
    source = config.further_sources.get(name, config.source)
    parameter = f"{name}_source" if name in config.further_sources else "source"
    first, stream, known, _ = peek(stream, f"{parameter} {source}")
    own = getattr(config, f"{name}_columns")
    columns, fields = further_columns(own, FURTHER[name], known), config.template_fields
    if "system" in {*columns} - {*own}:
        values = [value_at(row.record, columns["system"]) for row in first if row.record is not None]
        if 2 * sum(map(may_instruct, values)) < len(values):  # found by its name alone, it is something else
            del columns["system"]
    if found := [f"{role} ← {columns[role]}" for role in columns if role not in (*own, *FURTHER[name])]:
        logger.warning("%s (%s): recognised by the columns' names: %s", source, name, ", ".join(found))
    if fields and "prompt" not in own:
        columns = {role: column for role, column in columns.items() if role not in ("prompt", "input")}
        check_present([("prompt_template", field) for field in fields], known, source)
    check_present([(f"{name}_columns[{role!r}]", column) for role, column in columns.items()], known, source)
    read = refused = taken = 0
    for row in stream:
        read += 1
        try:
            record: Demonstration | Judged
            if name == "prompts":
                record = Demonstration(read_prompt(row.readable, columns, config), "")
            else:
                read_one = read_demonstration if name == "sft" else read_judged
                record = read_one(row.readable, columns, config)
            if isinstance(record.prompt, list) is not conversational:
                raise Refused("plain text and conversations are mixed", "with the preferences")
            taken += 1
            yield record
        except Refused as reason:
            refused += not isinstance(reason, LeftOut)
            rejections.add(row.number, row.place, reason, source=name)
    if not taken or refused > config.max_rejected_fraction * read:
        reasons = "; ".join(f"{rule} ({count})" for rule, count in rejections.extras[name].most_common(3))
        if not taken:
            verdict = f"none of the {read} rows of {source} ({name}) can be used"
        else:
            verdict = (
                f"{refused} of the {read} rows of {source} ({name}) were refused, more than "
                f"max_rejected_fraction = {config.max_rejected_fraction} allows"
            )
        raise DataError(f"{verdict}: {reasons}. They are listed in {listing}")
