"""Losses of single completions that are desirable or not, without another one to compare them with."""

from __future__ import annotations

import torch
from torch import Tensor


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    offsets: Tensor | None = None,
) -> Tensor:
    """Kahneman-Tversky optimization: `d λ_D (1 − σ(u − z)) + (1 − d) λ_U (1 − σ(z − u))`.

    u = β (logp − logp_ref) − o of each completion, and z = β max(0, kl), the same for all: what the policy
    gained on the reference anyway. Source: arXiv 2402.01306, without the constant λ of its loss.

    Args:
        logps, ref_logps: `[sequences]`, nats; the reference enters without gradient.
        desirable: `[sequences]`, d, the probability that a completion is desirable: 1 or 0 of a hard label.
        kl: estimate of KL(policy ‖ reference), nats, without gradient; the mean log-ratio of completions that
            belong to other prompts, in the paper.
        beta: > 0, how averse to risk the value function is.
        desirable_weight, undesirable_weight: λ_D and λ_U, ≥ 0. Their ratio makes up for labels that are not
            balanced.
        offsets: `[sequences]`, o, a reward that each completion has besides that of the labels, nats; None:
            0.

    Returns:
        `[sequences]`.

    Raises:
        ValueError: β ≤ 0 or a weight < 0.
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        if not weight >= 0:
            raise ValueError(f"{name} must be at least 0, got {weight}")
    utilities = beta * (logps - ref_logps.detach())
    if offsets is not None:
        utilities = utilities - offsets.detach().to(logps.dtype)
    gained = utilities - beta * torch.as_tensor(kl, dtype=logps.dtype, device=logps.device).detach().clamp(0)
    losses: Tensor = desirable * desirable_weight * torch.sigmoid(-gained)
    return losses + (1 - desirable) * undesirable_weight * torch.sigmoid(gained)
