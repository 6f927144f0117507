"""The course of a training stage, whatever it trains: claimed, tracked, trained, evaluated, saved, ended."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import softpref
from softpref.config import write_parameters
from softpref.disk import what_is_at
from softpref.errors import DataError
from softpref.finished import as_recorded, finished_result, write_result
from softpref.lm.arguments import StageArguments, require_devices
from softpref.lm.checkpoints import Claim, claim_checkpoints, remove_checkpoints, step_of
from softpref.lm.loading import require_new_folder, save_model_files
from softpref.lm.training import GuardedTrainer
from softpref.lm.watching import add_stage_callbacks, stage_tracker
from softpref.progress import settle_output
from softpref.records.dataset import read_stats
from softpref.records.files import RESULT_FILE
from softpref.records.model import METADATA_FILE, save_metadata
from softpref.timings import PhaseTimer
from softpref.tracking.waiting import END, patience

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from softpref.records.dataset import DatasetStats

logger = logging.getLogger(__name__)

TRAINING_OPTIONS = (  # of transformers, which say what a run was
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "fp16",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
)

_LENGTHS = ("max_prompt_length", "max_completion_length", "max_length")  # those that a stage has


class Trained(NamedTuple):
    """What training leaves.

    Attributes:
        metrics: of training and evaluation, and `rows/NAME`, the counts of the training rows; a stage may add
            its own.
        model: the whole model; None on all processes but the first.
        run_id: of the tracking run.
    """

    metrics: dict[str, float]
    model: Any
    run_id: str | None


class Course:
    """One run of a training stage.

    Args:
        stage: the stage's name.
        config: its `TrainingArguments`; checkpoints are kept in its `output_dir`, which is set here.
        output_dir: the model folder to write; must not hold the finished model of another run.
        name: name of the model and of its tracking run.
        experiment, parent_run_id, tracking_uri: where tracking puts the run, and where a registered model
            is; an empty URI takes `MLFLOW_TRACKING_URI`, or a local store.
        checkpoint_dir: where checkpoints are kept while training; by default inside `output_dir`. A run that
            was cut off continues from the newest whole one; they are removed at the end.

    Attributes:
        timer: seconds by phase; the stage itself enters the phases before training.

    Raises:
        ConfigError: the folder is taken, or fewer GPUs are there than were asked for.
    """

    def __init__(
        self,
        stage: str,
        config: StageArguments,
        output_dir: str | Path,
        *,
        name: str,
        experiment: str,
        parent_run_id: str,
        tracking_uri: str,
        checkpoint_dir: str,
    ) -> None:
        self.timer = PhaseTimer("loading")
        settle_output()
        require_devices(config.gpus)
        if not (Path(output_dir) / RESULT_FILE).is_file():  # else `finished` decides
            require_new_folder(output_dir)
        patience(END)  # refuses a wrong SOFTPREF_TRACKING_WAIT before anything is loaded
        self._stage, self._config, self._output_dir, self._name = stage, config, Path(output_dir), name
        self._tracking = {
            "experiment": experiment,
            "run_name": name,
            "parent_run_id": parent_run_id or None,
            "tracking_uri": tracking_uri or None,
        }
        self._checkpoints = Path(checkpoint_dir or Path(output_dir) / "checkpoints")
        self._claim = Claim(None, same_run=True)
        self._identity: dict[str, object] = {}
        self._made_from: dict[str, object] = {}
        self._description: dict[str, Any] | None = None
        config.output_dir = str(self._checkpoints)
        torch.manual_seed(config.seed)

    def finished(self, identity: dict[str, object], **written: object) -> dict[str, float] | None:
        """The metrics of this very run where it has finished before, as one that was killed at its end had.

        What the kill left undone is done: the tracking run is ended, checkpoints are removed.

        Args:
            identity: what the run is, its configuration and its data; also tracked.
            written: options that decide what is written besides.

        Raises:
            ConfigError: the folder holds the finished model of another run.
        """
        self._identity = identity
        self._made_from = as_recorded({"stage": self._stage, "name": self._name, **identity, **written})
        if not (self._output_dir / METADATA_FILE).is_file():
            return None
        metrics: dict[str, float] = finished_result(self._output_dir, self._made_from, "a finished model")
        if self._config.process_index == 0:
            from softpref.tracking import finish

            logger.warning("%s holds this very model, finished: there is nothing to train", self._output_dir)
            finish(self._output_dir)
            remove_checkpoints(self._checkpoints)
        return metrics

    def claim(self) -> None:
        """Find the checkpoint from which training continues, if there is one; all processes must call it.

        Raises:
            ConfigError: the checkpoints are of another run.
        """
        self._claim = claim_checkpoints(self._checkpoints, self._identity, self._config)

    @contextmanager
    def trained(
        self,
        trainer: GuardedTrainer,
        stats: DatasetStats,
        row_counts: Mapping[str, Mapping[str, int]],
        **parameters: object,
    ) -> Iterator[Trained]:
        """Train and evaluate; the caller saves inside, and then the run is ended.

        Args:
            stats: of the dataset, which is tracked too.
            row_counts: what was counted of each split's rows.
            parameters: tracked beside the run's identity.
        """
        config, checkpoint = self._config, self._claim.checkpoint
        self.timer.enter("tracking")
        anew = not self._claim.same_run
        # of the first process
        with stage_tracker(config, self._output_dir, anew=anew, **self._tracking) as tracker:
            if tracker is not None:
                tracker.params({"stage": self._stage, **parameters, **self._identity})
                tracker.dataset(stats, "training")
                tracker.resume(step_of(checkpoint) if checkpoint else 0)
            add_stage_callbacks(trainer, self._name, tracker)
            metrics: dict[str, float] = {}
            if config.num_train_epochs > 0 or config.max_steps > 0:
                self.timer.enter("training")
                metrics.update(trainer.train(resume_from_checkpoint=checkpoint).metrics)
            metrics.update({f"rows/{what}": float(count) for what, count in row_counts["train"].items()})
            self.timer.enter("evaluation")
            if trainer.eval_dataset is not None:
                metrics.update(trainer.evaluate())
            model = trainer.whole_model()
            if tracker is None:
                yield Trained(metrics, None, None)
            else:
                self.timer.enter("tracking")
                tracker.flush(timeout=60)  # the run's id is part of what is saved
                self.timer.enter("saving")
                yield Trained(metrics, model, tracker.run_id)
                self.timer.enter("saving")
                if self._description is not None:
                    result = {name: float(value) for name, value in metrics.items()}
                    write_result(self._output_dir, self._made_from, result)
                    save_metadata(self._output_dir, self._description)
                remove_checkpoints(self._checkpoints)
                self.timer.enter("tracking")
                tracker.metrics(self.timer.metrics(), step=trainer.state.global_step)
        if tracker is not None:
            self.timer.write(self._output_dir)

    def description(self, trained: Trained, **described: object) -> dict[str, object]:
        """What a model folder says of its model: what all stages say, and `described`."""
        return {
            "stage": self._stage,
            "name": self._name,
            **described,
            "code_version": softpref.__version__,
            "run_id": trained.run_id,
            **{name: getattr(self._config, name) for name in _LENGTHS if hasattr(self._config, name)},
        }

    def save(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        description: dict[str, Any],
        write: Callable[[Any, Any, Path, dict[str, Any]], None] = save_model_files,
    ) -> None:
        """Write the model folder but for its last file, the description, which completes it at the end."""
        write_parameters(self._config, self._output_dir)
        write(model, tokenizer, self._output_dir, description)
        self._description = description


def dataset_stats(dataset_dir: str | Path) -> DatasetStats:
    """`stats.json` of a dataset folder of the data stage.

    Raises:
        DataError: it is no such folder, or the file is damaged.
    """
    folder = Path(dataset_dir)
    if not os.path.isdir(folder):
        raise DataError(f"dataset {folder} {what_is_at(folder)}; give a folder of the data stage")
    for file in ("stats.json", "dataset_dict.json"):
        if not (folder / file).is_file():
            raise DataError(f"{folder} is not a dataset folder of the data stage: it holds no {file}")
    return read_stats(folder)
