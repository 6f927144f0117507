"""The KFP face of the stage, with a real store."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from softpref.evaluation.stage import headline
from softpref.records.evaluation import Evaluation, read_samples

from tests.evaluation.conftest import copy_policy


def artifact(path, uri=""):
    return SimpleNamespace(path=str(path), uri=uri or f"file://{path}", metadata={})


def test_component_writes_artifacts_and_tracks_to_a_real_store(
    world, extrapolated, empty_store, tmp_path, monkeypatch
):
    import mlflow
    from softpref.evaluation.component import evaluate_model

    monkeypatch.setattr("softpref.intervals.LEAST_PROMPTS", 3)  # as many as this world holds out

    shutil.copy(empty_store, tmp_path / "own.db")
    store, logged = f"sqlite:///{tmp_path}/own.db", {}
    metrics = SimpleNamespace(log_metric=logged.__setitem__, metadata={})
    evaluation, report = artifact(tmp_path / "evaluation"), artifact(tmp_path / "report.html")
    policy = copy_policy(world, tmp_path / "policy")
    shutil.copytree(extrapolated / "extrapolated-0.5", policy / "extrapolated-0.5")
    evaluate_model.python_func(
        dataset=artifact(world.dataset),
        reference=artifact(world.reference),
        policy=artifact(policy, uri="s3://models/spo-1"),
        evaluation=evaluation,
        report=report,
        metrics=metrics,
        samples_per_prompt=4,
        experiment="component",
        tracking_uri=store,
        overrides={"bootstrap_samples": 100},
    )
    written = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert written["model_uri"] == "s3://models/spo-1"
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert logged == headline(Evaluation.of(written))
    assert logged["win_rate"] == float(f"{written['metrics']['win_rate']['value']:.6g}")
    assert metrics.metadata["model"] == evaluation.metadata["name"] == written["name"]
    assert len(logged) + len({*metrics.metadata} - {"display_name"}) <= 10  # one page of the UI's table
    assert {
        artifact.metadata["display_name"].split(":")[0] for artifact in (metrics, evaluation, report)
    } == {written["name"]}
    assert (evaluation.metadata["alpha"], evaluation.metadata["judge"]) == (written["alpha"], "expert")
    assert all(np.isfinite(value) for value in logged.values())
    assert evaluation.metadata["evaluation_id"] == written["evaluation_id"]
    client = mlflow.MlflowClient(store)
    [run] = client.search_runs([client.get_experiment_by_name("component").experiment_id])
    win_rate = written["metrics"]["win_rate"]
    for key, part in {
        "eval/win_rate": "value",
        "eval/low/win_rate": "low",
        "eval/high/win_rate": "high",
    }.items():
        assert run.data.metrics[key] == win_rate[part]
    (used,) = run.inputs.dataset_inputs
    assert used.dataset.digest == written["dataset_hash"][:36]
    mlflow.set_tracking_uri(store)
    try:
        table = client.load_table(run.info.experiment_id, "evaluation/samples.json", [run.info.run_id])
    finally:
        mlflow.set_tracking_uri(None)
    samples = read_samples(tmp_path / "evaluation", 1000)
    assert table["completion"].tolist() == [text.text for one in samples for text in one.policy]
    assert table["prompt"][0] == samples[0].prompt == written["example"]
    member = json.loads((tmp_path / "evaluation/extrapolated-0.5/evaluation.json").read_text())
    assert member["model_uri"] == "s3://models/spo-1/extrapolated-0.5"
    win_rate = run.data.metrics["eval/expo-0.5/win_rate"]
    assert win_rate == pytest.approx(member["metrics"]["win_rate"]["value"])
    files = client.list_artifacts(run.info.run_id, "evaluation/extrapolated-0.5")
    assert len(files) == 4
