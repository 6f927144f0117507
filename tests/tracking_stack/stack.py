"""The tracking stack as processes of this machine: PostgreSQL, an S3 store, the MLflow server. No test in it.

Commands, arguments, environment and files are those of the manifests, as `kubectl kustomize` gives them; only
what a pod has and a process has not is put in: addresses and ports, the folder of a mount, values of Secrets.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from ..served import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
SECRETS = {
    # as infra/secrets.sh makes them; characters that a URL would not bear are on purpose
    "postgres": {"username": "mlflow", "password": "p@ss/w:rd?#1"},
    "object-store": {"access-key": "store-key", "secret-key": "store-secret"},
    "mlflow-server": {"flask-secret-key": "0123456789abcdef"},
    "mlflow-admin": {"username": "admin", "password": "correct horse battery"},
    "mlflow-credentials": {"username": "softpref", "password": "staple-of-runs-1"},
    "mlflow-serving-credentials": {"username": "serving", "password": "reader-of-models-1"},
}


def tool(name: str) -> str | None:
    """A program of this environment, of the PATH or of Debian's PostgreSQL; None where there is none."""
    beside = Path(sys.executable).parent / name
    if beside.exists():
        return str(beside)
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(debian[-1]) if debian else None)


def missing_tools() -> list[str]:
    needed = ("kubectl", "initdb", "postgres", "psql", "pg_dump", "pg_restore", "moto_server", "mlflow")
    return [name for name in needed if tool(name) is None]


