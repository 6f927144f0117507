"""Carries the records of a mirror to MLflow, in order and nothing twice. Decides no pauses."""

from __future__ import annotations

import logging
import threading
from typing import Any

from softpref.tracking.mirror import Mirror
from softpref.tracking.mlflow_store import RunGone, in_short, open_client
from softpref.tracking.pipeline_run import (
    KEY_TAG,
    PARENT_TAG,
    PipelineRun,
    experiment_of,
    find_or_open,
    find_or_open_root,
)

logger = logging.getLogger(__name__)

PARAM_LENGTH, TAG_LENGTH, NAME_LENGTH = 6000, 8000, 250  # MLflow's own limits
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST"}


class Delivery:
    """Carries a mirror's records to MLflow, a batch a call; raises when the server does not take them."""

    def __init__(
        self, mirror: Mirror, uri: str, lock: threading.Condition, artifact_attempts: int = 3
    ) -> None:
        self._mirror = mirror
        self._uri = uri
        self._lock = lock
        self._client: Any = None
        self._artifact_attempts = artifact_attempts
        self._failed_artifact = (-1, 0)  # its number, how often

    def deliver_batch(self) -> int:
        """Deliver the next records and note it; returns how many."""
        if self._client is None:
            self._client = open_client(self._uri)
        with self._lock:
            records, place = self._mirror.next_records()
        if not records:
            return 0
        run_id = self._mirror.run_id or self._open_run()
        points: list[Any] = []
        params: dict[str, str] = {}
        tags: dict[str, str] = {}

        def send() -> None:
            self._log(run_id, points, params, tags)
            points.clear()
            params.clear()
            tags.clear()

        from mlflow.entities import Metric

        for record in records:
            kind = record["kind"]
            if kind == "metrics":
                points += [
                    Metric(key, float(value), record["time"], record["step"])
                    for key, value in record["values"].items()
                ]
            elif kind == "params":
                if any(params.get(key, value) != value for key, value in record["values"].items()):
                    send()
                params.update(record["values"])
            elif kind == "tags":
                tags.update(record["values"])
            elif kind == "reopen":
                self._existing_run(run_id)
                self._client.update_run(run_id, status="RUNNING")
                if record.get("parent_run_id"):
                    tags[PARENT_TAG] = record["parent_run_id"]
            elif kind == "artifact":
                send()
                self._upload(run_id, record)
            elif kind == "end":
                send()
                self._existing_run(run_id)
                self._client.set_terminated(run_id, record["status"], record["time"])
        send()
        with self._lock:
            self._mirror.delivered(records[-1]["n"], place)
            self._lock.notify_all()
        return sum(record["kind"] not in ("rewind", "run", "reopen") for record in records)

    def _open_run(self) -> str:
        """Open the run, or find the one that an earlier attempt opened: its answer or its pod was lost."""
        header = self._mirror.header
        experiment_id = experiment_of(self._client, header["experiment"], self._uri)
        parent = header["parent_run_id"]
        if pipeline_run := header.get("pipeline_run"):
            parent = find_or_open_root(self._client, experiment_id, PipelineRun(**pipeline_run))
        if header.get("root"):
            run_id = parent
        else:
            tags = {PARENT_TAG: parent} if parent else {}
            key, name = (KEY_TAG, header["key"]), header["run_name"]
            run, found = find_or_open(self._client, experiment_id, key, name, tags, header["time"])
            run_id = run.info.run_id
            if found and run.info.status != "RUNNING":
                self._client.update_run(run_id, status="RUNNING")
        with self._lock:
            self._mirror.remember_run(run_id)
        return run_id

    def _log(self, run_id: str, points: list[Any], params: dict[str, str], tags: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        short = {key: cut(value, PARAM_LENGTH) for key, value in params.items()}
        entities = [*points, *(Param(*item) for item in short.items())]
        entities += [RunTag(key, cut(value, TAG_LENGTH)) for key, value in tags.items()]
        if not entities:
            return
        self._log_entities(run_id, entities)
        for key, value in params.items():
            if short[key] != value:
                try:
                    self._client.log_text(run_id, value, f"params/{key}.txt")
                except Exception as error:
                    self._existing_run(run_id)  # raises when it is the server that is away
                    logger.warning(
                        "the whole value of parameter %s is not uploaded: %s", key, in_short(error)
                    )

    def _log_entities(self, run_id: str, entities: list[Any]) -> None:
        """Log a batch; when the server refuses it, log its parts, so that one bad value holds up nothing."""
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
            logger.warning(
                "parameter %s of run %s stays %r; %r goes to the tag param_changed.%s",
                entity.key,
                run_id,
                run.data.params[entity.key],
                entity.value,
                entity.key,
            )
            self._client.set_tag(run_id, f"param_changed.{entity.key}"[:NAME_LENGTH], entity.value)
        else:
            logger.warning("MLflow refuses %s %r: %s", type(entity).__name__.lower(), entity.key, refusal)

    def _existing_run(self, run_id: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise RunGone(f"run {run_id} does not exist at {self._uri}") from error
            raise
        if run.info.lifecycle_stage == "deleted":
            raise RunGone(f"run {run_id} is deleted; `mlflow runs restore --run-id {run_id}` brings it back")
        return run

    def _upload(self, run_id: str, record: dict[str, Any]) -> None:
        """Upload a file or folder; while the server answers, a few failures are enough to go on without."""
        path = self._mirror.path.parent / record["path"]
        if not path.exists():
            logger.warning("artifact %s is not uploaded: it is not there any more", path)
            return
        try:
            if path.is_dir():
                self._client.log_artifacts(run_id, str(path), record["folder"] or None)
            else:
                self._client.log_artifact(run_id, str(path), record["folder"] or None)
        except Exception as error:
            self._existing_run(run_id)  # raises when it is the server that is away
            n, failures = self._failed_artifact
            failures = failures + 1 if n == record["n"] else 1
            self._failed_artifact = (record["n"], failures)
            if failures < self._artifact_attempts:
                raise
            logger.warning("artifact %s is not uploaded: %s", path, in_short(error))


def cut(text: str, length: int) -> str:
    note = " … [cut]"
    return text if len(text) <= length else text[: length - len(note)] + note
