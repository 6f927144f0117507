"""What both training stages do with `TrainingArguments`, and refuse of the machine, before they load."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from softpref.errors import ConfigError
from softpref.lm.ranges import check_ranges


class StageArguments(TrainingArguments):
    """`TrainingArguments` whose values are checked before transformers takes them.

    Raises:
        ConfigError: names the parameter and what would be right.
    """

    if TYPE_CHECKING:  # the options that both stages have besides
        max_prompt_length: int
        max_completion_length: int
        dataset_num_proc: int | None
        plain_forward: bool
        gpus: int
        trust_remote_code: bool

    def __post_init__(self) -> None:
        check_ranges(self)
        _check_packages(self)
        given: Any = self.fsdp
        if str(given).lower() in ("true", "1", "yes"):  # as the console has it
            given = True
        elif str(given).lower() in ("false", "0", "no"):
            given = None
        self.fsdp = given
        if not self.use_cpu:  # before transformers takes the device of this process, which may not be there
            require_devices(0, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self._check_own()
        if self.bf16 is None:
            self.bf16 = device_has_bf16() and not self.fp16 and not self.use_cpu
        super().__post_init__()  # type: ignore[no-untyped-call]
        _check_sharding(self)

    def _check_own(self) -> None:
        """Check, and settle, the stage's own options."""


# what the name of an optimizer contains, and the module that it needs; the first match decides
_OPTIMIZER_MODULES = {
    "torch_4bit": "torchao",
    "torch_8bit": "torchao",
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "lomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "schedule_free": "schedulefree",
    "anyprecision": "torchdistx",
    "stable_adamw": "optimi",
    **dict.fromkeys(("bnb", "8bit", "paged", "ademamix", "lion"), "bitsandbytes"),
}
_DISTRIBUTED_AS = {"optimi": "torch-optimi"}  # where the package has another name than its module


def _check_packages(args: TrainingArguments) -> None:
    """Refuse an optimizer, or a place to report to, whose package is not installed."""
    optimizer = str(getattr(args.optim, "value", args.optim))
    module = next((module for part, module in _OPTIMIZER_MODULES.items() if part in optimizer), None)
    if module and importlib.util.find_spec(module) is None:
        package = _DISTRIBUTED_AS.get(module, module.replace("_", "-"))
        raise ConfigError(
            f"{type(args).__name__}.optim {optimizer} needs the package {package}, which is not installed; "
            "install it, or take adamw_torch"
        )
    from transformers.integrations import integration_utils

    installed: Callable[[], list[str]] = integration_utils.get_available_reporting_integrations
    known = integration_utils.INTEGRATION_TO_CALLBACK
    places = args.report_to if isinstance(args.report_to, (list, tuple)) else [args.report_to]
    for place in places:
        if place in (None, "none", "all"):
            continue
        if place not in known:
            raise ConfigError(
                f"{type(args).__name__}.report_to must be none, all or of {', '.join(sorted(known))}, "
                f"got {place!r}"
            )
        if place not in installed():
            raise ConfigError(
                f"{type(args).__name__}.report_to {place} needs its package, which is not installed; install "
                "it, or leave report_to none (softpref tracks by itself)"
            )


def _check_sharding(args: TrainingArguments) -> None:
    """Refuse ways of sharding weights (`fsdp`) with which the stages do not work."""
    if not args.fsdp:
        return
    options = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
    if int(options.get("version", 2)) != 2 or options.get("xla"):
        raise ConfigError(f"{type(args).__name__}.fsdp_config must have version 2, without xla: FSDP2")
    if str(options.get("cpu_ram_efficient_loading", "false")).lower() in ("true", "1", "yes"):
        raise ConfigError(
            f"{type(args).__name__}.fsdp_config must not have cpu_ram_efficient_loading: every process "
            "copies the reference from the weights that it has loaded"
        )


def device_has_bf16() -> bool:
    """Whether the accelerator computes in bfloat16 natively; False on a CPU, where it is slower."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def require_devices(count: int, processes: int = 1) -> None:
    """Refuse to train on fewer GPUs than were asked for.

    A cluster can silently drop the request for a GPU; the job would then crawl on a CPU.

    Args:
        processes: of this machine; where there are GPUs, each process needs one of its own.
    """
    found = torch.cuda.device_count()
    if found < count:
        raise ConfigError(
            f"{count} GPU(s) were asked for, but {found} can be seen here; check the pod's resource limits "
            "and the node's device plugin, or set gpus to 0 to train on the CPU"
        )
    if 0 < found < processes:
        raise ConfigError(
            f"{processes} processes need a GPU each, and {found} can be seen here; start as many processes "
            "as there are GPUs, or hide these from them (CUDA_VISIBLE_DEVICES='') to train on the CPU"
        )
