"""Reads and checks a cluster's profile, `clusters/NAME.yaml`: images, GPUs, secrets, limits."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from softpref.config import build_config, closest, read_mapping
from softpref.distributed.config import DNS_NAME, QUANTITY, TrainJobConfig
from softpref.errors import ConfigError
from softpref.pipelines.recipes import find_file

Value = TypeVar("Value")
CLUSTERS = Path(__file__).parent / "clusters"
STAGES = {  # of a pipeline, with the image of each
    "plan": "train",
    "data": "data",
    "sft": "train",
    "train": "train",
    "evaluate": "evaluate",
    "compare": "evaluate",
    "register": "evaluate",
    "finish": "train",
}
TRAINING = ("sft", "train")
_TOLERATION = ("key", "operator", "value", "effect", "tolerationSeconds")
_PINNED = re.compile(r"[^\s@]+(@sha256:[0-9a-f]{64}|:(?!latest$)[\w][\w.-]{0,127})")


@dataclass(frozen=True)
class Secret:
    """A key of a Kubernetes secret in the run's namespace, as an environment variable.

    Attributes:
        optional: tasks start even without the secret.
    """

    secret: str
    key: str
    optional: bool = False


@dataclass(frozen=True)
class Gpu:
    """Settings of tasks with GPUs.

    Attributes:
        resource: the extended resource of the device plugin.
        shared_memory: size of `/dev/shm`, through which the processes of a node exchange tensors; empty
            leaves the container runtime's 64 MiB.
    """

    resource: str = "nvidia.com/gpu"
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    shared_memory: str = ""


@dataclass(frozen=True)
class Checkpoints:
    """A folder of a volume where the training stages keep their checkpoints while they run."""

    volume_claim: str
    mount_path: str = "/shared"
    folder: str = "checkpoints"


@dataclass(frozen=True)
class Volume:
    """A PersistentVolumeClaim of the run's namespace, mounted into tasks.

    Attributes:
        path: where it is mounted; read-only only through the claim's access mode, ReadOnlyMany, because KFP
            cannot mount read-only.
        stages: which mount it; empty: all.
    """

    claim: str
    path: str
    sub_path: str = ""
    stages: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """Settings of a stage's tasks.

    Attributes:
        cpu, memory: request and limit, as Kubernetes writes them (`500m`, `8Gi`); empty sets none. A stage
            computes with as many threads as CPUs.
        gpus: a number, or `parameter`: the pipeline's parameter `gpus` (training stages only).
        timeout: seconds after which the pod is stopped; 0 sets none.
        retries: attempts after the first, each with the whole timeout.
        cache: reuse the outputs of an earlier task with the same inputs.
    """

    cpu: str = ""
    memory: str = ""
    gpus: int | Literal["parameter"] = 0
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    timeout: int = 0
    retries: int = 0
    cache: bool = True


@dataclass(frozen=True)
class Profile:
    """One cluster. The file `clusters/default.yaml` comments every entry.

    Attributes:
        images: full name, with tag or digest, of the images `data`, `train` and `evaluate`.
        stages: settings by stage (see `STAGES`).
        trainjob: trains in Kubeflow Trainer jobs; what it leaves out (image, secrets, environment, GPUs,
            tolerations) is taken from the tasks. None trains in the tasks themselves.
        checkpoints: where a repeated training stage continues from; None: nowhere outside its pod.
        kfp_ui: address of KFP's UI, for links in MLflow; empty: the one given at submission.
        parameters: defaults of the pipelines' parameters on this cluster.
        service_account: of the run; empty leaves the backend's.
        models_at_once: models of a sweep that train at the same time; 0 sets no limit.
    """

    name: str
    images: dict[str, str]
    stages: dict[str, Stage]
    gpu: Gpu
    secrets: dict[str, Secret]
    environment: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    image_pull_policy: Literal["", "Always", "IfNotPresent", "Never"] = ""
    image_pull_secrets: list[str] = field(default_factory=list)
    service_account: str = ""
    user: int = 1000
    models_at_once: int = 0
    trainjob: TrainJobConfig | None = None
    checkpoints: Checkpoints | None = None
    volumes: list[Volume] = field(default_factory=list)
    kfp_ui: str = ""

    @property
    def fixed_gpus(self) -> int | None:
        """GPUs of a training stage; None where the pipeline's parameter decides."""
        gpus = self.stages["train"].gpus
        return None if gpus == "parameter" else int(gpus)


