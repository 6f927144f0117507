"""Log-probabilities, entropy and KL per token straight from hidden states: full logits never exist.

Logits of T tokens over a vocabulary of V take 4·T·V bytes, and autograd keeps several copies. Here they are
computed for a chunk of tokens at a time, reduced, thrown away, and computed once more for the gradient, which
has a closed form. Memory is that of a few chunks, whatever T is; the price is one more product per head,
mostly earned back by passes over logits that are still in cache.

A *head* is how logits arise from hidden states h: `softcap(scale · (h Wᵀ + bias))`, where
`softcap(z) = c · tanh(z / c)`, or nothing. Products run in the dtype of the inputs (under autocast in the
dtype of autocast) with fp32 accumulation; everything after them is fp32 (float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Bytes and tokens of one chunk's logits. Measured on a CPU (fp32 and bf16, width 256, vocabularies of 4,096
# and 32,000): fastest at 256 to 512 tokens; shorter ones reread the head too often, longer ones leave the
# cache between the passes over them. Accelerators have bandwidth for longer chunks, and launches to save.
_CPU_CHUNK_BYTES, _CPU_CHUNK_TOKENS = 32 * 2**20, 512
_CHUNK_BYTES = 256 * 2**20
_MIN_CHUNK_TOKENS = 64
_WIDE_PRODUCTS = torch.version.hip is None  # CUDA can hand out a bf16 product before it is rounded to bf16


class TokenLogps(NamedTuple):
    """What a policy says of each of T given tokens, in nats.

    Attributes:
        logps: `[T]`, log-probability of the token, with gradient.
        entropy: `[T]`, of the next-token distribution, without gradient.
    """

    logps: Tensor
    entropy: Tensor


class TokenKL(NamedTuple):
    """How far a policy is from its reference at each of T positions, in nats.

    Attributes:
        kl: `[T]`, the divergence over the whole vocabulary, with gradient.
        logps: `[T]`, the policy's log-probability of the token, with gradient.
        entropy: `[T]`, of the policy, without gradient.
        ref_logps: `[T]`, the reference's log-probability of the token, without gradient.
    """

    kl: Tensor
    logps: Tensor
    entropy: Tensor
    ref_logps: Tensor


def token_logps(
    hidden: Tensor,
    head_weight: Tensor | None,
    targets: Tensor,
    *,
    chunk_size: int | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """`log softmax(logits)[target]` of each token, nats, with gradient to hidden states, head and bias.

    Args:
        hidden: `[T, H]`, the last hidden states, from which each target was predicted.
        head_weight: `[V, H]`; None where `hidden` are logits already, `[T, V]`.
        targets: `[T]`, token ids.
        chunk_size: tokens whose logits exist at once; by default as many as suit the device. The result
            depends on it by no more than rounding.
        bias, scale, softcap: the rest of the head: `softcap · tanh(scale · (h Wᵀ + bias) / softcap)`.

    Returns:
        `[T]`, fp32 (float64 for float64 inputs). It can be differentiated once.

    Raises:
        ValueError: shapes or dtypes that do not fit together, a chunk size under 1.
    """
    head = _Head(head_weight, bias, scale, softcap)
    return _run(hidden, head, targets, chunk_size, entropy=False)[0]


def token_logps_and_entropy(
    hidden: Tensor,
    head_weight: Tensor | None,
    targets: Tensor,
    *,
    chunk_size: int | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> TokenLogps:
    """`token_logps` and the entropy of the same distributions, in one pass; arguments as there."""
    head = _Head(head_weight, bias, scale, softcap)
    return TokenLogps(*_run(hidden, head, targets, chunk_size, entropy=True)[:2])


def token_kl(
    hidden: Tensor,
    head_weight: Tensor | None,
    ref_hidden: Tensor,
    ref_head_weight: Tensor | None,
    targets: Tensor,
    *,
    reverse: bool = False,
    chunk_size: int | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ref_bias: Tensor | None = None,
    ref_scale: float = 1.0,
    ref_softcap: float | None = None,
) -> TokenKL:
    """KL(policy ‖ reference) of each next-token distribution, and what comes with it.

    Gradients of the divergence and of `logps` go to the policy's hidden states, head and bias; the reference
    gets none. With p of the policy and q of the reference, the divergence's gradient with respect to the
    policy's logits is `p (log p − log q − KL)`, reversed `p − q`.

    Args:
        hidden, head_weight, targets, chunk_size, bias, scale, softcap: as in `token_logps`.
        ref_hidden, ref_head_weight, ref_bias, ref_scale, ref_softcap: the reference's, over the same
            vocabulary; its width may differ.
        reverse: KL(reference ‖ policy) instead, as token-level DPO has it.

    Raises:
        ValueError: as in `token_logps`.
    """
    head = _Head(head_weight, bias, scale, softcap)
    reference = _Head(ref_head_weight, ref_bias, ref_scale, ref_softcap)
    logps, entropy, kl, ref_logps = _run(
        hidden, head, targets, chunk_size, ref_hidden=ref_hidden, reference=reference, reverse=reverse
    )
    return TokenKL(kl, logps, entropy, ref_logps)


def default_chunk_size(vocabulary: int, device: torch.device) -> int:
    """Tokens whose fp32 logits take 32 MB on a CPU, but at most 512, and 256 MB elsewhere; at least 64."""
    on_cpu = device.type == "cpu"
    tokens = (_CPU_CHUNK_BYTES if on_cpu else _CHUNK_BYTES) // (4 * vocabulary)
    return max(_MIN_CHUNK_TOKENS, min(tokens, _CPU_CHUNK_TOKENS) if on_cpu else tokens)


class _Head(NamedTuple):
    weight: Tensor | None
    bias: Tensor | None
    scale: float
    softcap: float | None


class _Form(NamedTuple):
    """How a head makes logits, beside its tensors; `products` is the dtype of the operands."""

    scale: float
    softcap: float | None
    products: torch.dtype


class _Plan(NamedTuple):
    """What is asked, and how it is computed; `sums` is the dtype of all but the products."""

    form: _Form
    ref_form: _Form
    entropy: bool
    reverse: bool
    chunk: int
    sums: torch.dtype


def _run(
    hidden: Tensor,
    head: _Head,
    targets: Tensor,
    chunk_size: int | None,
    *,
    entropy: bool = True,
    ref_hidden: Tensor | None = None,
    reference: _Head | None = None,
    reverse: bool = False,
) -> tuple[Tensor, ...]:
    vocabulary = _check(hidden, head, targets, "")
    form = ref_form = _Form(head.scale, head.softcap, _product_dtype(hidden))
    ref_weight = ref_bias = None
    if ref_hidden is not None and reference is not None:
        theirs = _check(ref_hidden, reference, targets, "ref_")
        if theirs != vocabulary:
            raise ValueError(f"the reference's vocabulary has {theirs} tokens, the policy's {vocabulary}")
        ref_weight, ref_bias = reference.weight, reference.bias
        ref_form = _Form(reference.scale, reference.softcap, _product_dtype(ref_hidden))
    if chunk_size is None:
        chunk_size = default_chunk_size(vocabulary, hidden.device)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    chunk = min(chunk_size, max(1, len(targets)))
    sums = torch.promote_types(hidden.dtype, torch.float32)
    plan = _Plan(form, ref_form, entropy, reverse, chunk, sums)
    return _TokenTerms.apply(hidden, head.weight, head.bias, targets, ref_hidden, ref_weight, ref_bias, plan)


def _check(hidden: Tensor, head: _Head, targets: Tensor, prefix: str) -> int:
    """Refuse what does not fit together; the size of the vocabulary."""
    if hidden.dim() != 2 or not hidden.is_floating_point() or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"{prefix}hidden must be [T, H] floating-point numbers and targets [T], "
            f"got {list(hidden.shape)} and {list(targets.shape)}"
        )
    weight, bias = head.weight, head.bias
    if weight is None:
        vocabulary = hidden.shape[1]
    else:
        if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
            raise ValueError(
                f"{prefix}head_weight must be [V, {hidden.shape[1]}] for {prefix}hidden "
                f"{list(hidden.shape)}, got {list(weight.shape)}"
            )
        autocast = torch.is_autocast_enabled(hidden.device.type)
        if weight.dtype != hidden.dtype and not autocast:
            raise ValueError(
                f"{prefix}hidden is {hidden.dtype}, but {prefix}head_weight is {weight.dtype}; "
                "make them one, as the model's own head would need them"
            )
        vocabulary = weight.shape[0]
    if bias is not None and bias.shape != (vocabulary,):
        raise ValueError(f"{prefix}bias must be [{vocabulary}], got {list(bias.shape)}")
    return vocabulary


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which `linear` would compute now: autocast leaves float64 alone."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


class _TokenTerms(torch.autograd.Function):
    """(logps, entropy, KL, ref_logps), each `[T]`; the last two are None without a reference."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, ref_hidden, ref_weight, ref_bias, plan):
        count = len(targets)
        compared = ref_hidden is not None
        new = {"dtype": plan.sums, "device": hidden.device}
        asked = (True, True, plan.entropy, compared, compared, compared)
        results: list[Any] = [torch.empty(count, **new) if each else None for each in asked]
        logps, log_sums, entropy, kl, ref_logps, ref_log_sums = results
        with torch.autocast(hidden.device.type, enabled=False):
            scores = _Scores(weight, bias, plan.form)
            ref_scores = _Scores(ref_weight, ref_bias, plan.ref_form)
            vocabulary = hidden.shape[1] if weight is None else weight.shape[0]
            z_chunk = torch.empty(plan.chunk, vocabulary, **new)
            q_chunk = torch.empty_like(z_chunk) if compared else None
            work_chunk = torch.empty_like(z_chunk) if plan.entropy else z_chunk
            for rows, size in _chunks(count, plan.chunk):
                z, work, target = z_chunk[:size], work_chunk[:size], targets[rows, None]
                scores(hidden[rows], z)
                logps[rows] = z.gather(1, target).squeeze(1)
                log_sums[rows] = _log_sum_exp(z, work)
                if entropy is None:
                    continue
                log_p = z.sub_(log_sums[rows, None])
                entropy[rows] = torch.exp(log_p, out=work).mul_(log_p).sum(1).neg_()
                if q_chunk is None:
                    continue
                q = q_chunk[:size]
                ref_scores(ref_hidden[rows], q)
                ref_logps[rows] = q.gather(1, target).squeeze(1)
                ref_log_sums[rows] = _log_sum_exp(q, work)
                log_q = q.sub_(ref_log_sums[rows, None])
                first, second = (log_q, log_p) if plan.reverse else (log_p, log_q)
                torch.exp(first, out=work)
                kl[rows] = second.sub_(first).mul_(work).sum(1).neg_()
            logps -= log_sums
            if compared:
                ref_logps -= ref_log_sums
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            hidden, weight, bias, targets, ref_hidden, ref_weight, ref_bias, log_sums, ref_log_sums, kl
        )
        ctx.mark_non_differentiable(*(each for each in (entropy, ref_logps) if each is not None))
        return logps, entropy, kl, ref_logps

    @staticmethod
    def backward(ctx, grad_logps, grad_entropy, grad_kl, grad_ref_logps):
        hidden, weight, bias, targets, ref_hidden, ref_weight, ref_bias, log_sums, ref_log_sums, kl = (
            ctx.saved_tensors
        )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "token_logps and token_kl can be differentiated once, but create_graph=True asks for the "
                "gradient of their gradient; compute full logits where that is needed"
            )
        plan, form = ctx.plan, ctx.plan.form
        if grad_logps is None and grad_kl is None:
            return (None,) * 8
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        new = {"dtype": plan.sums, "device": hidden.device}
        with torch.autocast(hidden.device.type, enabled=False):
            scores = _Scores(weight, bias, plan.form)
            ref_scores = _Scores(ref_weight, ref_bias, plan.ref_form)
            vocabulary = hidden.shape[1] if weight is None else weight.shape[0]
            z_chunk = torch.empty(plan.chunk, vocabulary, **new)
            q_chunk = None if grad_kl is None else torch.empty_like(z_chunk)
            slope_chunk = None if form.softcap is None else torch.empty_like(z_chunk)
            low_chunk = None if form.products == plan.sums else torch.empty_like(z_chunk, dtype=form.products)
            grad_hidden = torch.empty_like(hidden) if wants_hidden else None
            grad_weight = torch.zeros(weight.shape, **new) if wants_weight else None
            grad_bias = torch.zeros(vocabulary, **new) if wants_bias else None
            # the gradient is linear in what comes from above, so the scale can be multiplied in here
            grad_logps = torch.zeros_like(log_sums) if grad_logps is None else grad_logps
            grad_logps = _significant(grad_logps * form.scale)
            grad_kl = None if grad_kl is None else _significant(grad_kl * form.scale)
            for rows, size in _chunks(len(targets), plan.chunk):
                z, g = z_chunk[:size], grad_logps[rows, None]
                scores(hidden[rows], z)
                if slope_chunk is not None:  # 1 − (z / c)²
                    slope = torch.div(z, form.softcap, out=slope_chunk[:size]).square_().neg_().add_(1)
                z.sub_(log_sums[rows, None])
                if q_chunk is None:
                    z.exp_().mul_(-g)
                else:
                    q, g_kl = q_chunk[:size], grad_kl[rows, None]
                    ref_scores(ref_hidden[rows], q)
                    q.sub_(ref_log_sums[rows, None])
                    if plan.reverse:
                        z.exp_().mul_(g_kl - g).sub_(q.exp_().mul_(g_kl))
                    else:
                        torch.sub(z, q, out=q).mul_(g_kl).sub_(g_kl * kl[rows, None] + g)
                        z.exp_().mul_(q)
                z.scatter_add_(1, targets[rows, None], g)
                if slope_chunk is not None:
                    z.mul_(slope)
                if grad_bias is not None:
                    grad_bias += z.sum(0)
                if weight is None:
                    if grad_hidden is not None:
                        grad_hidden[rows] = z
                    continue
                low = z if low_chunk is None else low_chunk[:size].copy_(z)
                if grad_hidden is not None:
                    _product(low, scores.weight, grad_hidden[rows])
                if grad_weight is not None:
                    _product(low.t(), hidden[rows].to(form.products), grad_weight, add=True)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _significant(gradient: Tensor) -> Tensor:
    """The same, less what rounding would lose anyway: 0 where it is so small beside the largest, or to 1.

    A preference that is settled leaves gradients like 1e-30, whose products with probabilities are numbers
    that a CPU takes a hundred times longer over (denormal ones); zeros it takes in its stride.
    """
    if not gradient.numel():
        return gradient
    info = torch.finfo(gradient.dtype)
    size = gradient.abs()
    least = (size.max() * info.eps**2).clamp_min(info.tiny / info.eps**3)
    return gradient.masked_fill(size < least, 0)


