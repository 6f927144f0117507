"""Log-probabilities of given completions under a model, and sums of token values.

Everything is *flat*: a batch of S sequences with lengths l_1 … l_S (completion tokens, end token included)
gives tensors over T = Σ l_i tokens in order, so that no statistic can average over padding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from softpref.errors import ConfigError
from softpref.lm.head import completion_hidden, output_head
from softpref.lm.packing import PackedBatch, evaluation_mode, pack_sequences
from softpref.lm.padding import PaddedBatch

logger = logging.getLogger(__name__)

_LOGITS_AT_ONCE = 2**26  # of a model whose full logits are needed: 256 MB in fp32

Ids = Sequence[int]


def gather_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """`log softmax(logits)[target]` per token: `[T, V], [T] -> [T]`, nats."""
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def entropies(logits: Tensor) -> Tensor:
    """Entropy of each next-token distribution: `[T, V] -> [T]`, nats."""
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


def sum_by_sequence(values: Tensor, lengths: Tensor) -> Tensor:
    """Add up flat token values within each sequence: `[T], [S] -> [S]`, in the dtype of `values`.

    Sums run in float64 where the device has it: in fp32 they were wrong by up to 2e-3 nats over 500 tokens.
    """
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=values.device), lengths)
    terms = values if values.device.type == "mps" else values.double()
    return terms.new_zeros(len(lengths)).index_add(0, rows, terms).to(values.dtype)


def check_sequences(model: Any, sequences: Sequence[tuple[Ids, Ids]], drawn: int = 0) -> None:
    """Refuse rows that the model has no positions or no embedding for, before a batch of them fails.

    Args:
        sequences: `(prompt ids, completion ids)`.
        drawn: tokens that may be drawn for each prompt.

    Raises:
        ConfigError: says what is too long, or the id that is too high.
    """
    longest = max(((len(prompt), max(len(ids), drawn)) for prompt, ids in sequences), key=sum)
    check_positions(model, *longest, "lower max_prompt_length or max_completion_length")
    check_ids(model, (ids for pair in sequences for ids in pair))


def check_positions(model: Any, prompt: int, completion: int, remedy: str) -> None:
    """Refuse sequences that the model has no positions for, before a batch of them fails.

    Args:
        prompt, completion: lengths in tokens, the longest that there can be.
        remedy: what the message ends with.

    Raises:
        ConfigError: together they exceed the model's `max_position_embeddings`, if it has any.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and prompt + completion > positions:
        raise ConfigError(
            f"prompts of up to {prompt} tokens with completions of up to {completion} do not fit the model's "
            f"{positions} positions; {remedy}"
        )


def check_ids(model: Any, sequences: Iterable[Ids]) -> None:
    """Refuse ids that the model has no embedding for, before looking one up fails.

    Raises:
        ConfigError: names the highest id. Unused tokens, such as a pad token, may lie outside.
    """
    try:
        size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):  # a model that does not say where its embedding is
        size = None
    highest = max((max(ids) for ids in sequences if len(ids)), default=-1)
    if size is not None and highest >= size:
        raise ConfigError(
            f"the tokenizer gives id {highest}, but the model's embedding has {size} rows; take the "
            "tokenizer that belongs to the model, or resize the embedding to it"
        )


def sequence_logps(model: Any, batch: PackedBatch | PaddedBatch, *, plain: bool = False) -> Tensor:
    """`log π(completion | prompt)` of each sequence in nats: `[S]` fp32, with gradient."""
    return sum_by_sequence(completion_hidden(model, batch, plain=plain).logps(), batch.lengths)


