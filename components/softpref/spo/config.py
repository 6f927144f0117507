"""The configuration of SPO training: every option of `transformers.TrainingArguments`, and SPO's own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args, get_type_hints

from transformers import TrainingArguments

from softpref.errors import ConfigError
from softpref.lm.training import check_training_arguments, device_has_bf16

METHODS = ("spo", "dpo")


@dataclass
class SPOConfig(TrainingArguments):
    """Arguments of `SPOTrainer`.

    Args:
        method: `spo`, or the baseline `dpo` on the same rows in the same loop.
        alpha: softness α ≥ 0. The preference loss is minimal at softmax(reward / α): 1 gives the experts'
            own distribution, towards 0 their favourite, large values spread out.
        beta: for `spo` the strength of the KL regulariser over the policy's whole output distribution
            (0 switches it and all sampling off); for `dpo` its β.
        preference_kind: what the order of a row's completions means. `auto` follows the data's `kind` column.
        soft_labels: how a label probability enters the loss: `linear` keeps SPO's optimum, `geometric`
            gives uncertain pairs less weight.
        weight_exponent: γ of the symmetric row weight; 0 weighs all rows alike.
        label_smoothing: share of flipped labels that `dpo` assumes.
        kl_gradient: `token` is cheaper and has less variance; `full` is exact in expectation. Where a step is
            cut into micro-batches or processes, `full` looks at its samples once more beforehand, for a
            baseline over all of them (as a `weight_exponent` does at its rows).
        samples_per_refresh: completions drawn from the policy at each refresh, all processes together.
        sampling_interval: optimizer steps between refreshes; each consumes an equal slice of the samples.
        sampling_batch_size: completions sampled at once on a device.
        temperature, top_p, top_k, repetition_penalty: fixed. Samples of the KL term must come from the
            distribution that is scored; these exist to refuse other values with a reason.
        max_prompt_length: tokens kept of a prompt, from its end.
        max_completion_length: tokens kept of a completion, and the limit of sampled ones.
        use_peft: train a LoRA adapter; the reference is then the model with the adapter off.
        lora_r, lora_alpha, lora_target_modules: the adapter's rank, scale, and layers (comma-separated, or
            `all-linear`).
        merge_adapter: save the merged model rather than the adapter alone.
        gpus: GPUs the job asked for; training refuses to start with fewer. 0 asks for none.
        trust_remote_code: run model code that comes with a checkpoint.
    """

    output_dir: str | None = None
    method: Literal["spo", "dpo"] = "spo"
    alpha: float = 1.0
    beta: float = 0.05
    preference_kind: Literal["auto", "pairwise", "best_of_n", "ranking"] = "auto"
    soft_labels: Literal["linear", "geometric"] = "linear"
    weight_exponent: float = 0.0
    label_smoothing: float = 0.0
    kl_gradient: Literal["token", "full"] = "token"
    samples_per_refresh: int = 64
    sampling_interval: int = 8
    sampling_batch_size: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_prompt_length: int = 512
    max_completion_length: int = 512
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_target_modules: str = "all-linear"
    merge_adapter: bool = True
    gpus: int = 0
    trust_remote_code: bool = False

    # Defaults of TrainingArguments that do not suit preference training.
    learning_rate: float = 1e-6
    logging_steps: float = 10
    report_to: str | list[str] | None = "none"
    remove_unused_columns: bool = False
    bf16: bool | None = field(default=None)  # type: ignore[assignment]
    save_total_limit: int | None = 2

    def __post_init__(self) -> None:
        self._check()
        check_training_arguments(self)
        if self.bf16 is None:
            self.bf16 = device_has_bf16() and not self.fp16 and not self.use_cpu
        super().__post_init__()

    @property
    def samples_policy(self) -> bool:
        """Whether the objective needs samples of the policy: it does where a KL term does."""
        return self.method == "spo" and self.beta > 0

    def _check(self) -> None:
        def refuse(name: str, expected: str) -> None:
            raise ConfigError(f"SPOConfig.{name} must be {expected}, got {getattr(self, name)!r}")

        for name in ("method", "preference_kind", "soft_labels", "kl_gradient"):
            choices = get_args(get_type_hints(SPOConfig)[name])
            if getattr(self, name) not in choices:
                refuse(name, " or ".join(choices))
        if not (self.alpha >= 0 and math.isfinite(self.alpha)):
            refuse("alpha", "at least 0 (softness α: optimum softmax(reward/α); 1 is the experts' own)")
        if not (self.beta >= 0 and math.isfinite(self.beta)) or (self.method == "dpo" and self.beta == 0):
            refuse("beta", "above 0 for dpo, at least 0 for spo")
        if not 0 <= self.label_smoothing < 0.5:
            refuse("label_smoothing", "in [0, 0.5)")
        if not (self.weight_exponent >= 0 and math.isfinite(self.weight_exponent)):
            refuse("weight_exponent", "at least 0")
        for name in (
            "max_prompt_length",
            "max_completion_length",
            "sampling_interval",
            "sampling_batch_size",
            "lora_r",
        ):
            if getattr(self, name) < 1:
                refuse(name, "at least 1")
        if self.samples_per_refresh < self.sampling_interval:
            refuse(
                "samples_per_refresh",
                f"at least sampling_interval ({self.sampling_interval}), for each optimizer step consumes a "
                "slice of the samples",
            )
        for name, neutral in (("temperature", 1), ("top_p", 1), ("top_k", 0), ("repetition_penalty", 1)):
            if getattr(self, name) != neutral:
                refuse(
                    name,
                    f"{neutral}: the KL term weighs samples as draws of the policy's own distribution, and "
                    "any other setting would bias it without a sign",
                )


def member_name(method: str, alpha: float, beta: float) -> str:
    """The name of one model of a sweep: what distinguishes it from the others, `spo-alpha-0.5`."""
    return f"spo-alpha-{alpha:g}" if method == "spo" else f"{method}-beta-{beta:g}"