def read_profile(name: str) -> Profile:
    """Read and check a profile: the name of a file in `clusters/`, or the path of one.

    Raises:
        ConfigError: there is no such file, or an entry is unknown or wrong, with what would be right.
    """
    path = find_file(name, CLUSTERS, "cluster profile")
    values = read_mapping(path)
    try:
        return _profile_of(path.stem, values)
    except ConfigError as error:
        raise ConfigError(f"cluster profile {path}: {error}") from error


def _profile_of(name: str, values: dict[str, Any]) -> Profile:
    entries = dict(values)
    stages = _mapping(entries, "stages")
    shared = _quoted(_mapping(stages, "all"))
    entries["stages"] = {
        stage: build_config(Stage, shared, _quoted(check_names(stages, STAGES, "stage").get(stage) or {}))
        for stage in STAGES
    }
    entries["gpu"] = build_config(Gpu, _mapping(entries, "gpu"))
    secrets = _mapping(entries, "secrets")
    for variable, entry in secrets.items():
        if not isinstance(entry, dict):
            raise ConfigError(f"secrets.{variable} must be {{ secret: NAME, key: KEY }}, got {entry!r}")
    entries["secrets"] = {variable: build_config(Secret, entry) for variable, entry in secrets.items()}
    entries["environment"] = {key: str(value) for key, value in _mapping(entries, "environment").items()}
    trainjob = _mapping(entries, "trainjob")
    entries.pop("trainjob", None)
    if entries.get("checkpoints"):
        entries["checkpoints"] = build_config(Checkpoints, _mapping(entries, "checkpoints"))
    volumes = entries.get("volumes") or []
    if not isinstance(volumes, list) or not all(isinstance(entry, dict) for entry in volumes):
        raise ConfigError(f"volumes must be a list like [{{claim: NAME, path: /data}}], got {volumes!r}")
    entries["volumes"] = [build_config(Volume, entry) for entry in volumes]
    if trainjob and entries.get("checkpoints"):
        raise ConfigError("checkpoints are for training in the tasks; a trainjob keeps its own on its volume")
    profile = build_config(Profile, {**entries, "name": name})
    _check(profile)
    if not trainjob:
        return profile
    return replace(profile, trainjob=build_config(TrainJobConfig, _of_nodes(profile), trainjob))


def _of_nodes(profile: Profile) -> dict[str, object]:
    """The settings that a TrainJob's nodes share with the tasks of the training stage."""
    settings, gpu = profile.stages["train"], profile.gpu
    return {
        "image": profile.images["train"],
        "cpu": settings.cpu,
        "memory": settings.memory,
        "gpu_resource": gpu.resource,
        "shared_memory": gpu.shared_memory,
        "node_selector": {**settings.node_selector, **gpu.node_selector},
        "tolerations": [*settings.tolerations, *gpu.tolerations],
        "image_pull_secrets": profile.image_pull_secrets,
        "secrets": {
            variable: f"{one.secret}/{one.key}{'?' if one.optional else ''}"
            for variable, one in profile.secrets.items()
        },
        "pod_labels": profile.labels,
        "pod_annotations": profile.annotations,
        "user": profile.user,
        "timeout": settings.timeout,
        "env": {**threads(settings), **profile.environment},
    }


def threads(settings: Stage) -> dict[str, str]:
    """One thread per CPU of the limit; libraries would count the node's CPUs."""
    if not settings.cpu:
        return {}
    cpus = float(settings.cpu[:-1]) / 1000 if settings.cpu.endswith("m") else float(settings.cpu)
    return {"OMP_NUM_THREADS": str(max(1, math.floor(cpus)))}


