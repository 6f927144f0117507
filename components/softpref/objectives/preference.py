"""The preference loss of soft preference optimization, and what label probabilities do to a pairwise loss.

Log-probabilities are flat, `[sequences]`, the completions of a group next to each other, best first; there is
one loss per group. Means, regularisers and sampling are the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

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
    kind: PreferenceKind | Sequence[PreferenceKind] = "pairwise",
    probabilities: Tensor | None = None,
    soft_labels: SoftLabels = "linear",
    weight_exponent: float = 0.0,
    weight_scores: Tensor | None = None,
    log_mean_weight: Tensor | None = None,
    base_logps: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Soft preference optimization's loss of each group; its minimiser is `ν · exp(reward / alpha)`, scaled.

    The base measure ν is the counting measure as published; with `base_logps` it is another, and every
    `logp` of the loss is `logp − log ν`. Of the reference's probabilities as base, the pairwise loss is DPO's
    with β = α, over α. With `offsets` o, every `α logp` is `α logp − o`: rewards that the completions have
    besides those of the labels, and the minimiser is `ν · exp((reward + o) / alpha)`, scaled.

    With Δ_j = logp_j − logp_best, best-of-n is `(1/α) log Σ_j exp(α Δ_j)`; pairwise is its case n = 2,
    `−(1/α) log σ(α (logp_w − logp_l))`; a ranking is the sum of best-of-n over each suffix (Plackett-Luce).
    The factor 1/α keeps the gradient's scale. α = 0 gives the limit up to a constant, `mean_j Δ_j`, with
    offsets that of the weights `softmax_j(−o_j)`.
    Source: arXiv 2405.00747, equations 4, 12 and 15 in the notation above; soft labels: linear as the
    expected loss under the label, geometric as arXiv 2409.06691.

    Args:
        logps: `[sequences]`, log-probability of each completion in nats, best first within a group.
        group_sizes: `[groups]`, integers ≥ 2 that sum to `sequences`.
        alpha: softness α ≥ 0.
        kind: what the order within a group means, for all groups or one for each. `pairwise` asks for
            groups of two; `best_of_n` knows the first to be the best and nothing of the others.
        probabilities: `[groups]`, P(first beats second) of pairs; None, or 1, is a hard label, the only one
            that groups of more than two may carry.
        soft_labels: `linear` mixes the losses of both labels and keeps the minimiser; `geometric` scales the
            margin by 2p − 1, which gives uncertain pairs less weight and moves the minimiser.
        weight_exponent: γ of the symmetric weight μ, `log μ = γ logsumexp_j score_j`, scaled to mean 1 over
            the global batch. It is constant: no gradient flows through it. 0 gives every group weight 1.
        weight_scores: `[sequences]`, scores of the weight; the log-probabilities by default.
        base_logps: `[sequences]`, log ν of each completion, nats, constant; None: 0.
        offsets: `[sequences]`, o of each completion, nats, constant; None: 0.
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
    constant = torch.zeros_like(logps) if offsets is None else offsets.detach().to(logps.dtype)
    values = logps if base_logps is None else logps - base_logps
    if alpha:  # an offset is a base measure by another name
        values, constant = values - constant / alpha, torch.zeros_like(constant)
    groups, shifts = _as_rows(values, group_sizes), _as_rows(constant, group_sizes).values
    pairs = groups.present.sum(-1) == 2
    losses = _suffix_losses(groups, shifts, alpha, _places(kind, groups))
    if probabilities is not None:
        if bool((probabilities[~pairs] != 1).any()):
            raise ValueError("label probabilities are defined for groups of exactly two completions")
        margins = torch.stack([rows[:, 0] - rows[:, 1] for rows in (groups.values, shifts)])
        soft = soft_label_loss(
            lambda margin: _logistic(margin[0], margin[1], alpha), margins, probabilities, soft_labels
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


def ordered_pairs(
    group_sizes: Tensor, kind: PreferenceKind | Sequence[PreferenceKind]
) -> tuple[Tensor, Tensor]:
    """The pairs that groups decide, for losses that know pairs alone.

    A ranking decides all its pairs, a best-of-n the best against each other.

    Args:
        group_sizes: `[groups]`; a group of one decides none.
        kind: as in `preference_loss`.

    Returns:
        Flat places of the completions, `[2 · pairs]`, each pair's better one first; and the group of each
        pair, `[pairs]`.
    """
    sizes = group_sizes.tolist()
    kinds = [kind] * len(sizes) if isinstance(kind, str) else kind
    places: list[int] = []
    groups: list[int] = []
    start = 0
    for group, (size, one) in enumerate(zip(sizes, kinds, strict=True)):
        for better in range(size - 1 if one == "ranking" else 1):
            for worse in range(better + 1, size):
                places += [start + better, start + worse]
                groups.append(group)
        start += size
    whole: dict[str, Any] = {"dtype": torch.long, "device": group_sizes.device}
    return torch.tensor(places, **whole), torch.tensor(groups, **whole)


def soft_label_loss(
    loss: Callable[[Tensor], Tensor],
    margin: Tensor,
    probabilities: Tensor | None,
    soft_labels: SoftLabels = "linear",
) -> Tensor:
    """Turn a loss of the hard margin, `[pairs] -> [pairs]`, into the loss under label probabilities.

    Args:
        loss: ℓ of a margin, that of the first completion over the second.
        margin: `[pairs]`, nats; or several of each pair that change their signs together, `[…, pairs]`.
        probabilities: `[pairs]`, P(first beats second); None is a hard label for each.
        soft_labels: `linear`: `p ℓ(m) + (1 − p) ℓ(−m)`; `geometric`: `ℓ((2p − 1) m)`, as in GDPO and its
            like (arXiv 2409.06691).

    Raises:
        ValueError: an unknown way of soft labels.
    """
    if probabilities is None:
        return loss(margin)
    if soft_labels == "geometric":
        return loss((2 * probabilities - 1) * margin)
    if soft_labels == "linear":
        return probabilities * loss(margin) + (1 - probabilities) * loss(-margin)
    raise ValueError(f"soft_labels must be 'linear' or 'geometric', got {soft_labels!r}")


def _logistic(margin: Tensor, shift: Tensor, alpha: float) -> Tensor:
    """Of pairs; `shift` is the difference of what remains of the offsets at α = 0."""
    return -torch.sigmoid(shift) * margin if alpha == 0 else -F.logsigmoid(alpha * margin) / alpha


def _places(kind: PreferenceKind | Sequence[PreferenceKind], groups: _Groups) -> Tensor:
    """How many places of each group are decided by its order, `[groups]`: one, or all of a ranking."""
    sizes = groups.present.sum(-1)
    kinds = [kind] if isinstance(kind, str) else list(kind)
    for one in kinds:
        if one not in get_args(PreferenceKind):
            raise ValueError(f"kind must be one of {', '.join(get_args(PreferenceKind))}, got {one!r}")
    if not isinstance(kind, str) and len(kinds) != len(sizes):
        raise ValueError(f"kind must be one name or one for each of {len(sizes)} groups, got {len(kinds)}")
    pairwise, ranking = (
        torch.tensor([one == name for one in kinds], device=sizes.device) for name in ("pairwise", "ranking")
    )
    if bool((pairwise & (sizes != 2)).any()):
        raise ValueError("pairwise preferences need groups of exactly two completions")
    return torch.where(ranking, sizes - 1, 1)


def _suffix_losses(groups: _Groups, shifts: Tensor, alpha: float, places: Tensor) -> Tensor:
    """Σ over the first `places` `[groups]` places k of the best-of-n loss of the suffix that starts at k.

    `shifts` `[groups, n]` is what remains of the offsets at α = 0.
    """
    values, present = groups
    size, most = values.shape[1], int(places.max()) if len(places) else 1
    in_suffix = torch.ones(most, size, dtype=torch.bool, device=values.device).triu()
    counted = present[:, None, :] & in_suffix  # [groups, k, j]
    decided = torch.arange(most, device=values.device) < places[:, None]  # [groups, k]
    # differences first, for sums of large log-probabilities would lose them
    if alpha == 0:
        differences = values[:, None, :] - values[:, :most, None]
        # a place behind the last completion has only -inf, of which a softmax is NaN
        lost = (-shifts)[:, None, :].expand_as(counted).masked_fill(~counted, -torch.inf)
        shares = lost.masked_fill(~decided[..., None], 0.0).softmax(-1)
        terms = (shares * differences.where(counted, 0)).sum(-1)
    else:
        # to the largest of each suffix: the exponentials and their gradient then meet small numbers only
        every = values.detach()[:, None, :].expand_as(counted)
        largest = every.masked_fill(~counted, -torch.inf).amax(-1).where(decided, 0)
        scaled = (alpha * (values[:, None, :] - largest[..., None])).masked_fill(~counted, -torch.inf)
        # a place behind the last completion has only -inf, whose gradient is NaN: give it a constant instead
        scaled = scaled.masked_fill(~decided[..., None], 0.0)
        terms = largest - values[:, :most] + scaled.logsumexp(-1) / alpha
    return terms.where(decided, 0).sum(-1)


def _as_rows(values: Tensor, group_sizes: Tensor) -> _Groups:
    sizes = group_sizes.to(values.device)
    if int(sizes.sum()) != len(values) or (len(sizes) and int(sizes.min()) < 2):
        raise ValueError(
            f"group_sizes must be at least 2 and sum to {len(values)} sequences, got {group_sizes.tolist()}"
        )
    present = torch.arange(int(sizes.max()), device=values.device) < sizes[:, None]
    rows = values.new_zeros(present.shape).masked_scatter(present, values)
    return _Groups(rows, present)
