"""`--runner docker` with real containers: a whole sweep, its failures, and its interruption."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from softpref.errors import ConfigError
from softpref.images import DATA_IMAGE, EVALUATE_IMAGE, TRAIN_IMAGE

from tests.containers.conftest import REPOSITORY, needs_containers, podman

pytestmark = [needs_containers, pytest.mark.usefixtures("images")]


def start(folder, script, *arguments):
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}
    for name in ("MLFLOW_RUN_ID", "DOCKER_HOST"):
        environment.pop(name, None)
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "pipelines" / script), *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder, script, *arguments):
    process = start(folder, script, *arguments)
    out, err = process.communicate(timeout=550)
    return process.returncode, out, err


def containers_of(output):
    """Ids of the containers that a run has now, also of those that have ended and were not removed."""
    return podman("ps", "--all", "--quiet", "--filter", f"label=softpref.output={output}").stdout.split()


def wait_for_container(output, image, seconds=120):
    until = time.monotonic() + seconds
    filters = ("--filter", f"label=softpref.output={output}", "--filter", f"ancestor={image}")
    while time.monotonic() < until:
        found = podman("ps", "--quiet", *filters).stdout.split()
        if found:
            return found[0]
        time.sleep(0.2)
    raise AssertionError(f"no container of {image} was started")


def statuses(folder):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "softpref"]
    return {run.info.run_name: run.info.status for run in client.search_runs([experiment.experiment_id])}


def artifacts(output):
    """Every file that the tasks left, by its place below the run's own folder."""
    (root,) = [path for path in (output / "pipeline").iterdir() if path.name.startswith("spo-sweep")]
    names = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    return {name for name in names if ".lock" not in name and "/checkpoint" not in name}


def evaluations(output):
    found = [
        json.loads(path.read_text()) for path in (output / "pipeline").rglob("evaluation/evaluation.json")
    ]
    return {evaluation["name"]: evaluation for evaluation in found}


def test_a_sweep_in_containers_leaves_what_a_local_one_leaves(quick_recipe, tmp_path):
    local, contained = tmp_path / "local", tmp_path / "contained"
    local.mkdir(), contained.mkdir()
    recipe = quick_recipe()
    code, _, err = run(local, "spo_sweep.py", "--recipe", recipe, "--output", "out")
    assert code == 0, err[-4000:]
    code, out, err = run(contained, "spo_sweep.py", "--runner=docker", "--recipe", recipe, "--output", "out")
    assert code == 0, out[-2000:] + err[-4000:]

    # each stage in its own container, of its own image
    query = ["events", "--stream=false", "--since=1h", "--filter=event=create", "--format={{.Image}}"]
    query.append(f"--filter=label=softpref.output={contained / 'out'}")
    started = sorted(podman(*query).stdout.split())
    assert started == sorted([DATA_IMAGE] + 4 * [TRAIN_IMAGE] + 4 * [EVALUATE_IMAGE])
    assert not containers_of(contained / "out")

    assert artifacts(contained / "out") == artifacts(local / "out")
    here, there = evaluations(local / "out"), evaluations(contained / "out")
    assert sorted(there) == sorted(here) == ["dpo-beta-1", "spo-alpha-0.5"]
    for name, evaluation in there.items():
        for figure, value in evaluation["metrics"].items():
            expected = here[name]["metrics"][figure]
            if value and value["value"] is not None:
                assert value["value"] == pytest.approx(expected["value"], rel=1e-3, abs=1e-3), (name, figure)
    assert set(statuses(contained).values()) == {"FINISHED"}
    assert {n for n in statuses(contained) if "quick" not in n} == {
        "dpo-beta-1",
        "reference",
        "spo-alpha-0.5",
    }

    # the registered model is where the local run's would be, and is served from there without any server
    import mlflow
    from mlflow import MlflowClient

    registration = json.loads((contained / "out/registration.json").read_text())
    assert set(registration["aliases"]) == {"challenger", "champion"}
    uri = f"sqlite:///{contained / 'mlflow.db'}"
    version = MlflowClient(uri).get_model_version_by_alias("softpref-story", "champion")
    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model(f"models:/softpref-story/{version.version}")
    assert model.predict([{"prompt": "Write a very short story about a brave fox.\n"}])


