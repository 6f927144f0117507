"""What differs between runners on this machine: a container's exit status, the store that tasks can share."""

import json

import pytest


class Container:
    """Stands in for a container of the docker SDK that has ended with `status`."""

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
    import containers

    container = Container(status)

    class Client:
        class containers:
            @staticmethod
            def run(**options):
                assert not options.get("auto_remove")
                return container

    assert containers.run_container(Client(), "image", ["true"], {}) == status
    assert container.removed
    assert "working" in capsys.readouterr().out


def test_containers_are_not_given_a_sqlite_store(tmp_path, capsys):
    import launch
    import spo_sweep

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    arguments = ["--runner", "docker", "--tracking-uri", uri, "--output", str(tmp_path / "out")]
    assert launch.main(spo_sweep.spo_sweep, arguments) == 2
    assert "mlflow server" in capsys.readouterr().err


def test_the_summary_of_a_run_has_a_line_for_every_model(tmp_path, capsys):
    import local_run

    names = {"evaluate-model": "even", "evaluate-model/evaluation/extrapolated-0.5": "even-expo-0.5"}
    names["evaluate-model-2"] = "sharp"
    for place, name in names.items():
        folder = tmp_path / "pipeline" / place
        folder = folder if "extrapolated" in place else folder / "evaluation"
        folder.mkdir(parents=True)
        weight = 0.5 if "extrapolated" in place else 0.0
        evaluation = {"name": name, "method": "spo", "alpha": 1.0, "beta": 0.1, "metrics": {}, "exact": None}
        evaluation |= {"rounds": 1, "train_on": "preferences", "extrapolation": weight}
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
        (folder / "report.html").touch()
    local_run._summarise(tmp_path, "sqlite:///store.db")
    printed = capsys.readouterr().out
    table = [line.split()[0] for line in printed.splitlines() if " 1 " in line and line.endswith("–")]
    assert sorted(table) == ["even", "even-expo-0.5", "sharp"]
    assert printed.count("report:") == 3
