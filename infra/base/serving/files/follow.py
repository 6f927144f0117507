"""Rolls a Deployment over when the registry's alias moves to another version. Standard library only.

    follow.py DEPLOYMENT

An annotation of the pod template holds the served version; changing it makes Kubernetes start new pods. Reads
MODEL_NAME, MODEL_ALIAS, NAMESPACE, MLFLOW_TRACKING_URI, _USERNAME and _PASSWORD, and the pod's own service
account.
"""

import base64
import json
import os
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

ANNOTATION = "softpref/model-version"
ACCOUNT = Path(os.environ.get("SERVICE_ACCOUNT_FOLDER", "/var/run/secrets/kubernetes.io/serviceaccount"))


def main(deployment: str) -> str:
    """Patch the Deployment if the alias has moved; returns in words what was done."""
    name, alias = os.environ["MODEL_NAME"], os.environ["MODEL_ALIAS"]
    version = _aliased_version(name, alias)
    path = f"/apis/apps/v1/namespaces/{os.environ['NAMESPACE']}/deployments/{deployment}"
    template = _kubernetes("GET", path)["spec"]["template"]
    served = (template["metadata"].get("annotations") or {}).get(ANNOTATION)
    if served == version:
        return f"{name}@{alias} is version {version}, which is served"
    patch = {"spec": {"template": {"metadata": {"annotations": {ANNOTATION: version}}}}}
    _kubernetes("PATCH", path, patch)
    return f"{name}@{alias} is version {version} (was {served or 'not known'}): {deployment} is rolled over"


def _aliased_version(name: str, alias: str) -> str:
    query = urllib.parse.urlencode({"name": name, "alias": alias})
    login = f"{os.environ['MLFLOW_TRACKING_USERNAME']}:{os.environ['MLFLOW_TRACKING_PASSWORD']}"
    request = urllib.request.Request(
        f"{os.environ['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/registered-models/alias?{query}",
        headers={"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"},
    )
    return str(_answer(request, "MLflow")["model_version"]["version"])


def _kubernetes(method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    host = os.environ.get("KUBERNETES_SERVICE_HOST", "kubernetes.default.svc")
    host = f"[{host}]" if ":" in host else host
    request = urllib.request.Request(
        f"https://{host}:{os.environ.get('KUBERNETES_SERVICE_PORT', '443')}{path}",
        data=json.dumps(body).encode() if body else None,
        method=method,
        headers={
            "Authorization": f"Bearer {(ACCOUNT / 'token').read_text(encoding='utf-8').strip()}",
            "Content-Type": "application/strategic-merge-patch+json",
        },
    )
    return _answer(request, "Kubernetes", ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt")))


def _answer(
    request: urllib.request.Request, server: str, context: ssl.SSLContext | None = None
) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(request, timeout=30, context=context) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        detail = error.read().decode(errors="replace")[:300]
        raise SystemExit(f"{server}, {request.full_url}: {error.code} {detail}") from error
    except OSError as error:
        raise SystemExit(f"{server}, {request.full_url}: {error}") from error


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(main(sys.argv[1]))
