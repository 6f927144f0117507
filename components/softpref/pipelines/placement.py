"""Applies a cluster's profile to the steps of a pipeline. Pipelines for this machine have no profile."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

from softpref.pipelines.profiles import STAGES, TRAINING, Profile, threads
from softpref.preflight.stage import ARTIFACT_SCHEME
from softpref.tracking import KFP_UI, RUN_ID, RUN_NAME

if TYPE_CHECKING:
    from kfp.dsl import PipelineTask
    from kfp.dsl.pipeline_channel import PipelineChannel

_profile: ContextVar[Profile | None] = ContextVar("profile", default=None)
_artifact: ContextVar[str] = ContextVar("artifact", default="")  # address of a source in KFP's own store
_LONG = 30 * 86400  # seconds within which a step without timeout is retried
_BACKOFF = 30


@contextlib.contextmanager
def applied(profile: Profile | None, source: str) -> Iterator[None]:
    """Within it a pipeline is traced for a cluster, and for a source, which may be a KFP artifact."""
    tokens = _profile.set(profile), _artifact.set(source if source.startswith(ARTIFACT_SCHEME) else "")
    try:
        yield
    finally:
        _profile.reset(tokens[0])
        _artifact.reset(tokens[1])


def place(
    task: PipelineTask, stage: str, *, gpus: PipelineChannel | str | int = 0, cache: bool = True
) -> None:
    """Give a task its stage's settings in the present profile, if there is one.

    Args:
        gpus: of a training stage: the pipeline's parameter, or the fixed number.
        cache: False for a task that must always run, whatever the profile says.
    """
    profile = _profile.get()
    if profile is None:
        if not cache:
            task.set_caching_options(False)
        return
    from kfp import kubernetes

    settings = profile.stages[stage]
    if profile.trainjob and stage in TRAINING:  # the task only waits for the job's nodes
        waiting = profile.stages["plan"]
        settings = dataclasses.replace(
            settings, cpu=waiting.cpu, memory=waiting.memory, gpus=0, node_selector={}, tolerations=[]
        )
    task.set_container_image(profile.images[STAGES[stage]])
    task.set_caching_options(cache and settings.cache)
    if settings.cpu:
        task.set_cpu_request(settings.cpu).set_cpu_limit(settings.cpu)
    if settings.memory:
        task.set_memory_request(settings.memory).set_memory_limit(settings.memory)
    if settings.retries:
        # the maximum covers all attempts together; by default it is an hour
        whole = (settings.retries + 1) * settings.timeout + _BACKOFF * 2**settings.retries
        task.set_retry(
            settings.retries,
            backoff_duration=f"{_BACKOFF}s",
            backoff_factor=2.0,
            backoff_max_duration=f"{whole if settings.timeout else _LONG}s",
        )
    if settings.timeout:
        kubernetes.set_timeout(task, settings.timeout)
    selector, tolerations = dict(settings.node_selector), list(settings.tolerations)
    if settings.gpus:
        count = gpus if settings.gpus == "parameter" else settings.gpus
        task.set_accelerator_type(profile.gpu.resource).set_accelerator_limit(count)
        selector |= profile.gpu.node_selector
        tolerations += profile.gpu.tolerations
        if profile.gpu.shared_memory:
            kubernetes.empty_dir_mount(
                task, "shared-memory", "/dev/shm", medium="Memory", size_limit=profile.gpu.shared_memory
            )
    for key, value in selector.items():
        kubernetes.add_node_selector(task, key, value)
    for toleration in tolerations:
        given = dict(toleration)
        kubernetes.add_toleration(task, toleration_seconds=given.pop("tolerationSeconds", None), **given)
    shared = profile.trainjob or profile.checkpoints
    if shared and stage in TRAINING:
        kubernetes.mount_pvc(task, shared.volume_claim, shared.mount_path)
    for volume in profile.volumes:
        if stage in (volume.stages or STAGES):
            kubernetes.mount_pvc(task, volume.claim, volume.path, volume.sub_path)
    kubernetes.use_field_path_as_env(task, RUN_ID, "metadata.labels['pipeline/runid']")
    kubernetes.use_field_path_as_env(task, RUN_NAME, "metadata.labels['workflows.argoproj.io/workflow']")
    for variable, source in profile.secrets.items():
        kubernetes.use_secret_as_env(task, source.secret, {source.key: variable}, optional=source.optional)
    told = {KFP_UI: profile.kfp_ui} if profile.kfp_ui else {}
    for variable, value in {**told, **threads(settings), **profile.environment}.items():
        task.set_env_variable(variable, value)
    for key, value in profile.labels.items():
        kubernetes.add_pod_label(task, key, value)
    for key, value in profile.annotations.items():
        kubernetes.add_pod_annotation(task, key, value)
    if profile.image_pull_policy:
        kubernetes.set_image_pull_policy(task, profile.image_pull_policy)
    if profile.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, profile.image_pull_secrets)
    kubernetes.set_security_context(
        task, run_as_user=profile.user, run_as_group=profile.user, run_as_non_root=True
    )


def launcher() -> str:
    """The training stages' parameter `launcher` for the present profile."""
    profile = _profile.get()
    if profile and profile.trainjob:
        return json.dumps({"trainjob": dataclasses.asdict(profile.trainjob)})
    if profile and profile.checkpoints:
        volume = profile.checkpoints
        return json.dumps({"checkpoints": f"{volume.mount_path.rstrip('/')}/{volume.folder}"})
    return ""


@contextlib.contextmanager
def ended(experiment: object, tracking_uri: object) -> Iterator[None]:
    """On a cluster, after the steps traced within it a last one ends the run in MLflow, whatever happened."""
    if _profile.get() is None:  # on this machine the runner does it
        yield
        return
    from kfp import dsl

    from softpref.preflight.component import finish_run

    finish = finish_run(run_name=run_name(), experiment=experiment, tracking_uri=tracking_uri)
    finish.set_display_name("End the run in MLflow")
    place(finish, "finish", cache=False)
    with dsl.ExitHandler(finish, name="steps"):
        yield


def run_name() -> str:
    """The placeholder of the pipeline run's name, which KFP fills in."""
    from kfp import dsl

    return str(dsl.PIPELINE_JOB_NAME_PLACEHOLDER) if _profile.get() else ""


def source_artifact() -> dict[str, PipelineChannel]:
    """The data stage's input artifact, for a source in KFP's own store."""
    if not _artifact.get():
        return {}
    from kfp import dsl

    dataset = dsl.importer(artifact_uri=_artifact.get(), artifact_class=dsl.Dataset)
    return {"artifact": dataset.output}


def models_at_once() -> int | None:
    """The limit on models of a sweep that train at the same time; None: no limit."""
    profile = _profile.get()
    return (profile.models_at_once or None) if profile else None
