"""Whole pipelines in KFP's own local runner, small: artifacts, tracking, registration, and failure."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from tests.pipelines.conftest import PACKAGES, REPOSITORY


def run_pipeline(script, *arguments, folder):
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}
    environment.pop("MLFLOW_RUN_ID", None)
    return subprocess.run(
        [sys.executable, REPOSITORY / "pipelines" / script, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep")


def test_sweep_trains_compares_and_registers(quick_recipe, folder):
    result = run_pipeline("spo_sweep.py", "--recipe", quick_recipe(), "--output", "out", folder=folder)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    output = folder / "out"

    comparison = json.loads((output / "comparison/comparison.json").read_text())
    assert sorted(member["name"] for member in comparison["members"]) == ["dpo-beta-1", "spo-alpha-0.5"]
    assert f"chosen:   {comparison['chosen']}. " in result.stdout
    (chosen,) = [one for one in comparison["members"] if one["name"] == comparison["chosen"]]
    assert f"model:    {chosen['model_uri']}\n" in result.stdout
    store = f"sqlite:///{folder / 'mlflow.db'}"
    serve = "mlflow models serve -m models:/softpref-story@champion --env-manager local -p 5001\n"
    assert f"serve:    MLFLOW_TRACKING_URI={store} {serve}" in result.stdout
    assert re.search(
        r"--backend-store-uri \S+, then open http://\S+/#/experiments/\d+\?workflowType=machine_l",
        result.stdout,
    )
    for text in {text for member in comparison["members"] for text in member["warnings"]}:
        assert result.stdout.count(text) == 1
    took = result.stdout.splitlines()[-1]
    assert "training" in took
    assert "evaluation" in took
    assert list((output / "reference-cache").glob("*.safetensors"))
    assert (output / "comparison/frontier.png").stat().st_size > 10_000
    assert "frontier" in (output / "comparison/report.html").read_text().lower()

    registration = json.loads((output / "registration.json").read_text())
    assert registration["registered"]
    assert set(registration["aliases"]) == {"challenger", "champion"}

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "softpref"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.info.run_name: run for run in runs if run is not parent}
    assert sorted(children) == ["dpo-beta-1", "reference", "spo-alpha-0.5"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent.info.run_id}
    assert {run.info.status for run in runs} == {"FINISHED"}
    policy = children["spo-alpha-0.5"]
    assert policy.data.params["alpha"] == "0.5"
    assert {"kl/sequence", "sampling/ess", "rewards/accuracies", "eval/win_rate"} <= set(policy.data.metrics)
    assert {"seconds/training", "eval/seconds/evaluation"} <= set(policy.data.metrics)
    for member in (policy, children["dpo-beta-1"]):  # preferences were tokenized once, beside the reference
        assert "seconds/reading" in member.data.metrics
        assert "seconds/tokenizing" not in member.data.metrics
    assert "kl/sequence" not in children["dpo-beta-1"].data.metrics
    version = client.get_model_version_by_alias("softpref-story", "champion")
    assert version.tags["alpha"] in {"0.5", "1.0"}
    assert client.get_run(version.run_id).info.run_name == comparison["chosen"]


def test_failing_stage_fails_the_run_and_says_why(quick_recipe, folder):
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "p", "chosen": "", "rejected": "b"}\n' * 4, encoding="utf-8")
    recipe = quick_recipe(source=str(rows), data_overrides={})
    result = run_pipeline("spo_pipeline.py", "--recipe", recipe, "--output", "failed", folder=folder)
    assert result.returncode == 1
    assert "DataError" in result.stderr
    assert "empty" in result.stderr
    assert "pipeline.log" in result.stderr
    assert not (folder / "failed/registration.json").exists()

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "softpref"]
    statuses = [run.info.status for run in client.search_runs([experiment.experiment_id])]
    assert statuses.count("FAILED") == 1


def used_again(printed):
    """The tasks, with their models, whose results a run took from its folder."""
    return re.findall(r"^[\d:]+  (.+) is done: its result is used again$", printed, re.MULTILINE)


def started(printed):
    return re.findall(r"^[\d:]+  (\S+) started$", printed, re.MULTILINE)


def test_a_sweep_goes_on_in_its_folder_with_another_softness(quick_recipe, folder):
    """And of its models none passes a stricter gate: it registers none and fails."""
    before = {file: file.stat().st_mtime_ns for file in (folder / "out").rglob("model.safetensors")}
    recipe = quick_recipe(alphas=[0.5, 2], baselines=[], min_win_rate=0.999, registered_model_name="nobody")
    result = run_pipeline("spo_sweep.py", "--recipe", recipe, "--output", "out", folder=folder)
    assert result.returncode == 1
    evaluations = {"evaluate-model (spo-alpha-0.5)", "evaluate-model"}
    assert {*used_again(result.stdout)} - evaluations == {
        "prepare-data",
        "train-reference",
        "train-policy (spo-alpha-0.5)",
    }
    assert started(result.stdout).count("train-policy") == 1
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert result.stderr.startswith("error: no model was registered: No member passes the gate: ")
    assert "chosen:   none. No member passes the gate: " in result.stdout
    assert "spo-alpha-0.5  0.5" in result.stdout  # the table
    comparison = json.loads((folder / "out/comparison/comparison.json").read_text())
    assert comparison["chosen"] is None
    assert sorted(member["name"] for member in comparison["members"]) == ["spo-alpha-0.5", "spo-alpha-2"]
    assert "dpo-beta-1" not in result.stdout
    assert (folder / "out/comparison/report.html").exists()

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    assert client.search_model_versions("name = 'nobody'") == []


def test_a_single_model_that_fails_the_gate_fails_the_run_where_it_was_to_be_registered(quick_recipe, folder):
    recipe = quick_recipe(min_win_rate=0.999, registered_model_name="single")
    result = run_pipeline("spo_pipeline.py", "--recipe", recipe, "--output", "out", folder=folder)
    assert result.returncode == 1
    assert result.stderr.startswith("error: no model was registered: win_rate is ")
    assert (folder / "out/registration.json").exists()
    assert "model:    " in result.stdout


def test_where_nothing_is_to_be_registered_no_step_asks_the_gate():
    spec = next(yaml.safe_load_all((PACKAGES / "spo_pipeline.yaml").read_text(encoding="utf-8")))
    dags = {name: part["dag"]["tasks"] for name, part in spec["components"].items() if "dag" in part}
    (registering,) = [name for name, tasks in dags.items() if "register-model" in tasks]
    (task,) = [
        task
        for tasks in dags.values()
        for task in tasks.values()
        if task["componentRef"]["name"] == registering
    ]
    wanted = "inputs.parameter_values['pipelinechannel--registered_model_name'] != ''"
    assert task["triggerPolicy"]["condition"] == wanted
