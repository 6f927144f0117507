"""A server that is told to open a run, does not answer in time, and opens it later than anybody expects."""

import shutil
import threading
import uuid
from types import SimpleNamespace

import pytest
from softpref.tracking import RUN_ID, check_server, finish_pipeline_run

from tests.test_outages import Server
from tests.tracking.conftest import history, tracker
from tests.tracking.test_pipeline_run import tree

CREATE, SEARCH, LOG, END = "/runs/create", "/runs/search", "/runs/log-batch", "/runs/update"


class LateServer(Server):
    """It holds the first request for a run until `until` is asked for the n-th time afterwards."""

    def __init__(self, folder):
        super().__init__(folder, delay=0.0)
        self._lock, self._late = threading.RLock(), threading.Event()
        self._held = False
        self._left: tuple[str, int] | None = None
        self.opened = threading.Event()

    def hold(self, until, times=1):
        """Hold the next request for a run."""
        self._held, self._left = True, (until, times)

    def release(self):
        """Open the run whose request is held."""
        self._late.set()
        assert self.opened.wait(20)

    def _answer(self, request):
        with self._lock:
            held = self._held and request.path.endswith(CREATE)
            if held:
                self._held = False
            elif not self._held and self._left and request.path.endswith(self._left[0]):
                what, times = self._left
                self._left = (what, times - 1) if times > 1 else None
                if times == 1:
                    self.release()
        if held:
            assert self._late.wait(60)
        answer = super()._answer(request)
        if held:
            self.opened.set()
        return answer


@pytest.fixture
def server(tmp_path, monkeypatch, empty_store):
    from mlflow.server import handlers

    shutil.copy(empty_store, tmp_path / "server.db")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr("softpref.tracking.pipeline_run._SETTLE", 0.01)
    server = LateServer(tmp_path)
    monkeypatch.setattr(handlers, "_tracking_store", server.store)
    server.become("well")
    yield server
    server.become("down")


@pytest.fixture
def client(server, tmp_path):
    """Of the server's store, which is not late."""
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{tmp_path}/server.db")


@pytest.fixture(params=["ascending", "descending"])
def ids(request, monkeypatch):
    """The ids of runs, random otherwise: whether a later run has the greater one."""
    numbers = iter(range(100) if request.param == "ascending" else range(99, -1, -1))
    fake = SimpleNamespace(uuid4=lambda: uuid.UUID(int=next(numbers)))
    monkeypatch.setattr("mlflow.store.tracking.sqlalchemy_store.uuid", fake)


def runs_of(client):
    """Name and status of all runs of the experiment that are not deleted, doubles with them."""
    experiment = client.get_experiment_by_name("stories").experiment_id
    return sorted((run.info.run_name, run.info.status) for run in client.search_runs([experiment]))


