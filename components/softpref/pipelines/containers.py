"""Runs the tasks of a pipeline in containers, through the API that Docker and Podman share.

A container runs as the calling user, sees only this run's folders and the paths in its parameters, writes
only to the former and its own /tmp, has no capabilities, and is removed when the run is interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from softpref.errors import ConfigError
from softpref.evaluation.reference_cache import REFERENCE_CACHE
from softpref.interruption import interruptible
from softpref.preflight.stage import further_sources
from softpref.tracking import RUN_ID, RUN_NAME
from softpref.tracking.mlflow_store import artifact_folder, sqlite_file

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.containers import Container
    from kfp.local import DockerRunner

# variables of the launcher's environment that tasks get
_FORWARDED = (
    *(RUN_ID, RUN_NAME, REFERENCE_CACHE),
    *("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"),
    *("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"),
    *("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *("MLFLOW_TRACKING_INSECURE_TLS", "MLFLOW_TRACKING_SERVER_CERT_PATH", "SOFTPREF_TRACKING_WAIT"),
    *("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
    *("http_proxy", "https_proxy", "no_proxy"),
)
OUTPUT_LABEL = "softpref.output"  # of a container: the folder of its run
_UNPRIVILEGED = 1000  # the images' user
_PATIENCE = 60.0  # seconds for an engine or a tracking server to start


class Engine(NamedTuple):
    """The container engine at `DOCKER_HOST`.

    Attributes:
        name: "podman" or "docker".
        rootless: whether root in its containers is this machine's calling user.
    """

    name: str
    rootless: bool


@contextlib.contextmanager
def engine() -> Iterator[Engine]:
    """The engine of `DOCKER_HOST`, else Podman, whose API is started meanwhile, else Docker.

    Raises:
        ConfigError: there is neither, or it does not answer.
    """
    with contextlib.ExitStack() as stack:
        if "DOCKER_HOST" not in os.environ and shutil.which("podman"):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="softpref-")))
            path, log = folder / "podman.sock", folder / "log"
            command = ["podman", "system", "service", "--time=0", f"unix://{path}"]
            _await(path.exists, stack.enter_context(_process(command, log)), log, "podman system service")
            os.environ["DOCKER_HOST"] = f"unix://{path}"
            stack.callback(os.environ.pop, "DOCKER_HOST")
        yield _who_answers()


def _who_answers() -> Engine:
    import docker
    import requests

    try:
        client = docker.from_env()
        try:
            components = client.version().get("Components") or [{}]
            security = client.info().get("SecurityOptions") or []
        finally:
            client.close()
    except (docker.errors.DockerException, requests.RequestException) as error:
        where = os.environ.get("DOCKER_HOST")
        raise ConfigError(
            f"no container engine answers at DOCKER_HOST={where}: {error}"
            if where
            else f"--runner docker needs Podman or Docker, and neither answers here: {error}"
        ) from error
    name = "podman" if "Podman" in components[0].get("Name", "") else "docker"
    return Engine(name, any("rootless" in option for option in security))


def require_images(names: Iterable[str], engine: Engine) -> None:
    """Pull the images that are not on this machine.

    Raises:
        ConfigError: some are not available; names them all, and the command that builds them.
    """
    import docker

    missing = []
    client = docker.from_env()
    try:
        for name in sorted(set(names)):
            try:
                client.images.get(name)
            except docker.errors.ImageNotFound:
                try:
                    if name.startswith("localhost/"):  # no registry
                        raise
                    print(f"pulling {name}", flush=True)
                    client.images.pull(name)
                except docker.errors.APIError:
                    missing.append(name)
    finally:
        client.close()
    if missing:
        build = f"python3 images/build.py --engine {engine.name}"
        raise ConfigError(f"{engine.name} has no image {', '.join(missing)}; build the images with: {build}")


@contextlib.contextmanager
def served(store: Path, log_file: Path) -> Iterator[str]:
    """The address of an MLflow server for a SQLite store, which containers cannot share as a file.

    Only the loopback interface reaches it. Runs and artifacts are stored where they would be without it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{store}", "--no-serve-artifacts"]
    command += ["--default-artifact-root", artifact_folder(store).as_uri()]
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=2):
            return True
        return False

    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with _process(command, log_file, environment) as process:
        _await(answers, process, log_file, "the MLflow server")
        yield address


