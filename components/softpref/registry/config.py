"""The parameters of stage 5, registration. Registers nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from softpref.errors import ConfigError
from softpref.fitness import Limits

CompareMetric = Literal["win_rate", "expected_reward", "preference_accuracy", "preference_margin"]


@dataclass
class RegistryConfig:
    """When a model is registered, under which name, and when it becomes the champion.

    Args:
        registered_model_name: name in the MLflow model registry; no `/` and no `:`.
        min_win_rate: the gate asks that the low end of the win rate's interval be above this (above 0.5:
            better than the reference), and that the judge be better than a coin; 0 or null asks for neither.
            A broken model is never registered.
        max_kl: the gate asks that the high end of `kl_sequence` (nats) be at most this; null sets no limit.
        compare_metric: by which the champion is challenged, higher is better: `win_rate`, `expected_reward`,
            `preference_accuracy` or `preference_margin`.
        beyond_noise: a challenger must win by more than noise: the low end of its interval must be above the
            high end of the champion's.
        task: how the model is served: `completions`, `chat`, or `auto`: chat when the tokenizer has a chat
            template.
        trust_remote_code: register a model with code of its own, which MLflow then runs wherever it is
            served.
        experiment: MLflow experiment, when the model names no run.
        tracking_uri: MLflow server; empty takes `MLFLOW_TRACKING_URI` or a local store.
        await_seconds: longest wait until the registry reports the version as ready.
    """

    registered_model_name: str
    min_win_rate: float | None = 0.5
    max_kl: float | None = None
    compare_metric: CompareMetric = "win_rate"
    beyond_noise: bool = False
    task: Literal["auto", "completions", "chat"] = "auto"
    trust_remote_code: bool = False
    experiment: str = "softpref"
    tracking_uri: str = ""
    await_seconds: int = 300

    def __post_init__(self) -> None:
        # KFP's runner on this machine writes the name between quotes into a condition, and evaluates that
        if not self.registered_model_name.strip() or any(
            character in self.registered_model_name for character in "/:'\"\\"
        ):
            raise ConfigError(
                "RegistryConfig.registered_model_name must be a name without '/', ':', quotes and "
                f"backslashes, got {self.registered_model_name!r}"
            )
        if self.min_win_rate is not None and not 0 <= self.min_win_rate <= 1:
            raise ConfigError(
                f"RegistryConfig.min_win_rate is a share from 0 to 1 (or null), got {self.min_win_rate}"
            )
        if self.max_kl is not None and not (self.max_kl > 0 and math.isfinite(self.max_kl)):
            raise ConfigError(f"RegistryConfig.max_kl is in nats, above 0 (or null), got {self.max_kl}")
        if self.await_seconds < 1:
            raise ConfigError(
                f"RegistryConfig.await_seconds must be at least 1, got {self.await_seconds} seconds"
            )

    @property
    def limits(self) -> Limits:
        """What the gate asks for."""
        return Limits(self.min_win_rate, self.max_kl)
