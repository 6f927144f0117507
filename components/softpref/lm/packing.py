"""Prompts with their completions as one flat sequence: no padding, a prompt's work done once.

A *block* is a prompt followed by the completions that share it, `p p p a a a b b b`. Each completion goes on
from the prompt's positions, and attends to the prompt and to itself; blocks know nothing of each other. The
linear layers of a model then run over tokens that count, and attention over one block at a time.

The last token of a completion predicts nothing and is left out. From the last token of a prompt the first
token of each of its completions is predicted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

logger = logging.getLogger(__name__)

ATTENTION = "softpref_blocks"
"""The name under which transformers knows the attention of this module: `sdpa` where there are no blocks."""

Block = tuple[int, tuple[int, ...]]  # tokens of the prompt, and of each completion, that the model reads


class PackedBatch(NamedTuple):
    """S completions of T tokens in all, with their prompts, in N tokens that a model reads.

    Attributes:
        input_ids: `[N]`, block after block.
        position_ids: `[N]`, from 0 in each prompt, and on from it in each completion.
        predictors: `[T]`, the place among the N from which each completion token is predicted.
        targets: `[T]`, the completion tokens, in the order given.
        lengths: `[S]`, completion tokens per sequence.
        blocks: for each block, tokens of its prompt and tokens read of its completions.
    """

    input_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    lengths: Tensor
    blocks: tuple[Block, ...]

    def to(self, device: torch.device | str) -> PackedBatch:
        ids, positions, predictors, targets, lengths = (
            tensor.to(device, non_blocking=True) for tensor in self[:-1]
        )
        return PackedBatch(ids, positions, predictors, targets, lengths, self.blocks)

    def run(self, model: Any) -> Any:
        """The model's output over the packed tokens, `[1, N, …]`; see `packs`, which must have agreed."""
        blocks = _Blocks(self.blocks, self.input_ids.device)
        output = _run(model, self, blocks)
        if not blocks.calls:
            raise RuntimeError("the model did not attend by blocks: tokens saw all that stood before them")
        return output

    def predicting(self, states: Tensor) -> Tensor:
        """Of states `[1, N, …]` those that predict completion tokens, `[T, …]`."""
        return states[0][self.predictors]

    def sequences(self) -> list[tuple[list[int], list[int]]]:
        """The `(prompt ids, completion ids)` pairs that were packed."""
        ids, targets, lengths = (each.tolist() for each in (self.input_ids, self.targets, self.lengths))
        pairs, start, place, row = [], 0, 0, 0
        for prompt_length, completions in self.blocks:
            prompt = ids[start : start + prompt_length]
            for _ in completions:
                pairs.append((prompt, targets[place : place + lengths[row]]))
                place, row = place + lengths[row], row + 1
            start += prompt_length + sum(completions)
        return pairs


def pack_sequences(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]], *, share_prompts: bool = True
) -> PackedBatch:
    """Pack `(prompt ids, completion ids)` pairs; neighbours with one prompt share it.

    Args:
        sequences: in any order; every prompt and every completion needs at least one token.
        share_prompts: false gives every completion a prompt of its own.
    """
    if not sequences or min(min(len(prompt), len(completion)) for prompt, completion in sequences) == 0:
        raise ValueError("every sequence needs at least one prompt token and at least one completion token")
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    blocks: list[tuple[int, list[int]]] = []
    before: Sequence[int] | None = None
    last = 0  # where the prompt ends
    for prompt, completion in sequences:
        if before is None or not share_prompts or (prompt is not before and list(prompt) != list(before)):
            ids.extend(prompt)
            positions.extend(range(len(prompt)))
            blocks.append((len(prompt), []))
            before, last = prompt, len(ids) - 1
        read = len(completion) - 1
        predictors += [last, *range(len(ids), len(ids) + read)]
        targets.extend(completion)
        positions.extend(range(len(prompt), len(prompt) + read))
        ids.extend(completion[:read])
        blocks[-1][1].append(read)
    return PackedBatch(
        input_ids=torch.tensor(ids),
        position_ids=torch.tensor(positions),
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        lengths=torch.tensor([len(completion) for _, completion in sequences]),
        blocks=tuple((prompt, tuple(completions)) for prompt, completions in blocks),
    )


