"""The mathematics: tensors in, tensors out. Imports torch alone."""

from softpref.objectives.kl import effective_sample_size, kl_loss, kl_per_token
from softpref.objectives.optimum import exact_optimum
from softpref.objectives.preference import dpo_loss, preference_loss

__all__ = [
    "dpo_loss",
    "effective_sample_size",
    "exact_optimum",
    "kl_loss",
    "kl_per_token",
    "preference_loss",
]
