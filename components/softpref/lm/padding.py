"""Completions with their prompts as a padded batch, and full logits at completion tokens: the plain way.

`softpref.lm.packing` and `softpref.lm.head` save what is spent here on padding, on prompts that several
completions share, and on logits that nobody reads. This is the way for models that they cannot serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class PaddedBatch(NamedTuple):
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

    def to(self, device: torch.device | str) -> PaddedBatch:
        return PaddedBatch(*(tensor.to(device, non_blocking=True) for tensor in self))

    @property
    def targets(self) -> Tensor:
        """The completion tokens, `[T]`."""
        return self.input_ids[:, 1:][self.completion_mask[:, 1:]]

    def run(self, model: Any) -> Any:
        """The model's output, `[S, L, …]`."""
        return model(input_ids=self.input_ids, attention_mask=self.attention_mask, use_cache=False)

    def predicting(self, states: Tensor) -> Tensor:
        """Of states `[S, L, …]` those that predict completion tokens, `[T, …]`.

        A prompt has at least one token, so every completion token has a position that predicts it.
        """
        return states[:, :-1][self.completion_mask[:, 1:]]


class CompletionLogits(NamedTuple):
    """The scores `[T, V]`, fp32, from which each completion token was chosen, and these tokens `[T]`."""

    logits: Tensor
    targets: Tensor


def pad_sequences(sequences: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> PaddedBatch:
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
    return PaddedBatch(input_ids, attention_mask, completion_mask, torch.tensor(lengths))


def completion_logits(model: Any, batch: PaddedBatch) -> CompletionLogits:
    """Run the model and keep the logits that predict completion tokens; prompt and padding are dropped."""
    return CompletionLogits(batch.predicting(batch.run(model).logits).float(), batch.targets)
