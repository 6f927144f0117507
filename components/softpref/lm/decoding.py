"""Sequences that grow by a token at a time: with a cache, where that is right, or by whole forward passes.

transformers concatenates the keys of all earlier tokens with the new one at each step, in each layer, and
where heads share their keys, copies these for each head. For SmolLM2-135M on a CPU, 32 rows of some 150
tokens, that was a third of the time. Here a cache is written in place, and grouped attention copies nothing.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from softpref.lm.head import completion_hidden
from softpref.lm.packing import ATTENTION as PACKED_ATTENTION
from softpref.lm.packing import evaluation_mode, rounding_limit
from softpref.lm.scoring import scoring_batches

logger = logging.getLogger(__name__)

ATTENTION = "softpref_grouped"  # the name under which transformers knows `grouped_attention`

_ROOM = 64  # tokens; and a quarter of what is there already
# prompts of several lengths, and the tokens that follow each; after a few of them the second row leaves
_PROBE = (([1, 2, 3, 4, 5, 6, 7], [8, 2, 5, 1, 4]), ([9, 8], [1, 7, 3]), ([3, 1, 2, 6], [6, 9, 9, 5, 3]))
_LEAVES_AFTER = 3


class GrowingRows(Protocol):
    """Rows of tokens that grow together, and leave when they are done."""

    def logits(self) -> Tensor:
        """Scores of each row's next token: `[rows, V]` fp32."""

    def append(self, tokens: Tensor) -> None:
        """Add one token to each row: `[rows]`."""

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows, by their places."""


class CachedRows:
    """Rows padded on the left, so that all generate at the same place; the past is kept in a cache.

    Right only for models that pass `decodes`.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]) -> None:
        width = max(len(prompt) for prompt in prompts)
        ids = torch.zeros((len(prompts), width), dtype=torch.long)  # masked where it pads
        mask = torch.zeros((len(prompts), width), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = next(model.parameters()).device
        self._model, self._ids, self._mask = model, ids.to(device), mask.to(device)
        self._positions = (self._mask.cumsum(-1) - 1).clamp_min(0)
        self._cache = decoding_cache(model.config)
        taken = inspect.signature((_inner(model) or model).forward).parameters
        # Mamba's kind: once there is a state, it takes no mask any more
        self._recurrent = "cache_params" in taken and "past_key_values" not in taken
        self._started = False

    def logits(self) -> Tensor:
        output = self._model(
            input_ids=self._ids,
            attention_mask=None if self._recurrent and self._started else self._mask,
            use_cache=True,
            logits_to_keep=1,
            **(
                {"cache_params": self._cache}
                if self._recurrent
                else {"past_key_values": self._cache, "position_ids": self._positions}
            ),
        )
        self._started = True
        logits: Tensor = output.logits
        return logits[:, -1].float()

    def append(self, tokens: Tensor) -> None:
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=-1)
        self._ids, self._positions = tokens[:, None], self._positions[:, -1:] + 1

    def keep(self, rows: Tensor) -> None:
        self._ids, self._mask, self._positions = self._ids[rows], self._mask[rows], self._positions[rows]
        layers: Any = self._cache.layers
        for layer in layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.reorder_cache(rows)  # type: ignore[arg-type]
            else:
                layer.batch_select_indices(rows)


