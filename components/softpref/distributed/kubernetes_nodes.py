"""The nodes of a TrainJob, as pods of a cluster, through the Kubeflow SDK. Knows no training."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from softpref.distributed.config import TrainJobConfig
from softpref.distributed.node import SECRETS_VARIABLE
from softpref.errors import ConfigError
from softpref.images import TRAIN_IMAGE

if TYPE_CHECKING:
    from kubernetes.client import ApiException

logger = logging.getLogger(__name__)

_SECRETS = "/var/run/softpref-secrets"
_GONE_WITHIN = 120.0  # seconds for a removed job's pods to end; their grace period is 30
_TAIL = 60
# the libraries' default caches are in a home that is not writable
_HOMES = {
    "HOME": "/tmp/home",
    "HF_HOME": "/tmp/huggingface",
    "MPLCONFIGDIR": "/tmp/matplotlib",
    "XDG_CACHE_HOME": "/tmp/cache",
    "TRITON_CACHE_DIR": "/tmp/triton",
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/inductor",
}


class State(NamedTuple):
    """The state of a job.

    Attributes:
        status: `waiting` until all nodes run, `running`, `complete`, `failed`, or `gone` after a removal.
        nodes: the SDK's state of each existing node, by name.
    """

    status: str
    nodes: dict[str, str]


class KubernetesNodes:
    """The pods of a TrainJob, in this step's cluster or that of the kubeconfig's current context.

    Args:
        gpus: of each node.

    Raises:
        ConfigError: the SDK is not installed, or there is no cluster.
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
        self._printed: dict[tuple[str, int], int] = {}  # lines printed so far, by pod and its restarts

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
        """The arguments for `TrainerClient.train`."""
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
        about = {"labels": job.pod_labels, "annotations": job.pod_annotations}
        metadata = {key: values for key, values in about.items() if values}
        pods = sdk.PodTemplatePatch(metadata=metadata or None, spec=pod)
        template = sdk.JobTemplatePatch(spec=sdk.JobSpecPatch(template=pods))
        patch = sdk.TrainingRuntimeSpecPatch(
            template=sdk.JobSetTemplatePatch(
                spec=sdk.JobSetSpecPatch(
                    replicated_jobs=[sdk.ReplicatedJobPatch(name="node", template=template)]
                )
            )
        )
        options: list[object] = [
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

    def _volumes(self) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
        """The pod's volumes, and the container's mounts of them."""
        job = self._job
        volumes: list[dict[str, object]] = [
            {"name": "shared", "persistentVolumeClaim": {"claimName": job.volume_claim}},
            {"name": "tmp", "emptyDir": {}},
        ]
        mounts: list[dict[str, object]] = [
            {"name": "shared", "mountPath": job.mount_path},
            {"name": "tmp", "mountPath": "/tmp"},
        ]
        if job.shared_memory:
            memory = {"medium": "Memory", "sizeLimit": job.shared_memory}
            volumes.append({"name": "shm", "emptyDir": memory})
            mounts.append({"name": "shm", "mountPath": "/dev/shm"})
        # mounted as files: a TrainJob's patches cannot set this container's variables from secrets
        for secret in sorted({reference.partition("/")[0] for reference in job.secrets.values()}):
            volume = f"secret-{secret}".replace(".", "-")
            needed = any(one.startswith(f"{secret}/") and one[-1] != "?" for one in job.secrets.values())
            source = {"secretName": secret, **({} if needed else {"optional": True})}
            volumes.append({"name": volume, "secret": source})
            mounts.append({"name": volume, "mountPath": f"{_SECRETS}/{secret}", "readOnly": True})
        return volumes, mounts

    def _own(self, name: str) -> None:
        """Make this step's pod the job's owner, so that the cluster removes the job if the step cannot."""
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
        except Exception as error:  # the job runs anyway, and this step removes it itself
            logger.warning("TrainJob %s is not owned by this step's pod: %s", name, _reason(error))

    def state(self, name: str) -> State:
        """The job's state; raises OSError while it is unknown."""
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
        """The first node's output, each line once, until the node ends or the stream breaks."""
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
        """The restarts of a pod's container; each has a log of its own."""
        from kubernetes.client import ApiException

        backend = self._client.backend
        try:
            found = backend.core_api.read_namespaced_pod(pod, backend.namespace)
        except ApiException:  # the pod is being removed
            return 0
        return sum(each.restart_count for each in found.status.container_statuses or ())

    def failure(self, name: str) -> list[str]:
        """The last lines of the failed nodes, and the cluster's events about them."""
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
            lines.append(f"no more is known: {_reason(error)}")
        return lines

    def delete(self, name: str) -> None:
        """Remove the job and its nodes, if there are any; returns when they are gone."""
        from kubernetes.client import ApiException

        try:
            self._client.delete_job(name)
        except (RuntimeError, TimeoutError) as error:
            if _status(error) == 404:
                return
            logger.warning(
                f"TrainJob {name} cannot be removed: {_reason(error)}; "
                f"remove it with kubectl delete trainjob {name}"
            )
            return
        logger.warning("TrainJob %s: removed", name)
        backend, until = self._client.backend, time.monotonic() + _GONE_WITHIN
        while time.monotonic() < until:  # the pods may write checkpoints until they end
            try:
                pods = backend.core_api.list_namespaced_pod(
                    backend.namespace, label_selector=f"jobset.sigs.k8s.io/jobset-name={name}"
                )
                if not pods.items and self.state(name).status == "gone":
                    return
            except (ApiException, OSError) as error:
                logger.warning("TrainJob %s may not be gone: %s", name, _reason(error))
                return
            time.sleep(min(1.0, self._job.poll_interval))
        logger.warning("TrainJob %s: pods are still there after %d s", name, _GONE_WITHIN)


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of the SDK, if any."""
    return next((cause.status for cause in _api_errors(error)), None)


def _reason(error: BaseException) -> str:
    """The API's answer behind an error of the SDK, if any; else the error and its cause."""
    for cause in _api_errors(error):
        if cause.body:
            try:
                return str(json.loads(cause.body)["message"])
            except (ValueError, KeyError, TypeError):
                return str(cause.body)
    return f"{error}" + (f" ({error.__cause__})" if error.__cause__ else "")


def _api_errors(error: BaseException | None) -> Iterator[ApiException]:
    from kubernetes.client import ApiException

    while error is not None:
        if isinstance(error, ApiException):
            yield error
        error = error.__cause__
