"""The regulariser KL(policy ‖ reference) over whole output distributions, from samples of the policy.

By the chain rule it is the expectation, over the policy's own completions, of the sum of per-token
divergences taken over the whole vocabulary. Samples are the caller's; they must come from the policy, or an
earlier state of it, at temperature 1 without any cut.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

KLGradient = float | str | None
"""An estimator by its name, or by its λ."""

_LAMBDAS = {"token": 0.0, "full": 1.0}


def kl_lambda(kl_gradient: KLGradient) -> float:
    """λ of an estimator of `kl_loss`: 0 of `token`, 1 of `full`; a number in [0, 1], text too, is its own.

    Raises:
        ValueError: anything else.
    """
    try:
        value = float(_LAMBDAS.get(kl_gradient, kl_gradient))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value <= 1:
        raise ValueError(f"kl_gradient must be 'token', 'full' or a number in [0, 1], got {kl_gradient!r}")
    return value


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
    old_token_logps: Tensor | None = None,
    max_importance_ratio: float | None = None,
    to_go_total: Tensor | None = None,
    sequences: int | None = None,
) -> Tensor:
    """A loss per sampled completion whose gradient estimates that of KL(policy ‖ reference).

    Its value is always the estimate itself, Σ_t w_t KL_t in nats; only the gradient differs:

    - `token`: the gradient of Σ_t w_t KL_t with the sampled prefixes held fixed. Leaves out how a token
      changes the prefixes after it; lower variance, no second pass.
    - `full`: adds Σ_t ∇log π(y_t) · [Σ_{s>t} w_s KL_s − v_t b_t], the score-function part, and is unbiased.
      The baseline b_t is the mean of the other completions' sum at the same position, which is independent
      of the completion it serves.
    - a number λ in [0, 1]: the same with Σ_{s>t} λ^{s−t} w_s KL_s, in the baseline too. What a token changes
      far behind it counts less: less variance and more bias the smaller λ is, as of the λ in generalised
      advantage estimation (arXiv 1506.02438). 0 is `token`, 1 is `full`.

    The weights are 1 for fresh samples. For samples of an earlier policy, w_t is the prefix ratio
    `Π_{u<t} π(y_u) / π_old(y_u)`, which makes both estimates in expectation what fresh samples would give,
    and v_t = w_t · π(y_t) / π_old(y_t).

    Args:
        token_kl: `[tokens]`, KL_t with gradient, completions one after another.
        token_logps: `[tokens]`, log π(y_t) with gradient.
        lengths: `[sequences]`, tokens per completion, ≥ 1.
        kl_gradient: which estimator.
        old_token_logps: `[tokens]`, log π_old(y_t) of the policy that drew the samples; None: π itself.
        max_importance_ratio: prefix ratios above this are cut down to it, which bounds the variance and
            leaves a bias; None cuts none.
        to_go_total, sequences: where the completions given are a part of the optimizer step's, the sum of
            `reward_to_go` of this λ over all of the step's (`[positions]`, at least as many as given) and
            their number.
            The baseline is then the same however the step is cut. By default those given are all.

    Returns:
        `[sequences]`, nats.

    Raises:
        ValueError: an unknown estimator.
    """
    discount = kl_lambda(kl_gradient)
    rows, columns = _positions(lengths)
    shape = (len(lengths), int(lengths.max()))
    if old_token_logps is None:
        weights = ratios = torch.ones_like(token_kl)
    else:
        weights = prefix_ratios(token_logps, old_token_logps, lengths, max_ratio=max_importance_ratio)
        ratios = (token_logps.detach() - old_token_logps).exp()
    per_sequence = token_kl.new_zeros(shape[0]).index_add(0, rows, weights * token_kl)
    if discount == 0:
        return per_sequence
    to_go = reward_to_go(weights * token_kl, lengths, discount)
    total = to_go.sum(0) if to_go_total is None else to_go_total[: shape[1]]
    count = shape[0] if sequences is None else sequences
    baseline = (total - to_go) / (count - 1) if count > 1 else torch.zeros_like(to_go)
    # weighing the baseline by the ratio of the token itself too keeps its expectation at zero
    score = token_logps * (to_go[rows, columns] - weights * ratios * baseline[rows, columns])
    score_part = token_logps.new_zeros(shape[0]).index_add(0, rows, score)
    return per_sequence + score_part - score_part.detach()


def prefix_ratios(
    token_logps: Tensor, old_token_logps: Tensor, lengths: Tensor, *, max_ratio: float | None = None
) -> Tensor:
    """Importance weight of each position, `Π_{u<t} π(y_u) / π_old(y_u)`: `[tokens]`, without gradient.

    It is 1 at a completion's first token.

    Args:
        token_logps, old_token_logps: `[tokens]`, log π(y_t) now and when the samples were drawn.
        lengths: `[sequences]`.
        max_ratio: larger products are cut down to this.
    """
    log_ratios = token_logps.detach() - old_token_logps
    rows, columns = _positions(lengths)
    placed = log_ratios.new_zeros(len(lengths), int(lengths.max()))
    placed[rows, columns] = log_ratios
    before = (placed.cumsum(1) - placed)[rows, columns]  # within the completion: no other's rounding error
    if max_ratio is not None:
        before = before.clamp_max(math.log(max_ratio))
    return before.exp()


def reward_to_go(token_kl: Tensor, lengths: Tensor, discount: float = 1.0) -> Tensor:
    """Σ_{s>t} λ^{s−t} KL_s behind each token, without gradient: `[tokens] -> [sequences, longest]`.

    0 at a completion's last token and behind it. `token_kl` comes weighted where samples are stale.

    Args:
        lengths: `[sequences]`.
        discount: λ.
    """
    rows, columns = _positions(lengths)
    sums = token_kl.new_zeros(len(lengths), int(lengths.max()))
    sums[rows, columns] = token_kl.detach()
    reach = 1  # tokens that each sum covers, from its own on
    while reach < sums.shape[1]:
        sums = sums + discount**reach * F.pad(sums[:, reach:], (0, reach))
        reach *= 2
    return discount * F.pad(sums[:, 1:], (0, 1))


def _positions(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of each flat token: `[tokens], [tokens]`."""
    device = lengths.device
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    starts = lengths.cumsum(0) - lengths
    return rows, torch.arange(len(rows), device=device) - starts[rows]
