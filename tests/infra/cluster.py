"""A Kubernetes API server that keeps objects and does nothing with them; kubectl takes it for a real one."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_RESOURCES = {
    "/api/v1": [("namespaces", "Namespace", False), ("secrets", "Secret", True)],
    "/apis/apps/v1": [("deployments", "Deployment", True)],
}


class Cluster:
    """Objects by their URL path, and every request in order as (method, path, body)."""

    def __init__(self, url: str, kubeconfig: Path, certificate: Path) -> None:
        self.url = url
        self.kubeconfig = kubeconfig
        self.certificate = certificate
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


@contextlib.contextmanager
def api_server(folder: Path) -> Iterator[Cluster]:
    """A running server with TLS, and a kubeconfig that points to it."""
    certificate, key = folder / "ca.crt", folder / "ca.key"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=127.0.0.1",
    ]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            path = self.path.split("?")[0].rstrip("/")
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, answer = _answer(cluster, self.command, path, body)
            cluster.requests.append((self.command, path, body))
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PATCH = handle_any

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = f"https://127.0.0.1:{server.server_address[1]}"
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "test",
                "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
                "clusters": [
                    {"name": "test", "cluster": {"server": url, "certificate-authority": str(certificate)}}
                ],
                "users": [{"name": "test", "user": {"token": "t"}}],
            }
        )
    )
    cluster = Cluster(url, kubeconfig, certificate)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield cluster
    finally:
        server.shutdown()
        server.server_close()


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


def _answer(cluster: Cluster, method: str, path: str, body: Any) -> tuple[int, Any]:
    if path == "/api":
        return 200, {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        version = {"groupVersion": "apps/v1", "version": "v1"}
        group = {"name": "apps", "versions": [version], "preferredVersion": version}
        return 200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": [group]}
    if path in _RESOURCES:
        resources = [
            {"name": name, "kind": kind, "namespaced": namespaced, "verbs": ["get", "create", "patch"]}
            for name, kind, namespaced in _RESOURCES[path]
        ]
        version = path.split("/", 2)[2]
        return 200, {"kind": "APIResourceList", "groupVersion": version, "resources": resources}
    if method == "POST" and path.rsplit("/", 1)[-1] in ("secrets", "namespaces"):
        target = f"{path}/{body['metadata']['name']}"
        if target in cluster.objects:
            return 409, _failure(409, "AlreadyExists", target)
        cluster.objects[target] = body
        return 201, body
    if path not in cluster.objects:
        return 404, _failure(404, "NotFound", path)
    if method == "PATCH":
        cluster.objects[path] = _merged(cluster.objects[path], body)
    return 200, cluster.objects[path]


def _merged(old: Any, new: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}


def _failure(code: int, reason: str, path: str) -> dict[str, Any]:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": code,
        "reason": reason,
        "message": f"{path}: {reason}",
    }
