"""Losses of pairs that need no reference, and the likelihood of the better completion beside any loss.

Arguments are as in `baselines`, with h of the policy's own scores; `lengths` are the tokens of each
completion, its end included, `[2 · pairs]`.
"""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from softpref.objectives.baselines import PairOptions, pair_loss


def simpo_loss(
    logps: Tensor,
    lengths: Tensor,
    *,
    beta: float,
    simpo_gamma: float = 0.5,
    **options: Unpack[PairOptions],
) -> Tensor:
    """Simple preference optimization: `−log σ(β h̄ − γ)`, h̄ the difference of log-probabilities per token.

    Source: arXiv 2405.14734, equation 6.

    Args:
        beta: scale of the rewards, > 0; the paper takes 2 to 2.5.
        simpo_gamma: γ ≥ 0, the margin that the better completion must win by, nats. It stays as it is where a
            soft label turns or scales z = β h̄.

    Raises:
        ValueError: β ≤ 0 or γ < 0.
    """
    if not simpo_gamma >= 0:
        raise ValueError(f"simpo_gamma must be at least 0, got {simpo_gamma}")
    return pair_loss(
        lambda margin: -F.logsigmoid(margin - simpo_gamma), logps / lengths, None, beta, **options
    )


def cpo_loss(
    logps: Tensor,
    lengths: Tensor,
    *,
    beta: float,
    nll_weight: float = 1.0,
    **options: Unpack[PairOptions],
) -> Tensor:
    """Contrastive preference optimization: `−log σ(β Δlogp)`, and the negative log-likelihood of the winner.

    The first term is β times that of `preference_loss` with α = β. Source: arXiv 2401.08417, whose likelihood
    is a sum; in its authors' code, and here, it is a mean over tokens (`nll_loss`).

    Args:
        beta: > 0; 0.1 in the paper.
        nll_weight: weight of the second term, ≥ 0.

    Raises:
        ValueError: β ≤ 0.
    """
    preference = pair_loss(lambda margin: -F.logsigmoid(margin), logps, None, beta, **options)
    return preference + nll_weight * nll_loss(logps, lengths, options.get("probabilities"))


def orpo_loss(
    logps: Tensor,
    lengths: Tensor,
    *,
    beta: float,
    nll_weight: float = 1.0,
    **options: Unpack[PairOptions],
) -> Tensor:
    """Odds ratio preference optimization: `NLL(winner) − β log σ(log odds(first) − log odds(second))`.

    Source: arXiv 2403.07691, equations 6 and 7, with β for its λ. Its likelihood is per token, here of the
    completion alone.

    Args:
        beta: weight of the odds ratio, > 0; no scale of it.
        nll_weight: weight of the likelihood, ≥ 0.

    Raises:
        ValueError: β ≤ 0.
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    odds = log_odds(logps, lengths)
    preference = pair_loss(lambda margin: -F.logsigmoid(margin), odds, None, 1.0, **options)
    return beta * preference + nll_weight * nll_loss(logps, lengths, options.get("probabilities"))


def nll_loss(logps: Tensor, lengths: Tensor, probabilities: Tensor | None = None) -> Tensor:
    """Negative log-likelihood per token of the winner of each pair; in expectation, where labels are soft.

    The term that keeps the better completion likely beside a loss of margins. Source: arXiv 2404.19733
    (iterative reasoning preference optimization), equation 1.

    Args:
        probabilities: `[pairs]`, P(first beats second); None: the first has won.

    Returns:
        `[pairs]`.
    """
    first, second = (-logps / lengths).view(-1, 2).unbind(-1)
    return first if probabilities is None else probabilities * first + (1 - probabilities) * second


def log_odds(logps: Tensor, lengths: Tensor) -> Tensor:
    """`log(P / (1 − P))` of each completion, P the geometric mean of its tokens' probabilities."""
    mean = (logps / lengths).clamp_max(-torch.finfo(logps.dtype).eps)  # a certain one has no odds
    return mean - torch.log(-torch.expm1(mean))
