"""How a causal model's logits arise from its last hidden states, and those states at completion tokens.

With them and the chunked functions of `softpref.objectives`, full logits never exist. For a model whose
logits may arise in another way, full logits take the place of the hidden states, and a line in the log says
why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from softpref.lm.packing import PackedBatch, evaluation_mode, pack_sequences, packs
from softpref.lm.padding import PaddedBatch, pad_sequences
from softpref.lm.sharding import shards
from softpref.objectives import TokenKL, token_kl, token_logps

logger = logging.getLogger(__name__)


class Head(NamedTuple):
    """`logits = softcap(scale · (hidden Wᵀ + bias))`, where `softcap(z) = c · tanh(z / c)`, or nothing.

    Attributes:
        weight: `[V, H]`, the model's own parameter, perhaps tied to its embeddings; None: hidden states are
            logits already.
        bias: `[V]`, or None.
        scale: what the model multiplies its scores by.
        softcap: c, or None.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


class CompletionHidden(NamedTuple):
    """What a model knows at each of the T completion tokens of a batch, before its head.

    Attributes:
        hidden: `[T, H]`, with gradient; row t predicts the t-th completion token. `[T, V]` fp32 logits where
            `head.weight` is None.
        targets: `[T]`, the completion tokens.
        head: what turns hidden states into scores.
        autocast: the dtype in which autocast had the model compute its head, or None. The methods follow it.
        beneath: where `hidden` are logits, and it was asked for, what entered the head, `[T, H]`.
    """

    hidden: Tensor
    targets: Tensor
    head: Head
    autocast: torch.dtype | None = None
    beneath: Tensor | None = None

    @property
    def states(self) -> Tensor:
        """The hidden states themselves, `[T, H]`, also where `hidden` are logits."""
        return self.hidden if self.beneath is None else self.beneath

    def logits(self) -> Tensor:
        """The scores from which each completion token was chosen: `[T, V]` fp32. For few tokens at a time."""
        if self.head.weight is None:
            return self.hidden
        with self._autocast():
            scores = nn.functional.linear(self.hidden, self.head.weight, self.head.bias).float()
        scores = scores * self.head.scale
        cap = self.head.softcap
        return scores if cap is None else cap * (scores / cap).tanh()

    def logps(self) -> Tensor:
        """Log-probability of each completion token, `[T]` fp32, nats, with gradient."""
        with self._autocast():
            return token_logps(self.hidden, self.head.weight, self.targets, **self._head())

    def kl(self, reference: CompletionHidden, *, reverse: bool = False) -> TokenKL:
        """KL(this ‖ reference) at each completion token, see `softpref.objectives.token_kl`."""
        with self._autocast():
            return token_kl(
                self.hidden,
                self.head.weight,
                reference.hidden,
                reference.head.weight,
                self.targets,
                reverse=reverse,
                **self._head(),
                **{f"ref_{name}": value for name, value in reference._head().items()},
            )

    def _head(self) -> dict[str, Any]:
        return {"bias": self.head.bias, "scale": self.head.scale, "softcap": self.head.softcap}

    def _autocast(self) -> torch.autocast:
        enabled = self.autocast is not None
        return torch.autocast(self.hidden.device.type, dtype=self.autocast, enabled=enabled)


def completion_hidden(
    model: Any, batch: PackedBatch | PaddedBatch, *, plain: bool = False, beneath: bool = False
) -> CompletionHidden:
    """Run the model and keep the hidden states that predict completion tokens; no prompt, no padding.

    The model is called as a whole, wrappers included, while its head is replaced: what enters the head is
    kept, and the head is applied to one position only, so that the output has its usual form. This works for
    any architecture, whatever the part below the head is called and wherever the last norm is. Wrappers still
    do their work: precision, checkpointing, the reduction of gradients. The head's gradients arise outside of
    forward. DistributedDataParallel allows that: it acts when a parameter's gradient has been accumulated,
    and where it looks for unused parameters, the one position leads it to the head and everything below.

    Args:
        batch: packed; it is padded where the model cannot take it packed (see `softpref.lm.packing.packs`).
            Or padded already.
        plain: pad, and have the model compute full logits: slower, larger, and the same numbers up to
            rounding.
        beneath: whether full logits come with the states that entered the head.
    """
    try:
        inner = _unwrapped(model)
    except _Unknown:
        inner = None
    packed = isinstance(batch, PackedBatch) and not plain and inner is not None and packs(model, inner, batch)
    if isinstance(batch, PackedBatch) and not packed:
        batch = pad_sequences(batch.sequences(), 0).to(batch.input_ids.device)
    known = None if plain else _known_head(model)
    if known is None:
        with _seen_entering(model, beneath) as seen:
            logits = batch.predicting(batch.run(model).logits).float()
        states = batch.predicting(seen[-1]) if beneath else None
        return CompletionHidden(logits, batch.targets, Head(None), beneath=states)
    module, head = known
    entered: list[tuple[Tensor, Head, torch.dtype | None]] = []

    def keep(hidden: Tensor) -> Tensor:
        device = hidden.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        # sharded weights are whole here, and stay so until their gradient is there
        entered.append((hidden, head._replace(weight=module.weight, bias=module.bias), autocast))
        return nn.functional.linear(hidden[:1, -1:], module.weight, module.bias)

    with _computing(module, keep):
        batch.run(model)
    [(hidden, head, autocast)] = entered
    return CompletionHidden(batch.predicting(hidden), batch.targets, head, autocast)


