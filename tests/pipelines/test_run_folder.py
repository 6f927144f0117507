"""A run's folder: whose it is, one process at a time, and results that are used again."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from softpref.errors import ConfigError
from softpref.pipelines import run_folder
from softpref.pipelines.run_folder import claimed

PARAMETERS = {"alphas": [0.5, 1.0], "source": "https://me:secret@host/rows.jsonl"}


def test_the_same_parameters_go_on_under_the_same_id(tmp_path):
    with claimed(tmp_path / "run", "first", PARAMETERS) as first:
        assert not first.goes_on
    with claimed(tmp_path / "run", "second", PARAMETERS) as second:
        assert second.goes_on
        assert (second.id, second.name) == (first.id, "first")
    with claimed(tmp_path / "run", "third", {**PARAMETERS, "alphas": [2.0]}) as third:
        assert third.goes_on
        assert third.id != first.id
        assert third.name == "third"
    assert "secret" not in (tmp_path / "run/run.json").read_text()


def test_a_moved_folder_is_another_run(tmp_path):
    with claimed(tmp_path / "run", "first", PARAMETERS) as first:
        pass
    (tmp_path / "run").rename(tmp_path / "moved")
    with claimed(tmp_path / "moved", "second", PARAMETERS) as second:
        assert second.id != first.id


@pytest.mark.parametrize("cut", ["", "{", "[]", '{"id": "x"}'])
def test_a_cut_record_begins_a_new_run(tmp_path, cut):
    (tmp_path / "run.json").write_text(cut, encoding="utf-8")
    with claimed(tmp_path, "name", PARAMETERS) as run:
        assert run.name == "name"
    assert json.loads((tmp_path / "run.json").read_text())["id"] == run.id


def test_a_process_that_was_killed_at_its_very_start_blocks_nothing(tmp_path):
    for name in (".lock", ".run.json.123.part"):
        (tmp_path / name).touch()
    with claimed(tmp_path, "name", PARAMETERS) as run:
        assert not run.goes_on


def test_what_is_no_runs_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path, says in ((tmp_path, "is not empty and holds no run"), (tmp_path / "file", "is a file")):
        with pytest.raises(ConfigError, match=says), claimed(path, "name", PARAMETERS):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_processes_cannot_work_in_one_folder(tmp_path):
    says = pytest.raises(ConfigError, match=f"is in use: process {os.getpid()} runs there")
    with claimed(tmp_path, "first", PARAMETERS), says, claimed(tmp_path, "second", PARAMETERS):
        pass
    with claimed(tmp_path, "second", PARAMETERS):
        pass


def test_a_step_that_outlives_its_run_holds_the_folder_until_it_ends(tmp_path, monkeypatch):
    held = f"""
import os, subprocess, sys
from pathlib import Path
from softpref.pipelines.run_folder import claimed
with claimed(Path({str(tmp_path)!r}), "killed", {{}}) as run:
    step = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    subprocess.Popen(step, stdin=0, stdout=subprocess.DEVNULL, pass_fds=[run.lock])
    os.kill(os.getpid(), 9)
"""
    read, write = os.pipe()
    subprocess.run([sys.executable, "-c", held], stdin=read, stdout=subprocess.PIPE, check=False)
    os.close(read)
    monkeypatch.setattr(run_folder, "_PATIENCE", 0.5)
    with (
        pytest.raises(ConfigError, match="steps of a stopped run have not ended"),
        claimed(tmp_path, "next", {}),
    ):
        pass
    monkeypatch.setattr(run_folder, "_PATIENCE", 20.0)
    threading.Timer(0.5, os.close, [write]).start()  # the step ends
    with claimed(tmp_path, "next", {}) as run:
        assert run.goes_on


@pytest.fixture
def results(tmp_path):
    from softpref.pipelines.results import Results

    return lambda **options: Results(tmp_path / "pipeline", **options)


def key_of(results, **arguments):
    return results.compute_key(
        component_name="comp-train-policy", image="i", full_command=["c"], arguments=arguments
    )


def do(results, task, **arguments):
    """As KFP does a task: its folder and whether it was run, which writes `written` there."""
    from kfp import dsl

    key = results.compute_key(
        component_name=f"comp-{task}", image="i", full_command=["c"], arguments=arguments
    )
    if found := results.get(key):
        return Path(found["out"].uri).parent, False
    folder = Path(results._task_root(str(results.root), "spo-sweep-now", task))
    folder.mkdir(parents=True, exist_ok=True)
    outputs = {"out": dsl.Dataset("out", str(folder / "out")), "metrics": dsl.Metrics("m", str(folder / "m"))}
    (folder / "out").write_text("written", encoding="utf-8")
    results.put(key, outputs)
    return folder, True


def test_a_task_is_used_again_by_what_it_is_made_of(results, capsys):
    first = results()
    folder, ran = do(first, "prepare-data", rows=3, tracking_uri="http://127.0.0.1:1")
    assert ran
    again = results()
    assert do(again, "prepare-data", rows=3, tracking_uri="http://127.0.0.1:2") == (folder, False)
    assert "Task 'prepare-data' is done: its result is used again" in capsys.readouterr().out
    assert (again.folders, again.done) == ([folder], [])
    other, ran = do(again, "prepare-data", rows=4)
    assert ran
    assert other != folder
    assert (again.folders, again.done) == ([folder, other], [other])


def test_anew_uses_nothing_and_empties_the_folder(results):
    folder, _ = do(results(), "train-policy", member='{"name": "one"}')
    (folder / "checkpoints").mkdir()
    assert do(results(anew=True), "train-policy", member='{"name": "one"}') == (folder, True)
    assert not (folder / "checkpoints").exists()


def test_a_result_whose_files_are_gone_is_made_again(results):
    folder, _ = do(results(), "prepare-data", rows=3)
    (folder / "out").unlink()
    assert do(results(), "prepare-data", rows=3) == (folder, True)


@pytest.mark.parametrize(("task", "kept"), [("train-policy", True), ("evaluate-model", False)])
def test_only_a_training_finds_what_a_killed_one_has_left(results, task, kept):
    killed = results()
    key_of(killed, rows=1)
    killed.compute_key(component_name=f"comp-{task}", image="i", full_command=["c"], arguments={})
    folder = Path(killed._task_root(str(killed.root), "spo-sweep-now", task))
    folder.mkdir(parents=True)
    (folder / "checkpoint").touch()
    assert do(results(), task) == (folder, True)
    assert (folder / "checkpoint").exists() == kept


def test_tasks_that_always_run_have_a_folder_of_their_run(results):
    known = results()
    do(known, "prepare-data", rows=3)
    do(known, "prepare-data", rows=3)  # a result used again leaves its name to no other task
    folder = Path(known._task_root(str(known.root), "spo-sweep-now", "compare-models"))
    assert folder == known.root / "spo-sweep-now/compare-models"
