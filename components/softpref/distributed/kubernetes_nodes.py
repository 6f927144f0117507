"""Nodes of a TrainJob as pods of a cluster, by the Kubeflow SDK. Knows no training."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from softpref.distributed.config import TrainJobConfig
from softpref.distributed.node import SECRETS_VARIABLE
from softpref.errors import ConfigError
from softpref.images import TRAIN_IMAGE

logger = logging.getLogger(__name__)

_SECRETS = "/var/run/softpref-secrets"
_GONE_WITHIN = 120.0  # seconds for a removed job's pods to end: they have 30 of grace
_TAIL = 60
# caches that libraries would put into a home that cannot be written
_HOMES = {
    "HOME": "/tmp/home",
    "HF_HOME": "/tmp/huggingface",
    "MPLCONFIGDIR": "/tmp/matplotlib",
    "XDG_CACHE_HOME": "/tmp/cache",
    "TRITON_CACHE_DIR": "/tmp/triton",
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/inductor",
}


class State(NamedTuple):
    """What is known of a job.

    Attributes:
        status: `waiting` until all nodes have run, `running`, `complete`, `failed`, or `gone` if somebody
            has removed it.
        nodes: the state of each node that there is, by its name, as the SDK calls it.
    """

    status: str
    nodes: dict[str, str]


class KubernetesNodes:
    """The pods of a TrainJob, in the cluster that this step runs in, or of the kubeconfig's current context.

    Args:
        gpus: of each node.

    Raises:
        ConfigError: the SDK is not installed, or no cluster is known.
    """

    def __init__(self, job: TrainJobConfig, gpus: int) -> None:
        try:
            from kubeflow.common.types import KubernetesBackendConfig
            from kubeflow.trainer import TrainerClient
            from kubernetes.config import ConfigException
        except ImportError as error:
            raise ConfigError("a TrainJob needs the Kubeflow SDK: pip install 'softpref[cluster]'") from error
        self._job, self._gpus = job, gpus
        try:
            self._client = TrainerClient(KubernetesBackendConfig(namespace=job.namespace or None))
        except ConfigException as error:
            raise ConfigError(
                f"a TrainJob needs a cluster, and none is known here ({error}); run the step in one, or "
                "give a kubeconfig"
            ) from error
        self._printed: dict[tuple[str, int], int] = {}  # lines of each start of a pod that were passed on

    def folder(self, name: str) -> Path:
        """The job's folder on the shared volume, as this step and its nodes see it."""
        return Path(self._job.mount_path) / self._job.folder / name

    def submit(self, name: str, env: Mapping[str, str]) -> None:
        """Start the job's nodes; each runs `softpref.distributed.node` with `env` in its environment."""
        try:
            self._client.train(**self.request(name, env))
        except (RuntimeError, TimeoutError) as error:
            raise ConfigError(
                f"TrainJob {name} cannot be created: {_reason(error)}; the step's service account must be "
                f"allowed to create TrainJobs, and the runtime {self._job.runtime} must exist"
            ) from error
        self._own(name)

    def request(self, name: str, env: Mapping[str, str]) -> dict[str, Any]:
        """What `TrainerClient.train` is called with."""
        from kubeflow.trainer import CustomTrainerContainer
        from kubeflow.trainer import options as sdk

        job = self._job
        resources: dict[str, str | int] = {}
        for key, value in (("cpu", job.cpu), ("memory", job.memory), (job.gpu_resource, self._gpus)):
            if value:
                resources[key] = str(value)
        files = {variable: f"{_SECRETS}/{reference}" for variable, reference in job.secrets.items()}
        variables = {**_HOMES, **env, **({SECRETS_VARIABLE: json.dumps(files)} if files else {})}
        volumes, mounts = self._volumes()
        pod = sdk.PodSpecPatch(
            service_account_name=job.service_account or None,
            volumes=volumes,
            containers=[
                sdk.ContainerPatch(
                    name="node",
                    volume_mounts=mounts,
                    security_context={
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                )
            ],
            image_pull_secrets=[{"name": secret} for secret in job.image_pull_secrets] or None,
            security_context={
                "runAsNonRoot": True,
                "runAsUser": job.user,
                "runAsGroup": job.user,
                "fsGroup": job.user,
                "fsGroupChangePolicy": "OnRootMismatch",  # not file by file through a large volume
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            node_selector=job.node_selector or None,
            tolerations=job.tolerations or None,
        )
        about = {
            key: values
            for key, values in (("labels", job.pod_labels), ("annotations", job.pod_annotations))
            if values
        }
        pods = sdk.PodTemplatePatch(metadata=about or None, spec=pod)
        template = sdk.JobTemplatePatch(spec=sdk.JobSpecPatch(template=pods))
        patch = sdk.TrainingRuntimeSpecPatch(
            template=sdk.JobSetTemplatePatch(
                spec=sdk.JobSetSpecPatch(
                    replicated_jobs=[sdk.ReplicatedJobPatch(name="node", template=template)]
                )
            )
        )
        options: list[Any] = [
            sdk.Name(name),
            sdk.Labels({"app.kubernetes.io/part-of": "softpref", **job.labels}),
            sdk.TrainerCommand(["python", "-m", "softpref.distributed.node", str(self.folder(name))]),
            sdk.RuntimePatch(training_runtime_spec=patch),
        ]
        if job.timeout:
            options.append(sdk.ActiveDeadlineSeconds(job.timeout))
        trainer = CustomTrainerContainer(
            image=job.image or TRAIN_IMAGE,
            num_nodes=job.nodes,
            resources_per_node=resources or None,
            env=variables,
        )
        return {"runtime": job.runtime, "trainer": trainer, "options": options}

    def _volumes(self) -> tuple[list[dict], list[dict]]:
        """The pod's volumes, and where the container has them."""
        job = self._job
        memory = {"medium": "Memory", **({"sizeLimit": job.shared_memory} if job.shared_memory else {})}
        volumes: list[dict] = [
            {"name": "shared", "persistentVolumeClaim": {"claimName": job.volume_claim}},
            {"name": "tmp", "emptyDir": {}},
            *([{"name": "shm", "emptyDir": memory}] if job.shared_memory else []),
        ]
        mounts: list[dict] = [
            {"name": "shared", "mountPath": job.mount_path},
            {"name": "tmp", "mountPath": "/tmp"},
            *([{"name": "shm", "mountPath": "/dev/shm"}] if job.shared_memory else []),
        ]
        # files, for variables of this container cannot be taken from secrets by a TrainJob's patches
        for secret in sorted({reference.partition("/")[0] for reference in job.secrets.values()}):
            volume = f"secret-{secret}".replace(".", "-")
            needed = any(one.startswith(f"{secret}/") and one[-1] != "?" for one in job.secrets.values())
            source = {"secretName": secret, **({} if needed else {"optional": True})}
            volumes.append({"name": volume, "secret": source})
            mounts.append({"name": volume, "mountPath": f"{_SECRETS}/{secret}", "readOnly": True})
        return volumes, mounts

    def _own(self, name: str) -> None:
        """Have the cluster remove the job with this step's pod, should nobody live to do it."""
        pod, uid = os.environ.get("KFP_POD_NAME"), os.environ.get("KFP_POD_UID")
        backend = self._client.backend
        if not (pod and uid) or self._job.namespace not in ("", backend.namespace):
            return
        owner = {"apiVersion": "v1", "kind": "Pod", "name": pod, "uid": uid}
        try:
            backend.custom_api.patch_namespaced_custom_object(
                "trainer.kubeflow.org",
                "v1alpha1",
                backend.namespace,
                "trainjobs",
                name,
                {"metadata": {"ownerReferences": [owner]}},
            )
        except Exception as error:  # the job runs all the same, and is removed by this step's own hand
            logger.warning("TrainJob %s is not owned by this step's pod: %s", name, _reason(error))

    def state(self, name: str) -> State:
        """How the job stands; raises OSError while that cannot be found out."""
        try:
            job = self._client.get_job(name)
        except (RuntimeError, TimeoutError) as error:
            if _status(error) == 404 and "TrainJob" in str(error):
                return State("gone", {})
            raise OSError(_reason(error)) from error
        steps = {step.name: str(step.status) for step in job.steps if step.name.startswith("node-")}
        if job.status in ("Complete", "Failed"):
            return State(job.status.lower(), steps)
        going = [status for status in steps.values() if status in ("Running", "Succeeded")]
        return State("running" if len(going) == self._job.nodes else "waiting", steps)

    def output(self, name: str) -> Iterator[str]:
        """What the first node prints, from its beginning, as it comes, until it ends or the stream breaks."""
        try:
            pods = [step.pod_name for step in self._client.get_job(name).steps if step.name == "node-0"]
            if not pods:
                return
            start = (pods[0], self._restarts(pods[0]))
            for number, line in enumerate(self._client.get_job_logs(name, step="node-0", follow=True), 1):
                if number > self._printed.get(start, 0):
                    self._printed[start] = number
                    yield f"{line}\n"
        except (RuntimeError, TimeoutError) as error:
            raise OSError(_reason(error)) from error

    def _restarts(self, pod: str) -> int:
        """How often a pod's container has been started again, each time with a log of its own."""
        from kubernetes.client import ApiException

        backend = self._client.backend
        try:
            found = backend.core_api.read_namespaced_pod(pod, backend.namespace)
        except ApiException:  # it is going; its log then tells
            return 0
        return sum(each.restart_count for each in found.status.container_statuses or ())

    def failure(self, name: str) -> list[str]:
        """Last lines of the nodes that failed, and what the cluster says about them."""
        lines: list[str] = []
        try:
            job = self._client.get_job(name)
            failed = [step for step in job.steps if step.status == "Failed"]
            for step in failed or job.steps:
                found = list(self._client.get_job_logs(name, step=step.name))
                lines += [f"[{step.name}, {step.status}] {line}" for line in found[-_TAIL:]]
            lines += [
                f"[{event.involved_object_name}] {event.reason}: {event.message}"
                for event in self._client.get_job_events(name)[-10:]
            ]
        except (RuntimeError, TimeoutError) as error:
            lines.append(f"nothing more can be found out: {_reason(error)}")
        return lines

    def delete(self, name: str) -> None:
        """Remove the job and its nodes, if they are there; returns when they are gone."""
        from kubernetes.client import ApiException

        try:
            self._client.delete_job(name)
        except (RuntimeError, TimeoutError) as error:
            if _status(error) == 404:
                return
            logger.warning(
                "TrainJob %s cannot be removed: %s; remove it by kubectl delete trainjob %s",
                name,
                _reason(error),
                name,
            )
            return
        logger.warning("TrainJob %s: removed", name)
        backend, until = self._client.backend, time.monotonic() + _GONE_WITHIN
        while time.monotonic() < until:  # its pods write checkpoints until they end
            try:
                pods = backend.core_api.list_namespaced_pod(
                    backend.namespace, label_selector=f"jobset.sigs.k8s.io/jobset-name={name}"
                )
                if not pods.items and self.state(name).status == "gone":
                    return
            except (ApiException, OSError) as error:
                logger.warning("whether TrainJob %s is gone is unknown: %s", name, _reason(error))
                return
            time.sleep(min(1.0, self._job.poll_interval))
        logger.warning("TrainJob %s: pods are still there after %d s", name, _GONE_WITHIN)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of the SDK goes back to, if any."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(status := getattr(cause, "status", None), int):
            return status
        cause = cause.__cause__
    return None


def _reason(error: BaseException) -> str:
    """What the API said, where an error of the SDK goes back to an answer of it."""
    cause: BaseException | None = error
    while cause is not None:
        if body := getattr(cause, "body", None):
            try:
                return str(json.loads(body)["message"])
            except (ValueError, KeyError, TypeError):
                return str(body)
        cause = cause.__cause__
    return f"{error}" + (f" ({error.__cause__})" if error.__cause__ else "")
