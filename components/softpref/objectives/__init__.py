"""The mathematics: tensors in, tensors out. Imports torch alone."""

from softpref.objectives.kl import effective_sample_size, kl_loss, kl_per_token, reward_to_go
from softpref.objectives.optimum import exact_optimum
from softpref.objectives.preference import dpo_loss, log_group_weights, preference_loss

__all__ = [
    "dpo_loss",
    "effective_sample_size",
    "exact_optimum",
    "kl_loss",
    "kl_per_token",
    "log_group_weights",
    "preference_loss",
    "reward_to_go",
]
