"""Trains with a tracking server in trouble: the waits are short, the model is the same, and no point is lost.

What the stage could not deliver, `softpref track-sync` does, once the server is well. The server is that of
the tests of outages, with MLflow's own answers, in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.faults import console
from tests.faults.console import AT_THE_END, STORE, Workplace, note_waits, seconds_waited, wrong_with
from tests.faults.manglings import as_trained
from tests.faults.outcomes import Outcome, Say
from tests.test_outages import SLACK, TROUBLE, Server

_AT_THE_START = 5.0  # seconds that a pipeline may wait by default
_MIDDLE = 8  # the step after which the server's state changes
_SLOW = 1.0  # seconds that a slow server takes to answer
_START = "start.txt"


class _Other(NamedTuple):
    """The server in a process of its own.

    Attributes:
        uri: its address.
        process: its id.
        control: where a state's name is written for it to take on.
        taken: where it says so.
    """

    uri: str
    process: int
    control: int
    taken: int

    def become(self, state: str) -> None:
        os.write(self.control, f"{state}\n".encode())
        assert os.read(self.taken, 1)

    def end(self) -> None:
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.control)
        os.close(self.taken)


def trouble_trackers(place: Workplace, say: Say) -> list[Outcome]:
    """Train once with each trouble; returns the outcomes."""
    outcome = Outcome("trackers")
    place.keep_stages()
    took = _seconds_of_a_training(place)
    for trouble, (at_first, then, delivers) in TROUBLE.items():
        wrong, costs = _trouble(place, at_first, then, took)
        outcome.note(fault=f"{trouble}: {'; '.join(wrong)}" if wrong else "")
        who = "the stage" if delivers else "track-sync"
        say(f"{trouble}: {costs}; {'; '.join(wrong) or f'every point is there, by {who} at the latest'}")
    return [outcome]


def _trouble(place: Workplace, at_first: str, then: str, took: float) -> tuple[list[str], str]:
    """What goes wrong, and what the trouble costs, in words."""
    place.begin("inputs", "store")
    server = _served(place.here)
    try:
        server.become(at_first)
        environment = {"MLFLOW_TRACKING_URI": server.uri}
        began = time.monotonic()
        ended = place.call(
            console.TRAIN,
            before=partial(_change_in_the_middle, server, at_first, then),
            environment=environment,
        )
        more = time.monotonic() - began - took
        wrong = [] if ended.status == 0 else [f"it ends with {ended.status}: {ended.said[-300:]}"]
        if "Traceback" in ended.said:
            wrong.append("it shows a traceback")
        start, end = float((place.here / _START).read_text()), seconds_waited(place.here)
        if at_first != "slow" and then != "well":
            wrong += [f"it waits {start:.1f} s at the start"] if start > _AT_THE_START + SLACK else []
            wrong += [f"it waits {end:.1f} s at the end"] if end > AT_THE_END + SLACK else []
        server.become("well")
        synced = place.call(["track-sync", "out"])
        if synced.status:
            wrong.append(f"track-sync ends with {synced.status}: {synced.said[-300:]}")
    finally:
        server.end()
    shutil.copy(place.here / "server.db", place.here / STORE)
    wrong += wrong_with(partial(as_trained, state="trained"), place, synced.said)
    return wrong, f"{start:.1f} s at the start, {end:.1f} s at the end, {more:+.0f} s in all"


def _seconds_of_a_training(place: Workplace) -> float:
    place.begin("inputs", "store")
    began = time.monotonic()
    assert place.call(console.TRAIN).status == 0
    return time.monotonic() - began


def _served(folder: Path) -> _Other:
    """A server on a copy of the folder's store, in a fork of this process."""
    shutil.copy(folder / STORE, folder / "server.db")
    control, write_control = os.pipe()
    read_taken, taken = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            from mlflow.server import handlers

            server = Server(folder, delay=_SLOW)  # here, or its connections would be this process's, too
            handlers._tracking_store = server.store
            os.write(taken, f"{server.uri}\n".encode())
            with open(control, encoding="utf-8") as states:
                for state in states:
                    server.become(state.strip())
                    os.write(taken, b".")
        finally:
            os._exit(0)
    os.close(control)
    os.close(taken)
    return _Other(os.read(read_taken, 100).decode().strip(), process, write_control, read_taken)


def _change_in_the_middle(server: _Other, at_first: str, then: str) -> None:
    """Ask for the server as a pipeline does, change its state in the middle, and note what is waited for."""
    from softpref.errors import ConfigError
    from softpref.lm.watching import TrackingCallback
    from softpref.tracking import Tracker, check_server

    began = time.monotonic()
    try:
        check_server("softpref", os.environ["MLFLOW_TRACKING_URI"])
    except ConfigError as error:  # the plan of a pipeline would end here; a later stage would not
        print(error, file=sys.stderr)
    Path(_START).write_text(f"{time.monotonic() - began}")
    real_on_log, real_flush = TrackingCallback.on_log, Tracker.flush

    def on_log(self, args, state, control, logs=None, **more) -> None:  # type: ignore[no-untyped-def]
        real_on_log(self, args, state, control, logs, **more)
        if state.global_step == _MIDDLE and at_first != then:
            if at_first == "well":
                real_flush(self.tracker, 60)
            server.become(then)

    TrackingCallback.on_log = on_log  # type: ignore[method-assign]
    note_waits()