class _Scores:
    """The logits of a head, written into a buffer; the head is cast once."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None, form: _Form) -> None:
        self.weight: Any = None if weight is None else weight.to(form.products)
        self.bias, self.form = bias, form

    def __call__(self, hidden: Tensor, out: Tensor) -> None:
        scale, softcap, products = self.form
        if self.weight is None:
            out.copy_(hidden)
        else:
            _product(hidden.to(products), self.weight.t(), out)
        if self.bias is not None:
            out.add_(self.bias)
        if scale != 1.0:
            out.mul_(scale)
        if softcap is not None:
            out.div_(softcap).tanh_().mul_(softcap)


def _product(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
    """`out = left right`, or `out += left right`; out may be of more precision than they are."""
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, out=out) if add else torch.mm(left, right, out=out)
    elif _WIDE_PRODUCTS and left.is_cuda and left.itemsize == 2 and out.dtype == torch.float32:
        if add:
            torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
        else:
            torch.mm(left, right, out_dtype=out.dtype, out=out)
    elif add:
        out.add_(left @ right)
    else:
        out.copy_(left @ right)


def _log_sum_exp(z: Tensor, work: Tensor) -> Tensor:
    """`log Σ exp(z)` of each row, `[n]`; `work` is written over, and may be `z`."""
    top = z.amax(1, keepdim=True)
    return torch.sub(z, top, out=work).exp_().sum(1).log_().add_(top.squeeze(1))


def _chunks(count: int, size: int) -> Iterator[tuple[slice, int]]:
    for start in range(0, count, size):
        end = min(start + size, count)
        yield slice(start, end), end - start
