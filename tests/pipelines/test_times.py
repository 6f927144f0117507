"""The account of a run's time: nothing is left out, nothing counted twice."""

import json

import pytest


def command(folder):
    given = {"inputs": {}, "outputs": {"outputFile": str(folder / "executor_output.json")}}
    return [
        "sh",
        "-ec",
        "script",
        "program",
        "--executor_input",
        json.dumps(given),
        "--function_to_execute",
        "f",
    ]


@pytest.fixture
def times(tmp_path):
    """A run from 100 to 160: a plan, then two trainings side by side, of which one wrote its phases."""
    from times import Task, TaskTimes

    times = TaskTimes(began=100.0)
    for name, began, ended in (("plan", 110.0, 112.0), ("train", 115.0, 145.0), ("train-2", 120.0, 150.0)):
        folder = tmp_path / name
        (folder / "policy").mkdir(parents=True)
        times.tasks.append(Task(folder, began, ended))
    phases = {"loading": 1.0, "training": 20.0, "evaluation": 5.0}
    (tmp_path / "train/policy/timings.json").write_text(json.dumps(phases))
    return times


def test_every_second_of_every_process_is_somewhere(times):
    shares = times.shares(ended=160.0)
    assert shares.purpose == {"training": 20.0, "evaluation": 5.0}
    assert shares.rest == {
        "train-2": 30.0,  # it wrote no phases: all of it
        "no task": 23.0,  # 10 before the plan, 3 after it, 10 at the end
        "beginning and end of tasks": 4.0,
        "plan": 2.0,
        "loading": 1.0,
    }
    assert shares.share == pytest.approx(25 / 85)


def test_the_line_says_how_long_what_for_and_what_else(times):
    line = times.in_words(ended=160.0)
    assert line.startswith("took 60 s; 29% of the processes' 85 s went into training 20 s, evaluation 5 s;")
    assert "train-2 30 s, no task 23 s" in line


def test_a_task_is_known_by_the_folder_of_its_outputs(tmp_path):
    from times import TaskTimes

    times = TaskTimes(began=0.0)
    with pytest.raises(RuntimeError), times.task(command(tmp_path / "fails")):
        raise RuntimeError
    (task,) = times.tasks
    assert task.folder == tmp_path / "fails"
    assert task.ended >= task.began > 0
