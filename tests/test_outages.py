"""What trouble with the tracking server costs a stage, and that nothing is lost by it.

MLflow's own answers through real sockets; the server may refuse, be silent, slow or broken, and come back.
"""

import contextlib
import shutil
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from softpref import cli
from softpref.errors import ConfigError
from softpref.tracking import RUN_ID, RUN_NAME, Tracker, check_server, deliver_missed, finish_pipeline_run
from softpref.tracking.waiting import END, START, WAIT
from werkzeug import Response

from tests.served import free_port, served

POINTS = [(step, float(step)) for step in range(300)]  # more than a batch
SLACK = 4.0  # seconds for what is no waiting, on a busy machine


@pytest.fixture(autouse=True)
def step_of_a_pipeline(monkeypatch):
    for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(RUN_ID, "0a1b-2c3d")
    monkeypatch.setenv(RUN_NAME, "sweep")
    monkeypatch.setattr("softpref.tracking.pipeline_run._SETTLE", 0.01)


class Server:
    """MLflow's server on one port and one SQLite file, in one of several states.

    Attributes:
        state: `well`, `slow` (it answers `delay` seconds late), `silent` (it never answers), `down`, or what
            it answers instead: `401`, `500`, `html`.
    """

    def __init__(self, folder, delay):
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        self.store = SqlAlchemyStore(f"sqlite:///{folder}/server.db", f"{folder}/artifacts")
        self.port, self.delay, self.state = free_port(), delay, "down"
        self.uri = f"http://127.0.0.1:{self.port}"
        self._released = threading.Event()
        self._listening = contextlib.ExitStack()

    def become(self, state):
        self._released.set()
        self._released = threading.Event()
        if state == "down":
            self._listening.close()
        elif self.state == "down":
            self._listening.enter_context(served(self._answer, port=self.port))
        self.state = state

    def _answer(self, request):
        from mlflow.server import app

        state, released = self.state, self._released
        if state == "silent":
            released.wait(60)
            return Response("too late", 503)
        if state == "401":
            return Response("You are not authenticated.", 401, {"WWW-Authenticate": "Basic realm=mlflow"})
        if state == "500":
            return Response("Internal Server Error", 500)
        if state == "html":
            return Response("<html><body>Sign in</body></html>", 200, mimetype="text/html")
        if state == "slow":
            time.sleep(self.delay)
        return Response.from_app(app, request.environ)

    def runs(self):
        """The status and the points of each run by name."""
        from mlflow.entities import ViewType

        experiment = self.store.get_experiment_by_name("stories")
        if experiment is None:
            return {}
        found = self.store.search_runs([experiment.experiment_id], "", ViewType.ACTIVE_ONLY)
        assert len({run.info.run_name for run in found}) == len(found)
        return {
            run.info.run_name: (
                run.info.status,
                sorted((p.step, p.value) for p in self.store.get_metric_history(run.info.run_id, "loss")),
            )
            for run in found
        }

    def await_points(self, count):
        deadline = time.monotonic() + 30
        while len(self.runs().get("alpha-1", ("", []))[1]) < count:
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.fixture
def server(tmp_path, monkeypatch, empty_store):
    from mlflow.server import handlers

    shutil.copy(empty_store, tmp_path / "server.db")
    server = Server(tmp_path, delay=0.3)
    monkeypatch.setattr(handlers, "_tracking_store", server.store)
    yield server
    server.become("down")


class Seconds(NamedTuple):
    """What tracking cost a stage at its start and at its end."""

    start: float
    end: float


def stage(server, folder, at_first, then, at_the_end=None):
    """Run a stage that logs `POINTS`; the server's state changes when half of them are logged.

    Args:
        at_the_end: the state that the server takes a second after the stage has begun to end.
    """
    server.become(at_first)
    begun = time.monotonic()
    with contextlib.suppress(ConfigError):  # the plan would refuse to go on; a later stage would not
        check_server("stories", server.uri)
    start = time.monotonic() - begun
    with Tracker(folder, experiment="stories", run_name="alpha-1", tracking_uri=server.uri) as tracked:
        for step, value in POINTS:
            if step == len(POINTS) // 2:
                if at_first == "well":
                    server.await_points(step)
                server.become(then)
            tracked.metrics({"loss": value}, step)
        if at_the_end:
            threading.Timer(1.0, server.become, [at_the_end]).start()
        begun = time.monotonic()
    return Seconds(start, time.monotonic() - begun)


