"""A sweep whose tracking server is killed in the middle: minutes long, so only `make test-tracking` runs it.

The real pipeline on this machine logs to the real stack as a user without special rights. While the policies
train, the server is killed, stays away for a minute, and is started again.
"""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
import yaml

from ..served import free_port, kill_server, start_server
from .stack import REPOSITORY, SECRETS, manifests, missing_tools, running_stack, tool

OUTAGE = 60  # seconds

assert not missing_tools(), f"make test-tracking needs {', '.join(missing_tools())}: install PostgreSQL"


@pytest.fixture(scope="module")
def stack():
    with running_stack() as stack:
        yield stack


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The embedded recipe, shortened to a few minutes; training outlasts the outage."""
    recipe = yaml.safe_load((REPOSITORY / "pipelines/recipes/embedded.yaml").read_text(encoding="utf-8"))
    recipe |= {
        "rows": 8000,
        "num_train_epochs": 1,
        "alphas": [0.5, 1.0],
        "baselines": [],
        "samples_per_prompt": 8,
        "min_win_rate": 0.0,
    }
    recipe["data_overrides"] |= {"sft_rows": 4000}
    recipe["evaluation_overrides"] = {"exact_prompts": 1, "bootstrap_samples": 100}
    recipe["train_overrides"] |= {"per_device_train_batch_size": 32, "logging_steps": 1}
    path = tmp_path_factory.mktemp("recipe") / "outage.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def sweep(stack, recipe, tmp_path_factory):
    """The sweep's output folder, its text, and how many points were written while the server was away."""
    output = tmp_path_factory.mktemp("sweep") / "out"
    user = SECRETS["mlflow-credentials"]
    environment = os.environ | {
        "MLFLOW_TRACKING_USERNAME": user["username"],
        "MLFLOW_TRACKING_PASSWORD": user["password"],
    }
    command = [sys.executable, REPOSITORY / "pipelines/spo_sweep.py", "--recipe", recipe]
    command += ["--tracking-uri", stack.uri, "--output", output]
    log = output.parent / "sweep.log"
    with log.open("wb") as text:
        process = subprocess.Popen(
            list(map(str, command)), stdout=text, stderr=text, env=environment, cwd=output.parent
        )
    try:
        _wait(process, log, lambda: _policy_points(output) > 40)
        stack.kill_server()
        before, begun = _policy_points(output), time.monotonic()
        time.sleep(OUTAGE)
        during = _policy_points(output) - before
        stack.start_server()
        print(f"away for {time.monotonic() - begun:.0f} s, in which {during} points of training were written")
        status = process.wait(900)
    finally:
        process.kill()
    assert status == 0, log.read_text(encoding="utf-8")[-5000:]
    return output, log.read_text(encoding="utf-8"), during


def _wait(process, log, ready):
    while not ready():
        if process.poll() is not None:
            raise AssertionError(log.read_text(encoding="utf-8")[-5000:])
        time.sleep(0.2)


def _policy_points(output):
    files = (output / "pipeline").rglob("tracking.jsonl") if output.exists() else []
    return sum(
        file.read_bytes().count(b'"kind": "metrics"') for file in files if "train-policy" in str(file.parent)
    )


