"""The overlays as `kubectl kustomize` gives them, and the Secrets as the script makes them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
INFRA = REPOSITORY / "infra"
OVERLAYS = sorted(path.parent.name for path in INFRA.glob("overlays/*/kustomization.yaml"))


@pytest.fixture(scope="session")
def kubectl():
    beside = Path(sys.executable).parent / "kubectl"
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    assert found, "kubectl is not installed; it comes with the extra `dev`"
    return found


@pytest.fixture(scope="session")
def build(kubectl):
    """`build(folder)`: the objects of a folder with a kustomization."""

    def objects(folder):
        command = [kubectl, "kustomize", str(folder)]
        return list(
            yaml.safe_load_all(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        )

    return objects


@pytest.fixture(scope="session")
def overlays(build):
    """Overlay → its objects."""
    return {name: build(INFRA / "overlays" / name) for name in OVERLAYS}


@pytest.fixture(scope="session")
def profile():
    """The cluster profile that fits the manifests."""
    return yaml.safe_load((REPOSITORY / "pipelines/clusters/default.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def made_secrets(kubectl, tmp_path_factory):
    """(namespace, name) → keys that infra/secrets.sh makes, for single-user and multi-user KFP."""
    from .cluster import api_server, run_secrets_script

    made = {}
    for runs in ("kubeflow", "softpref"):
        with api_server(tmp_path_factory.mktemp("api")) as cluster:
            cluster.add(f"/api/v1/namespaces/{runs}", apiVersion="v1", kind="Namespace")
            given = {"HUB_TOKEN": "a-token", "DATA_ACCESS_KEY": "a-key", "DATA_SECRET_KEY": "a-secret"}
            given |= {"DATA_ENDPOINT": "https://store.example", "JUDGE_KEY": "a-judges-key"}
            run_secrets_script(cluster, INFRA / "secrets.sh", kubectl, runs, **given)
            made |= cluster.secrets()
    return made
