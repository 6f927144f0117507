"""MLflow's stores: made once and whole, refused where they are of no use, asked within limits."""

import os
import sqlite3
import subprocess
import sys
import time

import pytest
from softpref.errors import ConfigError
from softpref.tracking import (
    check_server,
    open_client,
    resolve_tracking_uri,
    short_requests,
)
from softpref.tracking.waiting import WAIT

from tests.test_outages import SLACK
from tests.tracking.conftest import history, in_processes_at_once, tracker


def test_two_processes_may_make_one_sqlite_store_at_once_and_all_points_arrive(tmp_path):
    from mlflow import MlflowClient

    store = f"sqlite:///{tmp_path}/mlflow.db"
    in_processes_at_once(
        f"""
folder = {str(tmp_path)!r} + f"/{{number}}"
with Tracker(folder, experiment="race", run_name=folder, tracking_uri={store!r}) as tracked:
    for step in range(200):
        tracked.metrics({{"loss": step}}, step)
        time.sleep(0.005)
""",
        2,
    )
    client = MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("race").experiment_id])
    assert len(runs) == 2
    for run in runs:
        assert run.info.status == "FINISHED"
        assert history(client, run.info.run_id, "loss") == [(step, step) for step in range(200)]


def test_a_process_that_is_killed_while_the_store_is_made_leaves_none(tmp_path):
    from mlflow import MlflowClient

    store = f"sqlite:///{tmp_path}/mlflow.db"
    code = f"from softpref.tracking import open_client; open_client({store!r})"
    making = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not any(file.stat().st_size for file in tmp_path.glob(".mlflow.db.new-*")):
        assert making.poll() is None
        time.sleep(0.001)
    making.kill()
    making.wait()
    assert not (tmp_path / "mlflow.db").exists()
    open_client(store).create_experiment("after")
    assert not list(tmp_path.glob(".mlflow.db*"))
    assert MlflowClient(store).get_experiment_by_name("after")


def broken_store(kind, folder):
    """Address of a store that waiting does not mend."""
    if kind == "deleted":
        client = open_client(f"sqlite:///{folder}/deleted.db")
        client.delete_experiment(client.create_experiment("stories"))
    elif kind == "garbage":
        (folder / "garbage.db").write_bytes(b"no database " * 100)
    elif kind == "other":
        with sqlite3.connect(folder / "other.db") as other:
            other.execute("create table alembic_version (version_num varchar)")
            other.execute("insert into alembic_version values ('of another program')")
    elif kind == "files":
        return f"file://{folder}/mlruns"
    elif kind == "driver":
        return "postgresql+nodriver://me:secret@127.0.0.1:1/store"
    return f"sqlite:///{folder}/{kind}.db"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("deleted", "experiment 'stories' is deleted; `mlflow experiments restore"),
        ("garbage", r"no usable store \(.*file is not a database\); .*move the file away"),
        ("other", r"no usable store .*`mlflow db upgrade` of a copy may mend it"),
        ("files", r"no usable store \(The filesystem tracking backend .*; set MLFLOW_TRACKING_URI"),
        ("driver", r"^MLflow at postgresql\+nodriver://127.0.0.1:1/store is no usable store"),
    ],
)
def test_a_store_that_waiting_does_not_mend_is_refused_at_once(tmp_path, kind, said):
    with pytest.raises(ConfigError, match=said) as refused:
        check_server("stories", broken_store(kind, tmp_path))
    assert "secret" not in str(refused.value)


def test_a_store_that_takes_nothing_is_waited_for_no_longer_than_a_silent_one(
    tmp_path, store, monkeypatch, caplog, capfd
):
    connection = sqlite3.connect(tmp_path / "mlflow.db")
    connection.execute("DROP TABLE metrics")
    connection.commit()
    connection.close()
    monkeypatch.setenv(WAIT, "2")
    tracked = tracker(tmp_path / "out", store)
    tracked.metrics({"loss": 1}, 1)
    begun = time.monotonic()
    tracked.flush(60)
    tracked.close()
    assert time.monotonic() - begun < 2 + SLACK  # in all; a file that others use has a minute
    assert "did not reach MLflow" in caplog.text
    assert "Traceback" not in caplog.text + capfd.readouterr().err


@pytest.mark.parametrize("kind", ["a folder", "garbage"])
def test_a_file_that_is_no_store_is_said_to_be_none_before_mlflow_tries_it_ten_times(tmp_path, kind):
    file = tmp_path / "mlflow.db"
    file.mkdir() if kind == "a folder" else file.write_bytes(b"no database " * 100)
    with pytest.raises(sqlite3.DatabaseError):
        open_client(f"sqlite:///{file}")


def test_request_limits_are_given_back(tmp_path, store):
    before = dict(os.environ)
    with tracker(tmp_path / "out", store):
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    assert {key: value for key, value in os.environ.items() if key.startswith("MLFLOW_HTTP")} == {
        key: value for key, value in before.items() if key.startswith("MLFLOW_HTTP")
    }


def test_of_overlapping_limits_of_requests_the_largest_holds():
    with short_requests(timeout=5):
        with short_requests(retries=3, timeout=120):
            assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "120"
            assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "3"
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "5"
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


def test_the_login_in_a_servers_address_moves_to_the_environment(monkeypatch):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "another")
    assert resolve_tracking_uri("https://me%40here:p%2Fw@host:5000/a") == "https://host:5000/a"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "me@here"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "p/w"
