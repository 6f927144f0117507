"""Which loss a method takes of a batch's log-probabilities: the one place that knows all methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from softpref.fitness import SATURATED
from softpref.objectives import (
    dpo_loss,
    ipo_loss,
    ordered_pairs,
    preference_loss,
    rdpo_loss,
    slic_loss,
    sppo_loss,
    tdpo_loss,
)
from softpref.spo.config import SPOConfig


def method_losses(
    args: SPOConfig,
    logps: Tensor,
    rows: Mapping[str, Any],
    *,
    ref_logps: Tensor | None = None,
    divergences: Tensor | None = None,
    weight_scores: Tensor | None = None,
    weighted: bool = True,
) -> Tensor:
    """The loss of each row of a batch under `args.method`.

    Args:
        logps: `[sequences]`, log-probabilities under the policy, nats.
        rows: the batch's `group_sizes` and `probabilities` `[groups]`, `kinds` (one for each group), and
            `win_probabilities` `[sequences]` for `sppo`; `log_mean_weight` where the batch is a part of an
            optimizer step with weights.
        ref_logps: `[sequences]`, under the reference; every method but `spo` without an anchor needs them.
        divergences: `[sequences]`, Σ_t KL(π_ref ‖ π) along each completion, for `tdpo`.
        weight_scores: `[sequences]`, scores of `spo`'s weight; by default the log-probabilities.
        weighted: whether rows have `spo`'s weight.

    Returns:
        `[groups]`. Methods of pairs take the mean over the pairs that a row's order decides.
    """
    sizes, probabilities, kinds = rows["group_sizes"], rows["probabilities"], rows["kinds"]
    if args.method == "spo":
        return preference_loss(
            logps,
            sizes,
            alpha=args.alpha,
            kind=kinds,
            probabilities=probabilities,
            soft_labels=args.soft_labels,
            weight_exponent=args.weight_exponent if weighted else 0.0,
            weight_scores=weight_scores,
            log_mean_weight=rows.get("log_mean_weight"),
            base_logps=None if ref_logps is None else args.anchor * ref_logps,
            offsets=rows.get("offsets"),
        )
    assert ref_logps is not None
    if args.method == "sppo":
        return sppo_loss(logps, ref_logps, rows["win_probabilities"], sizes, beta=args.beta)
    places, groups = ordered_pairs(sizes, kinds)
    pairs = (logps[places], ref_logps[places])
    labels: dict[str, Any] = {
        "beta": args.beta,
        "probabilities": probabilities[groups],
        "soft_labels": args.soft_labels,
        "offsets": rows["offsets"][places] if "offsets" in rows else None,
    }
    if args.method == "dpo":
        losses = dpo_loss(*pairs, label_smoothing=args.label_smoothing, **labels)
    elif args.method == "rdpo":
        losses = rdpo_loss(*pairs, label_smoothing=args.label_smoothing, **labels)
    elif args.method == "ipo":
        losses = ipo_loss(*pairs, **labels)
    elif args.method == "slic":
        losses = slic_loss(*pairs, **labels)
    else:
        assert divergences is not None
        losses = tdpo_loss(*pairs, divergences[places], tdpo_alpha=args.tdpo_alpha, **labels)
    return _group_means(losses, groups, len(sizes))


def implicit_rewards(
    args: SPOConfig, logps: Tensor, ref_logps: Tensor | None, offsets: Tensor | None = None
) -> Tensor:
    """The reward that the policy implies for each completion, up to a constant of the prompt: `[sequences]`.

    It is α·(logp − anchor·logp_ref) for `spo`, β·(logp − logp_ref) for the others, less the offset.
    """
    scale, anchor = (args.alpha, args.anchor) if args.method == "spo" else (args.beta, 1.0)
    rewards = scale * (logps - (torch.zeros_like(logps) if ref_logps is None else anchor * ref_logps))
    return rewards if offsets is None else rewards - offsets


@torch.no_grad()
def preference_metrics(
    args: SPOConfig, logps: Tensor, rows: Mapping[str, Any], ref_logps: Tensor | None
) -> dict[str, Tensor]:
    """`logps/*` and `rewards/*` of each row of a batch, `[groups]` each.

    For rewards see `implicit_rewards`. `rewards/saturated` is the share of margins beyond 5, where a logistic
    loss has no curvature left: softness has no effect there. `logps/accuracies` compares plain
    log-probabilities. Rejected is the last of a row; a best-of-n row does not rank its others, so there the
    metrics are means over all of them.

    Args:
        logps, rows, ref_logps: as in `method_losses`.
    """
    sizes, kinds = rows["group_sizes"], rows["kinds"]
    scale, anchor = (args.alpha, args.anchor) if args.method == "spo" else (args.beta, 1.0)
    base = torch.zeros_like(logps) if ref_logps is None else anchor * ref_logps
    rewards = implicit_rewards(args, logps, ref_logps, rows.get("offsets"))
    chosen, rejected, groups = _chosen_and_rejected(sizes, kinds)
    margins = rewards[chosen] - rewards[rejected]
    # where policy and reference are the same, the margin is only rounding of the log-probabilities: a tie
    rounding = 0 * logps if ref_logps is None else 1e-6 * scale * (logps.abs() + base.abs())
    ties = margins.abs() <= rounding[chosen] + rounding[rejected]
    each = {
        "logps/chosen": logps[chosen],
        "logps/rejected": logps[rejected],
        "logps/accuracies": (logps[chosen] > logps[rejected]).float(),
        "rewards/chosen": rewards[chosen],
        "rewards/rejected": rewards[rejected],
        "rewards/margins": margins,
        "rewards/accuracies": torch.where(ties, 0.5, (margins > 0).float()),
        "rewards/saturated": (margins.abs() > SATURATED).float(),
    }
    return {name: _group_means(values, groups, len(sizes)) for name, values in each.items()}


def _chosen_and_rejected(sizes: Tensor, kinds: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Flat places of each row's best, of what it is set against, and the row of each such pair."""
    pairs: list[tuple[int, int, int]] = []
    start = 0
    for group, (size, kind) in enumerate(zip(sizes.tolist(), kinds, strict=True)):
        first = start + 1 if kind == "best_of_n" else start + size - 1
        pairs += [(start, place, group) for place in range(first, start + size)]
        start += size
    chosen, rejected, groups = torch.tensor(pairs, device=sizes.device).unbind(-1)
    return chosen, rejected, groups


def _group_means(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Mean of the values of each group: `[n], [n] -> [count]`."""
    sums = values.new_zeros(count).index_add(0, groups, values)
    return sums / torch.bincount(groups, minlength=count)