def test_a_stage_that_fails_fails_the_run_and_is_named(quick_recipe, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "p", "chosen": "", "rejected": "b"}\n' * 4, encoding="utf-8")
    recipe = quick_recipe(
        source="rows.jsonl", data_overrides={}
    )  # relative, and only the containers' if mounted
    code, _, err = run(tmp_path, "spo_sweep.py", "--runner=docker", "--recipe", recipe, "--output", "out")
    assert code == 1
    assert "DataError" in err
    assert "prepare-data" in "\n".join(err.splitlines()[-2:])
    assert list(statuses(tmp_path).values()).count("FAILED") == 1
    assert not (tmp_path / "out/registration.json").exists()


def test_a_stage_that_is_killed_fails_the_run_and_is_named(quick_recipe, tmp_path):
    process = start(
        tmp_path, "spo_sweep.py", "--runner=docker", "--recipe", quick_recipe(), "--output", "out"
    )
    data = wait_for_container(tmp_path / "out", DATA_IMAGE)
    podman("kill", data)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "killed" in err
    assert "prepare-data" in "\n".join(err.splitlines()[-2:])


def test_an_interrupted_run_leaves_no_container(quick_recipe, tmp_path):
    recipe = quick_recipe(rows=8000, num_train_epochs=20)  # long enough to be in the middle of
    process = start(tmp_path, "spo_sweep.py", "--runner=docker", "--recipe", recipe, "--output", "out")
    wait_for_container(tmp_path / "out", DATA_IMAGE)
    until = time.monotonic() + 200
    while "spo-alpha-0.5" not in statuses(tmp_path) and time.monotonic() < until:
        time.sleep(1)
    assert containers_of(tmp_path / "out")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert not containers_of(tmp_path / "out")
    ended = statuses(tmp_path)
    assert ended.pop("reference") == "FINISHED"
    assert ended.pop("spo-alpha-0.5") == "KILLED"
    assert "RUNNING" not in ended.values()


def test_a_missing_image_is_said_with_the_command_that_builds_it():
    from softpref.pipelines.containers import engine, require_images

    with engine() as found:
        require_images([DATA_IMAGE], found)
        with pytest.raises(ConfigError, match=r"no-such-tag.*images/build\.py --engine podman"):
            require_images([DATA_IMAGE, "localhost/softpref-data:no-such-tag"], found)


def test_a_container_is_confined_and_its_exit_status_is_the_tasks(tmp_path, capsys, monkeypatch):
    import docker
    from softpref.pipelines.containers import Containers

    monkeypatch.setenv("HF_TOKEN", "token-of-the-hub")
    monkeypatch.setenv("UNRELATED_SECRET", "not for tasks")
    source = tmp_path / "rows.jsonl"
    source.write_text("{}\n")
    parameters = {"tracking_uri": "http://127.0.0.1:1", "source": str(source), "gpus": 0}
    root = tmp_path / "out/pipeline"
    script = (
        f"id -u; grep -c '^CapEff:.0*$' /proc/self/status; touch /x /opt/softpref/x; cat {source}; "
        f"echo changed > {source}; echo result > {root}/result && touch /tmp/x && env; exit 7"
    )
    with Containers([DATA_IMAGE]) as containers:
        assert containers.open(tmp_path / "out", parameters) == "http://127.0.0.1:1"
        client = docker.from_env()
        options = containers.runner().container_run_args
        volumes = {str(root): {"bind": str(root), "mode": "rw"}}
        assert containers.run(client, DATA_IMAGE, ["sh", "-c", script], volumes, **options) == 7
        client.close()
    printed = capsys.readouterr().out
    user, capabilities = printed.splitlines()[:2]
    assert user == str(os.getuid() or 1000)
    assert capabilities == "1"
    assert printed.count("Read-only file system") == 3
    assert source.read_text() == "{}\n"
    assert (root / "result").read_text() == "result\n"
    assert "HF_TOKEN=token-of-the-hub" in printed
    assert "UNRELATED_SECRET" not in printed
