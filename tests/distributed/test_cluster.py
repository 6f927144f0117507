"""A training face as a TrainJob of a cluster: its objects by the recorded schema, and all that ends it."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest

pytest.importorskip("kubeflow.trainer", reason="the extra cluster is not installed")

from softpref.distributed.config import TrainJobConfig
from softpref.distributed.kubernetes_nodes import KubernetesNodes
from softpref.distributed.launch import run_stage
from softpref.distributed.processes import StageFailed
from softpref.distributed.trainjob import node_environment
from softpref.errors import ConfigError, SoftprefError

from tests.distributed.cluster import SCHEMA

FAULT = """
import os, pathlib
mark = pathlib.Path(os.environ.get("FAULT_MARK", "/nowhere/x"))
if os.environ.get("RANK") == "1" and mark.parent.is_dir() and not mark.exists():
    import transformers
    step = transformers.Trainer.training_step
    def fail(self, *arguments):
        if self.state.global_step == 4:
            mark.touch()
            raise RuntimeError("this node was preempted")
        return step(self, *arguments)
    transformers.Trainer.training_step = fail
"""


def test_two_nodes_take_the_steps_of_one_though_the_second_fails_once_and_the_job_is_submitted_again(
    cluster, train, launcher, same_trajectory, capfd, tmp_path, monkeypatch
):
    monkeypatch.setenv("KFP_POD_NAME", "step-1")
    monkeypatch.setenv("KFP_POD_UID", "1234")
    mark = tmp_path / "fault" / "mark"
    mark.parent.mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(FAULT)
    path = f"{tmp_path / 'fault'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    cluster.node_environment = {"FAULT_MARK": str(mark), "PYTHONPATH": path}
    saving = {"save_strategy": "steps", "save_steps": 3}
    one, single = train("policy", **saving)
    single = single.rename(tmp_path / "single")
    two, double = train("policy", launcher(retries=1), world_size=2, **saving)
    same_trajectory(single, double, resumed=True)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
    assert sorted(path.name for path in double.iterdir()) == sorted(path.name for path in single.iterdir())
    assert mark.exists()
    second = next((tmp_path / "cluster").glob("*-0-1.log")).read_text()
    steps = [line for line in second.splitlines() if "'rewards/margins'" in line and "eval" not in line]
    assert len(steps) == 3  # of six
    printed = capfd.readouterr().out
    assert printed.count("node 0 of 2: 1 processes") == 2  # each job's log is passed on, and no line twice
    assert printed.count("'train_runtime'") == 2  # the one process's, and the first node's
    assert [job["spec"]["trainer"]["numNodes"] for job in cluster.posted] == [2, 2]
    assert not cluster.jobs
    assert not list((tmp_path / "shared" / "training").iterdir())
    owner = {"apiVersion": "v1", "kind": "Pod", "name": "step-1", "uid": "1234"}
    assert cluster.patched == [{"metadata": {"ownerReferences": [owner]}}] * 2


@pytest.fixture
def nodes_run(cluster):
    """`nodes_run(program)`: nodes run this Python; it has the job's folder in `job`, its rank in `rank`."""

    def run(program):
        head = "import json, os, pathlib, sys, time\n"
        head += "job, rank = pathlib.Path(sys.argv[1]), os.environ['PET_NODE_RANK']\n"
        cluster.started_as = lambda command, variables: [sys.executable, "-c", head + program, command[-1]]

    return run


def test_a_job_that_fails_fails_the_step_with_the_last_lines_of_the_node(
    cluster, train, launcher, nodes_run, tmp_path
):
    nodes_run("sys.exit('this node was preempted') if rank == '1' else time.sleep(1)")
    with pytest.raises(
        StageFailed, match=r"TrainJob train-policy-\w+ failed \(checkpoints are kept"
    ) as failed:
        train("policy", launcher(), world_size=2)
    assert "[node-1, Failed]" in str(failed.value)
    assert "this node was preempted" in str(failed.value)
    assert not cluster.jobs
    assert not (tmp_path / "policy").exists()


def test_addresses_of_a_job_are_its_owners_alone_and_what_stays_holds_no_password(
    cluster, train, launcher, nodes_run, tmp_path
):
    address = "https://me:secret@models.example/judge?signature=abc"
    nodes_run(
        "names = 'job.json', 'parameters.json'\n"
        "modes = {name: oct((job / name).stat().st_mode & 0o777) for name in names}\n"
        "given = json.loads((job / 'parameters.json').read_text())['judge_model']\n"
        "sys.exit(f'{modes} {given}')"
    )
    with pytest.raises(StageFailed) as failed:
        train("policy", launcher(), world_size=2, judge_model=address)
    assert f"{{'job.json': '0o600', 'parameters.json': '0o600'}} {address}" in str(failed.value)
    [parameters] = (tmp_path / "shared").rglob("parameters.json")
    assert json.loads(parameters.read_text())["judge_model"] == "https://models.example/judge"
    assert parameters.stat().st_mode & 0o777 == 0o600


