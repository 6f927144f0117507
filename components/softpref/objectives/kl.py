"""The regulariser KL(policy ‖ reference) over whole output distributions, from samples of the policy.

By the chain rule it is the expectation, over the policy's own completions, of the sum of per-token
divergences taken over the whole vocabulary. Samples are the caller's; they must come from the policy at
temperature 1 without any cut.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KLGradient = Literal["token", "full"]


def kl_per_token(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """`Σ_v π(v) log(π(v) / π_ref(v))` at each position: `[tokens, V], [tokens, V] -> [tokens]`, nats."""
    logps, ref_logps = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logps.exp() * (logps - ref_logps)).sum(-1)


def kl_loss(
    token_kl: Tensor,
    token_logps: Tensor,
    lengths: Tensor,
    *,
    kl_gradient: KLGradient = "token",
) -> Tensor:
    """A loss per sampled completion whose gradient estimates that of KL(policy ‖ reference).

    Its value is always the estimate itself, Σ_t KL_t in nats; only the gradient differs:

    - `token`: the gradient of Σ_t KL_t with the sampled prefixes held fixed. Leaves out how a token changes
      the prefixes after it; lower variance, no second pass.
    - `full`: adds Σ_t ∇log π(y_t) · [Σ_{s>t} KL_s − baseline_t], the score-function part, and is unbiased.
      The baseline is the mean of the other completions' bracket at the same position, which is independent
      of the completion it serves.

    Args:
        token_kl: `[tokens]`, KL_t with gradient, completions one after another.
        token_logps: `[tokens]`, log π(y_t) with gradient.
        lengths: `[sequences]`, tokens per completion, ≥ 1.
        kl_gradient: which estimator.

    Returns:
        `[sequences]`, nats.
    """
    rows, columns = _positions(lengths)
    shape = (len(lengths), int(lengths.max()))
    per_sequence = token_kl.new_zeros(shape[0]).index_add(0, rows, token_kl)
    if kl_gradient == "token":
        return per_sequence
    if kl_gradient != "full":
        raise ValueError(f"kl_gradient must be 'token' or 'full', got {kl_gradient!r}")
    detached = token_kl.new_zeros(shape)
    detached[rows, columns] = token_kl.detach()
    to_go = detached.flip(1).cumsum(1).flip(1) - detached  # Σ_{s>t}, 0 behind the end
    others = (to_go.sum(0) - to_go) / max(shape[0] - 1, 1) if shape[0] > 1 else torch.zeros_like(to_go)
    score = token_logps * (to_go - others)[rows, columns]
    score_part = token_logps.new_zeros(shape[0]).index_add(0, rows, score)
    return per_sequence + score_part - score_part.detach()


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """`(Σw)² / (n Σw²)` of importance weights given as logarithms, `[n]`: a fraction in (0, 1]."""
    twice = 2 * log_weights
    return (2 * log_weights.logsumexp(0) - twice.logsumexp(0)).exp() / len(log_weights)


def _positions(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of each flat token: `[tokens], [tokens]`."""
    device = lengths.device
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    starts = lengths.cumsum(0) - lengths
    return rows, torch.arange(len(rows), device=device) - starts[rows]
