"""Ranges of the training stages' options. Imports no training library."""

from __future__ import annotations

import math
from typing import Any

from softpref.errors import ConfigError

# least and most, and whether the most itself is excluded
RANGES: dict[str, tuple[float, float, bool]] = {
    **dict.fromkeys(("learning_rate", "num_train_epochs", "weight_decay"), (0, math.inf, True)),
    **dict.fromkeys(("max_grad_norm", "warmup_steps", "warmup_ratio"), (0, math.inf, True)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, 1, True)),
    "adam_epsilon": (0, math.inf, True),
    "max_steps": (-1, math.inf, True),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1, False)),  # numpy takes no more
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        (1, math.inf, True),
    ),
    **dict.fromkeys(("dataloader_num_workers", "eval_delay"), (0, math.inf, True)),
    "save_total_limit": (1, math.inf, True),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), (0, math.inf, True)),
    # of ours, in both training stages
    **dict.fromkeys(("max_prompt_length", "max_completion_length", "dataset_num_proc"), (1, math.inf, True)),
    # of a reward model
    **dict.fromkeys(("heads", "max_length"), (1, math.inf, True)),
    "frozen_layers": (0, math.inf, True),
    "layers": (0, math.inf, True),
    "vocab_size": (258, math.inf, True),  # 256 bytes, end and padding: every text can be written
    # of SPO training
    **dict.fromkeys(("anchor", "kl_beta", "weight_exponent", "tdpo_alpha"), (0, math.inf, True)),
    **dict.fromkeys(
        ("simpo_gamma", "nll_weight", "desirable_weight", "undesirable_weight"), (0, math.inf, True)
    ),
    "label_smoothing": (0, 0.5, True),
    "initial_share": (0, 1, False),
    **dict.fromkeys(
        ("sampling_interval", "sampling_batch_size", "lora_r", "rounds", "opponent_history"),
        (1, math.inf, True),
    ),
    **dict.fromkeys(("completions_per_prompt", "degree_levels"), (2, math.inf, True)),
    "degree_weight": (0, math.inf, True),
    "degree_heads": (1, 2, False),
}


def check_ranges(args: Any) -> None:
    """Refuse numbers that transformers accepts, and that would fail or train nothing once training begins.

    Args:
        args: a `TrainingArguments`, or anything that has some of its options.

    Raises:
        ConfigError: names the parameter and what would be right.
    """
    for name, (least, most, open_end) in RANGES.items():
        value = getattr(args, name, None)
        if value is None:
            continue
        if not (isinstance(value, (int, float)) and least <= value <= most) or (open_end and value == most):
            span = f"at least {least}" if math.isinf(most) else f"from {least} to {most}"
            below = f", below {most}" if open_end and not math.isinf(most) else ""
            raise ConfigError(f"{type(args).__name__}.{name} must be {span}{below}, got {value!r}")