def _records(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


@pytest.fixture(scope="module")
def mirrors(sweep):
    """Run id → records of all folders that tracked it."""
    output, _, _ = sweep
    found: dict[str, list] = {}
    for path in sorted((output / "pipeline").rglob("tracking*.jsonl")):
        records = list(_records(path))
        notes = list(_records(path.with_suffix(".sent")))
        run_id = records[0]["run_id"] or next(note["run_id"] for note in notes if "run_id" in note)
        found.setdefault(run_id, []).extend((path.parent, record) for record in records)
    return found


@pytest.fixture(scope="module")
def client(stack, sweep):
    from mlflow import MlflowClient

    user = SECRETS["mlflow-credentials"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", user["username"])
        patch.setenv("MLFLOW_TRACKING_PASSWORD", user["password"])
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        yield MlflowClient(stack.uri)


def test_training_does_not_stop_while_the_server_is_away(sweep):
    _, _, during = sweep
    assert during > 40


def test_every_point_of_every_run_is_in_the_database_once(stack, mirrors):
    assert len(mirrors) >= 3  # the reference and two policies
    total = 0
    for run_id, records in mirrors.items():
        written = {  # a set, for what is logged twice within a millisecond is one point to the store
            (key, record["step"], record["time"], repr(float(value)))
            for _, record in records
            if record["kind"] == "metrics"
            for key, value in record["values"].items()
        }
        stored = Counter(
            (key, step, moment, "nan" if is_nan else repr(value))
            for key, step, moment, value, is_nan in stack.query(
                "SELECT key, step, timestamp, value, is_nan FROM metrics WHERE run_uuid = %s", run_id
            )
        )
        assert stored == Counter(written)
        total += len(written)
    print(f"{total} points of {len(mirrors)} runs")


def test_the_servers_api_tells_the_same_points(client, mirrors):
    for run_id, records in mirrors.items():
        written: dict[str, set] = {}
        for _, record in records:
            if record["kind"] == "metrics":
                for key, value in record["values"].items():
                    written.setdefault(key, set()).add((record["step"], record["time"], float(value)))
        for key, points in written.items():
            told = {(one.step, one.timestamp, one.value) for one in client.get_metric_history(run_id, key)}
            assert told == points


def test_parameters_and_tags_are_those_that_were_written_and_runs_are_ended(client, mirrors):
    for run_id, records in mirrors.items():
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED"
        for _, record in records:
            if record["kind"] == "params":
                for key, value in record["values"].items():
                    kept = run.data.params[key]
                    assert value == kept or kept.endswith("[cut]")
            elif record["kind"] == "tags":
                assert record["values"].keys() <= run.data.tags.keys()


def test_artifacts_lie_in_the_bucket_as_they_were_sent(stack, client, mirrors, tmp_path):
    stored = stack.objects_in("mlflow")
    checked = 0
    for run_id, records in mirrors.items():
        for folder, record in records:
            if record["kind"] != "artifact":
                continue
            path = folder / record["path"]
            for file in [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]:
                name = str(Path(record["folder"]) / (file.name if path.is_file() else file.relative_to(path)))
                kept = Path(client.download_artifacts(run_id, name, str(tmp_path)))
                assert kept.read_bytes() == file.read_bytes()
                assert any(key.endswith(f"{run_id}/artifacts/{name}") for key in stored)
                checked += 1
    assert checked


def test_the_registered_champion_is_the_chosen_model(client, sweep, tmp_path):
    import mlflow

    output, _, _ = sweep
    decision = json.loads((output / "registration.json").read_text(encoding="utf-8"))
    version = client.get_model_version_by_alias("softpref-story", "champion")
    assert version.version == decision["version"]
    assert version.tags["model_hash"] == decision["model_hash"]
    mlflow.set_tracking_uri(client.tracking_uri)
    try:
        folder = Path(
            mlflow.artifacts.download_artifacts("models:/softpref-story@champion", dst_path=str(tmp_path))
        )
    finally:
        mlflow.set_tracking_uri(None)
    weights = [file.read_bytes() for file in folder.rglob("*.safetensors")]
    trained = [file.read_bytes() for file in (output / "pipeline").rglob("policy/model.safetensors")]
    assert weights
    assert all(one in trained for one in weights)


def test_the_sweeps_runs_have_one_parent(client, mirrors, sweep):
    parents = {client.get_run(run_id).data.tags.get("mlflow.parentRunId") for run_id in mirrors} - {None}
    assert len(parents) == 1
    assert client.get_run(parents.pop()).info.status == "FINISHED"


def test_the_champion_is_served_as_the_deployment_serves_it(stack, sweep, tmp_path):
    """The Deployment's command and environment, logged in as the user that may only read."""
    objects = manifests("overlays/serving")
    pod = objects["Deployment", "softpref-serving"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    port = free_port()
    user = SECRETS["mlflow-serving-credentials"]
    environment = {
        **objects["ConfigMap", "serving-settings"]["data"],
        **{one["name"]: one["value"] for one in container["env"] if "value" in one},
        "MLFLOW_TRACKING_URI": stack.uri,
        "MLFLOW_TRACKING_USERNAME": user["username"],
        "MLFLOW_TRACKING_PASSWORD": user["password"],
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "huggingface"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    settings = {"--host=0.0.0.0": "--host=127.0.0.1", "--port=8080": f"--port={port}"}
    arguments = [
        re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], settings.get(part, part))
        for part in container["args"]
    ]
    address = f"http://127.0.0.1:{port}"
    probe = container["readinessProbe"]["httpGet"]["path"]
    command = [str(tool("mlflow")), *container["command"][1:], *arguments]
    process = start_server(command, address + probe, tmp_path / "log", env=environment, cwd=tmp_path)
    try:
        request = urllib.request.Request(
            address + "/invocations",
            data=json.dumps({"prompt": "Write a very short story about a brave fox.\n"}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            (told,) = json.load(answer)
    finally:
        kill_server(process)
    assert len(told["choices"][0]["text"].split()) > 3
