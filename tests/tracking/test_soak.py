"""Fifty runs log to one server at once; nothing is lost, doubled or left open."""

import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.served import free_port, kill_server, start_server
from tests.tracking.soak import METRICS, differences, soak


@pytest.fixture
def server(tmp_path):
    """A server with the settings of the tracking image and SQLite: its URL, and its database."""
    port, store = free_port(), tmp_path / "mlflow.db"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "2", "--uvicorn-opts", "--timeout-worker-healthcheck=120"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{store}",
        "--artifacts-destination",
        str(tmp_path / "artifacts"),
    ]
    uri = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = start_server(command, uri + "/health", tmp_path / "server.log", cwd=tmp_path, env=environment)
    yield uri, store
    kill_server(process)


def asked(store):
    def query(statement):
        with closing(sqlite3.connect(store)) as connection:
            return connection.execute(statement).fetchall()

    return query


def artifacts(folder: Path) -> list[str]:
    return sorted(file.read_text() for file in folder.rglob("note.txt"))


def logged_at_once(server, tmp_path, runs, steps):
    uri, store = server
    folder = tmp_path / "runs"
    folder.mkdir()
    soaked = soak(uri, folder, runs, steps)
    print(soaked)
    assert differences(soaked, asked(store)) == []
    assert artifacts(tmp_path / "artifacts") == sorted(f"of run {number}" for number in range(runs))
    return soaked


@pytest.mark.slow
def test_fifty_runs_log_at_once_and_nothing_is_lost_doubled_or_left_open(server, tmp_path):
    logged_at_once(server, tmp_path, runs=50, steps=200)


def test_eight_runs_log_at_once_and_what_is_lost_or_doubled_would_be_seen(server, tmp_path):
    soaked = logged_at_once(server, tmp_path, runs=8, steps=20)
    _, store = server
    with closing(sqlite3.connect(store)) as connection, connection:
        (moment,) = connection.execute("SELECT timestamp FROM metrics WHERE step = 3 LIMIT 1").fetchone()
        connection.execute("DELETE FROM metrics WHERE step = 7")
        connection.execute(
            "INSERT INTO metrics (key, value, timestamp, run_uuid, step, is_nan) "
            "SELECT key, value, ? + 1, run_uuid, step, is_nan FROM metrics WHERE step = 3 LIMIT 1",
            (moment,),
        )
        connection.execute("UPDATE runs SET status = 'RUNNING' WHERE name = 'run-5'")
        connection.execute("DELETE FROM params WHERE key = 'parameter_1'")
    said = differences(soaked, asked(store))
    assert said[0].startswith(f"{8 * len(METRICS)} points are lost")
    assert said[1].startswith("1 points are doubled")
    assert said[2].startswith("parameters")
    assert said[3].startswith("runs")
    assert len(said) == 4
