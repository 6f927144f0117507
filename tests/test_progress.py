"""Progress in a log: few lines, each of use by itself, and no bars or doubled warnings of libraries."""

import logging
import os
import subprocess
import sys

import pytest
import tqdm
from softpref import progress
from softpref.progress import Lines, follow, in_words, settle_output


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is moved: `clock(seconds)`."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


@pytest.fixture
def said(capsys):
    return lambda: capsys.readouterr().err.splitlines()


def test_a_line_says_how_far_the_loop_is_and_how_long_it_will_take(clock, said):
    lines = Lines("spo-alpha-0.5", 400, "step")
    lines.note = "loss 0.41"
    for _ in range(120):
        clock(0.5)
        lines.update()
    assert said()[-1] == "spo-alpha-0.5: step 120 of 400, loss 0.41, 2 min 20 s left"


@pytest.mark.parametrize(
    ("seconds", "rows"), [(0.0625, [160, 200]), (0.5, range(20, 201, 20)), (60.0, range(10, 201, 10))]
)
def test_lines_are_ten_seconds_and_a_twentieth_of_the_loop_apart(clock, said, seconds, rows):
    with Lines("loop", 200) as lines:
        for _ in range(200):
            clock(seconds)
            lines.update()
    assert [line.split(",")[0] for line in said()] == [f"loop: row {row} of 200" for row in rows]


def test_a_short_loop_says_nothing(clock, said):
    with Lines("loop", 100) as lines:
        for _ in range(100):
            clock(0.09)
            lines.update()
    assert said() == []


def test_the_end_says_how_long_it_took_unless_it_broke(clock, said):
    with Lines("loop", 2, "sample") as lines:
        clock(3700.0)
        lines.update(2)
    assert said() == ["loop: sample 2 of 2, took 1 h 1 min"]
    broken = Lines("loop", 2)
    clock(60.0)
    broken.__exit__(ValueError, ValueError("broke"), None)
    assert said() == []


def test_where_the_end_is_not_known_lines_grow_rarer(clock, said):
    for _ in follow((number for number in range(4000)), "reading"):
        clock(1.0)
    lines = said()
    assert lines[0] == "reading: row 10, 10 s so far"
    assert 30 < len(lines) < 90
    assert lines[-1].startswith("reading: row 4000, took 1 h 6 min")


def test_what_was_done_before_is_no_part_of_the_time_left(clock, said):
    lines = Lines("resumed", 100, "step", done=50)
    clock(10.0)
    lines.update(10)
    assert said() == ["resumed: step 60 of 100, 40 s left"]


def test_progress_can_be_switched_off(clock, said):
    for _ in follow(range(10), "rows", disable=True):
        clock(60.0)
    assert said() == []


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(progress, "on_terminal", lambda: True)
    with progress.progress("loop", total=3) as loop:
        assert isinstance(loop, tqdm.tqdm)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (130, "2 min 10 s"), (11100, "3 h 5 min")]
)
def test_durations_in_words(seconds, words):
    assert in_words(seconds) == words


SCRIPT = """
import logging, sys
from kfp.dsl.executor_main import _setup_logging
from softpref.progress import settle_output
_setup_logging()
if sys.argv[1] == "before": settle_output()
import datasets, huggingface_hub
from transformers.utils import logging as transformers_logging
if sys.argv[1] == "after": settle_output()
for name in ("datasets", "huggingface_hub.utils", "transformers.x", "softpref.x"):
    logging.getLogger(name).warning("a warning of %s", name)
rows = datasets.Dataset.from_dict({"x": [1, 2, 3]})
rows.map(lambda row: row).save_to_disk(sys.argv[2])
list(transformers_logging.tqdm(range(3), desc="Loading weights"))
list(huggingface_hub.utils.tqdm(range(3), desc="Fetching files"))
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_in_a_pod_a_warning_comes_once_and_libraries_draw_no_bars(tmp_path, when):
    # where CI is set, transformers hands its warnings to the root logger too, which is what a CI's tests want
    unset = {*progress._OFF, "CI"}
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, when, str(tmp_path / "rows")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        text=True,
        check=True,
    )
    for name in ("datasets", "huggingface_hub.utils", "transformers.x", "softpref.x"):
        assert result.stdout.count(f"a warning of {name}") == 1, result.stdout
    assert "%|" not in result.stdout, result.stdout


def test_settling_the_output_leaves_what_the_user_has_set(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    for name in set(progress._OFF) - {"HF_HUB_DISABLE_PROGRESS_BARS"}:
        monkeypatch.setenv(name, "kept")
    monkeypatch.setattr(progress, "_SWITCHES", {})
    propagate = {name: logging.getLogger(name).propagate for name in ("datasets", "huggingface_hub")}
    settle_output()
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "0"
    assert os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "kept"
    for name, value in propagate.items():
        logging.getLogger(name).propagate = value
