"""The mathematics: tensors in, tensors out. Imports torch alone."""

from softpref.objectives.baselines import (
    apo_down_loss,
    apo_zero_loss,
    dpo_loss,
    group_of,
    ipo_loss,
    rdpo_loss,
    ropo_loss,
    slic_loss,
    sppo_loss,
    tdpo1_loss,
    tdpo_loss,
)
from softpref.objectives.chunked import (
    TokenKL,
    token_kl,
    token_logps,
)
from softpref.objectives.degree import degree_logits, degree_loss, length_accuracy
from softpref.objectives.kl import (
    kl_lambda,
    kl_loss,
    kl_per_token,
    prefix_ratios,
    reward_to_go,
)
from softpref.objectives.offsets import (
    implied_rewards,
    modpo_loss,
    odpo_loss,
    sequential_loss,
    weighted_rewards,
)
from softpref.objectives.optimum import exact_optimum, ipo_optimum
from softpref.objectives.preference import log_group_weights, ordered_pairs, preference_loss
from softpref.objectives.reference_free import cpo_loss, log_odds, nll_loss, orpo_loss, simpo_loss
from softpref.objectives.reward import bradley_terry_loss
from softpref.objectives.unpaired import kto_loss

__all__ = [
    "TokenKL",
    "apo_down_loss",
    "apo_zero_loss",
    "bradley_terry_loss",
    "cpo_loss",
    "degree_logits",
    "degree_loss",
    "dpo_loss",
    "exact_optimum",
    "group_of",
    "implied_rewards",
    "ipo_loss",
    "ipo_optimum",
    "kl_lambda",
    "kl_loss",
    "kl_per_token",
    "kto_loss",
    "length_accuracy",
    "log_group_weights",
    "log_odds",
    "modpo_loss",
    "nll_loss",
    "odpo_loss",
    "ordered_pairs",
    "orpo_loss",
    "preference_loss",
    "prefix_ratios",
    "rdpo_loss",
    "reward_to_go",
    "ropo_loss",
    "sequential_loss",
    "simpo_loss",
    "slic_loss",
    "sppo_loss",
    "tdpo1_loss",
    "tdpo_loss",
    "token_kl",
    "token_logps",
    "weighted_rewards",
]
