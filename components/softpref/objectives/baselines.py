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

    return pair_loss(loss, logps, ref_logps, beta, **options)


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

    return pair_loss(loss, logps, ref_logps, beta, **options)


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
    return pair_loss(lambda margin: ((margin - 0.5) / beta) ** 2, logps, ref_logps, beta, **options)


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
    return pair_loss(lambda margin: F.relu(1 - margin), logps, ref_logps, beta, **options)


def ropo_loss(
    logps: Tensor,
    ref_logps: Tensor,
    *,
    beta: float,
    ropo_alpha: float = 14.0,
    **options: Unpack[PairOptions],
) -> Tensor:
    """Robust preference optimization: `[4a / (1 + a)²] (−log σ(z) + a σ(−z))`.

    The second term is bounded: a pair that the policy is sure is mislabelled has little gradient from it. The
    factor makes the largest slope in z that of DPO, 1, wherever a ≥ 1. With `geometric` soft labels it is
    GROPO (arXiv 2409.06691). Source: arXiv 2404.04102, equation 9.

    Args:
        beta: as in `dpo_loss`.
        ropo_alpha: a > 0, weight of the bounded term.

    Raises:
        ValueError: β or a ≤ 0.
    """
    if not ropo_alpha > 0:
        raise ValueError(f"ropo_alpha must be above 0, got {ropo_alpha}")

    def loss(margin: Tensor) -> Tensor:
        both = -F.logsigmoid(margin) + ropo_alpha * torch.sigmoid(-margin)
        return 4 * ropo_alpha / (1 + ropo_alpha) ** 2 * both

    return pair_loss(loss, logps, ref_logps, beta, **options)


def apo_zero_loss(logps: Tensor, ref_logps: Tensor, *, beta: float, **options: Unpack[PairOptions]) -> Tensor:
    """Anchored preference optimization, zero: `1 − σ(u_w) + σ(u_l)`, for chosen completions that are good.

    u = s (β (logp − logp_ref) − o) of each completion: the winner's grows, the loser's falls.
    Source: arXiv 2408.06266, equation 7.

    Args:
        beta: as in `dpo_loss`.

    Raises:
        ValueError: β ≤ 0.
    """
    return _completion_loss(
        lambda winner, loser: torch.sigmoid(-winner) + torch.sigmoid(loser), logps, ref_logps, beta, **options
    )


def apo_down_loss(logps: Tensor, ref_logps: Tensor, *, beta: float, **options: Unpack[PairOptions]) -> Tensor:
    """Anchored preference optimization, down: `σ(u_w) + 1 − σ(u_w − u_l)`, u as in `apo_zero_loss`.

    For chosen completions that are worse than the policy's own: both fall, the loser's more.
    Source: arXiv 2408.06266, equation 8.

    Args:
        beta: as in `dpo_loss`.

    Raises:
        ValueError: β ≤ 0.
    """
    return _completion_loss(
        lambda winner, loser: torch.sigmoid(winner) + torch.sigmoid(loser - winner),
        logps,
        ref_logps,
        beta,
        **options,
    )


def tdpo1_loss(
    logps: Tensor,
    ref_logps: Tensor,
    divergences: Tensor,
    *,
    beta: float,
    **options: Unpack[PairOptions],
) -> Tensor:
    """Token-level DPO as its theory has it: `−log σ(z − s β (D_l − D_w))`, both D with gradient.

    Source: arXiv 2404.11999, the first of its two objectives; `tdpo_loss` is the second. A soft label turns
    or scales z and this drift together.

    Args:
        divergences, beta: as in `tdpo_loss`.

    Raises:
        ValueError: β ≤ 0.
    """
    return pair_loss(lambda margin: -F.logsigmoid(margin), logps + divergences, ref_logps, beta, **options)


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


def pair_loss(
    loss: Callable[[Tensor], Tensor],
    logps: Tensor,
    ref_logps: Tensor | None,
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


def _completion_loss(
    loss: Callable[[Tensor, Tensor], Tensor],
    logps: Tensor,
    ref_logps: Tensor,
    beta: float,
    *,
    probabilities: Tensor | None = None,
    soft_labels: SoftLabels = "linear",
    offsets: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """`loss` of the winner's and the loser's u of each pair under its label probability.

    Geometric soft labels take weighted means of both, whose difference is (2p − 1) z.
    """
    _check(beta, scale=scale)
    first, second = (scale * (beta * ratio - o) for ratio, o in _parts(logps, ref_logps, offsets))
    if probabilities is None:
        return loss(first, second)
    if soft_labels == "geometric":
        flipped = 1 - probabilities
        return loss(probabilities * first + flipped * second, flipped * first + probabilities * second)
    if soft_labels == "linear":
        return probabilities * loss(first, second) + (1 - probabilities) * loss(second, first)
    raise ValueError(f"soft_labels must be 'linear' or 'geometric', got {soft_labels!r}")


def _margins(
    logps: Tensor,
    ref_logps: Tensor | None,
    beta: float,
    *,
    offsets: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """z of each pair; differences first, for products of large log-probabilities would lose them."""
    _check(beta, scale=scale)
    (first, first_offset), (second, second_offset) = _parts(logps, ref_logps, offsets)
    return scale * (beta * (first - second) - (first_offset - second_offset))


def _parts(logps: Tensor, ref_logps: Tensor | None, offsets: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Log-ratio and offset, `[pairs]` each, of the first completions and of the second."""
    ratios = logps if ref_logps is None else logps - ref_logps.detach()
    constant = torch.zeros_like(logps) if offsets is None else offsets.detach().to(logps.dtype)
    return list(zip(ratios.view(-1, 2).unbind(-1), constant.view(-1, 2).unbind(-1), strict=True))


def _check(beta: float, label_smoothing: float = 0.0, scale: float = 1.0) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")
