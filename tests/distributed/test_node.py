"""What a node of a TrainJob finds out before it starts its processes, and what the configuration refuses."""

import json

import pytest
from softpref.config import build_config
from softpref.distributed.config import LauncherConfig, TrainJobConfig, parse_launcher
from softpref.distributed.node import NodeTask, main, read_secrets, rendezvous
from softpref.errors import ConfigError

pytestmark = pytest.mark.fast


def test_the_torch_policy_says_where_nodes_meet():
    policy = {
        "PET_NNODES": "3",
        "PET_NODE_RANK": "2",
        "PET_MASTER_ADDR": "a-node-0-0.a",
        "PET_MASTER_PORT": "1",
    }
    assert rendezvous(policy) == (3, 2, "a-node-0-0.a", 1)
    with pytest.raises(ConfigError, match=r"PET_NNODES, PET_NODE_RANK, .* not set .*spec\.mlPolicy\.torch"):
        rendezvous({"PET_MASTER_PORT": "29500"})


def test_a_node_waits_for_the_name_of_the_first(tmp_path, monkeypatch, capsys):
    from softpref.distributed import node

    asked, started = [], []

    def resolve(address, port):
        asked.append(address)
        if len(asked) < 3:
            raise OSError("not known")

    NodeTask("sft", {"dataset": "dataset", "output": "output"}, {}, processes=1, gpus=0).write(tmp_path)
    policy = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a-node-0-0.a", "MASTER_PORT": "29500"}
    for key, value in policy.items():
        monkeypatch.setenv(f"PET_{key}", value)
    monkeypatch.setattr(node.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(node.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(node, "run_watched", lambda command, **options: started.append(command))
    assert main([str(tmp_path)]) == 0
    assert asked == ["a-node-0-0.a"] * 3
    assert len(started) == 1
    asked.clear()
    monkeypatch.setattr(node, "_NAMED_WITHIN", -1)
    assert main([str(tmp_path)]) == 2
    assert "a-node-0-0.a, has no address" in capsys.readouterr().err


def test_secrets_are_read_from_files(tmp_path):
    (tmp_path / "token").write_text("abc\n")
    files = {"HF_TOKEN": str(tmp_path / "token")}
    assert read_secrets({"SOFTPREF_SECRET_FILES": json.dumps(files)}) == {"HF_TOKEN": "abc"}
    assert read_secrets({}) == {}
    optional = {"HF_TOKEN": f"{tmp_path / 'none'}?"}
    assert read_secrets({"SOFTPREF_SECRET_FILES": json.dumps(optional)}) == {}
    with pytest.raises(ConfigError, match="the secret for HF_TOKEN cannot be read"):
        read_secrets({"SOFTPREF_SECRET_FILES": json.dumps({"HF_TOKEN": str(tmp_path / "none")})})


def test_a_node_refuses_what_it_does_not_have(tmp_path, monkeypatch, capsys):
    assert main([str(tmp_path)]) == 2
    assert "mount the shared volume here" in capsys.readouterr().err
    NodeTask("sft", {"dataset": "dataset", "output": "output"}, {}, processes=2, gpus=2).write(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert main([str(tmp_path)]) == 2
    assert "2 GPU(s) were asked for, but 1 can be seen here" in capsys.readouterr().err


def test_a_node_that_starts_again_after_the_end_leaves_things_alone(tmp_path):
    NodeTask("sft", {"dataset": "dataset", "output": "output"}, {}, processes=1, gpus=0).write(tmp_path)
    (tmp_path / "result.json").write_text('{"result": {"train_loss": 1.0}}')
    assert main([str(tmp_path)]) == 0  # without a rendezvous, too


def test_an_empty_launcher_is_this_machine():
    assert parse_launcher("") == LauncherConfig(processes=0, trainjob=None)
    assert parse_launcher('{"processes": 2.0}').processes == 2  # KFP hands integers over as floats
    job = parse_launcher('{"trainjob": {"volume_claim": "shared", "nodes": 4.0, "gpus_per_node": null}}').job
    assert (job.nodes, job.gpus_per_node, job.mount_path) == (4, None, "/shared")


@pytest.mark.parametrize(
    ("launcher", "says"),
    [
        ("[2]", "must be a JSON object"),
        ("{", "launcher is not JSON"),
        ('{"process": 2}', "did you mean 'processes'"),
        ('{"processes": -1}', "processes must be at least 0"),
        ('{"processes": 2, "trainjob": {"volume_claim": "a"}}', r"give trainjob\.processes_per_node"),
        ('{"trainjob": {}}', "volume_claim must be the name of a ReadWriteMany claim"),
        ('{"trainjob": {"volume_clam": "a"}}', "did you mean 'volume_claim'"),
    ],
)
def test_a_launcher_that_is_none_is_refused_with_what_would_be_right(launcher, says):
    with pytest.raises(ConfigError, match=says):
        parse_launcher(launcher)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("nodes", 0, "at least 1"),
        ("gpus_per_node", -1, "at least 0"),
        ("poll_interval", 0, "above 0"),
        ("mount_path", "shared", "absolute path"),
        ("folder", "../other", "relative path inside the volume"),
        ("runtime", "Torch Distributed", "name of a Kubernetes object"),
        ("secrets", {"HF_TOKEN": "hub-token"}, "SECRET/KEY"),
        ("env", {"A-B": "1"}, "variables with text"),
        ("volume_claim", "", "ReadWriteMany claim"),
    ],
)
def test_a_job_that_cannot_be_is_refused(option, value, says):
    with pytest.raises(ConfigError, match=says) as refused:
        build_config(TrainJobConfig, {"volume_claim": "shared", option: value})
    assert option in str(refused.value)


def test_a_variable_has_one_source():
    with pytest.raises(ConfigError, match="without HF_TOKEN, which secrets has too"):
        TrainJobConfig(volume_claim="a", secrets={"HF_TOKEN": "hub/token"}, env={"HF_TOKEN": "x"})