def packs(model: Any, inner: Any, batch: PackedBatch) -> bool:
    """Whether a model computes this batch packed as it computes its sequences apart.

    Only a trial can tell. Once per model a few tokens are run packed and apart: every attention layer must
    take part, the numbers must agree, and those of one block must not depend on its neighbours. A model that
    fails is padded from then on, and a line in the log says why. One that passes keeps the attention of this
    module, which is `sdpa` where no blocks are passed.

    Args:
        model: as it is called, with wrappers.
        inner: the transformers model inside.
    """
    implementation = inner.config.get_text_config()._attn_implementation
    changed = implementation != ATTENTION or _compiled(model)
    if inner not in _verdicts or (not _verdicts[inner] and changed):
        _verdicts[inner] = reason = _reason_against(model, inner)
        if reason:
            logger.warning("sequences are padded for %s: %s", type(inner).__name__, reason)
    if _verdicts[inner]:
        return False
    window = _window(inner.config.get_text_config())
    return window is None or _longest(batch.blocks) <= window


_verdicts: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # of each model: why not; empty if it can

# what models tell their attention function besides, and what makes no difference to it
_HARMLESS = {"position_ids", "cache_position", "use_cache", "return_dict"}
_PROBE = (([1, 2, 3, 4], [5, 6, 7]), ([1, 2, 3, 4], [8, 9]), ([3, 1], [2, 6, 4]))


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Eval mode inside, the former mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class _Refused(Exception):
    """Why attention cannot be computed by blocks."""


class _Blocks:
    """The blocks of one forward pass: how attention is divided, and masks, made once for all layers."""

    def __init__(self, blocks: Sequence[Block], device: torch.device | str) -> None:
        self.blocks = [(block, _runs(block)) for block in blocks]
        self.sizes = [size for block, runs in self.blocks for size in _sizes(block, runs)]
        self.longest = _longest(blocks)
        self.calls = 0
        self._device = device
        self._masks: dict[tuple[Block, torch.dtype], Tensor] = {}

    def mask(self, block: Block, dtype: torch.dtype) -> Tensor | None:
        """`[tokens, tokens]`: 0 where a token of a block may see another, else −∞; None: all before it."""
        prompt, completions = block
        if len(completions) == 1:
            return None
        if (block, dtype) not in self._masks:
            size = prompt + sum(completions)
            mask, start = torch.ones(size, size, dtype=torch.bool).tril(), prompt
            for length in completions:
                mask[start + length :, start : start + length] = False
                start += length
            self._masks[block, dtype] = self._added(mask, dtype)
        return self._masks[block, dtype]

    def continuing(self, prompt: int, completion: int, dtype: torch.dtype) -> Tensor:
        """`[completion, prompt + completion]`: the same for a completion with its prompt before it."""
        key = ((-prompt, (completion,)), dtype)
        if key not in self._masks:
            ones = torch.ones(completion, prompt + completion, dtype=torch.bool)
            self._masks[key] = self._added(ones.tril(prompt), dtype)
        return self._masks[key]

    def _added(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """What is added to scores; a boolean mask would be turned into this in each layer."""
        added = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))
        return added.to(self._device, non_blocking=True)


def _longest(blocks: Sequence[Block]) -> int:
    """Tokens of the longest sequence that is read."""
    return max(prompt + max(completions) for prompt, completions in blocks)


def _runs(block: Block) -> list[tuple[int, int]]:
    """Neighbouring completions of one length, `(how many, length)`; none where the block is best left whole.

    A whole block takes fewer and longer products; its parts skip what no completion may see of another.
    Measured on a CPU, parts win once they are two and a half times less work.
    """
    prompt, completions = block
    whole = prompt + sum(completions)
    seen = prompt * prompt / 2 + sum(length * (prompt + length) for length in completions)
    if len(completions) == 1 or whole * whole <= 2.5 * seen:
        return []
    return [(len(list(run)), length) for length, run in groupby(completions)]


def _sizes(block: Block, runs: list[tuple[int, int]]) -> list[int]:
    """Tokens of each part of a block that attention sees at once."""
    prompt, completions = block
    return [prompt, *(count * length for count, length in runs)] if runs else [prompt + sum(completions)]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    softpref_blocks: _Blocks | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention within blocks: `[1, heads, N, d]` queries to `[1, N, heads, d]`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward, use_gqa_in_sdpa

    if softpref_blocks is None:
        options.update(scaling=scaling, dropout=dropout, is_causal=is_causal, sliding_window=sliding_window)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    softpref_blocks.calls += 1
    if sliding_window is not None and softpref_blocks.longest > sliding_window:
        raise _Refused(f"its attention looks back {sliding_window} tokens, fewer than there are")
    for name, option in options.items():
        if name not in _HARMLESS and option is not None and option is not False:
            raise _Refused(f"its attention has {name}, which attention by blocks does not know")
    if query.shape[2] != key.shape[2] or query.shape[0] != 1 or is_causal is False:
        raise _Refused("its attention is not from every token to every token")
    sizes = softpref_blocks.sizes
    parts = zip(*(torch.split(each, sizes, dim=2) for each in (query, key, value)), strict=True)
    outputs = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        causal, grouped = mask is None, k.shape[1] != q.shape[1]
        # heads that share keys need no copies of them, but for accelerators' kernels that know masks
        if grouped and q.device.type != "cpu" and not use_gqa_in_sdpa(mask, k, v):
            k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
            grouped = False
        return functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=scaling, dropout_p=dropout, enable_gqa=grouped
        ).transpose(1, 2)

    for block, runs in softpref_blocks.blocks:
        q, k, v = next(parts)
        outputs.append(attend(q, k, v, None if runs else softpref_blocks.mask(block, query.dtype)))
        for count, length in runs:
            each = [part.unflatten(2, (count, length))[0].transpose(0, 1) for part in next(parts)]
            if length:  # [count, heads, length, d]
                keys = torch.cat([k.expand(count, -1, -1, -1), each[1]], 2)
                values = torch.cat([v.expand(count, -1, -1, -1), each[2]], 2)
                mask = softpref_blocks.continuing(block[0], length, query.dtype)
                outputs.append(attend(each[0], keys, values, mask).flatten(0, 1)[None])
    return torch.cat(outputs, 1), None


