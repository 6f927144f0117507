"""Where a training stage runs: in this process, in several on this machine, or as a Kubeflow TrainJob.

A cluster profile has these values; the training faces take them as one JSON string, `launcher`. Imports
nothing heavy, because the compiler checks profiles with it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from softpref.config import build_config, parse_overrides
from softpref.errors import ConfigError

DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|[EPTGMK]i?)?")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass
class TrainJobConfig:
    """A training stage as a `TrainJob` of Kubeflow Trainer: several nodes, folders on one shared volume.

    The step that submits the job needs no GPU. It must mount the same volume claim at the same path, and have
    a service account that may create, get and delete TrainJobs and read pods, their logs and events in the
    job's namespace, and read TrainingRuntimes and ClusterTrainingRuntimes.

    Args:
        runtime: a TrainingRuntime or ClusterTrainingRuntime for torch, whose job and container are called
            `node`, like those that come with Kubeflow Trainer.
        namespace: of the job; empty: that of the submitting step.
        nodes: number of pods.
        gpus_per_node: GPUs of each node, one process each. None: the stage's parameter `gpus`.
        gpu_resource: the resource of the cluster's device plugin.
        processes_per_node: processes of a node without GPUs.
        image: the training image; empty: the one of this version of softpref.
        volume_claim: PersistentVolumeClaim (ReadWriteMany) for data, checkpoints and results, in the job's
            namespace; required.
        mount_path: where the claim is mounted, in the nodes and in the submitting step.
        folder: folder of the volume that holds each job's own.
        cpu, memory: request and limit of each node, as Kubernetes writes them (`8`, `64Gi`). Empty: the
            runtime's.
        shared_memory: size of `/dev/shm`, as Kubernetes writes it; counts as memory. Empty: the container
            engine's, mostly 64 MiB, too small for NCCL on several GPUs.
        service_account: of the nodes, which need no rights; empty: the namespace's default.
        node_selector: labels that a node must have.
        tolerations: as in a pod's specification.
        image_pull_secrets: names of secrets for the image's registry.
        secrets: environment variable → `SECRET/KEY`, read by Kubernetes when a node starts. With `?` at the
            end, a missing secret or key leaves the variable out.
        env: further environment variables. Never secrets: everybody who may see the job can read them.
        labels: labels of the job, such as Kueue's queue.
        pod_labels, pod_annotations: of each node's pod, such as `sidecar.istio.io/inject: "false"`.
        user: user and group id of the nodes; must be those of the submitting step.
        timeout: seconds after which the cluster ends the job. 0: no limit.
        start_timeout: seconds within which all nodes must run, in spite of queues and busy GPUs; a later
            job is removed and the step fails. 0: no limit.
        retries: how often a failed job is submitted again, to continue from its last checkpoint; not after
            a wrong parameter.
        poll_interval: seconds between two checks of the job.
    """

    runtime: str = "torch-distributed"
    namespace: str = ""
    nodes: int = 2
    gpus_per_node: int | None = None
    gpu_resource: str = "nvidia.com/gpu"
    processes_per_node: int = 1
    image: str = ""
    volume_claim: str = ""
    mount_path: str = "/shared"
    folder: str = "training"
    cpu: str = ""
    memory: str = ""
    shared_memory: str = ""
    service_account: str = ""
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    image_pull_secrets: list[str] = field(default_factory=list)
    secrets: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    pod_labels: dict[str, str] = field(default_factory=dict)
    pod_annotations: dict[str, str] = field(default_factory=dict)
    user: int = 1000
    timeout: int = 0
    start_timeout: int = 3600
    retries: int = 0
    poll_interval: float = 5.0

    def __post_init__(self) -> None:
        def refuse(name: str, expected: str) -> None:
            raise ConfigError(f"TrainJobConfig.{name} must be {expected}, got {getattr(self, name)!r}")

        if not self.volume_claim:
            refuse("volume_claim", "the name of a ReadWriteMany claim that the nodes and this step mount")
        for name in ("runtime", "volume_claim", "namespace", "service_account"):
            if (name == "runtime" or getattr(self, name)) and not DNS_NAME.fullmatch(getattr(self, name)):
                refuse(name, "the name of a Kubernetes object: lower-case letters, digits, '-' and '.'")
        for name in ("nodes", "processes_per_node", "timeout", "start_timeout", "retries"):
            least = 1 if name in ("nodes", "processes_per_node") else 0
            if getattr(self, name) < least:
                refuse(name, f"at least {least}")
        if self.gpus_per_node is not None and self.gpus_per_node < 0:
            refuse("gpus_per_node", "at least 0, or left out for the stage's parameter gpus")
        if not self.poll_interval > 0:
            refuse("poll_interval", "above 0 seconds")
        if not self.mount_path.startswith("/") or self.mount_path == "/":
            refuse("mount_path", "an absolute path below /")
        if not self.folder or self.folder.startswith("/") or ".." in self.folder.split("/"):
            refuse("folder", "a relative path inside the volume")
        for name, reference in self.secrets.items():
            if not _ENV_NAME.fullmatch(name) or not re.fullmatch(r"[^/\s]+/[^/\s?]+\??", str(reference)):
                refuse("secrets", 'variables with "SECRET/KEY", like {"HF_TOKEN": "hub-token/token"}')
        for name, value in self.env.items():
            if not _ENV_NAME.fullmatch(name) or not isinstance(value, str):
                refuse("env", 'variables with text, like {"NCCL_DEBUG": "INFO"}')
        if twice := sorted({*self.env} & {*self.secrets}):
            refuse("env", f"without {', '.join(twice)}, which secrets has too")
        for name in ("cpu", "memory", "shared_memory"):
            if getattr(self, name) and not QUANTITY.fullmatch(getattr(self, name)):
                refuse(name, "a quantity like 500m or 8Gi")
        if not all(isinstance(toleration, dict) for toleration in self.tolerations):
            refuse("tolerations", 'a list like [{"key": "nvidia.com/gpu", "operator": "Exists"}]')


@dataclass
class LauncherConfig:
    """The faces' parameter `launcher`.

    Args:
        processes: processes on this machine, under `accelerate launch`. 0: one for each requested GPU. Above
            0 only without GPUs, or equal to their number.
        checkpoints: folder on a lasting volume for the checkpoints of each training while it runs; the same
            step of the same pipeline run continues from them. Empty: inside the output, which is lost with
            the pod.
        trainjob: the parameters of `TrainJobConfig`; then nothing is trained on this machine.
    """

    processes: int = 0
    checkpoints: str = ""
    trainjob: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.processes < 0:
            raise ConfigError(f"LauncherConfig.processes must be at least 0, got {self.processes}")
        self.job = None if self.trainjob is None else build_config(TrainJobConfig, self.trainjob)
        if self.processes and self.job:
            raise ConfigError(
                "LauncherConfig has processes and trainjob; for a TrainJob give trainjob.processes_per_node"
            )
        if self.checkpoints and self.job:
            raise ConfigError("LauncherConfig has checkpoints and trainjob; a TrainJob keeps its own")


def parse_launcher(text: str) -> LauncherConfig:
    """Read the `launcher` parameter of a training face; empty means this machine.

    Raises:
        ConfigError: it is not a JSON object, or names what a launcher does not have.
    """
    return build_config(LauncherConfig, parse_overrides(text, "launcher"))