class WholeRows:
    """Rows that are read from their beginning for each token, as the trainer scores them: slow but right."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]) -> None:
        self._model, self._rows = model, [list(prompt) for prompt in prompts]

    def logits(self) -> Tensor:
        sequences = [(row, [0]) for row in self._rows]  # the token to predict does not matter
        parts: list[Tensor] = []
        places: list[int] = []
        for chosen, batch in scoring_batches(self._model, sequences, batch_size=len(sequences)):
            parts.append(completion_hidden(self._model, batch).logits())
            places += chosen
        return torch.cat(parts)[torch.tensor(places).argsort().to(parts[0].device)]

    def append(self, tokens: Tensor) -> None:
        for row, token in zip(self._rows, tokens.tolist(), strict=True):
            row.append(token)

    def keep(self, rows: Tensor) -> None:
        self._rows = [self._rows[row] for row in rows.tolist()]


def decodes(model: Any) -> bool:
    """Whether drawing with a cache gives a model's tokens the scores that one forward pass gives them.

    Only a trial can tell: some models keep their past outside the cache that they are given, and some read
    padding as text. Once per model a few rows of several lengths are grown token by token, one leaves on the
    way, and all scores must be those of each sequence alone. For a model that fails, each token takes a whole
    forward pass (`WholeRows`), and a line in the log says why.
    """
    inner = _inner(model)
    key = model if inner is None else inner
    if key not in _verdicts:
        with evaluation_mode(model), torch.no_grad(), decoding_attention(model):
            try:
                _verdicts[key] = _reason_against(model)
            except Exception as error:  # of a foreign forward: the slow way remains
                _verdicts[key] = f"{type(error).__name__}: {error}"
        if _verdicts[key]:
            logger.warning(
                "samples of %s are drawn without a cache, by a whole forward pass for each token, which is "
                "slow: %s",
                type(key).__name__,
                _verdicts[key],
            )
    return not _verdicts[key]


_verdicts: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # of each model: why not; empty if it can


def _reason_against(model: Any) -> str:
    weight = next(model.parameters())
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompts, following = (
        [[i % vocabulary for i in ids] for ids in each] for each in zip(*_PROBE, strict=True)
    )
    expected = []
    for prompt, tokens in zip(prompts, following, strict=True):
        ids = torch.tensor([[*prompt, *tokens]], device=weight.device)
        expected.append(model(input_ids=ids, use_cache=False).logits[0].float()[len(prompt) - 1 :])
    rows, here = CachedRows(model, prompts), list(range(len(prompts)))
    for step in range(max(map(len, following))):
        found = rows.logits()
        right = torch.stack([expected[row][step] for row in here])
        size = float(right.abs().max())
        apart = float((found - right).abs().max())
        if not apart <= rounding_limit(weight.dtype) * size:
            return f"token by token its scores differ from those of one forward pass by up to {apart:.2g}"
        rows.append(torch.tensor([following[row][step] for row in here], device=weight.device))
        if step + 1 == _LEAVES_AFTER:
            here = [0, 2]
            rows.keep(torch.tensor(here, device=weight.device))
    return ""


def _inner(model: Any) -> PreTrainedModel | None:
    """The transformers model inside wrappers."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def decoding_cache(config: Any) -> DynamicCache:
    """A cache for a model of this configuration; layers that keep all tokens have room to grow."""
    cache = DynamicCache(config=config)
    roomy: Callable[[], DynamicLayer] = _RoomyLayer
    cache.layers = [roomy() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values at the front of larger tensors, in which later tokens are written in place.

    It supports what drawing needs: adding tokens and removing rows. Beam search is not supported.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._rooms = tuple(states[:, :, :0] for states in (key_states, value_states))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        end = before + key_states.shape[2]
        if end > self._rooms[0].shape[2]:
            self._rooms = tuple(
                _larger(room[:, :, :before], end + max(_ROOM, end // 4)) for room in self._rooms
            )
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, before:end] = states
        return self._show(end)

    def batch_select_indices(self, indices: Tensor) -> None:
        length = self.get_seq_length()
        if length:
            self._rooms = tuple(room[indices] for room in self._rooms)
            self._show(length)

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        keys, values = (room[:, :, :length] for room in self._rooms)
        self.keys, self.values = keys, values
        return keys, values


def _larger(states: Tensor, length: int) -> Tensor:
    """The same states at the front of `length` tokens."""
    rows, heads, before, width = states.shape
    room = states.new_empty(rows, heads, length, width)
    room[:, :, :before] = states
    return room


@contextmanager
def decoding_attention(model: Any) -> Iterator[None]:
    """Inside, a model with `sdpa` attention uses `grouped_attention`; others stay as they are."""
    inner = _inner(model)
    if inner is None or not inner._can_set_attn_implementation():
        yield
        return
    before = inner.config.get_text_config()._attn_implementation
    if before not in ("sdpa", PACKED_ATTENTION):
        yield
        return
    AttentionInterface.register(ATTENTION, grouped_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    inner.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`sdpa` attention of transformers; for one new token, heads that share keys become queries of one head.

    Args:
        query: `[B, heads, L, d]`; with L = 1, the token being drawn, nothing is copied for each head.
        key, value: `[B, groups, S, d]`; head h sees group `h // (heads // groups)`.
        attention_mask: `[B or 1, 1, L, S]`, true or 0 where a token is seen; None: all are.

    Returns:
        `[B, L, heads, d]`, and no weights.
    """
    rows, heads, length, width = query.shape
    groups = key.shape[1]
    for_all = attention_mask is None or (attention_mask.dim() == 4 and attention_mask.shape[1] == 1)
    if length > 1 or heads == groups or not for_all or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    found = functional.scaled_dot_product_attention(
        query.reshape(rows, groups, heads // groups, width),
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=options.get("dropout") or 0.0,
        scale=options.get("scaling"),
    )
    return found.reshape(rows, 1, heads, -1), None