class Containers:
    """The containers of one run of a pipeline: `run` replaces KFP's `run_docker_container`.

    Entering it finds an engine and pulls the tasks' `images`; `open` then prepares what the tasks need.
    """

    def __init__(self, images: Iterable[str]) -> None:
        self._images = set(images)
        self._stack = contextlib.ExitStack()
        self._running: dict[str, Container] = {}
        self._lock = threading.Lock()
        self._interrupted = False
        self._user, self._gpus = "", 0
        self._environment: dict[str, str] = {}
        self._labels: dict[str, str] = {}
        self._volumes: dict[str, str] = {}  # path, the same on both sides, and mode

    def __enter__(self) -> Containers:
        with contextlib.ExitStack() as stack:
            self._engine = stack.enter_context(engine())
            require_images(self._images, self._engine)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def open(self, output: Path, parameters: Mapping[str, Any]) -> str:
        """Make the folders that tasks write to, and serve a SQLite tracking store.

        Args:
            output: folder of the run; the tasks' outputs will be in its `pipeline`. What evaluations keep of
                the reference is where `SOFTPREF_REFERENCE_CACHE` says.
            parameters: of the pipeline; tasks can read the files and folders that they name.

        Returns:
            The tracking URI for the tasks: the given one, or that of the server.
        """
        address = str(parameters["tracking_uri"])
        self._labels = {OUTPUT_LABEL: str(output.absolute())}
        writable = [output / "pipeline", *map(Path, filter(None, [os.environ.get(REFERENCE_CACHE)]))]
        if store := sqlite_file(address):
            writable.append(artifact_folder(store))
            address = self._stack.enter_context(served(store, output / "mlflow-server.log"))
        forwarded = {name: os.environ[name] for name in _FORWARDED if os.environ.get(name)}
        self._environment = {**forwarded, "MLFLOW_TRACKING_URI": address}
        self._gpus = int(parameters.get("gpus") or 0)
        further = [one.place for one in further_sources(parameters.get("data_overrides"))]
        for path in _paths_in([dict(parameters), further, forwarded]):
            self._volumes[str(path.absolute())] = "ro"
        hub_cache = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
        if self._engine.rootless:  # only its root is the calling user
            self._user = "0:0"
        elif os.getuid():
            self._user = f"{os.getuid()}:{os.getgid()}"
        else:  # never root: the images' user, who then owns the writable folders
            self._user = f"{_UNPRIVILEGED}:{_UNPRIVILEGED}"
            hub_cache = output / "hub-cache"
        for folder in [*writable, hub_cache]:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.getuid() and not self._engine.rootless:
                _give(folder, _UNPRIVILEGED)
            self._volumes[str(folder.absolute())] = "rw"
        self._environment["HF_HOME"] = str(hub_cache.absolute())
        return address

    def runner(self) -> DockerRunner:
        """KFP's runner, with this machine's network and confined containers.

        Containers that a killed run has left in the same folder are removed.
        """
        _remove(self._labels)
        from docker.types import DeviceRequest
        from kfp import local

        options: dict[str, Any] = {
            "network_mode": "host",
            "user": self._user,
            "read_only": True,
            "tmpfs": {"/tmp": "rw,exec,nosuid,mode=1777"},
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges"],
            "shm_size": "1g",
            "environment": self._environment,
            "labels": self._labels,
        }
        here = Path.cwd()
        if any(here in Path(path).parents for path in self._volumes):
            options["working_dir"] = str(here)  # for relative paths in parameters
        if self._gpus:
            options["device_requests"] = [DeviceRequest(count=self._gpus, capabilities=[["gpu"]])]
        return local.DockerRunner(**options)

    def run(
        self,
        client: DockerClient,
        image: str,
        command: list[str],
        volumes: dict[str, dict[str, str]],
        **options: Any,
    ) -> int:
        """Run one task in a container, print its output, and return its exit status.

        KFP's own function asks for the status after removing the container, and so reports a failure as a
        success (kubeflow/pipelines 13332).
        """
        if self._interrupted:
            return 1
        suffix = ",z" if any(volume["mode"].endswith(",z") for volume in volumes.values()) else ""  # SELinux
        for path, mode in self._volumes.items():
            volumes.setdefault(path, {"bind": path, "mode": mode + suffix})
        container = client.containers.run(
            image=image, command=command, detach=True, volumes=volumes, **options
        )
        try:
            with self._lock:
                self._running[container.id] = container
            if self._interrupted:  # meanwhile
                container.kill()
            for line in container.logs(stream=True, follow=True):
                print(line.decode(errors="replace"), end="")
            status = int(container.wait()["StatusCode"])
            if status == 137 and not self._interrupted:
                print("ERROR - the task's container was killed, perhaps for want of memory\n")
            return status
        finally:
            with self._lock:
                self._running.pop(container.id, None)
            container.remove(force=True)

    def interruptible(self) -> contextlib.AbstractContextManager[None]:
        """Within it SIGINT and SIGTERM end the containers and raise `Interrupted`; a second one kills."""
        return interruptible(self._end)

    def _end(self, grace: float) -> None:
        """Interrupt every task as Ctrl-C would, and kill those still running after `grace` seconds."""
        self._interrupted = True
        with self._lock:
            running = list(self._running.values())
        if grace:
            for container in running:
                with contextlib.suppress(Exception):  # it has just ended
                    # reaches all but the shell that KFP starts a task with, which then ends by itself
                    container.exec_run(["sh", "-c", "kill -INT -1"], detach=True)
        until = time.monotonic() + grace
        while time.monotonic() < until and any(container.id in self._running for container in running):
            time.sleep(0.2)
        for container in running:
            if container.id in self._running:
                with contextlib.suppress(Exception):
                    container.kill()


