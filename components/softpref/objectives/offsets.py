"""Losses of pairs whose margin has an offset: rewards that completions have besides those of the labels.

Each is `dpo_loss` with `offsets` and a `scale` of its own. Arguments are as in `baselines`; `rewards` are
those of other dimensions of preference, from frozen models, nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Unpack

import torch
from torch import Tensor

from softpref.objectives.baselines import LabelOptions, dpo_loss


def implied_rewards(
    logps: Tensor, *, scale: float, base_logps: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    """The reward that a trained policy implies for each completion, up to a constant of the prompt.

    `scale (logp − base) − offset`: what the labels of its own training said, without what the offsets
    brought. Source: arXiv 2405.12739, whose rewards of earlier rounds these are.

    Args:
        logps: `[sequences]`, under that policy, nats.
        scale: β of a method relative to its reference, α of `preference_loss`.
        base_logps: `[sequences]`, under that reference, or log ν of `preference_loss`; None: 0.
        offsets: `[sequences]`, those it was trained with; None: 0.

    Returns:
        `[sequences]`, without gradient, fp32 or finer.
    """
    rewards = _fine(logps) - (0 if base_logps is None else _fine(base_logps))
    return scale * rewards - (0 if offsets is None else _fine(offsets))


def weighted_rewards(rewards: Tensor, weights: float | Sequence[float] = 1.0) -> Tensor:
    """Σ_i λ_i R_i of each completion: the offset that earlier dimensions make.

    Args:
        rewards: `[dimensions, sequences]`, nats; there may be none.
        weights: λ_i ≥ 0, one for each dimension or one for all.

    Returns:
        `[sequences]`, without gradient, fp32 or finer.

    Raises:
        ValueError: a weight below 0, or another number of them.
    """
    each = [weights] * len(rewards) if isinstance(weights, (int, float)) else list(weights)
    if len(each) != len(rewards) or not all(weight >= 0 for weight in each):
        raise ValueError(
            f"weights must be at least 0, and one or one for each of {len(rewards)} dimensions, got {weights}"
        )
    rewards = _fine(rewards)
    return torch.tensor(each, dtype=rewards.dtype, device=rewards.device) @ rewards


def sequential_loss(
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    *,
    beta: float,
    dimension_weights: float | Sequence[float] = 1.0,
    **options: Unpack[LabelOptions],
) -> Tensor:
    """Sequential preference optimization, a further round: `−log σ(β h − Σ_i λ_i ΔR_i)`.

    The reference is the policy that the round begins with, and R_i is what round i implied
    (`implied_rewards`): the optimum is π_ref · exp((reward + Σ_i λ_i R_i) / β), scaled. Training begins with
    `−log σ(−Σ_i λ_i ΔR_i)`, not with ln 2. Source: arXiv 2405.12739; its first round is DPO.

    Args:
        rewards: `[earlier rounds, 2 · pairs]`.
        beta: as in `dpo_loss`.
        dimension_weights: λ_i ≥ 0, how many nats of the present dimension one of dimension i is worth, one
            for each earlier round or one for all. 0 lets the round forget that dimension.

    Raises:
        ValueError: β ≤ 0, or weights that do not fit.
    """
    offsets = weighted_rewards(rewards, dimension_weights)
    return dpo_loss(logps, ref_logps, beta=beta, offsets=offsets, **options)


def modpo_loss(
    logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    *,
    beta: float,
    weight: float,
    reward_weights: float | Sequence[float] = 1.0,
    **options: Unpack[LabelOptions],
) -> Tensor:
    """Multi-objective DPO: `−log σ((β h − Σ_{j≠k} w_j ΔR_j) / w_k)` of the labels of dimension k.

    The reference is the initial model; the optimum is π_ref · exp(Σ_j w_j R_j / β), scaled, over all
    dimensions. Source: arXiv 2310.03708, and `modpo_loss` of its authors' code.

    Args:
        rewards: `[other dimensions, 2 · pairs]`, of reward models or implied ones.
        beta: as in `dpo_loss`.
        weight: w_k > 0, of the dimension that the labels are of.
        reward_weights: w_j ≥ 0, one for each other dimension or one for all.

    Raises:
        ValueError: β ≤ 0, w_k ≤ 0, or weights that do not fit.
    """
    if not weight > 0:
        raise ValueError(f"weight must be above 0, got {weight}")
    offsets = weighted_rewards(rewards, reward_weights)
    return dpo_loss(logps, ref_logps, beta=beta, offsets=offsets, scale=1 / weight, **options)


def odpo_loss(
    logps: Tensor,
    ref_logps: Tensor,
    scores: Tensor,
    *,
    beta: float,
    odpo_alpha: float = 1.0,
    scaling: Literal["log", "linear"] = "log",
    **options: Unpack[LabelOptions],
) -> Tensor:
    """DPO with an offset: `−log σ(β h − a f(score(first) − score(second)))`.

    The better the first completion, the larger the margin that it must win by. Source: arXiv 2402.10571, and
    its authors' code, where f = log and a = 1.

    Args:
        scores: `[2 · pairs]`, how good each completion is, on any scale.
        beta: as in `dpo_loss`.
        odpo_alpha: a ≥ 0; 0 is DPO.
        scaling: f, `log` or `linear`. The logarithm needs a first completion with the higher score.

    Raises:
        ValueError: β ≤ 0, a < 0, an unknown f, or scores of which it has no logarithm.
    """
    if not odpo_alpha >= 0:
        raise ValueError(f"odpo_alpha must be at least 0, got {odpo_alpha}")
    first, second = _fine(scores).view(-1, 2).unbind(-1)
    offsets = first - second
    if scaling == "log":
        if not bool((offsets > 0).all()):
            raise ValueError(
                "scores must be higher for the first completion of each pair where the scaling is log, "
                f"got differences {offsets.tolist()}"
            )
        offsets = offsets.log()
    elif scaling != "linear":
        raise ValueError(f"scaling must be 'log' or 'linear', got {scaling!r}")
    each = odpo_alpha * torch.stack([offsets, torch.zeros_like(offsets)], dim=-1).flatten()
    return dpo_loss(logps, ref_logps, beta=beta, offsets=each, **options)


def _fine(values: Tensor) -> Tensor:
    """Without gradient, and where less than fp32, in fp32: differences of large sums need it."""
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))
