"""What watches a trainer while a stage runs: its metrics go to a tracker, its progress to whoever waits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length

from softpref.progress import Lines, on_terminal

if TYPE_CHECKING:
    from softpref.tracking import Tracker


class TrackingCallback(TrainerCallback):
    """Hands what the trainer logs to a tracker, which knows nothing of training and never raises."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def on_log(
        self,
        args: object,
        state: TrainerState,
        control: object,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        numbers = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, (int, float))}
        if numbers:
            self.tracker.metrics(numbers, step=state.global_step)


class NamedProgress(ProgressCallback):
    """The trainer's progress bar with the model's name, on a terminal."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)


class PlainProgress(TrainerCallback):
    """The trainer's progress as lines with the model's name: in a sweep, several train side by side."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._training: Lines | None = None
        self._evaluation: Lines | None = None

    def on_train_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if state.is_world_process_zero:
            self._training = Lines(self.name, state.max_steps, "step", done=state.global_step)

    def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if self._training:
            self._training.update(state.global_step - self._training.count)

    def on_log(
        self,
        args: object,
        state: TrainerState,
        control: object,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if self._training and logs and "loss" in logs:
            self._training.note = f"loss {logs['loss']:.4g}"

    def on_train_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if self._training:
            self._training.close()
            self._training = None

    def on_prediction_step(
        self,
        args: object,
        state: TrainerState,
        control: object,
        eval_dataloader: DataLoader[Any] | None = None,
        **kwargs: object,
    ) -> None:
        if state.is_world_process_zero and eval_dataloader is not None and has_length(eval_dataloader):
            title = f"{self.name}, evaluation"
            self._evaluation = self._evaluation or Lines(title, len(eval_dataloader), "batch")
            self._evaluation.update()

    def on_evaluate(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if self._evaluation:
            self._evaluation.close()
            self._evaluation = None


def add_stage_callbacks(trainer: Trainer, name: str, tracker: Tracker | None) -> None:
    """Track what `trainer` logs, and show its progress under `name`."""
    if tracker is not None:
        trainer.add_callback(TrackingCallback(tracker))
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(NamedProgress(name) if on_terminal() else PlainProgress(name))


def stage_tracker(
    config: TrainingArguments, output_dir: str | Path, **options: Any
) -> AbstractContextManager[Tracker | None]:
    """The tracker of a training stage on the main process; nothing on the others."""
    from softpref.tracking import Tracker, watch_termination

    if config.process_index:
        return nullcontext()
    if config.world_size > 1:  # the step that a cluster ends is another process
        watch_termination(options["experiment"], options["tracking_uri"])
    return Tracker(output_dir, **options)
