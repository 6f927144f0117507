"""The MLflow run of a whole pipeline: every step finds it by the pipeline run's id. Knows no mirror.

The id comes from the environment, so that it enters no step's parameters and no key of KFP's cache: on a
cluster Kubernetes sets it from the pod's labels, on this machine the runner does. It is stored under the tag
that KFP's own MLflow plugin uses, so where the plugin is on, its run is the one found.
"""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from softpref.errors import ConfigError
from softpref.remote import public_url, within
from softpref.tracking import waiting
from softpref.tracking.mirror import TAG_LENGTH, as_text, usable_name
from softpref.tracking.mlflow_store import (
    find_experiment,
    in_short,
    lasting_refusal,
    mlflow_ready,
    open_client,
    resolve_tracking_uri,
    short_requests,
    source_tags,
)
from softpref.tracking.waiting import END, START, Answers, with_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

RUN_ID, RUN_NAME, KFP_UI = "SOFTPREF_RUN_ID", "SOFTPREF_RUN_NAME", "SOFTPREF_KFP_UI"
KEY_TAG = "softpref.tracking_key"  # of every run that a stage opens
_IN_USE_TAG = "softpref.in_use"  # of the run that whoever asked for one has taken; see `find_or_open`
PARENT_TAG = "mlflow.parentRunId"
_ID_TAG, _ADDRESS_TAG = "kfp.pipeline_run_id", "kfp.pipeline_run_url"
_PAUSE = 2.0  # seconds between attempts to reach a server that is away
_SETTLE = 1.0  # seconds until a run that another step opened at the same moment is visible


class PipelineRun(NamedTuple):
    """One run of a pipeline, on a cluster or on this machine.

    Attributes:
        name: for people; on a cluster the workflow's, until the plan step has told the run's own.
    """

    id: str
    name: str


def current_pipeline_run() -> PipelineRun | None:
    """The pipeline run that this process is a step of, or None."""
    run_id = os.environ.get(RUN_ID)
    return PipelineRun(run_id, os.environ.get(RUN_NAME) or run_id) if run_id else None


def experiment_of(client: MlflowClient, name: str, uri: str) -> str:
    """Id of the experiment: KFP's MLflow plugin's where it opened the pipeline's run, else by name."""
    given = os.environ.get("MLFLOW_EXPERIMENT_ID")
    by_plugin = current_pipeline_run() and os.environ.get("MLFLOW_RUN_ID")
    if given and by_plugin and _same_server(uri):
        return given
    return find_experiment(client, name, uri)


def _same_server(uri: str) -> bool:
    """Whether the store at `uri` is that of the environment, if it names one."""
    named = os.environ.get("MLFLOW_TRACKING_URI")
    return not named or resolve_tracking_uri(named).rstrip("/") == uri.rstrip("/")


def find_or_open(
    client: MlflowClient,
    experiment_id: str,
    key: tuple[str, str],
    name: str,
    tags: Mapping[str, str],
    began: int,
) -> tuple[Run, bool]:
    """The run with a tag, opened when there is none.

    MLflow has no way to open a run only where there is none. So several may have the tag: opened by several
    steps at the same moment, or by a request that was given up, and that the server carried out later. One
    that is in use is taken, else the oldest; it is marked before anything is logged to it, so whoever looks
    later takes it, too. The others are removed when it ends.

    Args:
        key: the tag and its value.
        tags: further tags of a run that is opened here.
        began: milliseconds since 1970.

    Returns:
        The run, and whether it existed before.
    """
    found, opened = _runs_with(client, experiment_id, key), None
    if not found:
        opened = client.create_run(
            experiment_id, start_time=began, tags={**source_tags(), **tags, key[0]: key[1]}, run_name=name
        )
        time.sleep(_SETTLE)
        found = _runs_with(client, experiment_id, key) or [opened]
    run = found[0]
    if _IN_USE_TAG not in run.data.tags:
        client.set_tag(run.info.run_id, _IN_USE_TAG, "true")
    if opened and opened.info.run_id != run.info.run_id:  # another step was faster
        _discard(client, opened)
    return run, opened is None


def discard_unused(client: MlflowClient, run: Run, key: tuple[str, str]) -> None:
    """Remove the runs with a tag that nobody has taken, but for this one."""
    for other in _runs_with(client, run.info.experiment_id, key):
        if other.info.run_id != run.info.run_id and _IN_USE_TAG not in other.data.tags:
            _discard(client, other)


def _runs_with(client: MlflowClient, experiment_id: str, key: tuple[str, str]) -> list[Run]:
    """The runs with a tag, the one to take first."""
    return sorted(client.search_runs([experiment_id], f"tags.`{key[0]}` = '{key[1]}'"), key=_order)


def _order(run: Run) -> tuple[bool, int, str]:
    """By which everybody orders runs with one tag."""
    return _IN_USE_TAG not in run.data.tags, run.info.start_time, run.info.run_id


def _discard(client: MlflowClient, run: Run) -> None:
    """Remove a run, but end it where something was logged to it."""
    if not run.data.metrics and not run.data.params:
        _remove(client, run, "KILLED")
    elif run.info.status == "RUNNING":
        client.set_terminated(run.info.run_id, "KILLED")


def _remove(client: MlflowClient, run: Run, otherwise: str) -> None:
    """Delete a run, which MLflow can restore; end it where that is not allowed."""
    from mlflow.exceptions import MlflowException

    try:
        client.delete_run(run.info.run_id)
    except MlflowException as error:  # MLflow's permission to edit is none to delete
        if error.error_code != "PERMISSION_DENIED":
            raise
        client.set_terminated(run.info.run_id, otherwise)


