"""Gives the steps of a pipeline what a cluster's profile says: `place` alone knows Kubernetes.

Runs on this machine apply no profile: they trace the pipelines without one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from softpref.pipelines.profiles import STAGES, TRAINING, Profile, threads
from softpref.preflight.stage import ARTIFACT_SCHEME
from softpref.tracking import KFP_UI, RUN_ID, RUN_NAME

_profile: ContextVar[Profile | None] = ContextVar("profile", default=None)
_artifact: ContextVar[str] = ContextVar("artifact", default="")  # address of a KFP artifact to begin with
_LONG = 30 * 86400  # seconds within which a step without timeout is tried again
_BACKOFF = 30


@contextlib.contextmanager
def applied(profile: Profile | None, source: str) -> Iterator[None]:
    """Within it, a pipeline is traced for a cluster, and begins with the source where that is KFP's."""
    tokens = _profile.set(profile), _artifact.set(source if source.startswith(ARTIFACT_SCHEME) else "")
    try:
        yield
    finally:
        _profile.reset(tokens[0])
        _artifact.reset(tokens[1])


def place(task: Any, stage: str, *, gpus: Any = 0, cache: bool = True) -> None:
    """Give a task what the profile that is being compiled for says of its stage; nothing without a profile.

    Args:
        gpus: the pipeline's parameter, or its fixed number, for a training stage.
        cache: False for a task that must run anew whatever the profile says.
    """
    profile = _profile.get()
    if profile is None:
        if not cache:
            task.set_caching_options(False)
        return
    from kfp import kubernetes

    settings = profile.stages[stage]
    if profile.trainjob and stage in TRAINING:  # the work is done by the job's nodes; the task waits
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
        # of all attempts together: an hour, unless it is given
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
    """The training stages' parameter of that name on the cluster that is being compiled for."""
    profile = _profile.get()
    if profile and profile.trainjob:
        return json.dumps({"trainjob": dataclasses.asdict(profile.trainjob)})
    if profile and profile.checkpoints:
        volume = profile.checkpoints
        return json.dumps({"checkpoints": f"{volume.mount_path.rstrip('/')}/{volume.folder}"})
    return ""


@contextlib.contextmanager
def ended(**where: Any) -> Iterator[None]:
    """Steps after which, on a cluster, a last one ends the run in MLflow, however they have ended.

    Args:
        where: `experiment` and `tracking_uri`.
    """
    if _profile.get() is None:  # on this machine the runner does it
        yield
        return
    from kfp import dsl

    from softpref.preflight.component import finish_run

    finish = finish_run(run_name=run_name(), **where)
    finish.set_display_name("End the run in MLflow")
    place(finish, "finish", cache=False)
    with dsl.ExitHandler(finish, name="steps"):
        yield


def run_name() -> str:
    """The name of the pipeline run, as KFP puts it in."""
    from kfp import dsl

    return dsl.PIPELINE_JOB_NAME_PLACEHOLDER if _profile.get() else ""


def source_artifact() -> dict[str, Any]:
    """The data stage's artifact, where the source is the address of one in KFP's own store."""
    if not _artifact.get():
        return {}
    from kfp import dsl

    dataset = dsl.importer(artifact_uri=_artifact.get(), artifact_class=dsl.Dataset)
    return {"artifact": dataset.output}


def models_at_once() -> int | None:
    """How many models of a sweep train at the same time; None sets no limit."""
    profile = _profile.get()
    return (profile.models_at_once or None) if profile else None
