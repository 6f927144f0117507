"""What both training stages share: guards, resuming, tracking of a trainer. No loss lives here."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length

from softpref.errors import ConfigError, SoftprefError
from softpref.lm.head import try_out
from softpref.lm.loading import settle_generation_config
from softpref.lm.sharding import shards, whole_copy, whole_head
from softpref.progress import Lines, on_terminal

logger = logging.getLogger(__name__)

_IDENTITY = "run.json"  # in a folder of checkpoints: whose they are


class GuardedTrainer(Trainer):
    """A `transformers.Trainer` that stops at the first non-finite loss or gradient, before the weights move.

    The last good state is saved as a checkpoint and the offending batch beside it. Where there are several
    processes, a loss is known to one of them alone, and the gradient that it leaves, which all share, is what
    stops them together. One process uses one GPU, whatever else it sees: threads of `nn.DataParallel` know
    nothing of packed batches.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        config = options["args"]
        if config.n_gpu > 1:
            logger.warning(
                "%d GPUs can be seen here, and one is used; set gpus=%d to train on all of them",
                config.n_gpu,
                config.n_gpu,
            )
            config._n_gpu = 1
        if config.ddp_broadcast_buffers is None:
            config.ddp_broadcast_buffers = False  # constants; and every forward would wait for the others
        if config.fsdp and config.world_size == 1:
            raise ConfigError(
                f"{type(config).__name__}.fsdp divides weights among processes, and this is the only one; "
                "leave it out, or set gpus"
            )
        settle_model(options["model"])
        if config.eval_strategy != "no" and options.get("eval_dataset") is None:
            raise ConfigError(
                f"{type(config).__name__}.eval_strategy is {config.eval_strategy.value}, and there are no "
                "validation rows; set it to no, or give some"
            )
        rows = options.get("train_dataset")
        at_once = config.per_device_train_batch_size * config.world_size
        if config.dataloader_drop_last and rows is not None and len(rows) < at_once:
            raise ConfigError(
                f"{type(config).__name__}.dataloader_drop_last leaves nothing of {len(rows)} rows, for a "
                f"batch takes {at_once}; lower per_device_train_batch_size, or leave dataloader_drop_last out"
            )
        super().__init__(*args, **options)
        self._suspect: dict[str, Any] | None = None  # the first micro-batch of a step that was not finite
        # now, for accelerate will have its forward compute in a lower precision, whose rounding hides what
        # is looked for, and may cut its weights into shards
        if not config.plain_forward:
            try_out(self.model)
        if config.fsdp:
            plugin = self.accelerator.state.fsdp_plugin
            if (
                plugin is not None and plugin.mixed_precision_policy is not None
            ):  # gradients are summed in fp32
                policy = plugin.mixed_precision_policy
                plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        """As in the base class; `True` takes the newest checkpoint that was written to its end.

        Raises:
            ConfigError: there is no such checkpoint.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ConfigError(f"{self.args.output_dir} holds no whole checkpoint to resume from")
        elif resume_from_checkpoint and not (Path(resume_from_checkpoint) / "trainer_state.json").is_file():
            raise ConfigError(
                f"{resume_from_checkpoint} is no checkpoint that was written to its end; name another, or "
                "set resume_from_checkpoint to True for the newest that was"
            )
        return super().train(resume_from_checkpoint or None, *args, **options)

    def init_hf_repo(self, token: str | None = None) -> None:
        """As in the base class, before training; a Hub that does not answer is said with what to do."""
        try:
            super().init_hf_repo(token)
        except Exception as error:  # the Hub client raises a dozen unrelated types
            reason = "".join(str(error).strip().splitlines()[:1])
            raise ConfigError(
                f"push_to_hub: the Hub makes no repository ({type(error).__name__}: {reason}); log in with "
                "`hf auth login`, check hub_model_id and the network, or leave push_to_hub out"
            ) from error

    def whole_model(self) -> Any:
        """The model as it can be saved: without wrappers, its weights not in shards.

        All processes must call it. Where weights are in shards it is a copy on the CPU, and None on other
        processes than the first.
        """
        if not shards(self.model):
            return self.accelerator.unwrap_model(self.model)
        weights = self.accelerator.get_state_dict(self.model)
        return whole_copy(self.model, weights) if self.is_world_process_zero() else None

    def compute_loss_context_manager(self):
        """Autocast around all that is computed here.

        transformers leaves it to the forward of the model that is trained; a reference, whose forward nobody
        prepares, would be computed in another precision than the policy it is compared with.
        """
        return self.accelerator.autocast()

    def training_step(self, model, inputs, num_items_in_batch=None):
        with whole_head(model):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._last_inputs = inputs
        if not torch.isfinite(loss):
            if self.args.world_size == 1 or self.args.fp16:
                self._stop("loss", loss, inputs)
            self._suspect = self._suspect or inputs
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.args.fp16:  # the loss scaler finds its scale by overflowing, and skips those steps itself
            return norm
        if norm is not None and not math.isfinite(float(norm)):
            self._stop("gradient norm", norm, self._suspect or self._last_inputs)
        self._suspect = None
        return norm

    def _stop(self, what: str, value: Any, inputs: dict[str, Any]) -> None:
        from safetensors.torch import save_file

        step, folder, rank = self.state.global_step, Path(str(self.args.output_dir)), self.args.process_index
        batch_file = folder / f"nonfinite_batch{f'-{rank}' if rank else ''}.safetensors"
        if self.args.should_save or self._suspect:
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {k: v.cpu().contiguous() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
            save_file(tensors, batch_file)
        assert self.model is not None
        # to save takes all processes, and the others may have seen nothing
        if self.args.fsdp or (what == "loss" and self.args.world_size > 1):
            raise SoftprefError(
                f"{what} became {float(value)} at optimizer step {step + 1}; use the last checkpoint in "
                f"{folder}, the batch is in {batch_file}. {_REMEDIES}"
            )
        finite = all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters())
        if finite:
            self._save_checkpoint(self.model, trial=None)
            kept = f"the weights before it are in {folder / f'checkpoint-{step}'}"
        else:
            kept = f"the weights are no longer finite either; use the last checkpoint in {folder}"
        raise SoftprefError(
            f"{what} became {float(value)} at optimizer step {step + 1}; {kept}, the batch in {batch_file}. "
            f"{_REMEDIES}"
        )


def settle_model(model: Any) -> None:
    """Change in a model's configuration what would fail in training, each with a line in the log."""
    settle_router(model)
    settle_generation_config(model)