def _check(profile: Profile) -> None:
    stages = {f"stages.{name}": stage for name, stage in profile.stages.items()}
    texts = {"labels": profile.labels, "annotations": profile.annotations}
    entries: dict[str, Gpu | Stage] = {"gpu": profile.gpu, **stages}
    for where, entry in entries.items():
        texts[f"{where}.node_selector"] = entry.node_selector
        for toleration in entry.tolerations:
            if not isinstance(toleration, dict):
                raise ConfigError(f"{where}.tolerations must be a list of mappings, got {toleration!r}")
            check_names(toleration, _TOLERATION, f"{where}.tolerations entry")
            if (operator := toleration.get("operator", "Equal")) not in ("Equal", "Exists"):
                raise ConfigError(f"{where}.tolerations: operator must be Equal or Exists, got {operator!r}")
        for key in ("cpu", "memory", "shared_memory"):
            if (quantity := getattr(entry, key, "")) and not QUANTITY.fullmatch(quantity):
                raise ConfigError(f"{where}.{key} must be a quantity like 500m or 8Gi, got {quantity!r}")
    for where, values in texts.items():
        for key, value in values.items():
            if not isinstance(value, str):
                raise ConfigError(f'{where}.{key} must be text, got {value!r}; write it in quotes, "{value}"')
    if profile.models_at_once < 0:
        raise ConfigError(f"models_at_once must be at least 0, got {profile.models_at_once}")
    if profile.user < 1:
        raise ConfigError(f"user must be at least 1, got {profile.user}: no stage runs as root")
    if profile.service_account and not DNS_NAME.fullmatch(profile.service_account):
        raise ConfigError(f"service_account must be an object's name, got {profile.service_account!r}")
    wanted = set(STAGES.values())
    for image in sorted(wanted - set(profile.images)):
        raise ConfigError(f"images needs {image}, the full name of that image")
    for image, full_name in check_names(profile.images, wanted, "image").items():
        if not _PINNED.fullmatch(full_name):
            raise ConfigError(
                f"images.{image} must end with a tag other than latest, or a digest, got {full_name!r}: runs "
                "record which image they used"
            )
    for where, stage in stages.items():
        for key in ("timeout", "retries"):
            if getattr(stage, key) < 0:
                raise ConfigError(f"{where}.{key} must be at least 0, got {getattr(stage, key)}")
        if stage.gpus == "parameter":
            if where.removeprefix("stages.") not in TRAINING:
                raise ConfigError(f"{where}.gpus must be a number: only training stages have the parameter")
        elif stage.gpus < 0:
            raise ConfigError(f"{where}.gpus must be at least 0, got {stage.gpus}")
    for volume in profile.volumes:
        if not DNS_NAME.fullmatch(volume.claim):
            raise ConfigError(f"volumes: claim must be an object's name, got {volume.claim!r}")
        if not volume.path.startswith("/"):
            raise ConfigError(f"volumes: path must begin with /, got {volume.path!r}")
        check_names(dict.fromkeys(volume.stages), STAGES, "stage")
    if profile.stages["sft"].gpus != profile.stages["train"].gpus:
        raise ConfigError("stages.sft.gpus and stages.train.gpus must be the same: one parameter serves both")


def _mapping(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = values.get(key)
    if not isinstance(value, (dict, type(None))):
        raise ConfigError(f"{key} must be a mapping, got {value!r}")
    return value or {}


def _quoted(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`cpu: 2` is a number in YAML; Kubernetes writes it as text."""
    return {
        key: str(value) if key in ("cpu", "memory") and isinstance(value, (int, float)) else value
        for key, value in settings.items()
    }


def check_names(values: Mapping[str, Value], known: Collection[str], what: str) -> dict[str, Value]:
    """Refuse values whose name is neither `known` nor `all`."""
    for name in values:
        if name not in known and name != "all":
            raise ConfigError(f"there is no {what} {name!r}{closest(name, known)}")
    return dict(values)
