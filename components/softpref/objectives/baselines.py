"""The preference losses of other methods, on the same rows and with the same soft labels as ours.

All but SPPO's take pairs and return one loss per pair, `[pairs]`. Their arguments `logps` and `ref_logps` are
flat log-probabilities under policy and reference, nats, `[2 · pairs]`: of each pair the better completion and
then the other. They share the margin

    z = s (β h − o),    h = [logp − logp_ref](first) − [logp − logp_ref](second)

in nats, never normalised by length, with the scale s (1) and the offset o (0) of `PairOptions`. The reference
and the offset enter without gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from softpref.objectives.preference import SoftLabels, soft_label_loss


class LabelOptions(TypedDict, total=False):
    """What a loss of pairs does with its labels.

    Attributes:
        probabilities: `[pairs]`, P(first beats second); None: the first has won.
        soft_labels: what they do, see `soft_label_loss`: z changes its sign, or is scaled, as a whole.
    """

    probabilities: Tensor | None
    soft_labels: SoftLabels


class PairOptions(LabelOptions, total=False):
    """What every loss of pairs takes besides its own arguments.

    Attributes:
        offsets: `[2 · pairs]`, a reward that each completion has besides that of the labels, nats; o is its
            difference. The optimum of `dpo_loss` is then π_ref · exp((reward / s + offset) / β), scaled.
        scale: s > 0.
    """

    offsets: Tensor | None
    scale: float


def dpo_loss(
    logps: Tensor,
    ref_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    **options: Unpack[PairOptions],
) -> Tensor:
    """Direct preference optimization: `ℓ(z) = −log σ(z)`. Source: arXiv 2305.18290, equation 7.

    Args:
        beta: strength of the implicit KL constraint, > 0.
        label_smoothing: ε in [0, ½), the share of flipped labels assumed (conservative DPO, of the same
            authors): `(1 − ε) ℓ(z) + ε ℓ(−z)`.

    Raises:
        ValueError: β or ε outside their range.
    """
    _check(beta, label_smoothing)

    def loss(margin: Tensor) -> Tensor:
        kept = -F.logsigmoid(margin)
        if not label_smoothing:
            return kept
        return (1 - label_smoothing) * kept - label_smoothing * F.logsigmoid(-margin)

    return _pair_loss(loss, logps, ref_logps, beta, **options)


def rdpo_loss(
    logps: Tensor,
    ref_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    **options: Unpack[PairOptions],
) -> Tensor:
    """Robust DPO: `[−(1 − ε) log σ(z) + ε log σ(−z)] / (1 − 2ε)`. Source: arXiv 2403.00409.

    Where a share ε of hard labels is flipped at random, its expectation is DPO's loss of the true labels.

    Args:
        beta: as in `dpo_loss`.
        label_smoothing: ε in [0, ½), the share of flipped labels; 0 is DPO.

    Raises:
        ValueError: β or ε outside their range.
    """
    _check(beta, label_smoothing)

    def loss(margin: Tensor) -> Tensor:
        kept, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
        return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)

    return _pair_loss(loss, logps, ref_logps, beta, **options)


def ipo_loss(
    logps: Tensor,
    ref_logps: Tensor,
    *,
    beta: float,
    **options: Unpack[PairOptions],
) -> Tensor:
    """Identity preference optimization: `(h − 1 / (2β))²`, or `ℓ(z) = (z − ½)² / β²`.

    Source: arXiv 2310.12036, equation 17.

    Args:
        logps, ref_logps: sums, where some implementations take means per token.
        beta: strength of the regularisation, > 0 (τ in the paper): the margin aimed at is 1 / (2β) nats.

    Raises:
        ValueError: β ≤ 0.
    """
    _check(beta)
    return _pair_loss(lambda margin: ((margin - 0.5) / beta) ** 2, logps, ref_logps, beta, **options)


def slic_loss(
    logps: Tensor,
    ref_logps: Tensor,
    *,
    beta: float,
    **options: Unpack[PairOptions],
) -> Tensor:
    """The hinge of sequence likelihood calibration, relative to the reference: `ℓ(z) = max(0, 1 − z)`.

    Source: arXiv 2309.06657 (RSO), its hinge-norm loss. The calibration loss as first published (arXiv
    2305.10425) is `max(0, δ − log π(first) + log π(second))`, without a reference.

    Args:
        beta: inverse of the margin in nats beyond which a pair is left alone, > 0.

    Raises:
        ValueError: β ≤ 0.
    """
    _check(beta)
    return _pair_loss(lambda margin: F.relu(1 - margin), logps, ref_logps, beta, **options)


def tdpo_loss(
    logps: Tensor,
    ref_logps: Tensor,
    divergences: Tensor,
    *,
    beta: float,
    tdpo_alpha: float = 0.5,
    probabilities: Tensor | None = None,
    soft_labels: SoftLabels = "linear",
    offsets: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Token-level DPO: `−log σ(z − s β a (D_l − sg D_w))`, sg: without gradient.

    Source: arXiv 2404.11999, the second of its two objectives.

    Args:
        divergences: `[2 · pairs]`, D = Σ_t KL(π_ref ‖ π_θ) over the whole vocabulary along each completion,
            nats, with gradient.
        beta: as in `dpo_loss`.
        tdpo_alpha: a ≥ 0, weight of the divergences.
        probabilities, soft_labels, offsets, scale: see `PairOptions`; where the second completion wins, D_w
            and D_l change places, and `geometric` scales z alone.

    Raises:
        ValueError: β ≤ 0, a < 0 or an unknown way of soft labels.
    """
    _check(beta)
    if tdpo_alpha < 0:
        raise ValueError(f"tdpo_alpha must be at least 0, got {tdpo_alpha}")
    margin = _margins(logps, ref_logps, beta, offsets=offsets, scale=scale)
    first, second = divergences.view(-1, 2).unbind(-1)

    def loss(margin: Tensor, winner: Tensor, loser: Tensor) -> Tensor:
        return -F.logsigmoid(margin - scale * beta * tdpo_alpha * (loser - winner.detach()))

    if probabilities is None:
        return loss(margin, first, second)
    if soft_labels == "geometric":
        return loss((2 * probabilities - 1) * margin, first, second)
    if soft_labels == "linear":
        kept, flipped = loss(margin, first, second), loss(-margin, second, first)
        return probabilities * kept + (1 - probabilities) * flipped
    raise ValueError(f"soft_labels must be 'linear' or 'geometric', got {soft_labels!r}")


