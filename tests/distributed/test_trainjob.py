"""A training face as a TrainJob of two nodes on the SDK's local backend, from copying in to copying back."""

import os

import pytest

pytest.importorskip("kubeflow.trainer", reason="the extra cluster is not installed")

from softpref.distributed.config import TrainJobConfig
from softpref.distributed.nodes import State
from softpref.distributed.trainjob import run_trainjob
from softpref.errors import SoftprefError


@pytest.fixture
def launcher(tmp_path):
    """`launcher(**options)`: two nodes as processes of this machine, with a shared folder."""

    def make(**options):
        return {
            "trainjob": {
                "backend": "local",
                "nodes": 2,
                "mount_path": str(tmp_path / "shared"),
                "poll_interval": 0.5,
                **options,
            }
        }

    return make


def test_two_nodes_take_the_steps_of_one_process(train, launcher, same_trajectory, capfd, tmp_path):
    here = os.getcwd()
    one, single = train("policy")
    single = single.rename(tmp_path / "single")
    two, double = train("policy", launcher(), world_size=2)
    printed = capfd.readouterr()
    same_trajectory(single, double)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
    assert "'rewards/margins'" in printed.out  # the first node's output is passed on
    assert printed.out.count("node 0 of 2: 1 processes") == 1
    assert printed.out.count("'train_runtime'") == 2  # the one process's, and the first node's
    assert sorted(path.name for path in double.iterdir()) == sorted(path.name for path in single.iterdir())
    assert not list((tmp_path / "shared" / "training").iterdir())
    assert os.getcwd() == here


def test_a_refusal_on_the_nodes_is_the_faces_own_and_is_not_repeated(train, launcher, caplog):
    with pytest.raises(SoftprefError, match="did you mean 'kl_gradient'"):
        train("policy", launcher(retries=2), world_size=2, kl_gradent="full")
    assert sum("submitted" in record.getMessage() for record in caplog.records) == 1


class Restarting:
    """Nodes whose runtime starts them again and again, whatever the stage says."""

    def __init__(self, folder):
        self.place, self.deleted = folder, 0

    def folder(self, name):
        return self.place

    def submit(self, name, env):
        (self.place / "result.json").write_text('{"error": "alpha must be at least 0"}')

    def state(self, name):
        return State("running", {"node-0": "Running", "node-1": "Running"})

    def output(self, name):
        return iter(())

    def failure(self, name):
        return []

    def delete(self, name):
        self.deleted += 1


def test_a_refusal_ends_a_job_that_its_runtime_would_start_again(folders, tmp_path):
    nodes = Restarting(tmp_path / "shared")
    job = TrainJobConfig(volume_claim="shared", backend="local", mount_path=str(tmp_path), poll_interval=0.1)
    places = {"dataset": folders.dataset, "reference": folders.reference, "output": str(tmp_path / "policy")}
    with pytest.raises(SoftprefError, match="alpha must be at least 0"):
        run_trainjob(job, "train", {}, folders=places, where={}, nodes=nodes)
    assert nodes.deleted == 2  # before and after