def _run(model: Any, batch: PackedBatch, blocks: _Blocks) -> Any:
    return model(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        # of the four dimensions at which transformers makes no mask of its own; the blocks say everything
        attention_mask=torch.zeros(1, 1, 1, 1, device=batch.input_ids.device),
        use_cache=False,
        softpref_blocks=blocks,
    )


def _reason_against(model: Any, inner: Any) -> str:
    """Why a model's sequences cannot be packed; empty, and its attention set, where they can."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = inner.config.get_text_config()
    if _compiled(model):
        return "it is compiled, and would be compiled anew for each batch"
    if config._attn_implementation not in ("sdpa", ATTENTION):
        return f"its attention is {config._attn_implementation}, and only sdpa can be had by blocks"
    others = {*(getattr(config, "layer_types", None) or [])} - {"full_attention", "sliding_attention"}
    if others:
        return f"it has layers of {', '.join(sorted(others))}"
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    try:
        inner.set_attn_implementation(ATTENTION)
        with evaluation_mode(inner), torch.no_grad():
            reason = _found_by_trying(inner)
    except Exception as error:  # of a foreign forward: padding remains
        reason = str(error) if isinstance(error, _Refused) else f"{type(error).__name__}: {error}"
    if reason and config._attn_implementation == ATTENTION:
        inner.set_attn_implementation("sdpa")
    return reason


def _found_by_trying(inner: Any) -> str:
    weight = inner.get_input_embeddings().weight
    vocabulary = len(weight)
    sequences = [([i % vocabulary for i in p], [i % vocabulary for i in c]) for p, c in _PROBE]
    batch = pack_sequences(sequences).to(weight.device)
    blocks = _Blocks(batch.blocks, weight.device)

    def packed(ids: Tensor) -> Tensor:
        logits: Tensor = _run(inner, batch._replace(input_ids=ids), blocks).logits
        return logits[0].float()[batch.predictors]

    found = packed(batch.input_ids)
    layers = inner.config.get_text_config().num_hidden_layers
    if blocks.calls != layers:
        return f"{blocks.calls} of its {layers} layers have an attention that can be had by blocks"
    apart = []
    for prompt, completion in sequences:
        ids = torch.tensor([[*prompt, *completion]], device=weight.device)
        apart.append(inner(input_ids=ids, use_cache=False).logits[0].float()[len(prompt) - 1 : -1])
    expected = torch.cat(apart)
    size, rounding = float(expected.abs().max()), torch.finfo(weight.dtype).eps
    if not float((found - expected).abs().max()) <= rounding_limit(weight.dtype) * size:
        return "packed and apart it gives different numbers"
    for start, end, mine in ((4, 6, slice(3, 8)), (7, 11, slice(0, 5))):  # a completion, the second block
        others = batch.input_ids.clone()
        others[start:end] = (others[start:end] + 1) % vocabulary
        if float((packed(others)[mine] - found[mine]).abs().max()) > 4 * rounding * size:
            return "tokens of one sequence reach another"
    return ""


def rounding_limit(dtype: torch.dtype) -> float:
    """By how much two ways to the same scores may differ, relative to the largest score."""
    return max(1e-4, 16 * torch.finfo(dtype).eps)


def _compiled(model: Any) -> bool:
    """Whether `torch.compile` was applied to a model, or to one inside its wrappers."""
    while model is not None:
        if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
            return True
        model = getattr(model, "module", None)
    return False


def _window(config: Any) -> int | None:
    """Tokens that sliding attention can look back, where some layer has it."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    types = getattr(config, "layer_types", None)
    return None if types and "sliding_attention" not in types else int(window)
