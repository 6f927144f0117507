"""Warnings of a training that goes wrong, with what to do about it. Reads metrics, runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from softpref.fitness import MUCH_SATURATED, saturation_remedy, saturation_warning
from softpref.spo.config import SPOConfig

END_FALLEN = 0.5  # nats that the end token may lose in training


def health_warnings(
    args: SPOConfig, means: Mapping[str, float], logged: Sequence[Mapping[str, float]], *, ended: bool
) -> list[str]:
    """What makes a run worthless: saturation at its start, or at its end a policy that forgot to stop.

    Args:
        means: the metrics about to be logged.
        logged: those of every log before.
        ended: whether training has ended.
    """
    warnings = []
    saturated = means.get("rewards/saturated", 0.0)
    if (
        not any("rewards/saturated" in log for log in logged)
        and saturated > MUCH_SATURATED
        and args.method == "spo"
    ):
        warnings.append(f"{saturation_warning(saturated)}; {saturation_remedy(args.anchor)}")
    fallen = fall([log["logps/end"] for log in logged if "logps/end" in log]) if ended else 0.0
    if fallen > END_FALLEN:
        strength = "beta" if args.method == "spo" else "kl_beta"
        warnings.append(
            f"log P of the end token behind chosen completions has fallen by {fallen:.1f} nats: the policy "
            "forgets to stop; lower learning_rate, or "
            + ("set kl_on to samples" if args.kl_on == "none" else f"raise {strength}")
        )
    return warnings


def fall(values: Sequence[float]) -> float:
    """How far the last fifth of a series lies below its first, if by more than two standard errors; else 0.

    The windows of a log hold different rows: a series of less than ten says nothing.
    """
    count = len(values) // 5
    if count < 2:
        return 0.0
    first, last = (torch.tensor(part, dtype=torch.float64) for part in (values[:count], values[-count:]))
    fallen = float(first.mean() - last.mean())
    error = float((first.var() / count + last.var() / count).sqrt())
    return fallen if fallen > 2 * error else 0.0
