"""Carries a mirror's records to MLflow, in order and none twice. Decides no pauses."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from softpref.remote import public_url
from softpref.tracking.mirror import HOUSEKEEPING, NAME_LENGTH, TAG_LENGTH, TOGETHER, Mirror, Record
from softpref.tracking.mlflow_store import RunGone, in_short, open_client
from softpref.tracking.pipeline_run import (
    KEY_TAG,
    PARENT_TAG,
    PipelineRun,
    discard_unused,
    experiment_of,
    find_or_open,
    find_or_open_root,
)
from softpref.tracking.waiting import Answers

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, Run, RunTag

logger = logging.getLogger(__name__)

_PARAM_LENGTH = 6000  # MLflow's own limit
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST"}


class Delivery:
    """Delivers one batch per call; raises when the server does not take it. Call `mlflow_ready` first."""

    def __init__(
        self,
        mirror: Mirror,
        uri: str,
        answers: Answers,
        lock: threading.Condition,
        artifact_attempts: int = 3,
    ) -> None:
        self._mirror = mirror
        self._uri = uri
        self._answers = answers
        self._lock = lock
        self._artifact_attempts = artifact_attempts
        self._failed_artifact = (-1, 0)  # its number, how often
        self._last_steps: dict[str, int] = {}  # of metrics that a lost mirror's records had sent

    @cached_property
    def _client(self) -> MlflowClient:
        return self._answers.of(open_client(self._uri))

    def deliver_batch(self) -> int:
        """Deliver the next records and note it; returns how many."""
        with self._lock:
            records, place = self._mirror.next_records()
        if not records:
            return 0
        run_id = self._mirror.run_id or self._open_run()
        if self._mirror.lost and not self._last_steps:
            self._learn_last_steps(self._existing_run(run_id))
        if records[0]["kind"] in TOGETHER:
            self._send_together(run_id, records)
        else:
            self._send_alone(run_id, records[0])
        with self._lock:
            self._mirror.delivered(records[-1]["n"], place)
            self._lock.notify_all()
        return sum(record["kind"] not in HOUSEKEEPING for record in records)

    def _send_alone(self, run_id: str, record: Record) -> None:
        kind = record["kind"]
        if kind == "dataset":
            self._log_dataset(run_id, record["dataset"])
        elif kind == "artifact":
            self._upload(run_id, record)
        elif kind == "end":
            run = self._existing_run(run_id)
            self._client.set_terminated(run_id, record["status"], record["time"])
            discard_unused(self._client, run, (KEY_TAG, self._mirror.header["key"]))
        else:
            self._existing_run(run_id)
            self._client.update_run(run_id, status="RUNNING")
            if parent := record.get("parent_run_id"):
                self._client.set_tag(run_id, PARENT_TAG, parent)

    def _send_together(self, run_id: str, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        points: list[Metric] = []
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        for record in records:
            kind = record["kind"]
            if kind == "metrics":
                points += [
                    Metric(key, float(value), record["time"], record["step"])
                    for key, value in record["values"].items()
                    if record["step"] > self._last_steps.get(key, -1)
                ]
            elif kind == "params":
                values = {key: str(value) for key, value in record["values"].items()}
                if any(params.get(key, value) != value for key, value in values.items()):
                    self._log(run_id, points, params, tags)
                    points, params, tags = [], {}, {}
                params.update(values)
            elif kind == "tags":
                tags.update({key: str(value) for key, value in record["values"].items()})
        self._log(run_id, points, params, tags)

    def _open_run(self) -> str:
        """Open the run, or find the one of an earlier attempt whose answer or pod was lost."""
        header = self._mirror.header
        experiment_id = experiment_of(self._client, header["experiment"], self._uri)
        parent = header["parent_run_id"]
        if pipeline_run := header.get("pipeline_run"):
            parent = find_or_open_root(self._client, experiment_id, PipelineRun(**pipeline_run))
        if parent and header.get("root"):
            run_id = parent
        else:
            tags = {PARENT_TAG: parent} if parent else {}
            key, name = (KEY_TAG, header["key"]), header["run_name"]
            run, found = find_or_open(self._client, experiment_id, key, name, tags, header["time"])
            run_id = run.info.run_id
            if found and run.info.status != "RUNNING":
                self._client.update_run(run_id, status="RUNNING")
            self._learn_last_steps(run)
        with self._lock:
            self._mirror.remember_run(run_id)
        return run_id

    def _learn_last_steps(self, run: Run) -> None:
        for metric in run.data.metrics:
            points = self._client.get_metric_history(run.info.run_id, metric)
            self._last_steps[metric] = max(point.step for point in points)

    def _log(
        self, run_id: str, points: Sequence[Metric], params: dict[str, str], tags: dict[str, str]
    ) -> None:
        from mlflow.entities import Param, RunTag

        short = {key: _cut(value, _PARAM_LENGTH) for key, value in params.items()}
        entities: list[Metric | Param | RunTag] = [*points, *(Param(*item) for item in short.items())]
        entities += [RunTag(key, _cut(value, TAG_LENGTH)) for key, value in tags.items()]
        if not entities:
            return
        self._log_entities(run_id, entities)
        for key, value in params.items():
            if short[key] != value:
                try:
                    self._client.log_text(run_id, value, f"params/{key}.txt")
                except Exception as error:
                    self._existing_run(run_id)  # raises when the server is away
                    logger.warning("parameter %s is not uploaded whole: %s", key, in_short(error))

    def _log_entities(self, run_id: str, entities: Sequence[Metric | Param | RunTag]) -> None:
        """Log a batch; if the server refuses it, log its halves, so that one bad value blocks no other."""
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(
                run_id,
                metrics=[entity for entity in entities if isinstance(entity, Metric)],
                params=[entity for entity in entities if isinstance(entity, Param)],
                tags=[entity for entity in entities if isinstance(entity, RunTag)],
            )
            return
        except MlflowException as error:
            if error.error_code not in _REFUSALS and error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            refusal = in_short(error)
        run = self._existing_run(run_id)
        if len(entities) > 1:
            half = len(entities) // 2
            self._log_entities(run_id, entities[:half])
            self._log_entities(run_id, entities[half:])
            return
        entity = entities[0]
        if isinstance(entity, Param) and run.data.params.get(entity.key, entity.value) != entity.value:
            key, known = entity.key, run.data.params[entity.key]
            logger.warning(
                f"parameter {key} of run {run_id} stays {known!r}; "
                f"{entity.value!r} goes to the tag param_changed.{key}"
            )
            self._client.set_tag(run_id, f"param_changed.{key}"[:NAME_LENGTH], entity.value)
        else:
            logger.warning("MLflow refuses %s %r: %s", type(entity).__name__.lower(), entity.key, refusal)

    def _log_dataset(self, run_id: str, known: Mapping[str, str]) -> None:
        """Log a dataset as an input of the run; MLflow keeps one that it has already."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(known["name"], known["digest"], "local", known["source"], profile=known["profile"])
        tags = [InputTag("mlflow.data.context", known["context"])]
        self._client.log_inputs(run_id, datasets=[DatasetInput(dataset, tags)])

    def _existing_run(self, run_id: str) -> Run:
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise RunGone(f"run {run_id} does not exist at {public_url(self._uri)}") from error
            raise
        if run.info.lifecycle_stage == "deleted":
            raise RunGone(f"run {run_id} is deleted; `mlflow runs restore --run-id {run_id}` brings it back")
        return run

    def _upload(self, run_id: str, record: Record) -> None:
        """Upload a file or folder; given up after a few failures while the server answers."""
        path = self._mirror.path.parent / record["path"]
        if not path.exists():
            logger.warning("artifact %s is not uploaded: it no longer exists", path)
            return
        try:
            upload = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
            upload(run_id, str(path), record["folder"] or None)
        except Exception as error:
            self._existing_run(run_id)  # raises when the server is away
            n, failures = self._failed_artifact
            failures = failures + 1 if n == record["n"] else 1
            self._failed_artifact = (record["n"], failures)
            if failures < self._artifact_attempts:
                raise
            logger.warning("artifact %s is not uploaded: %s", path, in_short(error))


def _cut(text: str, length: int) -> str:
    note = " … [cut]"
    return text if len(text) <= length else text[: length - len(note)] + note