def test_a_refusal_on_the_nodes_is_the_faces_own_and_is_not_repeated(cluster, train, launcher):
    with pytest.raises(SoftprefError, match="did you mean 'kl_gradient'"):
        train("policy", launcher(retries=2), world_size=2, kl_gradent="full")
    assert len(cluster.posted) == 1
    assert not cluster.jobs


def test_a_refusal_ends_a_job_that_its_runtime_would_start_again(cluster, train, launcher, nodes_run):
    nodes_run("(job / 'result.json').write_text('{\"error\": \"alpha must be at least 0\"}'); time.sleep(60)")
    with pytest.raises(SoftprefError, match="alpha must be at least 0"):
        train("policy", launcher(), world_size=2)
    assert not cluster.jobs


TRAINS_FOR_EVER = """
for step in range(1, 1000):
    (job / f"checkpoints/checkpoint-{step}").mkdir(parents=True, exist_ok=True)
    time.sleep(0.1)
"""
CONTINUES_TO_THE_END = """
kept = [path.name for path in (job / "checkpoints").iterdir()]
(job / "output").mkdir(exist_ok=True)
if rank == "0":
    (job / "output" / "model").write_text("trained")
    (job / "result.json").write_text(json.dumps({"result": {"checkpoints found": len(kept)}}))
"""


def test_a_step_that_is_stopped_takes_its_job_with_it_and_goes_on_when_it_is_run_again(
    cluster, launcher, folders, nodes_run, tmp_path
):
    places = {"dataset": folders.dataset, "reference": folders.reference, "output": str(tmp_path / "policy")}
    options = {"folders": places, "launcher": json.dumps(launcher()), "name": "policy"}
    # the step in a process of its own, as a pod would have it
    script = f"""
import os
from softpref.distributed.launch import run_stage
os.path.ismount = lambda path: path == {str(tmp_path / "shared")!r}
run_stage("train", dict, dict, {{}}, **{options!r})
"""
    nodes_run(TRAINS_FOR_EVER)
    jobs, trained = [], 0
    for sign in (signal.SIGTERM, signal.SIGKILL):
        step = subprocess.Popen([sys.executable, "-c", script])
        wait_for(lambda before=trained: checkpoints(tmp_path) > before + 2)
        step.send_signal(sign)
        assert step.wait(60) == -sign
        jobs.append(set(cluster.jobs))
        trained = checkpoints(tmp_path)
        nodes_run(TRAINS_FOR_EVER.replace("range(1,", f"range({trained},"))
    assert not jobs[0]
    assert len(jobs[1]) == 1  # nobody was left to remove it
    begun = len(cluster.calls)
    nodes_run(CONTINUES_TO_THE_END)
    result = run_stage("train", dict, dict, {}, **options)
    assert result["checkpoints found"] >= trained
    assert (tmp_path / "policy" / "model").read_text() == "trained"
    assert {body["metadata"]["name"] for body in cluster.posted} == jobs[1]  # always the same name
    calls = [call for call in cluster.calls[begun:] if "/trainjobs" in call]
    assert calls[0].startswith("DELETE")  # the orphan goes before the new one comes
    assert not cluster.jobs


def test_a_job_that_gets_no_nodes_is_removed_in_time(cluster, train, launcher):
    cluster.held = True
    with pytest.raises(StageFailed, match="did not start within 1 s"):
        train("policy", launcher(start_timeout=1), world_size=2)
    assert not cluster.jobs


def test_what_the_cluster_lacks_is_said_before_anything_is_trained(cluster, train, launcher, tmp_path):
    with pytest.raises(ConfigError, match="nothing is mounted at /elsewhere"):
        train("policy", launcher(mount_path="/elsewhere"), world_size=2)
    with pytest.raises(ConfigError, match="clustertrainingruntimes/none not found"):
        train("policy", launcher(runtime="none"), world_size=2)