def manifests(overlay: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The objects of an overlay by (kind, name); a generated ConfigMap under its name without the hash."""
    kubectl = tool("kubectl")
    assert kubectl is not None
    text = subprocess.run(
        [kubectl, "kustomize", str(REPOSITORY / "infra" / overlay)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = {}
    for document in yaml.safe_load_all(text):
        name = document["metadata"]["name"]
        if document["kind"] == "ConfigMap":
            name = re.sub(r"-[a-z0-9]{10}$", "", name)
        found[document["kind"], name] = document
    return found


class Stack:
    """Starts with `start`, ends with `stop`; `kill_server` and `start_server` are the outage.

    Args:
        folder: an empty folder that other users may enter (PostgreSQL refuses to run as root).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects = manifests("overlays/local")
        self.ports = {name: free_port() for name in ("postgres", "store", "mlflow")}
        self.uri = f"http://127.0.0.1:{self.ports['mlflow']}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._write_mounts()

    def start(self) -> None:
        self._start_postgres()
        self._start_store()
        self.run_container(self._pod()["initContainers"][0])
        self.run_container(self._pod()["initContainers"][1])
        self.start_server()

    def stop(self) -> None:
        for name in ("mlflow", "store", "postgres"):
            if name in self._processes:
                self._end(name, signal.SIGTERM if name != "postgres" else signal.SIGINT)

    # The server -----------------------------------------------------------------------------------------

    def start_server(self) -> None:
        container = self._pod()["containers"][0]
        command = [*container["command"], *container["args"]]
        command = [
            {"--host=0.0.0.0": "--host=127.0.0.1", "--port=5000": f"--port={self.ports['mlflow']}"}.get(
                part, part
            )
            for part in command
        ]
        self._spawn("mlflow", self._command(command), self.environment(container))
        self._wait("mlflow", lambda: self.status("/health") == 200)

    def kill_server(self) -> None:
        """As a node that loses power: no goodbye."""
        self._end("mlflow", signal.SIGKILL)

    def status(self, path: str, user: tuple[str, str] | None = None, host: str | None = None) -> int:
        """HTTP status of a GET."""
        import base64

        request = urllib.request.Request(self.uri + path)
        if user:
            request.add_header("Authorization", f"Basic {base64.b64encode(':'.join(user).encode()).decode()}")
        if host:
            request.add_header("Host", host)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    # Manifests to processes ------------------------------------------------------------------------------

    def environment(self, container: dict[str, Any]) -> dict[str, str]:
        """A container's own environment, and from this machine only what a program needs to be found."""
        values: dict[str, str] = {}
        for source in container.get("envFrom", []):
            if "configMapRef" in source:
                name = re.sub(r"-[a-z0-9]{10}$", "", source["configMapRef"]["name"])
                values |= self.objects["ConfigMap", name]["data"]
            elif not source["secretRef"].get("optional"):
                raise AssertionError(f"a Secret as a whole: {source}")
        for variable in container.get("env", []):
            if "value" in variable:
                values[variable["name"]] = self._here(variable["value"])
            else:
                reference = variable["valueFrom"]["secretKeyRef"]
                values[variable["name"]] = SECRETS[reference["name"]][reference["key"]]
        assert values["MLFLOW_S3_ENDPOINT_URL"] == "http://object-store:8333"
        values["MLFLOW_S3_ENDPOINT_URL"] = f"http://127.0.0.1:{self.ports['store']}"
        assert (values["PGHOST"], values["PGPORT"]) == ("postgres", "5432")
        values |= {"PGHOST": "127.0.0.1", "PGPORT": str(self.ports["postgres"])}
        programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return values | {"PATH": programs, "MLFLOW_USERS": str(self.folder / "mounts/etc/mlflow/users")}

    def run_container(self, container: dict[str, Any], **changes: str) -> str:
        """Run a container's command to its end and return what it printed."""
        values = self.environment(container) | changes
        command = [*container["command"], *container.get("args", [])]
        command = [re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], part) for part in command]
        result = subprocess.run(
            self._command(command), env=values, capture_output=True, text=True, timeout=300, cwd=self.folder
        )
        if result.returncode:
            raise RuntimeError(f"{command}: {result.stdout}{result.stderr}")
        return result.stdout

    def _pod(self) -> dict[str, Any]:
        return self.objects["Deployment", "mlflow"]["spec"]["template"]["spec"]

    def _write_mounts(self) -> None:
        volumes = {volume["name"]: volume for volume in self._pod()["volumes"]}
        for container in (*self._pod()["initContainers"], *self._pod()["containers"]):
            for mount in container["volumeMounts"]:
                target = self.folder / "mounts" / mount["mountPath"].lstrip("/")
                target.mkdir(parents=True, exist_ok=True)
                volume = volumes[mount["name"]]
                if "configMap" in volume:
                    name = re.sub(r"-[a-z0-9]{10}$", "", volume["configMap"]["name"])
                    content = self.objects["ConfigMap", name]["data"]
                else:
                    content = SECRETS[volume["secret"]["secretName"]] if "secret" in volume else {}
                for name, text in content.items():
                    (target / name).write_text(text, encoding="utf-8")
        (self.folder / "mounts/backup").mkdir()

    def _here(self, text: str) -> str:
        """A path within a pod as the path of this machine; the root of nothing but mounts."""
        return re.sub(r"^(?=/(etc/mlflow|tmp|backup)\b)", str(self.folder / "mounts"), text)

    def _command(self, command: list[str]) -> list[str]:
        program = sys.executable if command[0] == "python" else tool(command[0]) or command[0]
        rest = [self._here(part) for part in command[1:]]
        return [program, *(re.sub(r"(?<==)/backup", self._here("/backup"), part) for part in rest)]

    # Processes --------------------------------------------------------------------------------------------

    def _start_postgres(self) -> None:
        data, secret = self.folder / "postgres", SECRETS["postgres"]
        data.mkdir()
        user: dict[str, Any] = {}
        if os.geteuid() == 0:
            import pwd

            entry = pwd.getpwnam("nobody")
            user = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
            os.chown(data, entry.pw_uid, entry.pw_gid)
        password = self.folder / "postgres-password"
        password.write_text(secret["password"], encoding="utf-8")
        initdb, psql = tool("initdb"), tool("psql")
        assert initdb is not None
        assert psql is not None
        container = self.objects["StatefulSet", "postgres"]["spec"]["template"]["spec"]["containers"][0]
        options = next(
            one["value"] for one in container["env"] if one["name"] == "POSTGRES_INITDB_ARGS"
        ).split()
        initialise = [initdb, "--pgdata", data, "--username", secret["username"], "--pwfile", password]
        subprocess.run(
            [*map(str, initialise), "--auth=scram-sha-256", *options],
            check=True,
            capture_output=True,
            cwd="/",
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
            **user,
        )
        command = ["postgres", "-D", str(data), "-k", str(data), "-h", "127.0.0.1"]
        command += ["-p", str(self.ports["postgres"])]
        self._spawn("postgres", [*command, *container["args"]], {"PATH": os.environ["PATH"]}, **user)
        environment = self.database_environment() | {"PGDATABASE": "postgres"}

        def ready() -> bool:
            asked = subprocess.run(
                [psql, "-tAc", "CREATE DATABASE mlflow"], env=environment, capture_output=True, text=True
            )
            return asked.returncode == 0

        self._wait("postgres", ready)

    def database_environment(self) -> dict[str, str]:
        secret = SECRETS["postgres"]
        return {
            "PATH": os.environ["PATH"],
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.ports["postgres"]),
            "PGUSER": secret["username"],
            "PGPASSWORD": secret["password"],
        }

    def query(self, statement: str, *values: Any, database: str = "mlflow") -> list[tuple[Any, ...]]:
        import psycopg2

        secret = SECRETS["postgres"]
        with contextlib.closing(
            psycopg2.connect(
                host="127.0.0.1",
                port=self.ports["postgres"],
                user=secret["username"],
                password=secret["password"],
                dbname=database,
            )
        ) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(statement, values)
                return cursor.fetchall() if cursor.description else []

    def objects_in(self, bucket: str) -> dict[str, int]:
        """Keys and sizes of a bucket."""
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.ports['store']}",
            aws_access_key_id=SECRETS["object-store"]["access-key"],
            aws_secret_access_key=SECRETS["object-store"]["secret-key"],
            region_name="us-east-1",
        )
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return {found["Key"]: found["Size"] for page in pages for found in page.get("Contents", [])}

    def _start_store(self) -> None:
        command = ["moto_server", "-H", "127.0.0.1", "-p", str(self.ports["store"])]
        self._spawn("store", command, {"PATH": os.environ["PATH"], "HOME": str(self.folder)})

        def ready() -> bool:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.ports["store"]), 1),
            ):
                return True
            return False

        self._wait("store", ready)

    def _spawn(self, name: str, command: list[str], environment: dict[str, str], **user: Any) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [tool(command[0]) or command[0], *command[1:]],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                cwd=self.folder,
                **user,
            )

    def _wait(self, name: str, ready: Any, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._processes[name].poll() is not None:
                raise AssertionError(f"{name} ended: {self.log(name)}")
            if ready():
                return
            time.sleep(0.2)
        raise AssertionError(f"{name} did not start: {self.log(name)}")

    def _end(self, name: str, how: signal.Signals) -> None:
        process = self._processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def running_stack():
    """A started stack in a folder of its own, which is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="softpref-tracking-"))
    folder.chmod(0o755)
    stack = Stack(folder)
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()
        shutil.rmtree(folder, ignore_errors=True)
