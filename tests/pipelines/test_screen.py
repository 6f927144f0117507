"""What the screen shows of all that the stages of a local run print."""

import io
import sys
from pathlib import Path

import pytest
from softpref.pipelines import screen

pytestmark = pytest.mark.fast


@pytest.fixture
def console(monkeypatch):
    """A console whose clock stands at 100 s until `now[0]` is moved: `(console, now)`."""

    now = [100.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    return screen.Screen(io.StringIO(), io.StringIO()), now


def shown(console):
    return console._screen.getvalue().splitlines()


def test_progress_of_the_stages_is_shown_every_ten_seconds(console, capsys, monkeypatch):
    from softpref import progress

    console, now = console
    lines = progress.Lines("spo-alpha-0.5", 400, "step")
    lines.note = "loss 0.41"
    for _ in range(80):
        now[0] += 1.0
        lines.update(5)
        printed = capsys.readouterr().err
        console.write(printed)
        console.write(printed.replace("spo-alpha-0.5", "dpo-beta-1"))  # another stage, beside it
    assert shown(console)[0] == "          spo-alpha-0.5: step 50 of 400, loss 0.41, 1 min 10 s left"
    assert len(shown(console)) == 7
    assert not any("dpo" in line for line in shown(console))
    assert console._log.getvalue().count("dpo-beta-1: step") == 7


@pytest.mark.parametrize(
    ("line", "progress"),
    [
        ("spo-alpha-0.5: step 1 of 10, 4 s left", True),
        ("reading rows.jsonl: row 12000, 1 h 3 min so far", True),
        ("policy samples: sample 320 of 320, took 12 s", True),
        ("3 prompts: 2 were cut, and nothing is left of one", False),
        ("Successfully registered model 'story'.", False),
    ],
)
def test_progress_is_told_from_what_else_a_stage_prints(console, line, progress):
    console, _ = console
    console.write(f"{line}\n")
    assert shown(console) == ([f"          {line}"] if progress else [])
    assert console.last_lines(5) == ("" if progress else line)


def test_events_and_trouble_are_shown_at_once(console):
    console, _ = console
    console.write("12:00:01.5 - INFO - Executing task \x1b[96m'train-policy'\x1b[0m\n")
    console.write("[KFP Executor 2026-01-01 WARNING]: rows were cut\nloss\n")
    assert shown(console) == [
        "12:00:01  train-policy started",
        "[KFP Executor 2026-01-01 WARNING]: rows were cut",
    ]


def test_what_a_step_says_of_its_outcome_is_kept_for_the_end(console, capsys):
    from softpref.artifacts import say_outcome
    from softpref.pipelines.screen import outcome

    console, _ = console
    say_outcome(["chosen:   soft", "warning:  few prompts"])
    printed = capsys.readouterr().out
    console.write(f"    {printed}warning: another\n")  # KFP indents what steps print
    assert shown(console) == ["warning: another"]
    assert outcome(console._log.getvalue().splitlines()) == ["chosen:   soft", "warning:  few prompts"]


def test_a_run_goes_on_without_its_log_when_the_disk_is_full(capsys):
    with screen.log_and_screen(Path("/dev/full")):
        for _ in range(3):
            print("WARNING: of a step")
            sys.stdout.flush()
    shown = capsys.readouterr().out.splitlines()
    assert shown.count("warning: pipeline.log ends here: No space left on device") == 1
    assert shown.count("WARNING: of a step") == 3


def test_the_log_of_an_earlier_call_is_continued_and_every_line_is_there_at_once(tmp_path, capsys):
    for line in ("one", "two"):
        with screen.log_and_screen(tmp_path / "pipeline.log"):
            print(line)
            assert (tmp_path / "pipeline.log").read_text().endswith(f"{line}\n")
    assert (tmp_path / "pipeline.log").read_text() == "one\ntwo\n"
