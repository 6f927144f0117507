"""The cluster that `make test-cluster` names, and what of it can be reached from here."""

import os
import shlex

import pytest

from .kubeflow import Cluster

_ENDPOINT = "SOFTPREF_CLUSTER_ENDPOINT"


def pytest_collection_modifyitems(items):
    if _ENDPOINT not in os.environ:
        skip = pytest.mark.skip(reason="needs a cluster: make test-cluster ENDPOINT=… NAMESPACE=…")
        for item in items:
            if item.path.parent.name == "cluster":
                item.add_marker(skip)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    cluster = Cluster(
        os.environ[_ENDPOINT],
        os.environ["SOFTPREF_CLUSTER_NAMESPACE"],
        os.environ["SOFTPREF_CLUSTER_PROFILE"],
        shlex.split(os.environ.get("SOFTPREF_CLUSTER_OPTIONS", "")),
        tmp_path_factory.mktemp("cluster"),
    )
    print(f"\nexperiment and registered model: {cluster.name}")
    yield cluster
    if not os.environ.get("SOFTPREF_CLUSTER_KEEP"):
        cluster.clean_up()


@pytest.fixture(scope="session")
def mlflow(cluster):
    """A client of the tracking server; what needs it is skipped where it cannot be reached."""
    if "mlflow" in cluster.lacks:
        pytest.skip(cluster.lacks["mlflow"])
    return cluster.mlflow


@pytest.fixture(scope="session")
def kubernetes(cluster):
    """kubectl with the words that follow; what needs it is skipped where it cannot be reached."""
    if "kubectl" in cluster.lacks:
        pytest.skip(cluster.lacks["kubectl"])
    return cluster.kubernetes
