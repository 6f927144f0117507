"""Log-probabilities of given completions under a model: batches, logits at completion positions, sums.

Everything is *flat*: a batch of S sequences with lengths l_1 … l_S (completion tokens, end token included)
gives tensors over T = Σ l_i tokens in order, so that no statistic can average over padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softpref.lm.sampling import evaluation_mode


class SequenceBatch(NamedTuple):
    """Right-padded sequences with their completions marked.

    Attributes:
        input_ids: `[S, L]`, prompt then completion then padding.
        attention_mask: `[S, L]`, 1 on prompt and completion.
        completion_mask: `[S, L]`, True on completion tokens; by length, never by token id, since the padding
            token may be the end token.
        lengths: `[S]`, completion tokens per sequence.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    lengths: Tensor

    def to(self, device: Any) -> SequenceBatch:
        return SequenceBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


class CompletionLogits(NamedTuple):
    """What a model says at each of the T completion tokens of a batch.

    Attributes:
        logits: `[T, V]` in fp32, the scores from which each completion token was chosen.
        targets: `[T]`, the tokens that stand there.
    """

    logits: Tensor
    targets: Tensor


def pad_sequences(sequences: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> SequenceBatch:
    """Collate `(prompt ids, completion ids)` pairs; every completion needs at least one token."""
    lengths = [len(completion) for _, completion in sequences]
    if not sequences or min(lengths) == 0:
        raise ValueError("every sequence needs at least one completion token")
    width = max(len(prompt) + len(completion) for prompt, completion in sequences)
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(sequences), width), dtype=torch.long)
    completion_mask = torch.zeros((len(sequences), width), dtype=torch.bool)
    for row, (prompt, completion) in enumerate(sequences):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.as_tensor([*prompt, *completion])
        attention_mask[row, :end] = 1
        completion_mask[row, len(prompt) : end] = True
    return SequenceBatch(input_ids, attention_mask, completion_mask, torch.tensor(lengths))


def completion_logits(model: Any, batch: SequenceBatch) -> CompletionLogits:
    """Run the model and keep the fp32 logits that predict completion tokens; prompt and padding are dropped.

    A prompt has at least one token, so every completion token has a position that predicts it.
    """
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    predicts = batch.completion_mask[:, 1:]
    return CompletionLogits(output.logits[:, :-1][predicts].float(), batch.input_ids[:, 1:][predicts])


def gather_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """`log softmax(logits)[target]` per token: `[T, V], [T] -> [T]`, nats."""
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def entropies(logits: Tensor) -> Tensor:
    """Entropy of each next-token distribution: `[T, V] -> [T]`, nats."""
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


def sum_by_sequence(values: Tensor, lengths: Tensor) -> Tensor:
    """Add up flat token values within each sequence: `[T], [S] -> [S]`, in the dtype of `values`.

    Sums run in float64 where the device has it: fp32 ones came out wrong by up to 2e-3 nats over 500 tokens.
    """
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=values.device), lengths)
    terms = values if values.device.type == "mps" else values.double()
    return terms.new_zeros(len(lengths)).index_add(0, rows, terms).to(values.dtype)


def sequence_logps(model: Any, batch: SequenceBatch) -> Tensor:
    """`log π(completion | prompt)` of each sequence in nats: `[S]`."""
    logits, targets = completion_logits(model, batch)
    return sum_by_sequence(gather_logps(logits, targets), batch.lengths)


@torch.no_grad()
def score_sequences(
    model: Any,
    sequences: Iterable[tuple[Sequence[int], Sequence[int]]],
    *,
    pad_id: int,
    batch_size: int = 64,
) -> Tensor:
    """Sequence log-probabilities of any number of `(prompt ids, completion ids)` pairs, on the CPU, in order.

    The model is in eval mode meanwhile. Sequences are scored by length so that a batch holds little padding.
    """
    sequences = list(sequences)
    device = next(model.parameters()).device
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]) + len(sequences[i][1]))
    scores = torch.empty(len(sequences))
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = pad_sequences([sequences[i] for i in chosen], pad_id).to(device)
            scores[chosen] = sequence_logps(model, batch).cpu()
    return scores
