"""What is refused of `transformers.TrainingArguments` and of the machine before anything is loaded."""

from __future__ import annotations

import importlib.util
import os

import torch
from transformers import TrainingArguments

from softpref.errors import ConfigError
from softpref.lm.ranges import check_ranges


def check_training_arguments(args: TrainingArguments) -> None:
    """Refuse numbers that `transformers` takes, and that fail or train nothing only when training begins.

    Raises:
        ConfigError: names the parameter and what would be right.
    """
    check_ranges(args)
    _check_packages(args)
    if str(args.fsdp).lower() in ("true", "1", "yes"):  # as the console has it
        args.fsdp = True  # type: ignore[assignment]
    elif str(args.fsdp).lower() in ("false", "0", "no"):
        args.fsdp = None
    if not args.use_cpu:  # before transformers takes the device of this process, which may not be there
        require_devices(0, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


# what a name of an optimizer holds, and the module that it needs; the first of a kind decides
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
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    places = args.report_to if isinstance(args.report_to, (list, tuple)) else [args.report_to]
    for place in places:
        if place in (None, "none", "all"):
            continue
        if place not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"{type(args).__name__}.report_to must be none, all or of "
                f"{', '.join(sorted(INTEGRATION_TO_CALLBACK))}, got {place!r}"
            )
        if place not in get_available_reporting_integrations():
            raise ConfigError(
                f"{type(args).__name__}.report_to {place} needs its package, which is not installed; install "
                "it, or leave report_to none (softpref tracks by itself)"
            )


def check_sharding(args: TrainingArguments) -> None:
    """Refuse ways of sharding weights (`fsdp`) under which the stages do not work.

    Raises:
        ConfigError: names the option and what would be right.
    """
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

    A cluster can drop the request for a GPU without a word; the job would then crawl on a CPU.

    Args:
        processes: processes of this machine; where there are GPUs, each needs one of its own.

    Raises:
        ConfigError: says how many were asked for and how many are there.
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
