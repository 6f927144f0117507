"""The tracker against real MLflow stores and a real server that is killed; no training here."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from softpref.errors import ConfigError
from softpref.tracking import (
    Tracker,
    check_server,
    sync,
    sync_below,
)
from softpref.tracking.mirror import Mirror

from tests.served import free_port, kill_server, start_server
from tests.tracking.conftest import history, mirrored, tracker


class Server:
    """An `mlflow server` of the test's own on one port and one store, to be killed and started again."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.store = f"sqlite:///{folder}/server.db"

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", self.store]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        log = self.folder / "server.log"
        self.process = start_server(command, self.uri + "/health", log, cwd=self.folder, env=environment)

    def kill(self):
        kill_server(self.process)


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


def test_server_killed_in_the_middle_costs_no_point_and_delays_no_call(server, tmp_path, caplog):
    from mlflow import MlflowClient

    slowest = 0.0

    def log(tracker, steps):
        nonlocal slowest
        for step in steps:
            begun = time.monotonic()
            tracker.metrics({"loss": 1 / (step + 1), "not/finite": float("nan")}, step)
            slowest = max(slowest, time.monotonic() - begun)
            time.sleep(0.01)

    (tmp_path / "note.txt").write_text("kept")
    with tracker(tmp_path / "out", server.uri, exit_wait=60) as tracked:
        log(tracked, range(60))
        assert tracked.flush(30)
        log(tracked, range(60, 90))
        server.kill()
        log(tracked, range(90, 150))
        tracked.params({"alpha": 1.0})
        tracked.artifact(tmp_path / "note.txt", "notes")
        assert not tracked.flush(1.5)
        server.start()
        log(tracked, range(150, 200))

    assert slowest < 0.5
    client = MlflowClient(server.store)
    run = client.get_run(tracked.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"alpha": "1.0"}
    assert sorted(history(client, tracked.run_id, "loss")) == [(step, 1 / (step + 1)) for step in range(200)]
    assert len(history(client, tracked.run_id, "not/finite")) == 200
    assert [file.path for file in MlflowClient(server.uri).list_artifacts(tracked.run_id, "notes")] == [
        "notes/note.txt"
    ]
    assert sum("cannot be reached" in record.message for record in caplog.records) == 1


