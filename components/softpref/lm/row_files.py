"""Tokenized rows as files: parts of some thousands of rows, which bounds memory. Tokenizes nothing.

A part is a safetensors file of flat arrays: `ids` of every row's prompt and then its completions, and what
divides them: `prompts` (a length a row), `completions` (how many a row has), `lengths` (of each completion);
with the flags of `TokenizedSequence`, `cut_prompts` and `moved_borders` a row, `cut_completions` one each,
and so `reference_logps`, not a number where it is unknown.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from softpref.lm.tokenization import TokenizedSequence

_PART_ROWS = 10_000
_COLUMNS = {
    "ids": "I",
    **dict.fromkeys(("prompts", "completions", "lengths"), "I"),
    **dict.fromkeys(("cut_prompts", "moved_borders", "cut_completions"), "B"),
    "reference_logps": "f",
}


def write_rows(folder: Path, rows: Iterable[Sequence[TokenizedSequence]]) -> None:
    """Write rows, each the sequences of one prompt, into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    columns: dict[str, array[float]] = {name: array(kind) for name, kind in _COLUMNS.items()}
    parts = 0
    for row in rows:
        first = row[0]
        columns["ids"].extend(first.prompt)
        columns["prompts"].append(len(first.prompt))
        columns["completions"].append(len(row))
        columns["cut_prompts"].append(first.prompt_truncated)
        columns["moved_borders"].append(first.border_moved)
        for sequence in row:
            columns["ids"].extend(sequence.completion)
            columns["lengths"].append(len(sequence.completion))
            columns["cut_completions"].append(sequence.truncated)
            logp = sequence.reference_logp
            columns["reference_logps"].append(math.nan if logp is None else logp)
        if len(columns["prompts"]) == _PART_ROWS:
            _write(folder, parts, columns)
            parts += 1
    if columns["prompts"]:
        _write(folder, parts, columns)


def read_rows(folder: Path) -> Iterator[list[TokenizedSequence]]:
    """Rows that `write_rows` wrote, in their order."""
    from safetensors.numpy import load_file

    for file in part_files(folder):
        columns = load_file(file)
        ids = columns["ids"]
        each = zip(
            *(columns[name].tolist() for name in ("lengths", "cut_completions", "reference_logps")),
            strict=True,
        )
        rows = (columns[name].tolist() for name in ("prompts", "completions", "cut_prompts", "moved_borders"))
        end = 0
        for length, count, cut_prompt, moved in zip(*rows, strict=True):
            prompt = ids[end : (end := end + length)].tolist()
            row = []
            for tokens, cut, logp in islice(each, count):
                completion = ids[end : (end := end + tokens)].tolist()
                flags = (bool(cut), bool(cut_prompt), bool(moved))
                row.append(TokenizedSequence(prompt, completion, *flags, None if math.isnan(logp) else logp))
            yield row


def prompt_lengths(folder: Path) -> Iterator[int]:
    """How many ids each row's prompt has."""
    from safetensors import safe_open

    for file in part_files(folder):
        with safe_open(file, framework="np") as part:
            yield from part.get_tensor("prompts").tolist()


def part_files(folder: Path) -> list[Path]:
    """The files that `write_rows` wrote, in their order."""
    return sorted(folder.glob("part-*.safetensors"))


def _write(folder: Path, number: int, columns: dict[str, array[float]]) -> None:
    """Write a part, ids in two bytes where they fit, and empty the columns."""
    import numpy as np
    from safetensors.numpy import save_file

    tensors = {name: np.array(column) for name, column in columns.items()}
    if tensors["ids"].max(initial=0) < 1 << 16:
        tensors["ids"] = tensors["ids"].astype(np.uint16)
    save_file(tensors, folder / f"part-{number:05}.safetensors")
    for column in columns.values():
        del column[:]
