"""The preference losses: soft preference optimization and the baselines that share its rows.

Every function takes flat log-probabilities, `[sequences]`, of groups whose completions stand next to each
other, best first, and returns one loss per group. Means, regularisers and sampling are the caller's.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

PreferenceKind = Literal["pairwise", "best_of_n", "ranking"]
SoftLabels = Literal["linear", "geometric"]


class _Groups(NamedTuple):
    """Groups as rows: `values` `[groups, n]`, `present` `[groups, n]` True where a completion stands."""

    values: Tensor
    present: Tensor


def preference_loss(
    logps: Tensor,
    group_sizes: Tensor,
    *,
    alpha: float,
    kind: PreferenceKind = "pairwise",
    probabilities: Tensor | None = None,
    soft_labels: SoftLabels = "linear",
    weight_exponent: float = 0.0,
    weight_scores: Tensor | None = None,
    log_mean_weight: Tensor | None = None,
) -> Tensor:
    """Soft preference optimization's loss of each group; its minimiser is `softmax(reward / alpha)`.

    With Δ_j = logp_j − logp_best, best-of-n is `(1/α) log Σ_j exp(α Δ_j)`; pairwise is its case n = 2,
    `−(1/α) log σ(α (logp_w − logp_l))`; a ranking is the sum of best-of-n over each suffix (Plackett-Luce).
    The factor 1/α keeps the gradient's scale. α = 0 gives the limit up to a constant, `mean_j Δ_j`.
    Source: arXiv 2405.00747, equations 4, 12 and 15 in the notation above; soft labels: linear as the
    expected loss under the label, geometric as arXiv 2409.06691.

    Args:
        logps: `[sequences]`, log-probability of each completion in nats, best first within a group.
        group_sizes: `[groups]`, integers ≥ 2 that sum to `sequences`.
        alpha: softness α ≥ 0.
        kind: what the order within a group means. `pairwise` asks for groups of two; `best_of_n` knows the
            first to be the best and nothing of the others.
        probabilities: `[groups]`, P(first beats second) of pairs; None, or 1, is a hard label, the only one
            that groups of more than two may carry.
        soft_labels: `linear` mixes the losses of both labels and keeps the minimiser; `geometric` scales the
            margin by 2p − 1, which gives uncertain pairs less weight and moves the minimiser.
        weight_exponent: γ of the symmetric weight μ, `log μ = γ logsumexp_j score_j`, scaled to mean 1 over
            the global batch. It is constant: no gradient flows through it. 0 gives every group weight 1.
        weight_scores: `[sequences]`, scores of the weight; the log-probabilities by default.
        log_mean_weight: scalar, log of the mean of `exp(log_group_weights(…))` over the global batch, where
            the groups given are only a part of it; by default the groups given are all.

    Returns:
        `[groups]`, in the dtype of `logps`.

    Raises:
        ValueError: sizes that do not fit, a negative α, an unknown kind or way of soft labels, or
            probabilities for groups of more than two.
    """
    if alpha < 0:
        raise ValueError(f"softness alpha must be at least 0, got {alpha}")
    if kind not in get_args(PreferenceKind):
        raise ValueError(f"kind must be one of {', '.join(get_args(PreferenceKind))}, got {kind!r}")
    groups = _as_rows(logps, group_sizes)
    pairs = groups.present.sum(-1) == 2
    if kind == "pairwise" and not bool(pairs.all()):
        raise ValueError("pairwise preferences need groups of exactly two completions")
    ranks = groups.values.shape[1] - 1 if kind == "ranking" else 1
    losses = _suffix_losses(groups, alpha, ranks)
    if probabilities is not None:
        if bool((probabilities[~pairs] != 1).any()):
            raise ValueError("label probabilities are defined for groups of exactly two completions")
        soft = soft_label_loss(
            lambda margin: _logistic(margin, alpha),
            groups.values[:, 0] - groups.values[:, 1],
            probabilities,
            soft_labels,
        )
        losses = soft.where(pairs, losses)
    if weight_exponent:
        scores = logps if weight_scores is None else weight_scores
        log_weights = log_group_weights(scores, group_sizes, weight_exponent=weight_exponent)
        if log_mean_weight is None:
            log_mean_weight = log_weights.logsumexp(0) - math.log(len(log_weights))
        losses = losses * (log_weights - log_mean_weight).exp()
    return losses


def log_group_weights(scores: Tensor, group_sizes: Tensor, *, weight_exponent: float) -> Tensor:
    """`log μ = γ logsumexp_j score_j` of each group, before scaling: `[sequences], [groups] -> [groups]`.

    Symmetric in a group's completions, which keeps the loss's minimiser, and without gradient.
    """
    groups = _as_rows(scores.detach(), group_sizes)
    return weight_exponent * groups.values.masked_fill(~groups.present, -torch.inf).logsumexp(-1)


def dpo_loss(
    logps: Tensor,
    ref_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    probabilities: Tensor | None = None,
    soft_labels: SoftLabels = "linear",
) -> Tensor:
    """Direct preference optimization on pairs: `−log σ(β h)`, h = Δlogp − Δlogp_ref.

    Source: arXiv 2305.18290, equation 7.

    Args:
        logps: `[2 · pairs]`, policy log-probabilities in nats, chosen and rejected in turn.
        ref_logps: `[2 · pairs]`, the reference's.
        beta: strength of the implicit KL constraint, > 0.
        label_smoothing: ε in [0, ½), the assumed share of flipped labels (cDPO):
            `(1 − ε) ℓ(h) + ε ℓ(−h)`.
        probabilities: `[pairs]`, P(first beats second); None is hard.
        soft_labels: as in `preference_loss`.

    Returns:
        `[pairs]`.
    """
    if beta <= 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    ratios = (logps - ref_logps).view(-1, 2)

    def smoothed(margin: Tensor) -> Tensor:
        loss = -F.logsigmoid(beta * margin)
        if label_smoothing:
            loss = (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-beta * margin)
        return loss

    return soft_label_loss(smoothed, ratios[:, 0] - ratios[:, 1], probabilities, soft_labels)


def soft_label_loss(loss, margin: Tensor, probabilities: Tensor | None, soft_labels: SoftLabels) -> Tensor:
    """Turn a loss of the hard margin, `[pairs] -> [pairs]`, into the loss under label probabilities.

    `linear`: `p ℓ(m) + (1 − p) ℓ(−m)`; `geometric`: `ℓ((2p − 1) m)`.
    """
    if probabilities is None:
        return loss(margin)
    if soft_labels == "geometric":
        return loss((2 * probabilities - 1) * margin)
    if soft_labels == "linear":
        return probabilities * loss(margin) + (1 - probabilities) * loss(-margin)
    raise ValueError(f"soft_labels must be 'linear' or 'geometric', got {soft_labels!r}")


def _logistic(margin: Tensor, alpha: float) -> Tensor:
    return -0.5 * margin if alpha == 0 else -F.logsigmoid(alpha * margin) / alpha


def _suffix_losses(groups: _Groups, alpha: float, ranks: int) -> Tensor:
    """Σ over the first `ranks` places k of the best-of-n loss of the suffix that starts at k."""
    values, present = groups
    size = values.shape[1]
    # [groups, k, j]: differences first, for sums of large log-probabilities would lose them
    differences = values[:, None, :] - values[:, :ranks, None]
    in_suffix = torch.ones(ranks, size, dtype=torch.bool, device=values.device).triu()
    counted = present[:, None, :] & in_suffix
    has_rivals = counted.sum(-1) > 1  # [groups, k]; the last place of a ranking decides nothing
    if alpha == 0:
        terms = differences.where(counted, 0).sum(-1) / counted.sum(-1).clamp_min(1)
    else:
        scaled = (alpha * differences).masked_fill(~counted, -torch.inf)
        # a place with no completion has only -inf, whose gradient is NaN: give it a constant instead
        scaled = scaled.masked_fill(~has_rivals[..., None], 0.0)
        terms = scaled.logsumexp(-1) / alpha
    return terms.where(has_rivals, 0).sum(-1)


def _as_rows(values: Tensor, group_sizes: Tensor) -> _Groups:
    sizes = group_sizes.to(values.device)
    if int(sizes.sum()) != len(values) or (len(sizes) and int(sizes.min()) < 2):
        raise ValueError(
            f"group_sizes must be at least 2 and sum to {len(values)} sequences, got {group_sizes.tolist()}"
        )
    present = torch.arange(int(sizes.max()), device=values.device) < sizes[:, None]
    rows = values.new_zeros(present.shape).masked_scatter(present, values)
    return _Groups(rows, present)