# a run is searched for, opened, searched for again and marked
MOMENTS = {
    "when it is searched for again": (SEARCH, 1),
    "when it is opened again": (CREATE, 1),
    "when the second one is found": (SEARCH, 2),
    "when the first points are sent": (LOG, 1),
    "when it ends": (END, 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_opened_late_is_the_run_or_goes(moment, server, client, ids, tmp_path):
    server.hold(*MOMENTS[moment])
    with tracker(tmp_path / "out", server.uri, exit_wait=30) as tracked:
        tracked.metrics({"loss": 1}, 0)
        assert tracked.flush(30)
        tracked.metrics({"loss": 2}, 1)
    assert server.opened.is_set()
    assert runs_of(client) == [("alpha-1", "FINISHED")]
    assert history(client, tracked.run_id, "loss") == [(0, 1), (1, 2)]


def test_a_step_that_is_tried_again_finds_the_run_that_has_the_points(
    server, client, ids, tmp_path, pipeline_run
):
    check_server("stories", server.uri)
    server.hold("never")
    first = tracker(tmp_path / "pod-1", server.uri, exit_wait=30)
    first.metrics({"loss": 1}, 0)
    assert first.flush(30)
    server.release()
    with tracker(tmp_path / "pod-2", server.uri, exit_wait=30) as second:
        second.metrics({"loss": 2}, 1)
    assert second.run_id == first.run_id
    assert runs_of(client) == [("alpha-1", "FINISHED"), ("spo-sweep-x7k2p", "RUNNING")]
    assert history(client, second.run_id, "loss") == [(0, 1), (1, 2)]
    first.close()


def test_a_run_that_is_opened_after_its_end_goes_when_its_pipeline_ends(
    server, client, tmp_path, pipeline_run
):
    check_server("stories", server.uri)
    server.hold("never")
    with tracker(tmp_path / "out", server.uri, exit_wait=30) as tracked:
        tracked.metrics({"loss": 1}, 0)
    server.release()
    finish_pipeline_run("FINISHED", experiment="stories", tracking_uri=server.uri)
    assert tree(client) == {
        "spo-sweep-x7k2p": (None, "FINISHED"),
        "alpha-1": ("spo-sweep-x7k2p", "FINISHED"),
    }
    assert history(client, tracked.run_id, "loss") == [(0, 1)]


def test_all_steps_agree_on_the_pipelines_run_where_another_is_opened_late(
    server, client, tmp_path, pipeline_run
):
    client.create_experiment("stories")
    server.hold("never")
    assert check_server("stories", server.uri) is None
    root = check_server("stories", server.uri)
    with tracker(tmp_path / "reference", server.uri, run_name="reference"):
        pass
    server.release()
    assert check_server("stories", server.uri) == root
    with tracker(tmp_path / "out", server.uri):
        pass
    finish_pipeline_run("FINISHED", name="my sweep", experiment="stories", tracking_uri=server.uri)
    assert tree(client) == {
        "my sweep": (None, "FINISHED"),
        "reference": ("my sweep", "FINISHED"),
        "alpha-1": ("my sweep", "FINISHED"),
    }


def test_runs_below_two_runs_of_one_pipeline_come_under_one_at_its_end(
    server, client, tmp_path, pipeline_run
):
    """No store lets two steps agree for certain that open the pipeline's run at the same moment."""
    experiment = client.create_experiment("stories")
    for name in ("one", "other"):
        tags = {"kfp.pipeline_run_id": pipeline_run, "softpref.in_use": "true"}
        root = client.create_run(experiment, run_name=name, tags=tags, start_time=len(name))
        below = {"mlflow.parentRunId": root.info.run_id, "softpref.tracking_key": name}
        client.create_run(experiment, run_name=f"below {name}", tags=below)
    finish_pipeline_run("FAILED", name="my sweep", experiment="stories", tracking_uri=server.uri)
    assert tree(client) == {
        "my sweep": (None, "FAILED"),
        "below one": ("my sweep", "FAILED"),
        "below other": ("my sweep", "FAILED"),
    }


def test_a_double_with_points_is_ended_and_kept(server, client, tmp_path, pipeline_run):
    experiment = client.create_experiment("stories")
    with tracker(tmp_path / "out", server.uri) as tracked:
        tracked.metrics({"loss": 1}, 0)
        assert tracked.flush(30)
        key = client.get_run(tracked.run_id).data.tags["softpref.tracking_key"]
        other = client.create_run(experiment, run_name="another", tags={"softpref.tracking_key": key})
        client.log_metric(other.info.run_id, "loss", 3)
    assert ("another", "KILLED") in runs_of(client)
    assert ("alpha-1", "FINISHED") in runs_of(client)


def test_who_may_not_delete_a_double_ends_it(server, client, tmp_path, monkeypatch):
    """As a user with MLflow's permission EDIT may not."""
    from mlflow import MlflowClient
    from mlflow.exceptions import RestException

    def refuse(self, run_id):
        raise RestException({"error_code": "PERMISSION_DENIED", "message": "Permission denied"})

    monkeypatch.setattr(MlflowClient, "delete_run", refuse)
    server.hold(LOG)
    with tracker(tmp_path / "out", server.uri, exit_wait=30) as tracked:
        tracked.metrics({"loss": 1}, 0)
    assert server.opened.is_set()
    assert runs_of(client) == [("alpha-1", "FINISHED"), ("alpha-1", "KILLED")]
    assert client.get_run(tracked.run_id).info.status == "FINISHED"


def test_this_is_another_pipelines_run(server, client, tmp_path, pipeline_run, monkeypatch):
    """Runs of one name and of two pipelines are no doubles."""
    for run in ("first", "second"):
        monkeypatch.setenv(RUN_ID, run)
        with tracker(tmp_path / run, server.uri):
            pass
    assert [name for name, _ in runs_of(client)].count("alpha-1") == 2