def settle_router(model: Any) -> None:
    """Switch off a mixture's own load-balancing loss, which no objective here contains.

    It is computed beside the logits where the configuration asks for `output_router_logits`, read by nobody,
    and its computation bears neither a cache nor packed batches.
    """
    config = getattr(model, "config", None)
    if getattr(config, "output_router_logits", False):
        logger.warning(
            "output_router_logits asks for a load-balancing loss, which is no part of what is trained here; "
            "it is switched off in the model's configuration"
        )
        config.output_router_logits = False  # type: ignore[union-attr]


_REMEDIES = "A lower learning_rate, a longer warm-up or fp32 in place of bf16 are the usual remedies."


class TrackingCallback(TrainerCallback):
    """Hands what the trainer logs to a tracker, which knows nothing of training and never raises."""

    def __init__(self, tracker: Any) -> None:
        self.tracker = tracker

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            numbers = {k: float(v) for k, v in logs.items() if isinstance(v, (int, float))}
            self.tracker.metrics(numbers, step=state.global_step)


class NamedProgress(ProgressCallback):
    """The trainer's progress bar with the model's name, on a terminal."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)


class PlainProgress(TrainerCallback):
    """The trainer's progress as lines with the model's name, for several train side by side in a sweep."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._training: Lines | None = None
        self._evaluation: Lines | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._training = Lines(self.name, state.max_steps, "step", done=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self._training:
            self._training.update(state.global_step - self._training.count)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._training and logs and "loss" in logs:
            self._training.note = f"loss {logs['loss']:.4g}"

    def on_train_end(self, args, state, control, **kwargs):
        if self._training:
            self._training.close()
            self._training = None

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if state.is_world_process_zero and has_length(eval_dataloader):
            title = f"{self.name}, evaluation"
            self._evaluation = self._evaluation or Lines(title, len(eval_dataloader), "batch")
            self._evaluation.update()

    def on_evaluate(self, args, state, control, **kwargs):
        if self._evaluation:
            self._evaluation.close()
            self._evaluation = None


def add_stage_callbacks(trainer: Trainer, name: str, tracker: Any) -> None:
    """Track what `trainer` logs, and show its progress under `name`."""
    trainer.add_callback(TrackingCallback(tracker))
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(NamedProgress(name) if on_terminal() else PlainProgress(name))


def claim_checkpoints(folder: str | Path, identity: Mapping[str, Any]) -> str | None:
    """The checkpoint to continue from, or None for a fresh start in `folder`.

    Args:
        identity: what a run is: its configuration and its data. Written on the first call.

    Raises:
        ConfigError: the folder holds checkpoints of another run; continuing would mix the two.
    """
    file = Path(folder) / _IDENTITY
    own = json.loads(json.dumps(identity, default=str))
    checkpoint = last_checkpoint(folder)
    if checkpoint and file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        differing = sorted(key for key in {*own, *found} if own.get(key) != found.get(key))
        if differing:
            changes = ", ".join(
                f"{key}: {found.get(key)!r} there, {own.get(key)!r} here" for key in differing
            )
            raise ConfigError(
                f"{folder} holds checkpoints of another run ({changes}); name another folder, or remove it "
                "to start anew"
            )
    if checkpoint and os.environ.get("RANK", "0") == "0":
        logger.warning("continuing from %s", checkpoint)
    if not (checkpoint and file.is_file()):  # another process may be reading what stands there already
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(own, indent=2), encoding="utf-8")
    return checkpoint


