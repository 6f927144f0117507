"""A training face as a TrainJob whose nodes are containers of the training image, started by Podman."""

import os

import pytest
from softpref.images import TRAIN_IMAGE

from tests.containers.conftest import needs_containers, podman

pytest.importorskip("kubeflow.trainer", reason="the extra cluster is not installed")

pytestmark = needs_containers

IMAGE = os.environ.get("TRAIN_IMAGE_UNDER_TEST", TRAIN_IMAGE)


def test_two_containers_take_the_steps_of_one_process(
    cluster, train, launcher, same_trajectory, capfd, tmp_path
):
    assert not podman("image", "exists", IMAGE, check=False).returncode, f"{IMAGE} is not built: make images"
    volume = f"{tmp_path / 'shared'}:{tmp_path / 'shared'}"

    def in_container(command, variables):
        options = [f"--env={name}={value}" for name, value in variables.items()]
        where = ["--rm", "--user=0", "--network=host", f"--volume={volume}"]
        return ["podman", "run", *where, *options, IMAGE, *command]

    cluster.started_as = in_container
    _, single = train("policy")
    single = single.rename(tmp_path / "single")
    # the tracking store of this test is a file, which containers do not see
    job = {"image": IMAGE, "env": {"MLFLOW_TRACKING_URI": "sqlite:////tmp/mlflow.db", "OMP_NUM_THREADS": "1"}}
    _, double = train("policy", launcher(**job), world_size=2)
    same_trajectory(single, double)
    assert capfd.readouterr().out.count("'train_runtime'") == 2  # the one process's, and the first node's
    assert not cluster.jobs