def _remove(labels: Mapping[str, str]) -> None:
    """Remove the containers of a run that was killed: nobody waits for them, and they write to its folder."""
    import docker

    client = docker.from_env()
    try:
        wanted = {"label": [f"{name}={value}" for name, value in labels.items()]}
        for container in client.containers.list(all=True, filters=wanted):
            container.remove(force=True)
    finally:
        client.close()


def _paths_in(value: object) -> Iterator[Path]:
    """The files and folders of this machine that parameters name, even within JSON."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for element in value:
            yield from _paths_in(element)
    elif isinstance(value, str) and value.startswith(("{", "[")):
        with contextlib.suppress(ValueError):
            yield from _paths_in(json.loads(value))
    elif isinstance(value, str) and value.strip():
        with contextlib.suppress(OSError):  # a text too long to be a path
            if Path(value).exists() and Path(value).absolute() != Path("/"):
                yield Path(value)


def _give(folder: Path, user: int) -> None:
    """Make a user the owner of a folder and all it holds."""
    os.chown(folder, user, user)
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            os.chown(Path(place, name), user, user, follow_symlinks=False)


@contextlib.contextmanager
def _process(
    command: list[str], log_file: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that Ctrl-C does not reach, in a session of its own; it ends with this context."""
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _await(ready: Callable[[], bool], process: subprocess.Popen[bytes], log_file: Path, what: str) -> None:
    until = time.monotonic() + _PATIENCE
    while not ready():
        if process.poll() is not None or time.monotonic() > until:
            last = "\n".join(log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-10:])
            raise ConfigError(f"{what} did not start; it said:\n{last}")
        time.sleep(0.1)
