"""Runs a training stage as a `TrainJob` of Kubeflow Trainer, from the step that submits it.

Folders are copied to the shared volume, the job's nodes train there (`softpref.distributed.node`), and the
result is copied back. The job's name depends only on what is trained: a repeated step finds its folder,
removes a job left behind, and continues from the checkpoints. However the step ends, the job ends with it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softpref.config import without_secrets
from softpref.disk import write_private
from softpref.distributed.command import Stage, job_name, make_on_volume, read_result
from softpref.distributed.config import TrainJobConfig
from softpref.distributed.kubernetes_nodes import KubernetesNodes
from softpref.distributed.node import (
    CHECKPOINTS,
    JOB_FILE,
    OUTPUT,
    PARAMETERS_FILE,
    RESULT_FILE,
    NodeTask,
    finished,
)
from softpref.distributed.processes import StageFailed, cancellable
from softpref.errors import ConfigError
from softpref.tracking.pipeline_run import RUN_ID, RUN_NAME

logger = logging.getLogger(__name__)

_FORWARDED = (
    RUN_ID,
    RUN_NAME,
    "MLFLOW_TRACKING_URI",
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_EXPERIMENT_NAME",
    "SOFTPREF_TRACKING_WAIT",
    "HF_HUB_OFFLINE",
)
"""Variables that the nodes get from this step; none holds a secret."""

_PATIENCE = 300.0  # seconds without the cluster's API until the step gives up


def run_trainjob(
    job: TrainJobConfig,
    stage: Stage,
    values: Mapping[str, Any],
    *,
    folders: Mapping[str, str],
    where: Mapping[str, str],
) -> dict[str, float]:
    """Run a training stage as a TrainJob and wait for it; see `softpref.distributed.launch.run_stage`.

    Raises:
        SoftprefError: the stage's own.
        StageFailed: the job failed, more often than `job.retries` allows, or did not start in time.
    """
    folders = {name: os.path.abspath(path) for name, path in folders.items()}
    gpus = int(job.gpus_per_node if job.gpus_per_node is not None else values.get("gpus") or 0)
    values = {**values, "gpus": gpus}
    nodes = KubernetesNodes(job, gpus)
    name = job_name(stage, values, folders, where)
    folder = nodes.folder(name)
    task = NodeTask(
        stage,
        {
            **{kind: kind for kind in folders if kind != "output"},
            "output": OUTPUT,
            "checkpoint_dir": CHECKPOINTS,
        },
        {key: value for key, value in where.items() if value},
        gpus or job.processes_per_node,
        gpus,
    )
    with cancellable():
        _require_volume(job, folder)
        try:
            nodes.delete(name)  # left by a step that was killed
            if not finished(folder / RESULT_FILE):
                _prepare(folder, task, values, folders)
                _attempts(job, nodes, name, folder)
            result = read_result(folder / RESULT_FILE)
            shutil.copytree(folder / OUTPUT, folders["output"], dirs_exist_ok=True)
        finally:
            nodes.delete(name)
            _forget_secrets(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return result


def node_environment(job: TrainJobConfig) -> dict[str, str]:
    """Variables for the nodes: the profile's, and this step's without secrets."""
    return {key: os.environ[key] for key in _FORWARDED if os.environ.get(key)} | job.env


def _require_volume(job: TrainJobConfig, folder: Path) -> None:
    """Without the mount, no node would find the copied data."""
    if not os.path.ismount(job.mount_path):
        raise ConfigError(
            f"nothing is mounted at {job.mount_path} in this step; mount the claim {job.volume_claim} there, "
            "as the cluster profile does for steps that submit TrainJobs"
        )
    make_on_volume(folder)


def _prepare(folder: Path, task: NodeTask, values: Mapping[str, object], folders: Mapping[str, str]) -> None:
    """Copy data, reference and parameters to the volume; folders that are already there stay."""
    for kind, source in folders.items():
        target = folder / kind
        if kind == "output" or target.is_dir():
            continue
        part = folder / f"{kind}.part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source, part)
        part.replace(target)  # so a folder of this name is complete
    (folder / RESULT_FILE).unlink(missing_ok=True)  # an earlier error
    write_private(folder / PARAMETERS_FILE, json.dumps(dict(values)))
    task.write(folder)


def _forget_secrets(folder: Path) -> None:
    """Leave no password and no signature in a folder that stays; a repeated step writes its files anew."""
    for file in (folder / PARAMETERS_FILE, folder / JOB_FILE):
        if file.is_file():
            write_private(file, json.dumps(without_secrets(json.loads(file.read_text(encoding="utf-8")))))


def _attempts(job: TrainJobConfig, nodes: KubernetesNodes, name: str, folder: Path) -> None:
    """Submit the job until it completes, at most `job.retries` times again."""
    env, result = node_environment(job), folder / RESULT_FILE
    for attempt in range(job.retries + 1):
        if attempt:
            nodes.delete(name)
        nodes.submit(name, env)
        logger.warning("TrainJob %s: submitted, %d nodes", name, job.nodes)
        status = _watch(job, nodes, name, result)
        if status == "complete" and finished(result):
            return
        read_result(result)  # raises the stage's own error
        what = f"TrainJob {name} {status}"
        if status == "complete":
            what += f", and left no result in {result}; do its nodes mount this volume?"
        lines = nodes.failure(name)
        if attempt < job.retries:
            logger.warning("%s; submitted again, to continue from its last checkpoint", what)
    kept = f"checkpoints are kept in {folder / CHECKPOINTS}; the same step, run again, continues from them"
    raise StageFailed("\n".join([f"{what} ({kept}); last lines of its nodes:", *lines]))


def _watch(job: TrainJobConfig, nodes: KubernetesNodes, name: str, result: Path) -> str:
    """Print the job's output until it ends; returns its final status.

    Args:
        result: the file where the stage leaves its result, or its error.

    Raises:
        SoftprefError: the stage's own; the runtime may be about to start it again, in vain.
        StageFailed: the nodes did not start in time, or the state was unknown for too long.
    """
    over = threading.Event()
    printer = threading.Thread(target=_print_output, args=(nodes, name, over), daemon=True)
    printer.start()
    started = answered = time.monotonic()
    was_running, said = False, ""
    try:
        while True:
            try:
                state = nodes.state(name)
                answered = time.monotonic()
            except OSError as error:
                if time.monotonic() - answered > _PATIENCE:
                    raise StageFailed(f"the state of TrainJob {name} is unknown: {error}") from error
                logger.warning("the state of TrainJob %s is unknown now: %s", name, error)
                time.sleep(job.poll_interval)
                continue
            now = ", ".join(f"{node} {status}" for node, status in sorted(state.nodes.items()))
            if (now := f"{state.status}: {now}" if now else state.status) != said:
                logger.warning("TrainJob %s: %s", name, now)
                said = now
            was_running = was_running or state.status == "running"
            read_result(result)
            if state.status in ("complete", "failed", "gone"):
                over.set()
                printer.join(30)  # for output still on its way; not after an exception
                return state.status
            if job.start_timeout and not was_running and time.monotonic() - started > job.start_timeout:
                what = f"TrainJob {name} did not start within {job.start_timeout} s ({said}); check quota, "
                what += "queue and free GPUs, or raise start_timeout"
                raise StageFailed("\n".join([what, *nodes.failure(name)]))
            time.sleep(job.poll_interval)
    finally:
        over.set()


def _print_output(nodes: KubernetesNodes, name: str, over: threading.Event) -> None:
    """Print the first node's output; a broken stream is continued where it broke."""
    last = "\n"
    while True:
        last_round = over.is_set()
        try:
            for text in nodes.output(name):
                sys.stdout.write(text)
                sys.stdout.flush()
                last = text
        except OSError as error:
            logger.debug("the output of TrainJob %s broke off: %s", name, error)
        if last_round:
            if not last.endswith("\n"):
                sys.stdout.write("\n")
            return
        over.wait(1)
