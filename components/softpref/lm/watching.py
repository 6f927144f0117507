"""What watches a trainer while a stage runs: its figures to a tracker, its progress to whoever waits."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length

from softpref.progress import Lines, on_terminal


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
