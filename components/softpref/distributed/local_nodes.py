"""Nodes of a TrainJob on one machine, by the Kubeflow SDK's local and container backends: to try a job out.

Both run a Python function as a job; the function here becomes the very command that a cluster's node runs.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from softpref.distributed.config import TrainJobConfig
from softpref.distributed.nodes import State
from softpref.errors import ConfigError
from softpref.images import TRAIN_IMAGE

_RUNTIME = "torch-distributed"  # the one that both backends have
_TAIL = 60
_GRACE = 40.0  # seconds for a node to end its processes


def start_process(parameters):
    """Become a node of a job in a process. Its source is all that the backend takes along."""
    import os

    with open(parameters["pid_file"], "w", encoding="utf-8") as file:
        file.write(str(os.getpid()))
    os.execv(
        parameters["python"], [parameters["python"], "-m", "softpref.distributed.node", parameters["folder"]]
    )


def start_in_container(folder):
    """Become one of the processes of a node, a container in which the backend has started torchrun."""
    import os
    import sys

    os.execv(sys.executable, [sys.executable, "-m", "softpref.distributed.node", folder])


class ProcessNodes:
    """Each node is a job of the SDK's local backend: a process on this machine; see `trainjob.Nodes`.

    The backend has one process to a job and no rendezvous. What a cluster's torch policy would tell each node
    is put into its environment here, and the node starts its processes as it does on a cluster.
    """

    def __init__(self, job: TrainJobConfig) -> None:
        from kubeflow.trainer import LocalProcessBackendConfig, TrainerClient

        self._job = job
        self._client = TrainerClient(LocalProcessBackendConfig())
        self._started: dict[str, list[str]] = {}
        self._here = ""
        self._printed = 0  # lines of the first node that were passed on

    def folder(self, name: str) -> Path:
        return Path(self._job.mount_path) / self._job.folder / name

    def node_folder(self, name: str) -> str:
        return str(self.folder(name))

    def submit(self, name: str, env: Mapping[str, str]) -> None:
        from kubeflow.trainer import CustomTrainer
        from kubeflow.trainer.options import Name

        if self._job.secrets:
            raise ConfigError("the backend local reads no secrets; set their variables where the run starts")
        port, self._here, self._printed = _free_port(), os.getcwd(), 0
        self._started[name] = []
        for rank in range(self._job.nodes):
            node = f"{name}-node-{rank}"
            self._pid_file(name, rank).unlink(missing_ok=True)
            runtime = self._client.get_runtime(_RUNTIME)
            runtime.trainer.framework = "python"  # the node starts the processes itself, torchrun does not
            meet = {
                "NNODES": self._job.nodes,
                "NODE_RANK": rank,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            self._client.train(
                runtime=runtime,
                trainer=CustomTrainer(
                    func=start_process,
                    func_args={
                        "python": sys.executable,
                        "folder": self.node_folder(name),
                        "pid_file": str(self._pid_file(name, rank)),
                    },
                    env={**os.environ, **env, **{f"PET_{key}": str(value) for key, value in meet.items()}},
                ),
                options=[Name(node)],
            )
            self._started[name].append(node)

    def state(self, name: str) -> State:
        jobs = self._started.get(name)
        if not jobs:
            return State("gone", {})
        found = {f"node-{rank}": str(self._client.get_job(each).status) for rank, each in enumerate(jobs)}
        return State(_together(found.values()), found)

    def output(self, name: str) -> Iterator[str]:
        node = self._started[name][0]
        while True:
            ended = self._client.get_job(node).status in ("Complete", "Failed")
            lines = list(self._client.get_job_logs(node))
            for line in lines[self._printed : len(lines) - (not ended)]:  # the last one may still grow
                self._printed += 1
                yield f"{line}\n"
            if ended:
                return
            time.sleep(min(0.5, self._job.poll_interval))

    def failure(self, name: str) -> list[str]:
        lines: list[str] = []
        for rank, (node, status) in enumerate(self.state(name).nodes.items()):
            if status == "Failed":
                found = list(self._client.get_job_logs(self._started[name][rank]))
                lines += [f"[{node}, {status}] {line}" for line in found[-_TAIL:]]
        return lines

    def delete(self, name: str) -> None:
        for rank in range(self._job.nodes):
            with suppress(OSError, ValueError):
                _end(int(self._pid_file(name, rank).read_text()), self.node_folder(name))
        for node in self._started.pop(name, ()):
            with suppress(ValueError):
                self._client.delete_job(node)
            for thread in threading.enumerate():
                if thread.name == f"{node}-train":
                    thread.join(_GRACE)  # it changes this process's folder, and back at its end
            for folder in Path(tempfile.gettempdir()).glob(
                f"{node}*"
            ):  # what the backend leaves of a failure
                shutil.rmtree(folder, ignore_errors=True)
        if here := getattr(
            self, "_here", ""
        ):  # its threads change this process's folder, and back in any order
            os.chdir(here)

    def _pid_file(self, name: str, rank: int) -> Path:
        return self.folder(name) / f"node-{rank}.pid"


class ContainerNodes:
    """Each node is a container of the SDK's container backend, by Docker or Podman; see `trainjob.Nodes`.

    The backend gives the nodes one folder of its own, `/workspace`, and runs torchrun in each.
    """

    def __init__(self, job: TrainJobConfig, gpus: int) -> None:
        from kubeflow.trainer import ContainerBackendConfig, TrainerClient
        from kubeflow.trainer.backends.container.types import TrainingRuntimeSource

        if job.secrets:
            raise ConfigError("the backend container reads no secrets; give it none, or train on a cluster")
        self._job, self._gpus = job, gpus
        self._image = job.image or TRAIN_IMAGE
        self._printed = 0  # characters that were passed on
        # the backend asks a public repository for runtimes unless it is given one
        self._runtimes = Path(tempfile.mkdtemp(prefix="softpref-runtime-"))
        (self._runtimes / f"{_RUNTIME}.yaml").write_text(_RUNTIME_FILE.format(image=self._image))
        try:
            self._client = TrainerClient(
                ContainerBackendConfig(
                    pull_policy="IfNotPresent",
                    auto_remove=False,  # the folder holds the checkpoints
                    container_host=os.environ.get("DOCKER_HOST") or None,
                    runtime_source=TrainingRuntimeSource(sources=[str(self._runtimes / f"{_RUNTIME}.yaml")]),
                )
            )
        except RuntimeError as error:
            raise ConfigError(
                f"no container engine answers ({error}); start Docker, or `podman system service` with "
                "DOCKER_HOST naming its socket"
            ) from error

    def folder(self, name: str) -> Path:
        from kubeflow.trainer.backends.container.utils import create_workdir

        return Path(create_workdir(name))

    def node_folder(self, name: str) -> str:
        from kubeflow.trainer.constants.constants import WORKSPACE_PATH

        return str(WORKSPACE_PATH)

    def submit(self, name: str, env: Mapping[str, str]) -> None:
        from kubeflow.trainer import CustomTrainer
        from kubeflow.trainer.options import Name

        self._printed = 0
        (self.folder(name) / ".bash_profile").write_text(_PROFILE, encoding="utf-8")
        for path in (self.folder(name), *self.folder(name).rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)  # the image's user is not this one
        per_node = self._gpus or (self._job.processes_per_node if self._job.processes_per_node > 1 else 0)
        try:
            self._client.train(
                runtime=_RUNTIME,
                trainer=CustomTrainer(
                    func=start_in_container,
                    func_args={"folder": self.node_folder(name)},
                    image=self._image,
                    num_nodes=self._job.nodes,
                    resources_per_node={"gpu": per_node} if per_node else None,
                    env={"HOME": self.node_folder(name), **env},
                ),
                options=[Name(name)],
            )
        except RuntimeError as error:
            raise ConfigError(f"containers of {self._image} cannot be started: {error}") from error

    def state(self, name: str) -> State:
        try:
            job = self._client.get_job(name)
        except ValueError:
            return State("gone", {})
        found = {step.name: str(step.status) for step in job.steps}
        return State(_together(found.values()), found)

    def output(self, name: str) -> Iterator[str]:
        passed = 0  # the backend gives the whole log each time
        try:
            for text in self._client.get_job_logs(name, step="node-0", follow=True):
                fresh = text[max(0, self._printed - passed) :]
                passed += len(text)
                self._printed = max(self._printed, passed)
                if fresh:
                    yield fresh
        except ValueError as error:
            raise OSError(str(error)) from error

    def failure(self, name: str) -> list[str]:
        lines: list[str] = []
        for node, status in self.state(name).nodes.items():
            # by that name the backend gives all nodes, one after the other
            if node == "node-0" and status:
                text = "".join(self._client.get_job_logs(name))
                lines += [f"[nodes] {line}" for line in text.splitlines()[-_TAIL:]]
        return lines

    def delete(self, name: str) -> None:
        with suppress(ValueError):
            self._client.delete_job(name)


# the backend starts a login shell, which forgets the image's own PATH, and with it the image's Python
_PROFILE = """\
export PATH="$(tr '\\0' '\\n' </proc/$$/environ | sed -n 's/^PATH=//p')"
"""

_RUNTIME_FILE = """\
apiVersion: trainer.kubeflow.org/v1alpha1
kind: ClusterTrainingRuntime
metadata:
  name: torch-distributed
  labels: {{trainer.kubeflow.org/framework: torch}}
spec:
  mlPolicy: {{numNodes: 1, torch: {{}}}}
  template:
    spec:
      replicatedJobs:
        - name: node
          template:
            metadata:
              labels: {{trainer.kubeflow.org/trainjob-ancestor-step: trainer}}
            spec:
              template:
                spec:
                  containers: [{{name: node, image: "{image}"}}]
"""


def _together(states: Any) -> str:
    """What the states of a job's nodes make of the job."""
    states = list(states)
    if "Failed" in states:
        return "failed"
    if all(state == "Complete" for state in states):
        return "complete"
    return "running" if all(state in ("Running", "Complete") for state in states) else "waiting"


def _end(pid: int, folder: str) -> None:
    """End a node's process, unless the number has become another's."""
    if folder.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes():
        return
    os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + _GRACE
    while time.monotonic() < until:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