def test_stage_without_a_server_ends_in_time_and_a_later_sync_delivers_all(
    dead_uri, store, client, tmp_path, caplog
):
    begun = time.monotonic()
    with tracker(tmp_path / "out", dead_uri, exit_wait=2, tags={"alpha": 0.5}) as tracked:
        for step in range(50):
            tracked.metrics({"loss": step}, step)
    assert time.monotonic() - begun < 15
    assert tracked.run_id is None
    assert f"softpref track-sync {tmp_path / 'out'}" in caplog.text

    assert sync(tmp_path / "out", store).delivered == 52  # tags, points and the end
    assert sync(tmp_path / "out", store).delivered == 0
    (run,) = client.search_runs([client.get_experiment_by_name("stories").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["alpha"] == "0.5"
    assert history(client, run.info.run_id, "loss") == [(step, step) for step in range(50)]


def test_end_of_a_pipeline_delivers_what_its_stages_could_not(dead_uri, store, client, tmp_path, caplog):
    for name in ("train", "evaluate"):
        with tracker(tmp_path / "tasks" / name / "out", dead_uri, run_name=name, exit_wait=0.5) as tracked:
            tracked.metrics({"loss": 1}, 0)
    caplog.clear()
    assert sync_below(tmp_path / "tasks") == 0
    assert [str(tmp_path / "tasks" / "train" / "out") in record.message for record in caplog.records].count(
        True
    )
    assert sync_below(tmp_path / "tasks", store) == 4
    assert sync_below(tmp_path / "tasks", store) == 0
    runs = client.search_runs([client.get_experiment_by_name("stories").experiment_id])
    assert {run.info.run_name: run.data.metrics for run in runs} == {
        "train": {"loss": 1},
        "evaluate": {"loss": 1},
    }


def test_killed_stage_continues_its_run_and_repeated_points_stay_single(tmp_path, store, client):
    script = f"""
import os, signal
from softpref.tracking import Tracker
tracked = Tracker({str(tmp_path / "out")!r}, experiment="stories", run_name="alpha-1", tracking_uri={store!r})
for step in range(10):
    tracked.metrics({{"loss": step, "seconds": 1}}, step)
assert tracked.flush(30)
tracked.metrics({{"loss": 10}}, 10)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    with (tmp_path / "out" / "tracking.jsonl").open("a") as file:
        file.write('{"n": 99, "kind": "metr')  # the line that the kill tore

    with tracker(tmp_path / "out", store, parent_run_id="b" * 32) as tracked:
        tracked.resume(5)
        for step in range(6, 20):
            tracked.metrics({"loss": step, "seconds": 2}, step)

    (run,) = client.search_runs([client.get_experiment_by_name("stories").experiment_id])
    assert run.info.run_id == tracked.run_id
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == "b" * 32
    assert history(client, tracked.run_id, "loss") == [(step, step) for step in range(20)]
    steps = Counter(
        (record["step"], key) for record in mirrored(tmp_path / "out") for key in record["values"]
    )
    assert steps == {(step, key): 1 for step in range(20) for key in ("loss", "seconds")}
    # MLflow would show both values of a step: the first stays
    assert history(client, tracked.run_id, "seconds") == [(step, 1 if step < 10 else 2) for step in range(20)]


def test_second_resume_still_knows_the_points_of_the_first(tmp_path, store, client):
    first = tracker(tmp_path / "out", store)
    for step in range(8):
        first.metrics({"loss": step}, step)
    first.close("FAILED")
    assert client.get_run(first.run_id).info.status == "FAILED"
    second = tracker(tmp_path / "out", store)
    second.resume(3)
    second.metrics({"loss": 4.5, "new": 4}, 4)
    second.close("KILLED")
    third = tracker(tmp_path / "out", store)
    third.resume(3)
    for step in range(4, 9):
        third.metrics({"loss": step, "new": 2 * step}, step)
    third.close()
    assert {first.run_id} == {second.run_id, third.run_id}
    assert history(client, first.run_id, "loss") == [(step, step) for step in range(9)]
    assert history(client, first.run_id, "new") == [(4, 4), (5, 10), (6, 12), (7, 14), (8, 16)]


def test_without_a_resumption_only_what_has_changed_is_recorded_again(tmp_path, store, client):
    nan = float("nan")
    first = tracker(tmp_path / "out", store)
    first.metrics({"same": 1, "nan": nan, "other": 1}, 4)
    first.metrics({"same": 1, "nan": nan, "other": 2}, 4)
    first.close("FAILED")
    with tracker(tmp_path / "out", store) as second:
        second.metrics({"same": 1, "nan": nan, "other": 3}, 4)
    assert second.run_id == first.run_id
    assert history(client, first.run_id, "same") == [(4, 1)]
    assert len(history(client, first.run_id, "nan")) == 1
    assert sorted(history(client, first.run_id, "other")) == [(4, 1), (4, 2), (4, 3)]


def test_what_begins_anew_in_a_folder_has_a_run_of_its_own(tmp_path, store, client):
    first = tracker(tmp_path / "out", store)
    first.metrics({"loss": 1}, 1)
    first.close("KILLED")
    with tracker(tmp_path / "out", store, anew=True) as second:
        second.metrics({"loss": 2}, 1)
    runs = [history(client, run, "loss") for run in (first.run_id, second.run_id)]
    assert runs == [[(1, 1)], [(1, 2)]]


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize(
    "foreign",
    [
        *(b"\xff\xfe\x00", b"no JSON", b"[" * 10_000, b"7", b"null", b"[]", b"{}", b'{"n": 3, "kind": []}'),
        *(
            b'{"n": "x", "kind": "metrics"}',
            b'{"n": 2, "kind": "metrics", "time": 1, "step": 1, "values": 7}',
        ),
        b'{"n": 2, "kind": "metrics", "time": 1, "step": 1, "values": {"loss": "much"}}',
        b'{"n": 2, "kind": "metrics", "time": 1, "step": 1, "values": {"loss": 1%s}}' % (b"0" * 400),
        b'{"n": 2, "kind": "metrics", "time": 1, "step": 1%s, "values": {"loss": 1}}' % (b"0" * 400),
        b'{"n": 1%s}' % (b"0" * 400),
        b'{"n": 2, "kind": "end", "time": 1, "status": "SURPRISED"}',
        b'{"n": 2, "kind": "dataset", "time": 1, "dataset": {}}',
    ],
    ids=lambda line: line[:24].decode(errors="replace"),
)
def test_a_foreign_line_in_the_records_costs_nothing_but_itself(tmp_path, caplog, place, foreign):
    folder = tmp_path / "out"
    header = {
        "kind": "run",
        "key": "k",
        "run_id": None,
        "owned": True,
        "experiment": "stories",
        "run_name": "alpha-1",
    }
    header |= {"parent_run_id": None, "pipeline_run": None, "root": False, "tracking_uri": "sqlite:///x"}
    first = Mirror.for_run(folder, header)
    for step in range(4):
        first.append({"kind": "metrics", "time": 1, "step": step, "values": {"loss": step}})
    first.remember_run("the run")
    first.delivered(2, 0)
    first.close()
    for file in (folder / "tracking.jsonl", folder / "tracking.sent"):
        lines = file.read_bytes().splitlines()
        lines.insert({"first": 0, "middle": 1, "last": len(lines)}[place], foreign)
        file.write_bytes(b"\n".join([*lines, b'{"torn": ']))
    second = Mirror.for_run(folder, header)
    second.append({"kind": "metrics", "time": 1, "step": 4, "values": {"loss": 4}})
    left = []
    while second.waiting():  # the line that says that it goes on stands alone
        records, place = second.next_records()
        left += records
        second.delivered(records[-1]["n"], place)
    assert [one["step"] for one in left if one["kind"] == "metrics"] == [2, 3, 4]
    assert second.run_id == "the run"
    assert second.unrecorded({"loss": 3.0}, 3) == {}
    assert second.header == first.header
    second.close()
    assert "1 of its lines are no records" in caplog.text
    assert not list(folder.glob("*.broken"))


def test_records_whose_beginning_is_lost_go_on_in_their_run(tmp_path, store, client, caplog):
    first = tracker(tmp_path / "out", store)
    first.metrics({"loss": 1}, 1)
    first.close("FAILED")
    file = tmp_path / "out" / "tracking.jsonl"
    file.write_bytes(b"\0" + file.read_bytes()[40:])
    with tracker(tmp_path / "out", store) as second:
        second.resume(0)
        second.metrics({"loss": 1}, 1)
        second.metrics({"loss": 2}, 2)
    assert "does not say which run it is of" in caplog.text
    assert second.run_id == first.run_id
    assert client.get_run(first.run_id).info.status == "FINISHED"
    assert history(client, first.run_id, "loss") == [(1, 1), (2, 2)]


def test_a_run_whose_records_are_all_lost_stores_no_point_twice(tmp_path, store, client):
    first = tracker(tmp_path / "out", store)
    for step in (1, 2, 3):
        first.metrics({"loss": step}, step)
    first.close("FAILED")
    (tmp_path / "out" / "tracking.jsonl").write_bytes(b"[" * 100_000)
    with tracker(tmp_path / "out", store) as second:
        second.resume(2)
        for step in (3, 4):
            second.metrics({"loss": step}, step)
    assert second.run_id == first.run_id
    assert client.get_run(first.run_id).info.status == "FINISHED"
    assert history(client, first.run_id, "loss") == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_a_disk_that_is_full_for_a_while_costs_the_records_of_that_time_alone(
    tmp_path, store, monkeypatch, caplog
):
    monkeypatch.setattr("softpref.tracking.tracker.mlflow_ready", lambda uri: False)
    tracked = tracker(tmp_path / "out", store)
    tracked.metrics({"loss": 1}, 1)
    here = (tmp_path / "out" / "tracking.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (here + 20, limits[1]))
        tracked.metrics({"loss": 2}, 2)
        tracked.metrics({"loss": 3}, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, former)
    tracked.metrics({"loss": 4}, 4)
    tracked.close()
    assert [record["values"] for record in mirrored(tmp_path / "out")] == [{"loss": 1}, {"loss": 4}]
    assert caplog.text.count("loses records") == 1


def test_nothing_is_stored_twice_when_an_answer_is_lost(tmp_path, store, client, monkeypatch):
    from mlflow import MlflowClient

    lost = Counter()

    def losing(name):
        real = getattr(MlflowClient, name)

        def call(*arguments, **options):
            result = real(*arguments, **options)
            lost[name] += 1
            if lost[name] == 1:
                raise ConnectionError("the answer is lost")
            return result

        monkeypatch.setattr(MlflowClient, name, call)

    losing("create_run")
    losing("log_batch")
    with tracker(tmp_path / "out", store) as tracked:
        tracked.params({"alpha": 2})
        for step in range(20):
            tracked.metrics({"loss": step, "bad": float("nan")}, step)
    assert lost["create_run"] == 1
    assert lost["log_batch"] > 1
    (run,) = client.search_runs([client.get_experiment_by_name("stories").experiment_id])
    assert run.data.params == {"alpha": "2"}
    assert history(client, run.info.run_id, "loss") == [(step, step) for step in range(20)]
    assert len(history(client, run.info.run_id, "bad")) == 20


@pytest.fixture
def slow_calls(monkeypatch):
    """Have calls of MLflow's client take a second; those named `lost` fail once, when they are made."""
    from mlflow import MlflowClient

    made: list[str] = []
    monkeypatch.setattr("softpref.tracking.tracker._BATCH_SECONDS", 0.05)
    monkeypatch.setattr("softpref.tracking.pipeline_run._SETTLE", 0.01)

    def slow_down(name, lost):
        real = getattr(MlflowClient, name)

        def call(self, *arguments, **options):
            made.append(name)
            if name in lost and made.count(name) == lost[name]:
                raise ConnectionError("the request is lost")
            time.sleep(1)
            return real(self, *arguments, **options)

        monkeypatch.setattr(MlflowClient, name, call)

    def slow(**lost):
        for name in ("search_runs", "create_run", "set_tag", "log_batch", "log_artifact"):
            slow_down(name, lost)
        return made

    return slow


def test_the_end_waits_as_long_as_a_slow_server_answers_also_when_a_request_was_lost(
    tmp_path, store, client, slow_calls, caplog
):
    client.create_experiment("stories")
    made = slow_calls(create_run=1)
    with tracker(tmp_path / "out", store, exit_wait=4) as tracked:
        tracked.metrics({"loss": 1}, 0)
    assert made.count("create_run") == 2
    assert "did not reach" not in caplog.text
    assert client.get_run(tracked.run_id).info.status == "FINISHED"


def test_what_the_server_has_taken_is_not_sent_again_when_the_next_request_is_lost(
    tmp_path, store, client, slow_calls, caplog
):
    with tracker(tmp_path / "out", store, exit_wait=4) as tracked:
        assert tracked.flush(30)
        made = slow_calls(log_artifact=4)
        for number in range(4):
            (tmp_path / f"{number}.txt").write_text(f"{number}")
            tracked.artifact(tmp_path / f"{number}.txt")
    assert made.count("log_artifact") == 5
    assert "did not reach" not in caplog.text
    assert [file.path for file in client.list_artifacts(tracked.run_id)] == [
        "0.txt",
        "1.txt",
        "2.txt",
        "3.txt",
    ]


def test_a_mapping_is_one_parameter_whatever_the_order_of_its_keys(tmp_path, store, client, caplog):
    with tracker(tmp_path / "out", store) as tracked:
        tracked.params({"sizes": {"b": {"d": 1, 2: 2}, "a": 2}})
        tracked.params({"sizes": {"a": 2, "b": {2: 2, "d": 1}}})
    run = client.get_run(tracked.run_id)
    assert run.data.params == {"sizes": '{"a": 2, "b": {"2": 2, "d": 1}}'}
    assert "param_changed" not in caplog.text
    assert not [tag for tag in run.data.tags if tag.startswith("param_changed")]


def test_changed_and_long_parameters_are_recorded_and_raise_nothing(tmp_path, store, client, caplog):
    whole = "x" * 20_000
    with tracker(tmp_path / "out", store) as tracked:
        tracked.params({"alpha": 1, "recipe": whole, "odd (name)": {"a": [1, None]}})
        tracked.params({"alpha": 1})
        tracked.params({"alpha": 2, "beta": 0.1})
    run = client.get_run(tracked.run_id)
    assert run.data.params["alpha"] == "1"
    assert run.data.tags["param_changed.alpha"] == "2"
    assert "param_changed.alpha" in caplog.text
    assert run.data.params["beta"] == "0.1"
    assert run.data.params["odd _name_"] == '{"a": [1, null]}'
    assert run.data.params["recipe"].endswith("[cut]")
    text = Path(client.download_artifacts(tracked.run_id, "params/recipe.txt", str(tmp_path))).read_text()
    assert text == whole


def test_one_value_that_mlflow_refuses_holds_up_no_other(tmp_path, store, client, caplog):
    with tracker(tmp_path / "out", store) as tracked:
        tracked.metrics({"loss": 1, "../up": 2, "none": None, "reward": float("-inf")}, 0)
        tracked.artifact(tmp_path / "absent.txt")
        tracked.metrics({"loss": 0.5}, 1)
    assert history(client, tracked.run_id, "loss") == [(0, 1), (1, 0.5)]
    assert history(client, tracked.run_id, "reward")[0][1] < -1e300
    assert client.get_run(tracked.run_id).info.status == "FINISHED"
    for part in ("'../up'", "metric none", "absent.txt"):
        assert part in caplog.text


def opened(client, name):
    """A run that somebody else opened."""
    found = client.get_experiment_by_name("stories")
    experiment = found.experiment_id if found else client.create_experiment("stories")
    return client.create_run(experiment, run_name=name).info.run_id


def test_inherited_run_wins_and_is_left_open(tmp_path, store, client, monkeypatch):
    other, inherited = opened(client, "other"), opened(client, "inherited")
    monkeypatch.setenv("MLFLOW_RUN_ID", inherited)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    with Tracker(tmp_path / "out", experiment="stories", run_name="x", run_id=other) as tracked:
        assert tracked.run_id == inherited
        tracked.metrics({"loss": 1}, 0)
    run = client.get_run(inherited)
    assert run.info.status == "RUNNING"
    assert run.data.metrics == {"loss": 1}
    assert len(client.search_runs([run.info.experiment_id])) == 2


def test_evaluation_continues_the_training_run_and_runs_have_their_parent(tmp_path, store, client):
    parent = opened(client, "sweep")
    with tracker(tmp_path / "train", store, parent_run_id=parent) as training:
        training.metrics({"loss": 1}, 0)
    with tracker(tmp_path / "evaluate", store, run_id=training.run_id) as evaluation:
        evaluation.metrics({"win_rate": 0.7}, 0)
    run = client.get_run(training.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"loss": 1, "win_rate": 0.7}
    assert run.data.tags["mlflow.parentRunId"] == parent


def test_a_dataset_is_an_input_of_the_runs_that_used_it_each_once(tmp_path, store, client):
    stats = {
        "source": "s3://bucket/pairs.jsonl",
        "dataset_hash": "d" * 64,
        "rows": {"train": 90, "test": 10},
        "rejected": {},
    }
    with tracker(tmp_path / "train", store) as training:
        training.dataset(stats, "training")
        training.dataset({}, "training")  # of no data stage: there is nothing to say
    with tracker(tmp_path / "again", store, run_id=training.run_id) as evaluation:
        evaluation.dataset(stats, "training")
        evaluation.dataset(stats, "evaluation")
    (used,) = client.get_run(training.run_id).inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("pairs.jsonl", "d" * 36)
    assert json.loads(used.dataset.source) == {"uri": "s3://bucket/pairs.jsonl"}
    assert json.loads(used.dataset.profile) == {"rows": {"train": 90, "test": 10}}


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_status_of_the_run_says_how_the_stage_ended(error, status, tmp_path, store, client):
    with pytest.raises(error), tracker(tmp_path / "out", store) as tracked:
        raise error
    assert client.get_run(tracked.run_id).info.status == status


def test_finished_run_is_left_alone_when_its_folder_is_used_again(tmp_path, store, client):
    runs = []
    for loss in (1, 2):
        with tracker(tmp_path / "out", store) as tracked:
            tracked.metrics({"loss": loss}, 0)
        runs.append(tracked.run_id)
    assert runs[0] != runs[1]
    assert [history(client, run, "loss") for run in runs] == [[(0, 1)], [(0, 2)]]
    assert (tmp_path / "out" / "tracking-1.jsonl").exists()


def test_mirror_is_written_where_mlflow_is_not_installed(tmp_path, store, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with tracker(tmp_path / "out", store) as tracked:
        tracked.metrics({"loss": float("inf")}, 3)
    assert [(record["step"], float(record["values"]["loss"])) for record in mirrored(tmp_path / "out")] == [
        (3, float("inf"))
    ]
    assert sum("mlflow is not installed" in record.message for record in caplog.records) == 1
    assert check_server("stories", store) is None
    with pytest.raises(ConfigError, match="not installed"):
        sync(tmp_path / "out")


def test_unwritable_output_folder_is_a_warning(tmp_path, store, caplog):
    (tmp_path / "file").write_text("no folder")
    with tracker(tmp_path / "file" / "out", store) as tracked:
        tracked.metrics({"loss": 1}, 0)
        tracked.resume(0)
    assert "nothing of this run is tracked" in caplog.text


def test_deleted_run_stops_the_sending_and_keeps_the_records(tmp_path, store, client, caplog):
    run_id = opened(client, "gone")
    client.delete_run(run_id)
    with tracker(tmp_path / "out", store, run_id=run_id) as tracked:
        tracked.metrics({"loss": 1}, 0)
    assert "is deleted" in caplog.text
    with pytest.raises(ConfigError, match="deleted"):
        sync(tmp_path / "out")
    client.restore_run(run_id)
    assert sync(tmp_path / "out").delivered == 1
    assert history(client, run_id, "loss") == [(0, 1)]


def test_sync_says_what_is_wrong(tmp_path, dead_uri, store):
    with pytest.raises(ConfigError, match=r"no tracking\.jsonl"):
        sync(tmp_path)
    with tracker(tmp_path / "out", dead_uri, exit_wait=0.1) as tracked:
        tracked.metrics({"loss": 1}, 0)
        with pytest.raises(ConfigError, match="being written by a running stage"):
            sync(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"2 records of .* wait"):
        sync(tmp_path / "out")


def test_sync_says_that_the_records_of_a_run_break_off(tmp_path, dead_uri, store, caplog):
    with tracker(tmp_path / "out", dead_uri, exit_wait=0.1) as tracked:
        for step in range(10):
            tracked.metrics({"loss": step}, step)
    file = tmp_path / "out" / "tracking.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    caplog.clear()
    assert 0 < sync(tmp_path / "out", store).delivered < 10
    assert f"{file} ends before its run does" in caplog.text
    with tracker(tmp_path / "whole", dead_uri, exit_wait=0.1) as tracked:
        tracked.metrics({"loss": 1}, 1)
    caplog.clear()
    sync(tmp_path / "whole", store)
    assert "ends before" not in caplog.text


def test_the_address_of_a_database_is_for_its_owner_alone(tmp_path, caplog):
    uri = "postgresql+nodriver://me:s5ecret@127.0.0.1:1/store"  # sync needs it whole
    with tracker(tmp_path / "out", uri, exit_wait=0.1) as tracked:
        tracked.metrics({"loss": 1}, 3)
    mirror = tmp_path / "out" / "tracking.jsonl"
    assert "s5ecret" in mirror.read_text()
    assert mirror.stat().st_mode & 0o777 == 0o600
    assert "cannot be reached" in caplog.text
    assert "s5ecret" not in caplog.text
