"""Evaluations are found in folders, runs of MLflow and versions of its registry."""

import json
from pathlib import Path

import pytest
from softpref.cli import main
from softpref.errors import ConfigError
from softpref.evaluation.addresses import find_evaluations

from tests.evaluation.test_compare import EVEN, SHARP, SOFT, save


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three runs with evaluations of models of one name, a version each; the first evaluated otherwise."""
    from mlflow import MlflowClient

    root = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{root}/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.create_experiment("softpref", artifact_location=(root / "artifacts").as_uri())
    client.create_registered_model("story")
    runs = []
    members = [SOFT | {"evaluation_id": "before"}, SHARP, EVEN]
    for number, entry in enumerate(members):
        run = client.create_run(experiment).info.run_id
        entry = entry | {"name": "model", "run_id": run}
        (folder,) = save(root / str(number), entry)
        client.log_artifacts(run, folder, "evaluation")
        tags = {"name": "model", "evaluation_id": entry["evaluation_id"]}
        client.create_model_version("story", (root / str(number)).as_uri(), run, tags=tags)
        runs.append(run)
    client.set_registered_model_alias("story", "champion", "2")
    return uri, runs, client, experiment


def test_versions_over_time_are_compared_as_they_were_evaluated(store, tmp_path, capsys, caplog):
    uri, *_ = store
    output = tmp_path / "out"
    assert main(["compare", "models:/story", "--tracking_uri", uri, "--output", str(output)]) == 0
    assert "versions evaluated on other data, judge, reference or settings" in caplog.text
    assert caplog.text.rstrip().endswith("left out: 1; evaluate them in the same way, and give those folders")
    written = json.loads((output / "comparison.json").read_text())
    assert [entry["name"] for entry in written["members"]] == ["story version 2", "story version 3"]
    assert written["best_for"][0]["best"] == "story version 2"
    assert "best for: one answer: story version 2" in capsys.readouterr().out
    assert "speaks" in (output / "report.html").read_text()  # its samples came along


def test_a_download_that_was_cut_off_is_made_anew(store, tmp_path, monkeypatch):
    import mlflow.artifacts

    uri, runs, *_ = store
    download = mlflow.artifacts.download_artifacts

    def cut_off(dst_path, **asked):
        download(dst_path=dst_path, **asked)
        (Path(dst_path) / "evaluation" / "samples.jsonl").unlink()
        raise ConnectionError("gone")

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", cut_off)
    with pytest.raises(ConfigError, match="gone"):
        find_evaluations([f"runs:/{runs[1]}"], tmp_path, uri)
    monkeypatch.undo()
    (found,) = find_evaluations([f"runs:/{runs[1]}"], tmp_path, uri)
    assert (found.folder / "samples.jsonl").is_file()


def test_an_alias_a_number_and_a_run_are_found_beside_a_folder(store, tmp_path):
    uri, runs, *_ = store
    (folder,) = save(tmp_path, SOFT)
    addresses = ["models:/story@champion", f"runs:/{runs[2]}", folder]
    names = [one.evaluation.name for one in find_evaluations(addresses, tmp_path / "kept", uri)]
    assert names == ["story version 2", "model", "soft"]
    addresses = [f"runs:/{run}" for run in runs]
    names = [one.evaluation.name for one in find_evaluations(addresses, tmp_path / "kept", uri)]
    assert names == [f"model ({run[:8]})" for run in runs]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("models:/other", "the registry has no such model"),
        ("models:/story/9", "models:/story/9: MLflow at sqlite"),
        ("models:/story@nobody", "nobody"),
        ("models:story", "no address of an evaluation; write runs:/ID"),
        ("runs:/0123", "runs:/0123: MLflow at sqlite"),
    ],
)
def test_what_is_not_there_is_said(store, tmp_path, address, said):
    with pytest.raises(ConfigError, match=said):
        find_evaluations([address], tmp_path, store[0])


def test_a_run_without_evaluation_and_a_version_whose_evaluation_changed_are_said(store, tmp_path):
    uri, runs, client, experiment = store
    run = client.create_run(experiment).info.run_id
    with pytest.raises(ConfigError, match=f"runs:/{run}: run {run} holds no evaluation"):
        find_evaluations([f"runs:/{run}"], tmp_path, uri)
    client.create_registered_model("changed")
    client.create_model_version("changed", "file:///nowhere", runs[1], tags={"name": "model"})
    with pytest.raises(ConfigError, match=f"run {runs[1]} no longer holds the evaluation that version 1"):
        find_evaluations(["models:/changed/1"], tmp_path, uri)
