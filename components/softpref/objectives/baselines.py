"""The preference losses of other methods, on the same rows and with the same soft labels as ours.

All but SPPO's take pairs and return one loss per pair, `[pairs]`. Their arguments `logps` and `ref_logps` are
flat log-probabilities under policy and reference, nats, `[2 · pairs]`: of each pair the better completion and
then the other. They share the margin

    h = [logp − logp_ref](first) − [logp − logp_ref](second)

in nats, never normalised by length. `probabilities` are P(first beats second), `[pairs]` (None: the first has
won), and `soft_labels` says what they do (see `soft_label_loss`). The reference enters without gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from softpref.objectives.preference import SoftLabels, soft_label_loss


def dpo_loss(
    logps: Tensor,
    ref_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    probabilities: Tensor | None = None,
    soft_labels: SoftLabels = "linear",
) -> Tensor:
    """Direct preference optimization: `ℓ(h) = −log σ(β h)`. Source: arXiv 2305.18290, equation 7.

    Args:
        beta: strength of the implicit KL constraint, > 0.
        label_smoothing: ε in [0, ½), the share of flipped labels assumed (conservative DPO, of the same
            authors): `(1 − ε) ℓ(h) + ε ℓ(−h)`.

    Raises:
        ValueError: β or ε outside their range.
    """
    _check(beta, label_smoothing)

    def loss(margin: Tensor) -> Tensor:
        kept = -F.logsigmoid(beta * margin)
        if not label_smoothing:
            return kept
        return (1 - label_smoothing) * kept - label_smoothing * F.logsigmoid(-beta * margin)

    return soft_label_loss(loss, _margins(logps, ref_logps), probabilities, soft_labels)


def rdpo_loss(
    logps: Tensor,
    ref_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    probabilities: Tensor | None = None,
    soft_labels: SoftLabels = "linear",
) -> Tensor:
    """Robust DPO: `[−(1 − ε) log σ(β h) + ε log σ(−β h)] / (1 − 2ε)`. Source: arXiv 2403.00409.

    Where a share ε of hard labels is flipped at random, its expectation is DPO's loss of the true labels.

    Args:
        beta: as in `dpo_loss`.
        label_smoothing: ε in [0, ½), the share of flipped labels; 0 is DPO.

    Raises:
        ValueError: β or ε outside their range.
    """
    _check(beta, label_smoothing)

    def loss(margin: Tensor) -> Tensor:
        kept, flipped = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
        return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)

    return soft_label_loss(loss, _margins(logps, ref_logps), probabilities, soft_labels)


def ipo_loss(
    logps: Tensor,
    ref_logps: Tensor,
    *,
    beta: float,
    probabilities: Tensor | None = None,
    soft_labels: SoftLabels = "linear",
) -> Tensor:
    """Identity preference optimization: `ℓ(h) = (h − 1 / (2β))²`. Source: arXiv 2310.12036, equation 17.

    Args:
        logps, ref_logps: sums, where some implementations take means per token.
        beta: strength of the regularisation, > 0 (τ in the paper): the margin aimed at is 1 / (2β) nats.

    Raises:
        ValueError: β ≤ 0.
    """
    _check(beta)
    return soft_label_loss(
        lambda margin: (margin - 1 / (2 * beta)) ** 2, _margins(logps, ref_logps), probabilities, soft_labels
    )


def slic_loss(
    logps: Tensor,
    ref_logps: Tensor,
    *,
    beta: float,
    probabilities: Tensor | None = None,
    soft_labels: SoftLabels = "linear",
) -> Tensor:
    """The hinge of sequence likelihood calibration: `ℓ(h) = max(0, 1 − β h)`. Source: arXiv 2305.10425.

    Args:
        beta: inverse of the margin in nats beyond which a pair is left alone, > 0.

    Raises:
        ValueError: β ≤ 0.
    """
    _check(beta)
    return soft_label_loss(
        lambda margin: F.relu(1 - beta * margin), _margins(logps, ref_logps), probabilities, soft_labels
    )


def tdpo_loss(
    logps: Tensor,
    ref_logps: Tensor,
    divergences: Tensor,
    *,
    beta: float,
    tdpo_alpha: float = 0.5,
    probabilities: Tensor | None = None,
    soft_labels: SoftLabels = "linear",
) -> Tensor:
    """Token-level DPO: `−log σ(β h − β a (D_l − sg D_w))`, sg: without gradient.

    Source: arXiv 2404.11999, the second of its two objectives.

    Args:
        divergences: `[2 · pairs]`, D = Σ_t KL(π_ref ‖ π_θ) over the whole vocabulary along each completion,
            nats, with gradient.
        beta: as in `dpo_loss`.
        tdpo_alpha: a ≥ 0, weight of the divergences.
        probabilities, soft_labels: see the module; where the second completion wins, D_w and D_l change
            places, and `geometric` scales h alone.

    Raises:
        ValueError: β ≤ 0, a < 0 or an unknown way of soft labels.
    """
    _check(beta)
    if tdpo_alpha < 0:
        raise ValueError(f"tdpo_alpha must be at least 0, got {tdpo_alpha}")
    margin = _margins(logps, ref_logps)
    first, second = divergences.view(-1, 2).unbind(-1)

    def loss(margin: Tensor, winner: Tensor, loser: Tensor) -> Tensor:
        return -F.logsigmoid(beta * margin - beta * tdpo_alpha * (loser - winner.detach()))

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


def _margins(logps: Tensor, ref_logps: Tensor) -> Tensor:
    first, second = (logps - ref_logps.detach()).view(-1, 2).unbind(-1)
    return first - second


def _check(beta: float, label_smoothing: float = 0.0) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
