"""A store and a client of one test, and what all tests of tracking read from them."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from softpref.tracking import (
    RUN_ID,
    RUN_NAME,
    Tracker,
)

from tests.served import free_port


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    for name in ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID", RUN_ID, RUN_NAME):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def dead_uri():
    """The address of a server that is not there."""
    return f"http://127.0.0.1:{free_port()}"


def tracker(folder, store, **changes):
    return Tracker(
        folder, **{"experiment": "stories", "run_name": "alpha-1", "tracking_uri": store, **changes}
    )


def in_processes_at_once(code, count):
    """Run `code` in so many forks of a process that has imported what is needed; the words they printed."""
    script = f"""
import os, sys, time
import mlflow.store.tracking.sqlalchemy_store
from softpref.tracking import Tracker, check_server
forks = []
for number in range({count}):
    forks.append(os.fork())
    if not forks[-1]:
{textwrap.indent(code, "        ")}
        sys.stdout.flush()
        os._exit(0)
sys.exit(max(os.waitpid(fork, 0)[1] for fork in forks) > 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def history(client, run_id, key):
    return [(point.step, point.value) for point in client.get_metric_history(run_id, key)]


def mirrored(folder, kind="metrics"):
    lines = (Path(folder) / "tracking.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture
def pipeline_run(monkeypatch):
    """This process is a step of a pipeline run, as a cluster's pod is."""
    monkeypatch.setenv(RUN_ID, "0a1b-2c3d")
    monkeypatch.setenv(RUN_NAME, "spo-sweep-x7k2p")
    return "0a1b-2c3d"
