"""The part of a trainer that reads, evaluates and predicts preference rows. Trains on none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from softpref.lm.packing import evaluation_mode
from softpref.lm.scoring import check_sequences
from softpref.lm.training import GuardedTrainer
from softpref.spo.config import SPOConfig
from softpref.spo.objective import Objective, by_row
from softpref.spo.rounds import RoundRows
from softpref.spo.rows import PreferenceRows, TrainingRows

AnyRows = TypeVar("AnyRows", bound=TrainingRows)


class RowsTrainer(GuardedTrainer):
    """What `SPOTrainer` does with rows to evaluate, whenever they are handed over.

    Attributes:
        objective: the losses of a batch.
        stop_ids: ids that end a completion.
    """

    args: SPOConfig
    objective: Objective
    stop_ids: list[int]
    processing_class: PreTrainedTokenizerBase
    _most_completions = 0  # of a row among those that are evaluated

    def rows_for(
        self, kind: type[AnyRows], given: Any, name: str, model: Any, *, sampled: bool = False
    ) -> AnyRows:
        """Rows made of those that were handed over, which the model has positions and embeddings for."""
        rows = kind(given, self.processing_class, self.args, stop_ids=self.stop_ids, name=name)
        sequences = [(row["prompt"], one) for row in rows.rows for one in row["completions"]]
        removed = [row["removed"] for row in rows.rows if "removed" in row]
        sequences += [(one["prompt"], ids) for one in removed for side in one["texts"] for ids in side]
        check_sequences(model, sequences, self.args.max_completion_length if sampled else 0)
        return rows

    def evaluation_sets(self, given: Any, model: Any) -> dict[str, PreferenceRows]:
        """Sets of evaluation rows by name; `validation` is the name of a single one."""
        if given is None:
            return {}
        sets = given if isinstance(given, dict) else {"validation": given}
        return {
            name: self.rows_for(PreferenceRows, rows, f"{name} row", model) for name, rows in sets.items()
        }

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As in the base class; rows may come as they are handed to the constructor."""
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().get_eval_dataloader(eval_dataset)
        return self.get_test_dataloader(eval_dataset)  # which no persistent workers of another set serve

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """As in the base class; rows may come as they are handed to the constructor."""
        return super().get_test_dataloader(self._evaluated_rows(test_dataset))

    def _evaluated_rows(self, given: Any) -> TrainingRows | RoundRows:
        if isinstance(given, (TrainingRows, RoundRows)):
            return given
        return self.rows_for(
            PreferenceRows, given, "evaluation row", self.accelerator.unwrap_model(self.model)
        )

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """What the policy makes of rows, which come as they are handed to the constructor.

        Returns:
            `predictions`: `logps` and `rewards` (the method's own, see the metrics) of each row's completions
            in their order, `[rows, most]`; not a number beyond a row's last, and for rows that take no part
            (see `SPOConfig.cut_rows`). `label_ids`: `[rows]`, P(first beats second). `metrics` as `evaluate`
            has them.
        """
        rows = self._evaluated_rows(test_dataset)
        output: PredictionOutput = super().predict(rows, ignore_keys, metric_key_prefix)
        if not isinstance(rows, PreferenceRows) or len(rows) == rows.counts["given"]:
            return output
        found: Any = output.predictions  # what `prediction_step` returned, gathered
        whole: Any = {name: _spread(one, rows.numbers, rows.counts["given"]) for name, one in found.items()}
        labels = _spread(np.asarray(output.label_ids), rows.numbers, rows.counts["given"])
        return output._replace(predictions=whole, label_ids=labels)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Any, Tensor | None]:
        """Loss and metrics of an evaluation batch; unless the loss is all, what `predict` returns of it."""
        inputs = self._prepare_inputs(inputs)
        inputs["own_rows"] = self.own_rows(len(inputs["group_sizes"]))
        with torch.no_grad(), evaluation_mode(model), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        lines = {
            name: by_row(one, inputs["group_sizes"], self._most_completions) for name, one in outputs.items()
        }
        return loss.detach(), lines, inputs["probabilities"]

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in the base class; the metrics of `SPOTrainer` are added."""
        rows = getattr(getattr(dataloader, "dataset", None), "rows", ())
        self._most_completions = max((len(row["completions"]) for row in rows), default=0)
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        means = self.objective.means["eval"].take(self.sum_over_processes)
        if self.args.degree_weight:
            means |= self._length_baseline("eval")
        named = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    def _length_baseline(self, mode: str) -> dict[str, float]:
        """`degree/length_baseline` of training or evaluation since it was last taken."""
        found = self.objective.lengths[mode].take(lambda counts: self.accelerator.reduce(counts, "sum"))
        return {} if found is None else {"degree/length_baseline": found}


def _spread(values: np.ndarray, places: Sequence[int], count: int) -> np.ndarray:
    """Lines at their places among `count`, the others NaN."""
    whole = np.full((count, *values.shape[1:]), np.nan, dtype=values.dtype)
    whole[list(places)] = values
    return whole