def remove_checkpoints(folder: str | Path) -> None:
    """Remove what training has left in its folder, and the folder too where there is nothing else in it."""
    folder = Path(folder)
    for checkpoint in folder.glob("checkpoint-[0-9]*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    with contextlib.suppress(OSError):  # the model is saved already
        for file in (folder / _IDENTITY, *folder.glob("nonfinite_batch*.safetensors")):
            file.unlink(missing_ok=True)
        folder.rmdir()


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint that was written to its end, or None.

    The trainer's state is the last file of a checkpoint; one without it was cut off by a kill.
    """
    found: list[tuple[int, Path]] = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        try:
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            found.append((int(state["global_step"]), folder))
        except (OSError, ValueError, KeyError):
            continue
    return str(max(found)[1]) if found else None


def checkpoint_step(checkpoint: str) -> int:
    """The optimizer step after which a checkpoint folder was written."""
    return int(Path(checkpoint).name.rpartition("-")[2])


def stage_tracker(config: TrainingArguments, output_dir: str, **options: Any) -> Any:
    """The tracker of a training stage: a real one on the main process, a silent one on the others."""
    from softpref.tracking import Tracker, watch_termination

    if config.process_index:
        return _SilentTracker()
    if config.world_size > 1:  # the step that a cluster ends is another process
        watch_termination(options["experiment"], options["tracking_uri"])
    return Tracker(output_dir, **options)


class _SilentTracker:
    """Takes everything and keeps nothing, for all processes but the first."""

    run_id = None

    def params(self, values): ...
    def metrics(self, values, step): ...
    def artifact(self, path, folder=""): ...
    def tags(self, values): ...
    def rewind(self, step): ...
    def flush(self, timeout): ...
    def __enter__(self):
        return self

    def __exit__(self, *error): ...


def check_training_arguments(args: TrainingArguments) -> None:
    """Refuse numbers that `transformers` takes, and that fail or train nothing only when training begins.

    Raises:
        ConfigError: names the parameter and what would be right.
    """
    for name, (least, most, open_end) in _RANGES.items():
        value = getattr(args, name, None)
        if value is None:
            continue
        if not (isinstance(value, (int, float)) and least <= value <= most) or (open_end and value == most):
            span = f"at least {least}" if math.isinf(most) else f"from {least} to {most}"
            below = f", below {most}" if open_end and not math.isinf(most) else ""
            raise ConfigError(f"{type(args).__name__}.{name} must be {span}{below}, got {value!r}")
    _check_packages(args)
    if str(args.fsdp).lower() in ("true", "1", "yes"):  # as the console has it
        args.fsdp = True  # type: ignore[assignment]
    elif str(args.fsdp).lower() in ("false", "0", "no"):
        args.fsdp = None
    if not args.use_cpu:  # before transformers takes the device of this process, which may not be there
        require_devices(0, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


# of options of transformers: least and most, and whether the most itself is excluded
_RANGES: dict[str, tuple[float, float, bool]] = {
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
}
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