@torch.no_grad()
def score_sequences(
    model: Any,
    sequences: Sequence[tuple[Ids, Ids]],
    *,
    batch_size: int = 64,
    plain: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Sequence log-probabilities of any number of `(prompt ids, completion ids)` pairs: `[n]`, on the CPU.

    The model is in eval mode meanwhile. The result is in the order given.

    Args:
        batch_size: sequences computed at once.
        plain: as in `softpref.lm.head.completion_hidden`.
        progress: called with the number of sequences that a batch has added.
    """
    scores = torch.empty(len(sequences))
    with evaluation_mode(model):
        for rows, batch in scoring_batches(model, sequences, batch_size=batch_size, plain=plain):
            scores[rows] = sequence_logps(model, batch, plain=plain).cpu()
            if progress:
                progress(len(rows))
    return scores


def scoring_batches(
    model: Any, sequences: Sequence[tuple[Ids, Ids]], *, batch_size: int, plain: bool = False
) -> Iterator[tuple[list[int], PackedBatch]]:
    """Batches on the model's device, each with the places of its sequences: those of one prompt together.

    Lengths are alike within a batch, for models that need padding; where full logits arise, batches are small
    enough to bound them.
    """
    device = next(model.parameters()).device
    order = sorted(
        range(len(sequences)),
        key=lambda i: (len(sequences[i][0]), list(sequences[i][0]), len(sequences[i][1])),
    )
    full = plain or (bool(order) and output_head(model) is None)
    start = 0
    while start < len(order):
        rows = order[start : start + batch_size]
        if full:
            longest = max(len(sequences[i][0]) + len(sequences[i][1]) for i in rows)
            rows = rows[: max(1, _LOGITS_AT_ONCE // (longest * model.config.vocab_size))]
        yield rows, pack_sequences([sequences[i] for i in rows]).to(device)
        start += len(rows)


def computing_precision(args: TrainingArguments, model: Any) -> str:
    """The precision that a trainer computes in: `float32`, `bfloat16` or `float16`.

    Args:
        args: its `TrainingArguments`.
    """
    weights = str(next(model.parameters()).dtype).removeprefix("torch.")
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else weights


class TeamScorer:
    """Scores sequences on all processes of a run for the first of them, which alone has the sequences.

    The first calls it, any number of times, and then `dismiss`; meanwhile the others are in `help`.

    Args:
        compute: sequence log-probabilities of `(prompt ids, completion ids)` pairs, nats.
        rank, world_size: of this process, and how many there are.
    """

    def __init__(
        self, compute: Callable[[list[tuple[Ids, Ids]]], list[float]], rank: int, world_size: int
    ) -> None:
        self._compute, self._rank, self._size = compute, rank, world_size

    def __call__(self, sequences: Sequence[tuple[Ids, Ids]]) -> list[float]:
        """Log-probabilities in the order given, NaN where they could not be computed."""
        self._deal([list(sequences[rank :: self._size]) for rank in range(self._size)])
        parts = self._answers
        return [parts[i % self._size][i // self._size] for i in range(len(sequences))]

    def help(self) -> None:
        """Compute this process's shares until the first process needs no more."""
        while self._deal(None):
            pass

    def dismiss(self) -> None:
        """Let the others go on."""
        self._deal([None] * self._size)

    def _deal(self, shares: list[Any] | None) -> bool:
        """Compute a share on every process and have all answers on each; whether there was one."""
        mine: list[Any] = [None]
        if self._size == 1:
            mine = shares or mine
        else:
            torch.distributed.scatter_object_list(mine, shares, src=0)
        if mine[0] is None:
            return False
        self._answers: list[Any] = [None] * self._size
        answer = self._scored(mine[0])
        if self._size == 1:
            self._answers = [answer]
        else:
            torch.distributed.all_gather_object(self._answers, answer)
        return True

    def _scored(self, sequences: list[tuple[Ids, Ids]]) -> list[float]:
        try:
            return self._compute(sequences)
        except Exception as error:  # all must answer, or the others would wait forever
            logger.warning(
                "%d sequences cannot be scored by process %d: %s", len(sequences), self._rank, error
            )
            return [math.nan] * len(sequences)
