"""A training face as a TrainJob whose nodes are containers of the training image, by the SDK's backend."""

import os
import shutil
import subprocess
import time

import pytest
from softpref.images import TRAIN_IMAGE

from tests.containers.conftest import needs_containers

docker = pytest.importorskip("docker", reason="the extra cluster is not installed")
pytest.importorskip("kubeflow.trainer", reason="the extra cluster is not installed")

pytestmark = needs_containers

IMAGE = os.environ.get("TRAIN_IMAGE_UNDER_TEST", TRAIN_IMAGE)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """The address of an engine that has the training image: the named one, or Podman's, started here."""
    service = None
    address = os.environ.get("DOCKER_HOST", "")
    if not address:
        assert shutil.which("podman"), "there is no podman, and DOCKER_HOST names no engine"
        assert shutil.which("iptables"), "podman needs iptables for a network of containers"
        socket = tmp_path_factory.mktemp("podman") / "podman.sock"
        address = f"unix://{socket}"
        service = subprocess.Popen(["podman", "system", "service", "--time=0", address])
        until = time.monotonic() + 30
        while not socket.exists():
            assert time.monotonic() < until
            assert service.poll() is None
            time.sleep(0.1)
    client = docker.DockerClient(base_url=address)
    try:
        assert client.images.list(name=IMAGE), f"{IMAGE} is not built; make images builds it"
        yield address
    finally:
        client.close()
        if service is not None:
            service.terminate()
            service.wait()


def test_two_containers_take_the_steps_of_one_process(
    engine, train, same_trajectory, capfd, tmp_path, monkeypatch
):
    monkeypatch.setenv("DOCKER_HOST", engine)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # the SDK keeps the job's folder there
    _, single = train("policy")
    single = single.rename(tmp_path / "single")
    # the tracking store of this test is a file, which containers do not see
    monkeypatch.setattr("softpref.distributed.trainjob._FORWARDED", ())
    job = {"backend": "container", "image": IMAGE, "nodes": 2, "poll_interval": 1.0}
    job["env"] = {"MLFLOW_TRACKING_URI": "sqlite:////tmp/mlflow.db", "OMP_NUM_THREADS": "1"}
    _, double = train("policy", {"trainjob": job}, world_size=2)
    same_trajectory(single, double)
    # the one process's, and each node's once: the backend passes on the log of one after the other
    assert capfd.readouterr().out.count("'train_runtime'") == 3
    client = docker.DockerClient(base_url=engine)
    assert not client.containers.list(all=True, filters={"name": "train-policy-"})
    assert not client.networks.list(filters={"name": "train-policy-"})
