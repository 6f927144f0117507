"""The loss of reward models: how likely people's preferences are by Bradley-Terry."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(margin: Tensor, probabilities: Tensor) -> Tensor:
    """−p log σ(Δ) − (1 − p) log σ(−Δ): minimal where σ(Δ) is the share of votes p.

    Args:
        margin: Δ, the score of the first completion less that of the second, nats; any shape.
        probabilities: p, that the first beats the second; 1 for a hard label. Broadcast to `margin`.

    Returns:
        Nats, in the shape of `margin`.
    """
    return -probabilities * F.logsigmoid(margin) - (1 - probabilities) * F.logsigmoid(-margin)