def output_head(model: Any) -> Head | None:
    """The head of a causal model, wrapped or not; None where its logits do not arise from one plain product.

    The head must be a bare `nn.Linear`: no adapter, no quantization, no hooks. What the model does to the
    head's scores afterwards is not read from its configuration, where names differ and some have opposite
    meanings, but tried out once per model on chosen scores. A positive factor, a soft cap by tanh, or both
    are accepted. The reason for a None is logged, once per model.
    """
    known = _known_head(model)
    return None if known is None else known[1]


def try_out(model: Any) -> None:
    """Find out how the model is best computed, by runs of a few tokens, before its weights are sharded."""
    if _known_head(model) is not None:
        packs(model, _unwrapped(model), pack_sequences([([0], [0])]))


class _Form(NamedTuple):
    """What a model does to the scores of its head."""

    scale: float
    softcap: float | None


class _Unknown(Exception):
    """Why a model's logits cannot be had from its hidden states."""


# of each model: what was found out, and what has been logged
_forms: WeakKeyDictionary[nn.Module, _Form | _Unknown] = WeakKeyDictionary()
_reasons: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def _known_head(model: Any) -> tuple[nn.Linear, Head] | None:
    """The module of the head, and the head; None, with a line in the log, where they are not known."""
    try:
        inner = _unwrapped(model)
        module = inner.get_output_embeddings()
        _check_plain(module)
        if inner not in _forms:
            _forms[inner] = _tried_form(inner, module)
        form = _forms[inner]
        if isinstance(form, _Unknown):
            raise _Unknown(*form.args)  # anew: what is raised keeps its frames, and they keep the model
    except _Unknown as reason:
        if _reasons.get(model) != str(reason):
            _reasons[model] = str(reason)
            logger.warning("full logits are computed for %s: %s", type(model).__name__, _reasons[model])
        return None
    return module, Head(module.weight, module.bias, *form)


def _unwrapped(model: Any) -> Any:
    """The transformers model inside wrappers that are known to allow this."""
    from transformers import PreTrainedModel

    while not isinstance(model, PreTrainedModel):
        if isinstance(model, nn.parallel.DistributedDataParallel):
            if model.static_graph:  # its first backward must pass through the output of forward
                raise _Unknown("DistributedDataParallel with static_graph needs a loss made of its output")
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            raise _Unknown(f"{type(model).__name__} is no transformers model, nor a known wrapper of one")
    return model


def _check_plain(module: Any) -> None:
    """Refuse a head that is anything but a matrix and a bias, both whole when its forward runs."""
    sharded = isinstance(module, nn.Module) and module in shards(module)
    if type(module).__mro__[2 if sharded else 0] is not nn.Linear:
        raise _Unknown(f"its head is {type(module).__name__}, not a plain nn.Linear")
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    if (any(hooks) or module._backward_pre_hooks or "forward" in vars(module)) and not sharded:
        raise _Unknown("its head has hooks")
    for tensor in (module.weight, module.bias):
        if tensor is None or sharded:
            continue
        if type(tensor) not in (nn.Parameter, Tensor) or tensor.is_meta:
            raise _Unknown("its head is quantized, sharded or offloaded")
    if module.weight.shape != (module.out_features, module.in_features):
        raise _Unknown("its head is sharded, or packed")


def _tried_form(model: Any, module: nn.Linear) -> _Form | _Unknown:
    """Give the model chosen numbers as its head's scores, and see what logits come out.

    Of three positions, small scores show the factor, huge ones the cap, and a ladder, different for every
    token, whether the two explain everything.
    """
    dtype = torch.float32 if module.weight.device.type == "mps" else torch.float64
    scores = torch.empty(3, module.out_features, dtype=dtype, device=module.weight.device)
    scores[0], scores[1] = 2.0**-20, 2.0**20
    torch.linspace(-60, 60, module.out_features, out=scores[2])
    calls = []

    def pretend(hidden: Tensor) -> Tensor:
        calls.append(hidden)
        return scores[None]

    prompt = torch.zeros(1, 3, dtype=torch.long, device=scores.device)
    try:
        with (
            evaluation_mode(model),
            torch.inference_mode(False),
            torch.enable_grad(),
            _computing(module, pretend),
        ):
            logits = model(input_ids=prompt, attention_mask=torch.ones_like(prompt), use_cache=False).logits
    except Exception as error:  # of a foreign forward: full logits remain
        return _Unknown(f"its forward did not take chosen scores ({type(error).__name__}: {error})")
    if len(calls) != 1 or calls[0].shape != (1, 3, module.in_features):
        return _Unknown("its forward does not call its head once, on all positions")
    if logits.shape != (1, *scores.shape):
        return _Unknown("its logits are not the scores of its head: the shape differs")
    if logits.requires_grad:
        return _Unknown("its logits depend on parameters behind its head")
    seen = logits[0].to(dtype)
    scale = float(f"{(seen[0, 0] / scores[0, 0]).item():.12g}")  # less the rounding of the division
    top = seen[1, 0].item()
    softcap = None if abs(top - scale * 2.0**20) <= 1e-3 * abs(top) else float(f"{top:.12g}")
    expected = scores * scale
    if softcap is not None:
        expected = softcap * (expected / softcap).tanh()
    if not (scale > 0 and torch.allclose(seen, expected, rtol=1e-6, atol=0)):
        return _Unknown("its logits are not the scores of its head, nor those times a factor or under a cap")
    return _Form(scale, softcap)


@contextmanager
def _seen_entering(model: Any, asked: bool) -> Iterator[list[Tensor]]:
    """What enters a model's head inside, where that is asked for."""
    seen: list[Tensor] = []
    if not asked:
        yield seen
        return
    while not hasattr(model, "get_output_embeddings"):
        model = model.module
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def _computing(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Have the module compute `forward` inside; it keeps its place in the model."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
