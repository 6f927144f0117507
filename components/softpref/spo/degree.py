"""Rows' completions without some of their key content, in tokens, and which of these a batch is given.

They are tokenized once; the draw is new in each epoch. Knows no model and no loss.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
import torch

from softpref.key_content import texts_by_level
from softpref.lm.packing import pack_sequences
from softpref.lm.tokenizing import Job, RowText, tokenize_rows
from softpref.records.dataset import Text
from softpref.spo.config import SPOConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACES = (0, -1)  # among a row's completions: of the preferred, of the dispreferred


class Removed(TypedDict):
    """A row's completions at levels 1 … K − 1.

    Attributes:
        prompt: ids of the prompt before them.
        texts: for each side that `degree_on` asks for, ids of the completion at each level; none of one that
            takes no part.
    """

    prompt: list[int]
    texts: list[list[list[int]]]


class DegreeText(NamedTuple):
    """A completion at one level; `side` is 0 for a row's preferred one, 1 for its dispreferred one."""

    side: int
    level: int
    prompt: list[int]
    completion: list[int]


def sides_of(args: SPOConfig) -> tuple[int, ...]:
    """The sides that take part: 0 preferred, the first completion of a row; 1 dispreferred, its last."""
    return {"both": (0, 1), "preferred": (0,), "dispreferred": (1,)}[args.degree_on]


def add_removed(
    rows: Sequence[Any],
    texts: Iterable[RowText],
    tokenizer: PreTrainedTokenizerBase,
    args: SPOConfig,
    *,
    stop_ids: Collection[int],
    name: str,
) -> int:
    """Give every row its `removed`; all processes must call it.

    A completion takes no part if it has fewer than K − 1 phrases, if what is left of it cannot be tokenized,
    or if it was cut at the length limit: its lack of an end would tell the whole text from the others. Where
    nothing is left of one, its end token is.

    Args:
        rows: with `prompt` and `completions` in ids.
        texts: of the same rows, prompt and completions, text or messages.
        name: of one of the rows, for messages.

    Returns:
        How many completions take no part.
    """
    jobs: list[tuple[tuple[Any, list[list[Text]]], Job]] = []
    for row, text in zip(rows, texts, strict=True):
        levels: list[list[Text]] = []
        for side in sides_of(args):
            ended = row["completions"][_PLACES[side]][-1] in stop_ids
            whole = text.completions[_PLACES[side]]
            levels.append(texts_by_level(whole, args.degree_levels, args.degree_language) if ended else [])
        row["removed"] = Removed(prompt=row["prompt"], texts=[[] for _ in levels])
        if any(levels):
            left = [one for level in levels for one in level if not _blank(one)]
            jobs.append(((row, levels), RowText(text.prompt, left)))
    tokenized = tokenize_rows(
        lambda: jobs,
        tokenizer,
        args,
        name=f"{name} without key content",
        count=len(jobs),
        lenient=True,
        stop_ids=list(stop_ids),
        max_prompt_length=args.max_prompt_length,
        max_completion_length=args.max_completion_length,
    )
    for (row, levels), found in tokenized:
        if not found[0].prompt:
            continue
        ids = iter([one.completion for one in found])
        same = found[0].prompt == row["prompt"]
        row["removed"] = removed = Removed(prompt=row["prompt"] if same else found[0].prompt, texts=[])
        for side, level in zip(sides_of(args), levels, strict=True):
            end = row["completions"][_PLACES[side]][-1:]
            removed["texts"].append([end if _blank(one) else next(ids) for one in level])
    return sum(not one for row in rows for one in row["removed"]["texts"])


def drawn(row: Mapping[str, Any], args: SPOConfig, epoch: int, number: int) -> list[DegreeText]:
    """A row's completions at the levels that an epoch gives it, for each side that takes part.

    Levels are uniform, and follow from the seed, the epoch, the row and the side alone.

    Args:
        row: with its `removed`.
        number: the row's place among all.
    """
    found = []
    for side, texts in zip(sides_of(args), row["removed"]["texts"], strict=True):
        # the 2 separates the seed from those of samples and of rounds
        level = int(np.random.default_rng((args.seed, epoch, number, side, 2)).integers(args.degree_levels))
        if texts and level:
            found.append(DegreeText(side, level, row["removed"]["prompt"], texts[level - 1]))
        elif texts:
            found.append(DegreeText(side, 0, row["prompt"], row["completions"][_PLACES[side]]))
    return found


def degree_tensors(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch's tensors of its texts at their levels; with the rows' own completions, for they share prompts.

    `degree_` with a field of `PackedBatch` is the batch of both. `degree_own` says of each of its completion
    tokens whether it is of a row's own completion; the others are those of the texts, whose places among the
    completions are `degree_places`. They have one token more than they have, for a model reads all but the
    last: so the last state is that of the text's end.

    Args:
        rows: with `degree_texts`.
    """
    most = [len(row["removed"]["texts"]) for row in rows]
    shares = [1 - len(row["degree_texts"]) / sides for row, sides in zip(rows, most, strict=True)]
    inputs: dict[str, Any] = {"degree_skipped": torch.tensor(shares)}
    texts = [(number, text) for number, row in enumerate(rows) for text in row["degree_texts"]]
    if not texts:
        return inputs
    sequences: list[tuple[list[int], list[int]]] = []
    places: list[int] = []
    for row in rows:
        sequences += [(row["prompt"], completion) for completion in row["completions"]]
        for text in row["degree_texts"]:
            places.append(len(sequences))
            sequences.append((text.prompt, [*text.completion, text.completion[-1]]))
    batch = pack_sequences(sequences)
    own = torch.ones(len(sequences), dtype=torch.bool)
    own[places] = False
    return {
        **inputs,
        **{f"degree_{name}": value for name, value in batch._asdict().items()},
        "degree_own": own.repeat_interleave(batch.lengths),
        "degree_places": torch.tensor(places),
        "degree_rows": torch.tensor([number for number, _ in texts]),
        "degree_sides": torch.tensor([text.side for _, text in texts]),
        "degree_levels": torch.tensor([text.level for _, text in texts]),
    }


def _blank(text: Text) -> bool:
    return not (text if isinstance(text, str) else "".join(one["content"] for one in text)).strip()
