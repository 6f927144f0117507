"""The MLflow run of a pipeline: one for all steps, however they begin, are tried again and end."""

import logging
import signal
import subprocess
import sys
import time

from softpref.tracking import (
    RUN_ID,
    check_server,
    deliver_missed,
    finish_pipeline_run,
    run_tracked_in,
)

from tests.tracking.conftest import history, in_processes_at_once, tracker


def test_a_server_that_is_away_when_a_pipeline_begins_is_a_warning_at_once(dead_uri, caplog, pipeline_run):
    begun = time.monotonic()
    assert check_server("stories", dead_uri) is None
    assert time.monotonic() - begun < 10
    assert [record.levelno for record in caplog.records if record.name.startswith("softpref.tracking")] == [
        logging.WARNING
    ]


def tree(client):
    """The experiment's runs: `{name: (parent's name, status)}`."""
    experiment = client.get_experiment_by_name("stories").experiment_id
    runs = client.search_runs([experiment])
    names = {run.info.run_id: run.info.run_name for run in runs}
    assert len(names) == len(set(names.values()))
    return {
        run.info.run_name: (names.get(run.data.tags.get("mlflow.parentRunId")), run.info.status)
        for run in runs
    }


def test_steps_of_a_pipeline_put_their_runs_under_its_own(tmp_path, store, client, pipeline_run):
    root = check_server("stories", store)
    assert check_server("stories", store) == root
    with tracker(tmp_path / "plan", store, run_name="plan", root=True) as plan:
        plan.params({"beta": 0.1})
    for name in ("reference", "spo-alpha-1"):
        with tracker(tmp_path / name, store, run_name=name):
            assert tree(client)["spo-sweep-x7k2p"] == (None, "RUNNING")
    finish_pipeline_run("FINISHED", name="my sweep", experiment="stories", tracking_uri=store)
    assert tree(client) == {
        "my sweep": (None, "FINISHED"),
        "reference": ("my sweep", "FINISHED"),
        "spo-alpha-1": ("my sweep", "FINISHED"),
    }
    run = client.get_run(root)
    assert run.data.params == {"beta": "0.1"}
    assert run.data.tags["kfp.pipeline_run_id"] == pipeline_run


def test_a_step_that_is_tried_again_in_another_pod_goes_on_in_its_run(tmp_path, store, client, pipeline_run):
    first = tracker(tmp_path / "pod-1", store)
    first.metrics({"loss": 2}, 0)
    first.close("KILLED")
    assert tree(client)["alpha-1"] == ("spo-sweep-x7k2p", "KILLED")
    with tracker(tmp_path / "pod-2", store) as second:
        assert second.flush(10)
        assert tree(client)["alpha-1"] == ("spo-sweep-x7k2p", "RUNNING")
        second.metrics({"loss": 1}, 1)
    assert second.run_id == first.run_id
    assert history(client, first.run_id, "loss") == [(0, 2), (1, 1)]


def test_what_a_failed_pipeline_left_running_is_ended(tmp_path, store, client, pipeline_run):
    left = tracker(tmp_path / "lost", store, run_name="lost")
    assert left.flush(10)
    finish_pipeline_run("FAILED", experiment="stories", tracking_uri=store)
    assert tree(client) == {
        "spo-sweep-x7k2p": (None, "FAILED"),
        "lost": ("spo-sweep-x7k2p", "FAILED"),
    }
    left.close()


def test_the_tree_is_the_same_where_the_plugin_opens_runs_of_its_own(
    tmp_path, store, client, pipeline_run, monkeypatch
):
    experiment = client.create_experiment("stories")
    root = client.create_run(experiment, run_name="my sweep", tags={"kfp.pipeline_run_id": pipeline_run})
    below = {"mlflow.parentRunId": root.info.run_id}
    loop = client.create_run(experiment, run_name="for-loop-1", tags=below).info.run_id
    step = client.create_run(experiment, run_name="train-policy", tags={"mlflow.parentRunId": loop})
    monkeypatch.setenv("MLFLOW_RUN_ID", step.info.run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    with tracker(tmp_path / "out", store, experiment="another", run_name="spo-alpha-1") as tracked:
        tracked.metrics({"loss": 1}, 0)
    finish_pipeline_run("FINISHED", name="my sweep", experiment="another", tracking_uri=store)
    assert tree(client) == {"my sweep": (None, "FINISHED"), "spo-alpha-1": ("my sweep", "FINISHED")}


def test_a_later_step_delivers_what_a_pod_could_not(tmp_path, store, client, dead_uri, pipeline_run):
    with tracker(tmp_path / "policy", dead_uri, exit_wait=0.1) as tracked:
        tracked.metrics({"loss": 1}, 0)
    assert run_tracked_in(tmp_path / "policy") is None
    deliver_missed(tmp_path / "policy", tmp_path)  # still away: nothing is lost, and nothing fails
    lines = (tmp_path / "policy/tracking.jsonl").read_text().replace(dead_uri, store)
    (tmp_path / "policy/tracking.jsonl").write_text(lines)
    deliver_missed(tmp_path / "policy")
    run_id = run_tracked_in(tmp_path / "policy")
    assert history(client, run_id, "loss") == [(0, 1)]
    assert tree(client)["alpha-1"] == ("spo-sweep-x7k2p", "FINISHED")


def test_records_that_come_late_open_no_ended_pipeline_run_again(
    tmp_path, store, client, dead_uri, pipeline_run, monkeypatch
):
    with tracker(tmp_path / "policy", dead_uri, exit_wait=0.1) as tracked:
        tracked.metrics({"loss": 1}, 0)
    finish_pipeline_run("FINISHED", experiment="stories", tracking_uri=store)
    lines = (tmp_path / "policy/tracking.jsonl").read_text().replace(dead_uri, store)
    (tmp_path / "policy/tracking.jsonl").write_text(lines)
    monkeypatch.setenv(RUN_ID, "another")
    deliver_missed(tmp_path / "policy")
    assert tree(client) == {
        "spo-sweep-x7k2p": (None, "FINISHED"),
        "alpha-1": ("spo-sweep-x7k2p", "FINISHED"),
    }


def test_steps_that_open_the_pipelines_run_at_the_same_moment_agree_on_one(store, client, pipeline_run):
    client.create_experiment("stories")
    ids = in_processes_at_once(f"print(check_server('stories', {store!r}))", 4)
    assert len(ids) == 4
    assert len({*ids}) == 1
    assert tree(client) == {"spo-sweep-x7k2p": (None, "RUNNING")}


_BUSY_STEP = """
import sys, time
from softpref.tracking import Tracker, watch_termination
watch_termination("stories", sys.argv[1])
tracker = Tracker(sys.argv[2], experiment="stories", run_name="alpha-1", tracking_uri=sys.argv[1])
tracker.flush(30)
print("busy", flush=True)
with tracker:
    time.sleep(60)
"""


def test_termination_of_a_pod_ends_its_run_and_the_pipelines_as_killed(tmp_path, store, client, pipeline_run):
    step = subprocess.Popen(
        [sys.executable, "-c", _BUSY_STEP, store, tmp_path / "out"], stdout=subprocess.PIPE, text=True
    )
    assert step.stdout.readline() == "busy\n"
    step.send_signal(signal.SIGTERM)
    assert step.wait(30) == 143
    assert tree(client) == {
        "spo-sweep-x7k2p": (None, "KILLED"),
        "alpha-1": ("spo-sweep-x7k2p", "KILLED"),
    }
    finish_pipeline_run("FAILED", experiment="stories", tracking_uri=store)
    assert tree(client)["spo-sweep-x7k2p"] == (None, "KILLED")
