"""A Kubernetes API server that keeps objects and does nothing with them; kubectl takes it for a real one."""

from __future__ import annotations

import contextlib
import json
import os
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from werkzeug import Request, Response

from ..served import refuse, served

_RESOURCES = {
    "/api/v1": [("namespaces", "Namespace", False), ("secrets", "Secret", True)],
    "/apis/apps/v1": [("deployments", "Deployment", True)],
}


class Cluster:
    """Objects by their URL path, and every request in order as (method, path, body)."""

    def __init__(self, kubeconfig: Path) -> None:
        self.url = ""
        self.kubeconfig = kubeconfig
        self.objects: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str, Any]] = []

    def add(self, path: str, **content: Any) -> None:
        self.objects[path] = {"metadata": {"name": path.rsplit("/", 1)[-1]}, **content}

    def secrets(self) -> dict[tuple[str, str], set[str]]:
        """(namespace, name) → keys."""
        found = {}
        for path, content in self.objects.items():
            parts = path.split("/")
            if parts[-2] == "secrets":
                found[parts[-3], parts[-1]] = set(content["data"])
        return found

    def answer(self, request: Request) -> Any:
        path, body = request.path.rstrip("/"), request.get_json() if request.content_length else None
        self.requests.append((request.method, path, body))
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            version = {"groupVersion": "apps/v1", "version": "v1"}
            group = {"name": "apps", "versions": [version], "preferredVersion": version}
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [group]}
        if path in _RESOURCES:
            resources = [
                {"name": name, "kind": kind, "namespaced": namespaced, "verbs": ["get", "create", "patch"]}
                for name, kind, namespaced in _RESOURCES[path]
            ]
            version = path.split("/", 2)[2]
            return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}
        if request.method == "POST" and path.rsplit("/", 1)[-1] in ("secrets", "namespaces"):
            target = f"{path}/{body['metadata']['name']}"
            if target in self.objects:
                refuse(409, f"{target} is there", "AlreadyExists")
            self.objects[target] = body
            return Response(json.dumps(body), 201, mimetype="application/json")
        if path not in self.objects:
            refuse(404, f"{path} is not there", "NotFound")
        if request.method == "PATCH":
            self.objects[path] = _merged(self.objects[path], body)
        return self.objects[path]


@contextlib.contextmanager
def api_server(folder: Path) -> Iterator[Cluster]:
    """A running server with TLS, and a kubeconfig that points to it."""
    certificate, key = folder / "ca.crt", folder / "ca.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    cluster = Cluster(folder / "kubeconfig")
    with served(cluster.answer, context) as cluster.url:
        server = {"server": cluster.url, "certificate-authority": str(certificate)}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "clusters": [{"name": "test", "cluster": server}],
            "users": [{"name": "test", "user": {"token": "t"}}],
        }
        cluster.kubeconfig.write_text(json.dumps(content))
        yield cluster


def run_secrets_script(cluster: Cluster, script: Path, kubectl: str, namespace: str, **values: str) -> str:
    """Run infra/secrets.sh against the server; returns what it printed."""
    environment = {
        "PATH": f"{Path(kubectl).parent}:{os.environ['PATH']}",
        "KUBECONFIG": str(cluster.kubeconfig),
        "HOME": str(cluster.kubeconfig.parent),
        **values,
    }
    result = subprocess.run(
        [str(script), namespace], env=environment, capture_output=True, text=True, timeout=120
    )
    if result.returncode:
        raise RuntimeError(result.stdout + result.stderr)
    return result.stdout + result.stderr


def _merged(old: Any, new: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}
