"""The course of a training stage, whatever it trains: claimed, tracked, trained, evaluated, saved, ended."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import softpref
from softpref.config import write_parameters
from softpref.errors import DataError
from softpref.lm.arguments import StageArguments, require_devices
from softpref.lm.checkpoints import claim_checkpoints, remove_checkpoints
from softpref.lm.loading import require_new_folder, save_model_folder
from softpref.lm.training import GuardedTrainer
from softpref.lm.watching import add_stage_callbacks, stage_tracker
from softpref.progress import settle_output
from softpref.timings import PhaseTimer
from softpref.tracking.waiting import END, patience

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from softpref.records import DatasetStats

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
        metrics: of training and evaluation, and `rows/NAME`, the counts of the training rows.
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
        output_dir: the model folder to write; must not hold a finished model.
        name: name of the model and of its tracking run.
        experiment, parent_run_id, tracking_uri: where tracking puts the run, and where a registered model
            is; an empty URI takes `MLFLOW_TRACKING_URI`, or a local store.
        checkpoint_dir: where checkpoints are kept while training; by default inside `output_dir`. A run that
            was cut off continues from the newest complete one; they are removed at the end.

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
        require_new_folder(output_dir)
        patience(END)  # refuses a wrong SOFTPREF_TRACKING_WAIT before anything is loaded
        self._stage, self._config, self._output_dir, self._name = stage, config, output_dir, name
        self._tracking = {
            "experiment": experiment,
            "run_name": name,
            "parent_run_id": parent_run_id or None,
            "tracking_uri": tracking_uri or None,
        }
        self._checkpoints = Path(checkpoint_dir or Path(output_dir) / "checkpoints")
        self._checkpoint: str | None = None
        self._identity: dict[str, object] = {}
        config.output_dir = str(self._checkpoints)
        torch.manual_seed(config.seed)

    def claim(self, identity: dict[str, object]) -> None:
        """Find the checkpoint from which training continues, if there is one.

        Args:
            identity: what the run is, its configuration and its data; also tracked.

        Raises:
            ConfigError: the checkpoints are of another run.
        """
        self._identity = identity
        self._checkpoint = claim_checkpoints(self._checkpoints, identity)

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
        config = self._config
        self.timer.enter("tracking")
        with stage_tracker(config, self._output_dir, **self._tracking) as tracker:  # of the first process
            if tracker is not None:
                tracker.params({"stage": self._stage, **parameters, **self._identity})
                tracker.dataset(stats, "training")
            add_stage_callbacks(trainer, self._name, tracker)
            metrics: dict[str, float] = {}
            if config.num_train_epochs > 0 or config.max_steps > 0:
                if self._checkpoint and tracker is not None:
                    tracker.rewind(int(self._checkpoint.rpartition("-")[2]))  # to its optimizer step
                self.timer.enter("training")
                metrics.update(trainer.train(resume_from_checkpoint=self._checkpoint).metrics)
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

    def save(self, model: Any, tokenizer: PreTrainedTokenizerBase, description: dict[str, Any]) -> None:
        """Write the model folder; the description, its last file, completes it."""
        write_parameters(self._config, self._output_dir)
        save_model_folder(model, tokenizer, self._output_dir, description)


def dataset_stats(dataset_dir: str | Path) -> DatasetStats:
    """`stats.json` of a dataset folder of the data stage.

    Raises:
        DataError: it is no such folder.
    """
    folder = Path(dataset_dir)
    for file in ("stats.json", "dataset_dict.json"):
        if not (folder / file).is_file():
            raise DataError(f"{folder} is not a dataset folder of the data stage: it holds no {file}")
    stats: DatasetStats = json.loads((folder / "stats.json").read_text(encoding="utf-8"))
    return stats
