"""What differs between runners on this machine, without an engine: see tests/containers for the real ones."""

import json

import pytest
from softpref.pipelines import command, local


class Container:
    """Stands in for a container of the docker SDK that has ended with `status`."""

    id = "c1"

    def __init__(self, status):
        self.status, self.removed = status, False

    def logs(self, stream, follow):
        return iter([b"working\n"])

    def wait(self):
        assert not self.removed, "the status of a removed container cannot be asked for"
        return {"StatusCode": self.status}

    def remove(self, force):
        self.removed = True


@pytest.mark.parametrize("status", [0, 3])
def test_exit_status_of_a_container_is_read_before_it_is_removed(status, capsys):
    from softpref.pipelines.containers import Containers

    container = Container(status)

    class Client:
        class containers:
            @staticmethod
            def run(**options):
                assert not options.get("auto_remove")
                return container

    assert Containers([]).run(Client(), "image", ["true"], {}) == status
    assert container.removed
    assert "working" in capsys.readouterr().out


def test_an_engine_that_does_not_answer_is_said_before_anything_starts(sweep, tmp_path, capsys, monkeypatch):

    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path / 'nobody.sock'}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    arguments = ["--runner", "docker", "--output", str(tmp_path / "out")]
    assert command.main(sweep, arguments) == 2
    assert "no container engine answers at DOCKER_HOST" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "mlflow.db").exists()


def test_files_that_parameters_name_are_found_also_within_json(tmp_path):
    from softpref.pipelines.containers import _paths_in

    rows, prompts = tmp_path / "rows.jsonl", tmp_path / "prompts.jsonl"
    for path in (rows, prompts):
        path.touch()
    overrides = json.dumps({"prompts_source": str(prompts), "votes": 3})
    parameters = {"source": str(rows), "data_overrides": overrides, "judge": "auto", "alphas": [0.5]}
    assert sorted(_paths_in(parameters)) == [prompts, rows]
    assert not list(_paths_in({"source": "/", "prompt_template": "x" * 5000, "columns": "{no json}"}))


def test_the_summary_of_a_run_has_a_line_for_every_model(tmp_path, capsys):

    names = {"evaluate-model": "even", "evaluate-model/evaluation/extrapolated-0.5": "even-expo-0.5"}
    names["evaluate-model-2"] = "sharp"
    for place, name in names.items():
        folder = tmp_path / "pipeline" / place
        folder = folder if "extrapolated" in place else folder / "evaluation"
        folder.mkdir(parents=True)
        weight = 0.5 if "extrapolated" in place else 0.0
        evaluation = {"name": name, "method": "spo", "alpha": 1.0, "beta": 0.1, "metrics": {}, "exact": None}
        evaluation |= {"rounds": 1, "train_on": "preferences", "extrapolation": weight}
        evaluation |= {"model_uri": f"models/{name}", "warnings": ["few prompts"], "evaluation_id": "abc"}
        evaluation |= {"judge": {"name": "expert"}, "run_id": None, "softmax_frontier": None, "by_prompt": {}}
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
        (folder / "report.html").touch()
    folders = sorted((tmp_path / "pipeline").iterdir())
    local._summarise(folders, tmp_path, "sqlite:///store.db")
    printed = capsys.readouterr().out
    table = [line.split()[0] for line in printed.splitlines() if " 1 " in line and line.endswith("–")]
    assert sorted(table) == ["even", "even-expo-0.5", "sharp"]
    assert printed.count("report:") == 3
    assert printed.count("warning:  few prompts\n") == 1
    assert "model:    models/even-expo-0.5\n" in printed
