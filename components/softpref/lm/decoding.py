"""What makes drawing one token after another cheap: a cache that is written in place, and grouped attention.

transformers joins the keys of every earlier token with the new one at each step, in each layer, and, where a
group of heads shares its keys, copies these for each head besides. For SmolLM2-135M on a CPU, 32 rows of some
150 tokens, that was a third of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from softpref.lm.packing import ATTENTION as PACKED_ATTENTION

ATTENTION = "softpref_grouped"  # the name under which transformers knows `grouped_attention`

_ROOM = 64  # tokens; and a quarter of what is there already


def decoding_cache(config: Any) -> DynamicCache:
    """A cache for a model of this configuration; layers that keep all tokens keep them in rooms that grow."""
    cache = DynamicCache(config=config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _RoomyLayer(DynamicLayer):
    """Keys and values at the front of tensors with room for tokens to come, which are written in place.

    It knows what drawing asks of a cache: tokens that are added, rows that leave. Beams do not pass here.
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
    """Have a model that attends by `sdpa` attend by `grouped_attention` inside; others stay as they are."""
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
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
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """`sdpa` attention of transformers, where heads that share keys are queries of one head if each has one.

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
