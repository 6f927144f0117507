"""The trainer beneath those of both stages: guards and resuming. No loss lives here."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_utils import TrainOutput

from softpref.errors import ConfigError, SoftprefError
from softpref.lm.checkpoints import (
    LOSS_FILE,
    fault_of,
    last_checkpoint_of_all,
    obstacle,
    seal_checkpoint,
    thin_checkpoints,
)
from softpref.lm.head import try_out
from softpref.lm.loading import settle_generation_config
from softpref.lm.sharding import shards, whole_copy, whole_head

logger = logging.getLogger(__name__)

T = TypeVar("T")


class GuardedTrainer(Trainer):
    """A `transformers.Trainer` that keeps whole checkpoints, and stops before the weights are spoilt.

    A checkpoint is on the disk before an older one goes, and known to be damaged if it is. A training that
    was cut off and resumed has the `train_loss` of one that was not.

    At the first non-finite loss or gradient it stops, before the weights move. The last good state is saved
    as a checkpoint and the offending batch beside it. With several processes a loss is known to one of them
    alone; the gradient that it leaves, which all share, stops them together.
    One process uses one GPU, whatever else it sees: the threads of `nn.DataParallel` cannot run packed
    batches.
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
        self._earlier_loss = 0.0  # summed over the steps before this training was resumed
        self._kept_step: int | None = None  # of the checkpoint that has the present state
        self.add_callback(_LogsBeforeSaving())
        # before accelerate wraps the model: in a lower precision rounding would hide a difference, and the
        # weights may be sharded
        if not config.plain_forward:
            try_out(self.model)
        plugin = self.accelerator.state.fsdp_plugin if config.fsdp else None
        if plugin is not None and plugin.mixed_precision_policy is not None:
            policy = plugin.mixed_precision_policy
            plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32)  # gradients' sums

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any
    ) -> TrainOutput:
        """As in the base class; `True` takes the newest checkpoint that is whole.

        Raises:
            ConfigError: there is no such checkpoint, or the one that is named is not whole.
        """
        if resume_from_checkpoint is True:
            folder = str(self.args.output_dir)
            resume_from_checkpoint = last_checkpoint_of_all(folder, self.args)
            if resume_from_checkpoint is None:
                raise ConfigError(f"{folder} holds no whole checkpoint to resume from")
        elif resume_from_checkpoint and (fault := self._of_all(obstacle, str(resume_from_checkpoint))):
            raise ConfigError(
                f"{resume_from_checkpoint} is no checkpoint to resume from: {fault}; name another, or set "
                "resume_from_checkpoint to True for the newest that is"
            )
        output: TrainOutput = super().train(resume_from_checkpoint or None, *args, **options)
        loss = self._whole_loss()
        return output._replace(training_loss=loss, metrics={**output.metrics, "train_loss": loss})

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: DataLoader[Any]
    ) -> tuple[int, int, int, int, int, int | None, int]:
        """As in the base class, where a training begins."""
        self._earlier_loss, self._kept_step = 0.0, None  # a checkpoint's are loaded after this
        return super().set_initial_training_values(args, dataloader)

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        """As in the base class, which would take one step too many from a checkpoint of the last step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **options)  # type: ignore[no-untyped-call]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in the base class; `train_loss` is that of all steps, also of those before a resumption."""
        if "train_loss" in logs:
            logs = {**logs, "train_loss": self._whole_loss()}
        super().log(logs, start_time)

    def _whole_loss(self) -> float:
        """The mean loss of the steps whose losses have been logged."""
        return (self._earlier_loss + self._total_loss_scalar) / max(self.state.global_step, 1)

    def _of_all(self, fault: Callable[[str], str], checkpoint: str) -> str:
        """What the processes that write checkpoints find wrong with one, for all; all must call it."""
        found: list[str] = gather_object([fault(checkpoint)] if self.args.should_save else [])
        return next(filter(None, found), "")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in the base class; then the manifest is written, and after it older checkpoints are removed."""
        args, step = self.args, self.state.global_step
        if step == self._kept_step:
            return
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{step}"
        if args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt
        self.accelerator.wait_for_everyone()
        limit, args.save_total_limit = args.save_total_limit, None  # it removes before the new one is whole
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each has written its random state
            if args.should_save:
                seal_checkpoint(folder)
        except Exception:
            if args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # the disk may be full
            raise
        finally:
            args.save_total_limit = limit
        self._kept_step = step
        if args.should_save:
            thin_checkpoints(folder.parent, step, limit, self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            total = self._earlier_loss + self._total_loss_scalar + self._tr_loss.item()
            Path(output_dir, LOSS_FILE).write_text(json.dumps({"summed_loss": total}), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            text = Path(checkpoint, LOSS_FILE).read_text(encoding="utf-8")
            self._earlier_loss = json.loads(text)["summed_loss"]
            self._kept_step = self.state.global_step

    def _load_best_model(self) -> None:
        """As in the base class, where the best checkpoint is still whole."""
        if fault := self._of_all(fault_of, str(self.state.best_model_checkpoint)):
            raise SoftprefError(
                f"the best checkpoint, {self.state.best_model_checkpoint}, cannot be loaded: {fault}; set "
                "load_best_model_at_end to false to take the last one"
            )
        super()._load_best_model()

    def init_hf_repo(self, token: str | None = None) -> None:
        """As in the base class, before training; where the Hub does not answer, the error says what to do."""
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

        All processes must call it. A sharded model's is a copy on the CPU, and None on all processes but the
        first.
        """
        if not shards(self.model):
            return self.accelerator.unwrap_model(self.model)
        weights = self.accelerator.get_state_dict(self.model)
        return whole_copy(self.model, weights) if self.is_world_process_zero() else None

    def sum_over_processes(self, value: float) -> float:
        """The sum of what each process has."""
        if self.args.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.args.device)
        return float(self.accelerator.reduce(total, reduction="sum"))

    def whole_list(self, mine: list[T], total: int) -> list[T]:
        """The whole of a list that is dealt round robin: part r of w lies on process r."""
        parts: list[list[T]] = gather_object([mine])
        return [parts[i % len(parts)][i // len(parts)] for i in range(total)]

    def own_rows(self, count: int) -> int:
        """How many of an evaluation batch's `count` rows, the first ones, no other batch counts.

        With several processes, the last batches are filled up with rows from the beginning.
        """
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return count
        before: int = count * self.args.process_index  # rows of the processes before this one
        return max(0, min(int(state.remainder) - before, count))

    def compute_loss_context_manager(self) -> ExitStack:
        """Autocast around everything that is computed here.

        transformers leaves it to the trained model's forward. A reference, whose forward is not prepared,
        would then be computed in another precision than the policy it is compared with.
        """
        stack = ExitStack()
        stack.enter_context(self.accelerator.autocast())
        return stack

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        with whole_head(model):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._last_inputs = inputs
        if not torch.isfinite(loss):
            if self.args.world_size == 1 or self.args.fp16:
                self._stop("loss", loss, inputs)
            self._suspect = self._suspect or inputs
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor | float | None:
        norm: Tensor | float | None = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        if self.args.fp16:  # the loss scaler finds its scale by overflowing, and skips those steps itself
            return norm
        if norm is not None and not math.isfinite(float(norm)):
            self._stop("gradient norm", norm, self._suspect or self._last_inputs)
        self._suspect = None
        return norm

    def _stop(self, what: str, value: Tensor | float, inputs: dict[str, Any]) -> None:
        from safetensors.torch import save_file

        step, folder, rank = self.state.global_step, Path(str(self.args.output_dir)), self.args.process_index
        batch_file = folder / f"nonfinite_batch{f'-{rank}' if rank else ''}.safetensors"
        if self.args.should_save or self._suspect:
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {k: v.cpu().contiguous() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
            save_file(tensors, batch_file)
        assert self.model is not None
        # saving takes all processes, and the others may have seen nothing
        if self.args.fsdp or (what == "loss" and self.args.world_size > 1):
            kept = f"use the last checkpoint in {folder}"
        elif all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            self._save_checkpoint(self.model, trial=None)
            kept = f"the weights before it are in {folder / f'checkpoint-{step}'}"
        else:
            kept = f"the weights are no longer finite either; use the last checkpoint in {folder}"
        raise SoftprefError(
            f"{what} became {float(value)} at optimizer step {step + 1}; {kept}, the batch is in "
            f"{batch_file}. A lower learning_rate, a longer warm-up or fp32 in place of bf16 are the usual "
            "remedies."
        )


class _LogsBeforeSaving(TrainerCallback):
    """Has the steps since the last log logged before a checkpoint, which knows nothing of them.

    A resumed training then logs the same figures at the same steps as one that was not cut off.
    """

    def on_step_end(
        self, args: TrainingArguments, state: object, control: TrainerControl, **kwargs: object
    ) -> None:
        if control.should_save and args.logging_strategy != "no":
            control.should_log = True

    on_epoch_end = on_step_end


def settle_model(model: Any) -> None:
    """Change in a model's configuration what would fail in training, each with a line in the log.

    A mixture's own load-balancing loss (`output_router_logits`) is switched off: no objective here contains
    it, and computing it works with neither a cache nor packed batches.
    """
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "output_router_logits", False):
        logger.warning(
            "output_router_logits asks for a load-balancing loss, which is no part of what is trained here; "
            "it is switched off in the model's configuration"
        )
        config.output_router_logits = False
    settle_generation_config(model)