PROFILE = {
    "volume_claim": "softpref-shared",
    "nodes": 3,
    "cpu": "8",
    "memory": "64Gi",
    "shared_memory": "16Gi",
    "image": "registry.example/softpref-train:0.1.0",
    "service_account": "softpref-runner",
    "node_selector": {"nvidia.com/gpu.product": "H100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "image_pull_secrets": ["registry"],
    "secrets": {"HF_TOKEN": "hub-token/token?", "MLFLOW_TRACKING_PASSWORD": "mlflow-credentials/password"},
    "env": {"NCCL_DEBUG": "INFO"},
    "labels": {"kueue.x-k8s.io/queue-name": "gpus"},
    "pod_labels": {"team": "research"},
    "pod_annotations": {"sidecar.istio.io/inject": "false"},
    "user": 1234,
    "timeout": 3600,
}


@pytest.fixture
def manifest(cluster, monkeypatch):
    """`manifest(gpus, **profile)`: what is posted for a job, which nobody runs."""

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "the-password")

    def make(gpus=0, **profile):
        cluster.held = True
        job = TrainJobConfig(**profile)
        KubernetesNodes(job, gpus).submit("job", node_environment(job))
        return cluster.posted[-1]

    return make


def test_the_job_holds_what_the_profile_says(manifest):
    job = manifest(gpus=8, **PROFILE)
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    spec = job["spec"]
    assert spec["activeDeadlineSeconds"] == 3600
    assert spec["runtimeRef"]["name"] == "torch-distributed"
    trainer = spec["trainer"]
    assert trainer["image"] == PROFILE["image"]
    assert trainer["numNodes"] == 3
    assert trainer["command"] == ["python", "-m", "softpref.distributed.node", "/shared/training/job"]
    limits = {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "8"}
    assert trainer["resourcesPerNode"] == {"limits": limits, "requests": limits}
    variables = {each["name"]: each["value"] for each in trainer["env"]}
    assert variables["NCCL_DEBUG"] == "INFO"
    assert variables["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert "the-password" not in json.dumps(job)
    files = json.loads(variables["SOFTPREF_SECRET_FILES"])

    [patch] = spec["runtimePatches"]
    [replicated] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["name"] == "node"
    template = replicated["template"]["spec"]["template"]
    assert template["metadata"] == {
        "labels": PROFILE["pod_labels"],
        "annotations": PROFILE["pod_annotations"],
    }
    pod = template["spec"]
    assert {pod["securityContext"][key] for key in ("runAsUser", "runAsGroup", "fsGroup")} == {1234}
    assert pod["serviceAccountName"] == "softpref-runner"
    assert pod["nodeSelector"] == PROFILE["node_selector"]
    assert pod["tolerations"] == PROFILE["tolerations"]
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    [container] = pod["containers"]
    assert "env" not in container  # Kubeflow Trainer refuses a patch with variables of this container
    mounts = {each["mountPath"]: each for each in container["volumeMounts"]}
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert volumes[mounts["/shared"]["name"]]["persistentVolumeClaim"]["claimName"] == "softpref-shared"
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert "emptyDir" in volumes[mounts["/tmp"]["name"]]
    for name, reference in PROFILE["secrets"].items():
        secret, key = reference.split("/")
        mount = mounts[str(Path(files[name]).parent)]
        volume = volumes[mount["name"]]["secret"]
        assert volume["secretName"] == secret
        assert volume.get("optional", False) == key.endswith("?")
        assert mount["readOnly"]
        assert Path(files[name]).name == key


def test_nodes_pass_a_restricted_pod_security_level(manifest):
    job = manifest(volume_claim="softpref-shared")
    pod = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0][
        "template"
    ]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 1000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    security = pod["containers"][0]["securityContext"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["readOnlyRootFilesystem"] is True
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert "resourcesPerNode" not in job["spec"]["trainer"]
    homes = {e["name"]: e["value"] for e in job["spec"]["trainer"]["env"] if e["value"].startswith("/")}
    assert {"HOME", "HF_HOME"} <= homes.keys()
    assert all(value.startswith("/tmp/") for value in homes.values())


def test_the_recorded_schema_tells_right_from_wrong(manifest):
    job = manifest(gpus=1, **PROFILE)
    jsonschema.validate(job, SCHEMA)
    for break_it in (
        lambda job: job["spec"].update(nodes=2),
        lambda job: job["spec"]["trainer"].update(numNodes="two"),
        lambda job: job["spec"].pop("runtimeRef"),
        lambda job: job["spec"]["runtimePatches"][0].pop("manager"),
    ):
        wrong = copy.deepcopy(job)
        break_it(wrong)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, SCHEMA)


def checkpoints(tmp_path):
    """How many there are on the shared volume."""
    return len([*(tmp_path / "shared").glob("training/*/checkpoints/checkpoint-*")])


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)