def sppo_loss(
    logps: Tensor,
    ref_logps: Tensor,
    win_probabilities: Tensor,
    group_sizes: Tensor,
    *,
    beta: float,
) -> Tensor:
    """Self-play preference optimization: `Σ_i (logp(y_i) − logp_ref(y_i) − (P_i − ½) / β)²` of each group.

    Source: arXiv 2405.00675, with 1 / β for its η.

    Args:
        logps, ref_logps: `[sequences]`, nats; the reference is the policy that the round began with.
        win_probabilities: `[sequences]`, P_i, the estimated probability that y_i beats a completion of the
            policy.
        group_sizes: `[groups]`, completions of each prompt; they sum to `sequences`.
        beta: inverse step size, > 0.

    Returns:
        `[groups]`.

    Raises:
        ValueError: β ≤ 0.
    """
    _check(beta)
    errors = (logps - ref_logps.detach() - (win_probabilities - 0.5) / beta) ** 2
    return errors.new_zeros(len(group_sizes)).index_add(0, group_of(group_sizes, errors.device), errors)


def group_of(group_sizes: Tensor, device: torch.device | str | None = None) -> Tensor:
    """Which group each sequence belongs to: `[groups] -> [sequences]`."""
    sizes = group_sizes.to(device)
    return torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)


def _pair_loss(
    loss: Callable[[Tensor], Tensor],
    logps: Tensor,
    ref_logps: Tensor,
    beta: float,
    *,
    probabilities: Tensor | None = None,
    soft_labels: SoftLabels = "linear",
    offsets: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """`loss`, ℓ of a margin, of each pair under its label probability."""
    margins = _margins(logps, ref_logps, beta, offsets=offsets, scale=scale)
    return soft_label_loss(loss, margins, probabilities, soft_labels)


def _margins(
    logps: Tensor, ref_logps: Tensor, beta: float, *, offsets: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """z of each pair; differences first, for products of large log-probabilities would lose them."""
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    first, second = (logps - ref_logps.detach()).view(-1, 2).unbind(-1)
    margins = beta * (first - second)
    if offsets is not None:
        first, second = offsets.detach().to(logps.dtype).view(-1, 2).unbind(-1)
        margins = margins - (first - second)
    return scale * margins


def _check(beta: float, label_smoothing: float = 0.0) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
