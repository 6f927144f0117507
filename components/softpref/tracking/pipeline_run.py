"""The run of a whole pipeline in MLflow: every step finds it by the pipeline run's id. Knows no mirror.

The id comes from the environment, so that no parameter of a step, and no key of KFP's cache, holds it: the
cluster profile has Kubernetes set it from the pod's labels, the local runner sets it itself. The run bears it
as the tag by which KFP's own MLflow plugin marks the run that it opens; where the plugin is on, that one is
taken.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from softpref.tracking.mirror import as_text, usable_name
from softpref.tracking.mlflow_store import (
    find_experiment,
    in_short,
    mlflow_ready,
    open_client,
    resolve_tracking_uri,
    short_requests,
    source_tags,
)

logger = logging.getLogger(__name__)

RUN_ID, RUN_NAME, KFP_UI = "SOFTPREF_RUN_ID", "SOFTPREF_RUN_NAME", "SOFTPREF_KFP_UI"
KEY_TAG = "softpref.tracking_key"  # of every run that a stage opens
PARENT_TAG = "mlflow.parentRunId"
_ID_TAG, _ADDRESS_TAG = "kfp.pipeline_run_id", "kfp.pipeline_run_url"
_TAG_LENGTH = 8000
_SETTLE = 1.0  # seconds after which a run that another step opened at the same moment can be seen


class PipelineRun(NamedTuple):
    """One run of a pipeline, on a cluster or on this machine.

    Attributes:
        name: for people; on a cluster, until the plan has told the run's own, that of its workflow.
    """

    id: str
    name: str


def current_pipeline_run() -> PipelineRun | None:
    """The pipeline run that this process is a step of, or None."""
    run_id = os.environ.get(RUN_ID)
    return PipelineRun(run_id, os.environ.get(RUN_NAME) or run_id) if run_id else None


def experiment_of(client: Any, name: str, uri: str) -> str:
    """Id of the experiment: that of KFP's MLflow plugin where it opened the pipeline's run, else by name."""
    given = os.environ.get("MLFLOW_EXPERIMENT_ID")
    by_plugin = current_pipeline_run() and os.environ.get("MLFLOW_RUN_ID")
    if given and by_plugin and os.environ.get("MLFLOW_TRACKING_URI", uri).rstrip("/") == uri.rstrip("/"):
        return given
    return find_experiment(client, name, uri)


def find_or_open(
    client: Any, experiment_id: str, key: tuple[str, str], name: str, tags: Mapping[str, str], began: int
) -> tuple[Any, bool]:
    """The run with a tag, opened when there is none; of several opened at the same moment, the oldest.

    Args:
        key: the tag and its value.
        tags: of a run that is opened, besides the key.
        began: milliseconds since 1970.

    Returns:
        The run, and whether it was there already.
    """

    def search() -> list[Any]:
        query = f"tags.`{key[0]}` = '{key[1]}'"
        return client.search_runs(
            [experiment_id], filter_string=query, order_by=["attributes.start_time ASC"]
        )

    if found := search():
        return found[0], True
    opened = client.create_run(  # MLflow has no way to open a run only where there is none
        experiment_id, start_time=began, tags={**source_tags(), **tags, key[0]: key[1]}, run_name=name
    )
    time.sleep(_SETTLE)
    oldest = min(search(), key=lambda run: (run.info.start_time, run.info.run_id), default=opened)
    if oldest.info.run_id != opened.info.run_id:  # another step was faster
        client.delete_run(opened.info.run_id)
    return oldest, False


def find_or_open_root(client: Any, experiment_id: str, run: PipelineRun) -> str:
    """Id of the MLflow run of a pipeline run; one that a step which was stopped had ended is open again.

    Of another pipeline run than this process's own, whose records come late, it stays as it is.
    """
    tags = {_ADDRESS_TAG: address} if (address := run_address(run)) else {}
    now = int(time.time() * 1000)
    root, was_there = find_or_open(client, experiment_id, (_ID_TAG, run.id), run.name, tags, now)
    if was_there and root.info.status != "RUNNING" and run.id == os.environ.get(RUN_ID):
        client.update_run(root.info.run_id, status="RUNNING")
    return root.info.run_id


def run_address(run: PipelineRun) -> str:
    """Where KFP's UI shows the run; empty where nobody has said where the UI is."""
    ui = os.environ.get(KFP_UI, "").rstrip("/")
    return f"{ui}/#/runs/details/{run.id}" if ui else ""


def finish_pipeline_run(
    status: Literal["FINISHED", "FAILED", "KILLED"],
    *,
    name: str = "",
    tags: Mapping[str, Any] | None = None,
    experiment: str = "softpref",
    tracking_uri: str | None = None,
    patience: float = 30.0,
) -> None:
    """End the MLflow run of this pipeline run and whatever below it no step has ended. Raises nothing.

    A run that a terminated step marked KILLED stays so. Runs that KFP's MLflow plugin opened for each step
    and loop hold nothing that the stages' own do not say better; they are deleted (MLflow can restore them).

    Args:
        status: how its steps ended.
        name: of the pipeline run, as people see it.
        tags: for the run of the pipeline.
        patience: seconds to wait for a server that is away.
    """
    run, uri = current_pipeline_run(), resolve_tracking_uri(tracking_uri)
    if run is None or not mlflow_ready(uri):
        return
    run, deadline = run._replace(name=name or run.name), time.monotonic() + patience
    while True:
        try:
            with short_requests():
                client = open_client(uri)
                _finish(client, experiment_of(client, experiment, uri), run, status, tags or {})
            return
        except Exception as error:  # whatever the network, the store or its driver came up with
            if time.monotonic() > deadline or uri.startswith("sqlite:"):
                logger.warning(
                    "the run of the pipeline was not ended: MLflow at %s: %s", uri, in_short(error)
                )
                return
            time.sleep(5)


def _finish(client: Any, experiment_id: str, run: PipelineRun, status: str, tags: Mapping[str, Any]) -> None:
    now = int(time.time() * 1000)
    root, _ = find_or_open(client, experiment_id, (_ID_TAG, run.id), run.name, {}, now)
    own = {"mlflow.runName": run.name, **tags}
    if status == "FAILED" and root.info.status == "KILLED":
        status = "KILLED"
    own["softpref.ended"] = status  # KFP's plugin, which ends the run after all steps, calls KILLED failed
    if address := run_address(run):
        own[_ADDRESS_TAG] = address
    for key, value in own.items():
        client.set_tag(root.info.run_id, usable_name(key), as_text(value)[:_TAG_LENGTH])
    parents = [root.info.run_id]
    for parent in parents:  # grows: the plugin's runs of loops have children
        for child in client.search_runs([experiment_id], f"tags.`{PARENT_TAG}` = '{parent}'"):
            if KEY_TAG not in child.data.tags and os.environ.get("MLFLOW_RUN_ID"):
                parents.append(child.info.run_id)
                client.delete_run(child.info.run_id)
            elif child.info.status == "RUNNING":
                client.set_terminated(child.info.run_id, "FAILED" if status == "FINISHED" else status)
    client.set_terminated(root.info.run_id, status)
