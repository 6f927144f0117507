"""Which loss a method takes of a batch's log-probabilities: the one place that knows all methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

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
) -> Tensor:
    """The loss of each row of a batch under `args.method`.

    Args:
        logps: `[sequences]`, log-probabilities under the policy, nats.
        rows: the batch's `group_sizes` and `probabilities` `[groups]`, `kinds` (one for each group), and
            `win_probabilities` `[sequences]` for `sppo`; `log_mean_weight` where the batch is a part of an
            optimizer step with weights.
        ref_logps: `[sequences]`, under the reference; every method but `spo` needs them.
        divergences: `[sequences]`, Σ_t KL(π_ref ‖ π) along each completion, for `tdpo`.
        weight_scores: `[sequences]`, scores of `spo`'s weight, where they are not the log-probabilities.

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
            weight_exponent=args.weight_exponent,
            weight_scores=weight_scores,
            log_mean_weight=rows.get("log_mean_weight"),
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
    counts = torch.bincount(groups, minlength=len(sizes))
    return losses.new_zeros(len(sizes)).index_add(0, groups, losses) / counts


def implicit_rewards(args: SPOConfig, logps: Tensor, ref_logps: Tensor | None) -> Tensor:
    """The reward that a policy implies, up to a constant of the prompt: α·logp, or β·(logp − logp_ref)."""
    if ref_logps is None:
        return args.alpha * logps.detach()
    return args.beta * (logps.detach() - ref_logps)
