"""The preference-degree loss: how much of a text was removed, read off a model's hidden state at its end.

Li et al. 2024, "Self-supervised Preference Optimization" (arXiv 2409.17791). A text has a level from 0, the
whole, to K − 1, and a linear head on the state of its last token says which.
"""

from __future__ import annotations

import torch
from torch import Tensor


def degree_logits(states: Tensor, heads: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Scores of the levels of each text, `[texts, K]`.

    Args:
        states: `[texts, width]`, the last hidden state at each text's last token.
        heads: `[texts]`, which head reads it.
        weight, bias: `[heads, K, width]` and `[heads, K]`; their precision is that of the result.
    """
    every = torch.einsum("tw,hkw->thk", states.to(weight.dtype), weight) + bias
    return every[torch.arange(len(heads), device=heads.device), heads]


def degree_loss(losses: Tensor, sides: Tensor, counts: Tensor, number: int = 2) -> Tensor:
    """A batch's share of L_deg, the mean over sides of each side's mean: `[texts] -> scalar`.

    With both sides it is ½ (mean of the preferred + mean of the dispreferred), whatever the size of either. A
    side without a text in the whole step adds nothing.

    Args:
        losses: cross-entropy of each text's level, nats.
        sides: `[texts]`, 0 for preferred and 1 for dispreferred.
        counts: `[2]`, texts of each side in the whole optimizer step, of which this batch may be a part.
        number: of sides that take part.
    """
    return (losses / counts[sides]).sum() / number


def length_accuracy(counts: Tensor) -> float:
    """The best accuracy of telling levels by length alone, where a shorter text has a higher level.

    It is that of the best division of lengths into K intervals for these very texts, so that it is a little
    too good where they are few. Always to say the most frequent level is among its divisions.

    Args:
        counts: `[lengths, K]`, texts of each length and level, by increasing length.
    """
    best = counts.new_zeros(counts.shape[1])  # of texts so far, by the level said last
    for line in counts:
        best = best.flip(0).cummax(0).values.flip(0) + line
    return float(best.max() / counts.sum())
