"""Where the time of a pipeline on this machine went: its tasks, and their phases. Runs nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from softpref.timings import TIMINGS_FILE

_PURPOSE = ("training", "evaluation")
_LISTED_SECONDS = 0.5


class Task(NamedTuple):
    """A task's process: its folder, and when it began and ended (seconds of `time.time`)."""

    folder: Path
    began: float
    ended: float


class Shares(NamedTuple):
    """Process seconds: each task's, and those of the launcher while no task ran.

    Attributes:
        purpose: in training (with its sampling) and evaluation, by phase.
        rest: in anything else, by what it was, longest first.
    """

    purpose: dict[str, float]
    rest: dict[str, float]

    @property
    def share(self) -> float:
        """The purpose's fraction of all seconds."""
        purpose = sum(self.purpose.values())
        return purpose / (purpose + sum(self.rest.values()))


class TaskTimes:
    """Notes when tasks run, and adds up what became of their time."""

    def __init__(self, began: float) -> None:
        """Args: began: when the whole command began, in seconds of `time.time`."""
        self.began = began
        self.tasks: list[Task] = []

    @contextmanager
    def task(self, command: Sequence[str]) -> Iterator[None]:
        """Count the time within as that of a task with this KFP command."""
        began = time.time()
        try:
            yield
        finally:
            self.tasks.append(Task(_folder(command), began, time.time()))

    def shares(self, ended: float) -> Shares:
        """Where the seconds from the beginning to `ended` went."""
        purpose: dict[str, float] = {}
        rest = {"no task": ended - self.began - _covered(self.tasks)}
        for task in self.tasks:
            seconds = task.ended - task.began
            phases = _phases(task.folder)
            for name, value in phases.items():
                kind = purpose if name in _PURPOSE else rest
                kind[name] = kind.get(name, 0.0) + value
            between = "beginning and end of tasks" if phases else task.folder.name
            rest[between] = rest.get(between, 0.0) + max(0.0, seconds - sum(phases.values()))
        return Shares(_longest_first(purpose), _longest_first(rest))

    def in_words(self, ended: float) -> str:
        """One line: how long it all took, the share of training and evaluation, and the rest."""
        shares = self.shares(ended)
        total = sum(shares.purpose.values()) + sum(shares.rest.values())
        return (
            f"took {ended - self.began:.0f} s; {shares.share:.0%} of the processes' {total:.0f} s went into "
            f"{_list(shares.purpose) or 'training and evaluation'}; the rest: {_list(shares.rest)}"
        )


def _folder(command: Sequence[str]) -> Path:
    """The folder of a task's outputs, by the executor's input, which is part of its command."""
    given = json.loads(command[list(command).index("--executor_input") + 1])
    return Path(given["outputs"]["outputFile"]).parent


def _phases(folder: Path) -> Mapping[str, float]:
    """The seconds by phase that the task's stage wrote beside an output; empty when it wrote none."""
    file = next(folder.glob(f"*/{TIMINGS_FILE}"), None)
    return json.loads(file.read_text(encoding="utf-8")) if file else {}


def _covered(tasks: Sequence[Task]) -> float:
    """Seconds in which at least one task ran."""
    covered, until = 0.0, float("-inf")
    for task in sorted(tasks, key=lambda task: task.began):
        covered += max(0.0, task.ended - max(task.began, until))
        until = max(until, task.ended)
    return covered


def _longest_first(seconds: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _list(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if value >= _LISTED_SECONDS)
