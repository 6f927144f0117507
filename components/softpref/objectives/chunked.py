"""Log-probabilities, entropy and KL per token straight from hidden states: full logits never exist.

Logits of T tokens over a vocabulary of V take 4·T·V bytes, and autograd keeps several copies. Here they are
computed for a chunk of tokens at a time, reduced, and computed again for the gradient, which has a closed
form. Those of the last tokens are kept for it, as many as fit into a buffer of fixed size. Memory is that
buffer and a few chunks, whatever T is; the price is one more product per head for what did not fit.

A *head* is how logits arise from hidden states h: `softcap(scale · (h Wᵀ + bias))`, where
`softcap(z) = c · tanh(z / c)`, or nothing. Products run in the dtype of the inputs (under autocast in the
dtype of autocast) with fp32 accumulation; everything after them is fp32 (float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Bytes and tokens of one chunk's logits. Measured on a CPU (fp32 and bf16, width 256, vocabularies of 4,096
# and 32,000): fastest at 256 to 512 tokens; shorter ones reread the head too often, longer ones leave the
# cache between the passes over them. Accelerators have bandwidth for longer chunks, and launches to save.
_CPU_CHUNK_BYTES, _CPU_CHUNK_TOKENS = 32 * 2**20, 512
_CHUNK_BYTES = 256 * 2**20
_MIN_CHUNK_TOKENS = 64
_KEPT_BYTES = 256 * 2**20  # of logits that stay from forward to backward; each head has as much
_WIDE_PRODUCTS = torch.version.hip is None  # CUDA can return a bf16 product before it is rounded to bf16


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
        chunk_size: tokens whose logits exist at once. By default as many as suit the device, and up to
            256 MB of logits stay for backward besides. The result depends on it by no more than rounding.
        bias, scale, softcap: the rest of the head: `softcap · tanh(scale · (h Wᵀ + bias) / softcap)`.

    Returns:
        `[T]`, fp32 (float64 for float64 inputs). It can be differentiated once.

    Raises:
        ValueError: shapes or dtypes that do not fit together, a chunk size under 1.
    """
    return _run(hidden, _Head(head_weight, bias, scale, softcap), targets, chunk_size)[0]


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
    """How to compute what is asked; `sums` is the dtype of everything but the products.

    Logits of the last `kept` chunks stay for backward, as what forward has made of them:

    - of log-probabilities alone, `exp(z − top)`, where top is the greatest of a row;
    - with a reference, log p and log p − log q, reversed log q − log p and log q.
    """

    form: _Form
    ref_form: _Form
    reverse: bool
    chunk: int
    kept: int
    sums: torch.dtype