def find_or_open_root(client: MlflowClient, experiment_id: str, run: PipelineRun) -> str:
    """Id of the MLflow run of a pipeline run; reopened where a stopped step had ended it.

    The run of another pipeline run, whose records arrive late, is not reopened.
    """
    tags = {_ADDRESS_TAG: address} if (address := run_address(run)) else {}
    now = int(time.time() * 1000)
    root, was_there = find_or_open(client, experiment_id, (_ID_TAG, run.id), run.name, tags, now)
    if was_there and root.info.status != "RUNNING" and run.id == os.environ.get(RUN_ID):
        client.update_run(root.info.run_id, status="RUNNING")
    run_id: str = root.info.run_id  # MLflow's decorator loses the type
    return run_id


def run_address(run: PipelineRun) -> str:
    """Where KFP's UI shows the run; empty where the UI's address is unknown."""
    ui = os.environ.get(KFP_UI, "").rstrip("/")
    return f"{ui}/#/runs/details/{run.id}" if ui else ""


def finish_pipeline_run(
    status: Literal["FINISHED", "FAILED", "KILLED"],
    *,
    name: str = "",
    tags: Mapping[str, object] | None = None,
    experiment: str = "softpref",
    tracking_uri: str | None = None,
    patience: float | None = None,
) -> None:
    """End the MLflow run of this pipeline run and all runs below it that are still open. Never raises.

    A run that a terminated step marked KILLED stays so. The runs that KFP's MLflow plugin opened for each
    step and loop only repeat what the stages' own hold; they are deleted (MLflow can restore them).

    Args:
        status: how the steps ended.
        name: of the pipeline run, as people see it.
        tags: for the pipeline's run.
        patience: seconds to wait for a server that is away; default: as long as a stage at its end.
    """
    run, uri = current_pipeline_run(), resolve_tracking_uri(tracking_uri)
    if run is None or not mlflow_ready(uri):
        return
    run, answers = run._replace(name=name or run.name), Answers()
    silence = with_store(waiting.patience(END) if patience is None else patience, uri)
    deadline = time.monotonic() + silence

    def finish() -> None:
        with short_requests():
            client = answers.of(open_client(uri))
            _finish(client, experiment_of(client, experiment, uri), run, status, tags or {})

    while True:
        left = deadline - time.monotonic()
        try:
            within(left, finish, answers.last)
            return
        except Exception as error:  # of the network, the store or its driver
            if time.monotonic() + _PAUSE > deadline or uri.startswith("sqlite:"):
                logger.warning(
                    "MLflow at %s: the pipeline's run was not ended: %s", public_url(uri), in_short(error)
                )
                return
            time.sleep(_PAUSE)


def _finish(
    client: MlflowClient, experiment_id: str, run: PipelineRun, status: str, tags: Mapping[str, object]
) -> None:
    now = int(time.time() * 1000)
    root_key = (_ID_TAG, run.id)
    root, _ = find_or_open(client, experiment_id, root_key, run.name, {}, now)
    own: dict[str, object] = {"mlflow.runName": run.name, **tags}
    if status == "FAILED" and root.info.status == "KILLED":
        status = "KILLED"
    own["softpref.ended"] = status  # KFP's plugin, which ends the run after all steps, calls KILLED failed
    if address := run_address(run):
        own[_ADDRESS_TAG] = address
    for key, value in own.items():
        client.set_tag(root.info.run_id, usable_name(key), as_text(value)[:TAG_LENGTH])
    root_id = root.info.run_id
    stages: dict[str, list[Run]] = defaultdict(list)
    doubles = {run.info.run_id: run for run in _runs_with(client, experiment_id, root_key)}
    del doubles[root_id]
    parents = [root_id, *doubles]
    for parent in parents:  # grows: the plugin's runs of loops have children
        for child in client.search_runs([experiment_id], f"tags.`{PARENT_TAG}` = '{parent}'"):
            stage = child.data.tags.get(KEY_TAG)
            if stage is None and os.environ.get("MLFLOW_RUN_ID"):
                parents.append(child.info.run_id)
                _remove(client, child, status)
                continue
            if parent in doubles:
                client.set_tag(child.info.run_id, PARENT_TAG, root_id)
            stages[stage or child.info.run_id].append(child)
    for runs in stages.values():
        child, *unused = sorted(runs, key=_order)
        if child.info.status == "RUNNING":
            client.set_terminated(child.info.run_id, "FAILED" if status == "FINISHED" else status)
        for double in unused:
            _discard(client, double)
    for double in doubles.values():
        _discard(client, double)
    client.set_terminated(root.info.run_id, status)


def check_server(experiment: str, tracking_uri: str | None = None) -> str | None:
    """Id of the pipeline's run in MLflow, opened when absent; None, with a warning, while MLflow is away.

    Raises:
        ConfigError: what is wrong will not pass by waiting: the server refuses the login or its own host
            name, the experiment was deleted, or there is no usable store at this address. Without this check
            a sweep would fail only at its end, when it registers the model.
    """
    uri, run, answers = resolve_tracking_uri(tracking_uri), current_pipeline_run(), Answers()
    silence = with_store(waiting.patience(START), uri)
    if not mlflow_ready(uri):
        logger.warning("mlflow is not installed here; going on, records wait")
        return None

    def look_up() -> str | None:
        with short_requests():
            client = answers.of(open_client(uri))
            experiment_id = experiment_of(client, experiment, uri)
            return find_or_open_root(client, experiment_id, run) if run else None

    try:
        return within(silence, look_up, answers.last)
    except Exception as error:
        place = public_url(uri)
        if refusal := lasting_refusal(error, uri):
            raise ConfigError(f"MLflow at {place} {refusal}") from error
        logger.warning("MLflow at %s cannot be reached (%s); going on, records wait", place, in_short(error))
        return None