TROUBLE = {  # at first, then: whether the stage itself delivers all
    "it is down": ("down", "down", False),
    "it is a black hole": ("silent", "silent", False),
    "it refuses the login": ("401", "401", False),
    "it has only errors": ("500", "500", False),
    "another page answers": ("html", "html", False),
    "it dies in the middle": ("well", "down", False),
    "it falls silent in the middle": ("well", "silent", False),
    "it comes back in the middle": ("down", "well", True),
    "it is slow": ("slow", "slow", True),
}


def hold_to(server, folder, seconds, waits, delivers, caplog, capsys):
    """The stage cost no more than its waits, and after `softpref track-sync` nothing is lost or doubled."""
    command = f"softpref track-sync {folder}"
    if delivers:
        assert command not in caplog.text
    else:
        assert seconds.start < waits.start + SLACK
        assert seconds.end < waits.end + SLACK
        assert command in caplog.text
        assert server.runs().get("alpha-1", ("RUNNING",))[0] == "RUNNING"
        server.become("well")
        assert cli.main(command.split()[1:]) == 0
        assert "delivered" in capsys.readouterr().out
    assert server.runs()["alpha-1"] == ("FINISHED", POINTS)


@pytest.mark.parametrize("trouble", TROUBLE)
def test_trouble_costs_no_more_than_the_wait_and_loses_nothing(
    trouble, server, tmp_path, monkeypatch, caplog, capsys
):
    at_first, then, delivers = TROUBLE[trouble]
    monkeypatch.setenv(WAIT, "2" if delivers else "1")
    seconds = stage(server, tmp_path / "out", at_first, then)
    hold_to(server, tmp_path / "out", seconds, Seconds(1, 1), delivers, caplog, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("trouble", TROUBLE)
def test_by_default_trouble_costs_five_seconds_at_the_start_and_ten_at_the_end(
    trouble, server, tmp_path, monkeypatch, caplog, capsys
):
    at_first, then, delivers = TROUBLE[trouble]
    monkeypatch.delenv(WAIT, raising=False)
    server.delay = 2.0
    assert (START, END) <= (5, 10)
    seconds = stage(server, tmp_path / "out", at_first, then)
    hold_to(server, tmp_path / "out", seconds, Seconds(5, 10), delivers, caplog, capsys)
    print(f"{trouble}: {seconds.start:.1f} s at the start, {seconds.end:.1f} s at the end")


def test_who_waits_longer_needs_no_sync(server, tmp_path, monkeypatch):
    monkeypatch.setenv(WAIT, "30")
    stage(server, tmp_path / "out", "down", "down", at_the_end="well")
    assert server.runs()["alpha-1"] == ("FINISHED", POINTS)


def test_a_later_step_and_the_end_of_a_pipeline_wait_no_longer(server, tmp_path, monkeypatch):
    monkeypatch.setenv(WAIT, "0.5")
    for name in ("reference", "policy", "evaluation"):
        stage(server, tmp_path / name, "down", "down")
    server.become("silent")
    begun = time.monotonic()
    deliver_missed(*(tmp_path / name for name in ("reference", "policy", "evaluation")))
    finish_pipeline_run("FINISHED", experiment="stories", tracking_uri=server.uri)
    assert time.monotonic() - begun < 1 + SLACK  # each once, not once a folder


@pytest.mark.parametrize("wrong", ["soon", "-1", "nan", "1e9"])
def test_a_wait_that_is_no_number_of_seconds_is_refused(wrong, tmp_path, monkeypatch):
    monkeypatch.setenv(WAIT, wrong)
    with pytest.raises(
        ConfigError, match=f"{WAIT} must be a number of seconds from 0 to 86400, got '{wrong}'"
    ):
        check_server("stories", f"sqlite:///{tmp_path}/mlflow.db")
    assert not Path(tmp_path / "mlflow.db").exists()