def _run(
    hidden: Tensor,
    head: _Head,
    targets: Tensor,
    chunk_size: int | None,
    *,
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
    size = default_chunk_size(vocabulary, hidden.device) if chunk_size is None else chunk_size
    if size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    chunk = min(size, max(1, len(targets)))
    sums = torch.promote_types(hidden.dtype, torch.float32)
    kept = 0  # under a soft cap nothing is: its slope asks for what forward writes over
    if _has_gradient(hidden, head) and head.weight is not None and head.softcap is None:
        room = _KEPT_BYTES // (sums.itemsize * vocabulary) if chunk_size is None else 0
        kept = min(max(1, room // chunk), -(-len(targets) // chunk))
    plan = _Plan(form, ref_form, reverse, chunk, kept, sums)
    apply: Callable[..., tuple[Tensor, ...]] = _TokenTerms.apply
    return apply(hidden, head.weight, head.bias, targets, ref_hidden, ref_weight, ref_bias, plan)


def _has_gradient(hidden: Tensor, head: _Head) -> bool:
    """Whether there will be a backward pass that is not a compiler's own."""
    leaves = (hidden, head.weight, head.bias)
    wanted = any(each is not None and each.requires_grad for each in leaves)
    return wanted and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _check(hidden: Tensor, head: _Head, targets: Tensor, prefix: str) -> int:
    """Refuse shapes and dtypes that do not match; returns the size of the vocabulary."""
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
    """(logps, entropy, KL, ref_logps), each `[T]`; without a reference all but the first are None."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        targets: Tensor,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        plan: _Plan,
    ) -> tuple[Tensor | None, ...]:
        count = len(targets)
        new: dict[str, Any] = {"dtype": plan.sums, "device": hidden.device}
        logps, log_sums, sums = (torch.empty(count, **new) for _ in range(3))
        of_both: list[Any] = [None if ref_hidden is None else torch.empty(count, **new) for _ in range(4)]
        entropy, kl, ref_logps, ref_log_sums = of_both
        with torch.autocast(hidden.device.type, enabled=False):
            scores = _Scores(weight, bias, plan.form)
            ref_scores = _Scores(ref_weight, ref_bias, plan.ref_form)
            z_room = _room(hidden, weight, plan, plan.kept)
            q_room: Any = None if ref_hidden is None else torch.empty_like(z_room)
            work_chunk = None if ref_hidden is None else torch.empty_like(z_room[: plan.chunk])
            for rows, place, _ in _chunks(count, plan.chunk, plan.kept):
                z, target = z_room[place], targets[rows, None]
                work = z if work_chunk is None else work_chunk[: len(z)]
                scores(hidden[rows], z)
                logps[rows] = z.gather(1, target).squeeze(1)
                log_sums[rows], sums[rows] = _log_sum_exp(z, work)
                if ref_hidden is None:
                    continue
                log_p = z.sub_(log_sums[rows, None])
                entropy[rows] = torch.exp(log_p, out=work).mul_(log_p).sum(1).neg_()
                q = q_room[place]
                ref_scores(ref_hidden[rows], q)
                ref_logps[rows] = q.gather(1, target).squeeze(1)
                ref_log_sums[rows] = _log_sum_exp(q, work)[0]
                log_q = q.sub_(ref_log_sums[rows, None])
                first, second = (log_q, log_p) if plan.reverse else (log_p, log_q)
                torch.exp(first, out=work)
                kl[rows] = work.mul_(torch.sub(first, second, out=second)).sum(1)
            logps -= log_sums
            if ref_logps is not None:
                ref_logps -= ref_log_sums
        ctx.plan = plan
        ctx.rooms = (z_room, q_room) if plan.kept else None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            hidden, weight, bias, targets, ref_hidden, ref_weight, ref_bias, log_sums, sums, ref_log_sums, kl
        )
        ctx.mark_non_differentiable(*(each for each in (entropy, ref_logps) if each is not None))
        return logps, entropy, kl, ref_logps

    @staticmethod
    def backward(
        ctx: Any,
        grad_logps: Tensor | None,
        grad_entropy: Tensor | None,
        grad_kl: Tensor | None,
        grad_ref_logps: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, ref_hidden, ref_weight, ref_bias, *terms = ctx.saved_tensors
        log_sums, sums, ref_log_sums, kl = terms
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
            kept = plan.kept if ctx.rooms else 0  # what is kept serves once: it is overwritten
            z_room, q_room = ctx.rooms or (_room(hidden, weight, plan, 0), None)
            ctx.rooms = None
            if grad_kl is not None and q_room is None:
                q_room = torch.empty_like(z_room)
            slope_chunk = None if form.softcap is None else torch.empty_like(z_room)
            low_chunk = None
            if form.products != plan.sums:
                low_chunk = torch.empty_like(z_room[: plan.chunk], dtype=form.products)
            grad_hidden = torch.empty_like(hidden) if wants_hidden else None
            grad_weight = torch.zeros(weight.shape, **new) if wants_weight else None
            grad_bias = torch.zeros(z_room.shape[1], **new) if wants_bias else None
            # the gradient is linear in the incoming one, so the scale can be multiplied in here
            grad_logps = torch.zeros_like(log_sums) if grad_logps is None else grad_logps
            grad_logps = _significant(grad_logps * form.scale)
            grad_kl = None if grad_kl is None else _significant(grad_kl * form.scale)
            # the kept chunks come first, then their place is free
            for rows, place, is_kept in reversed([*_chunks(len(targets), plan.chunk, kept)]):
                z, g = z_room[place], grad_logps[rows, None]
                q: Any = None if q_room is None else q_room[place]
                if not is_kept:
                    scores(hidden[rows], z)
                    if slope_chunk is not None:  # 1 − (z / c)²
                        slope = torch.div(z, form.softcap, out=slope_chunk[: len(z)])
                        slope.square_().neg_().add_(1)
                    z.sub_(log_sums[rows, None])
                elif plan.reverse and q is not None:
                    torch.sub(q, z, out=z)
                if grad_kl is not None:
                    g_kl = grad_kl[rows, None]
                    if not is_kept:
                        ref_scores(ref_hidden[rows], q)
                        q.sub_(ref_log_sums[rows, None])
                    if plan.reverse:
                        z.exp_().mul_(g_kl - g).sub_(q.exp_().mul_(g_kl))
                    else:
                        log_ratio = q if is_kept else torch.sub(z, q, out=q)
                        z.exp_().mul_(log_ratio.mul_(g_kl).sub_(g_kl * kl[rows, None] + g))
                elif is_kept and ref_hidden is None:
                    z.mul_(-g / sums[rows, None])
                else:
                    z.exp_().mul_(-g)
                z.scatter_add_(1, targets[rows, None], g)
                if slope_chunk is not None:
                    z.mul_(slope)
                if grad_bias is not None:
                    grad_bias += z.sum(0)
                if weight is None:
                    if grad_hidden is not None:
                        grad_hidden[rows] = z
                    continue
                low = z if low_chunk is None else low_chunk[: len(z)].copy_(z)
                if grad_hidden is not None:
                    _product(low, scores.weight, grad_hidden[rows])
                if grad_weight is not None:
                    _product(low.t(), hidden[rows].to(form.products), grad_weight, add=True)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _room(hidden: Tensor, weight: Tensor | None, plan: _Plan, kept: int) -> Tensor:
    """Room for the logits of the kept chunks, and of one at least."""
    tokens = min(max(1, kept) * plan.chunk, max(1, len(hidden)))
    vocabulary = hidden.shape[1] if weight is None else weight.shape[0]
    return torch.empty(tokens, vocabulary, dtype=plan.sums, device=hidden.device)


def _significant(gradient: Tensor) -> Tensor:
    """The gradient, with zeros where rounding would lose it anyway, beside its largest value or beside 1.

    A settled preference leaves gradients like 1e-30. Their products with probabilities are denormal, which
    makes a CPU a hundred times slower; zeros cost nothing.
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
    wide = _WIDE_PRODUCTS and left.is_cuda and left.itemsize == 2 and out.dtype == torch.float32
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, out=out) if add else torch.mm(left, right, out=out)
    elif wide and not (add and torch.compiler.is_compiling()):  # the compiler knows no such sum
        if add:
            torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
        else:
            torch.mm(left, right, out_dtype=out.dtype, out=out)
    elif add:
        out.add_(left @ right)
    else:
        out.copy_(left @ right)


def _log_sum_exp(z: Tensor, work: Tensor) -> tuple[Tensor, Tensor]:
    """`log Σ exp(z)` and `Σ exp(z − top)` of each row, `[n]`; `work`, perhaps `z`, becomes `exp(z − top)`."""
    top = z.amax(1, keepdim=True)
    total = torch.sub(z, top, out=work).exp_().sum(1)
    return total.log().add_(top.squeeze(1)), total


def _chunks(count: int, size: int, kept: int) -> Iterator[tuple[slice, slice, bool]]:
    """Tokens of each chunk, where in the room their logits lie, and whether they stay there.

    The last `kept` chunks lie side by side; those before them pass through the place of the first of these.
    """
    starts = range(0, count, size)
    first = len(starts) - kept
    for number, start in enumerate(starts):
        length, place = min(size, count - start), max(0, number - first) * size
        yield slice(start, start + length), slice(place, place + length), number >= first
