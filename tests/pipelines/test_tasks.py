"""Tasks as forks of one process: as separate as KFP's own processes, and their ends are told as well."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="tasks are forked on Linux alone"
)

PROGRAM = """
import atexit, os, random, signal, sys, threading

def task(how: str):
    import datasets.fingerprint, torch
    assert "torch" in before, "torch was not imported in advance"
    print("said", how, os.environ.get("OWN", "-"), os.environ.get("LATE", "-"), os.getcwd())
    print("fingerprint", datasets.fingerprint.generate_random_fingerprint())
    os.environ["OWN"] = "changed"
    atexit.register(print, "at the end")
    threading.Timer(0.1, print, ["of a thread"]).start()
    torch.ones(64, 64, requires_grad=True).matmul(torch.ones(64, 64)).sum().backward()
    if how == "fail":
        raise ValueError("what went wrong")
    if how == "leave":
        sys.exit(7)
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)

before = set(sys.modules)
"""


@pytest.fixture(scope="module")
def server():
    from softpref.pipelines.tasks import TaskServer

    with TaskServer("sqlite:///mlflow.db") as server:
        yield server


@pytest.fixture
def run(server, capsys, tmp_path):
    """Runs the task above; its exit status and what it printed."""

    def run(how, env_vars=None):
        given = {
            "inputs": {"parameterValues": {"how": how}},
            "outputs": {"outputFile": str(tmp_path / "output.json")},
        }
        script = "_KFP_RUNTIME=true python3 -m kfp.dsl.executor_main …"
        options = ["--executor_input", json.dumps(given), "--function_to_execute", "task"]
        return server.run(["sh", "-ec", script, PROGRAM, *options], env_vars), capsys.readouterr().out

    return run


def test_a_task_runs_to_its_end_in_its_own_environment(run, monkeypatch, tmp_path):
    monkeypatch.setenv("LATE", "set after the server began")
    monkeypatch.chdir(tmp_path)
    status, printed = run("well", {"OWN": "given"})
    assert status == 0, printed
    assert f"said well given set after the server began {tmp_path}" in printed
    assert "of a thread" in printed
    assert "at the end" in printed
    assert "said well - " in run("well")[1]
    assert "OWN" not in os.environ


@pytest.mark.parametrize(
    ("how", "status", "told"),
    [("fail", 1, "ValueError: what went wrong"), ("leave", 7, ""), ("die", 1, "was killed")],
)
def test_the_end_of_a_task_is_told(run, how, status, told):
    found, printed = run(how)
    assert found == status
    assert told in printed


def test_a_server_that_was_killed_fails_its_tasks(capsys):
    from softpref.pipelines.tasks import TaskServer

    with TaskServer("sqlite:///mlflow.db") as server:
        server._process.kill()
        server._process.wait()
        assert server.run(["sh", "-ec", "kfp.dsl.executor_main", PROGRAM]) == 1
    assert "was killed" in capsys.readouterr().out


def test_no_two_tasks_draw_the_same_fingerprint(run):
    printed = [run("well")[1] for _ in range(2)]
    lines = [line for text in printed for line in text.splitlines() if line.startswith("fingerprint")]
    assert len(set(lines)) == 2


def test_two_tasks_run_at_once(server, tmp_path, capsys):
    meet = """
def task(own: str, other: str):
    import time, pathlib
    pathlib.Path(own).touch()
    for _ in range(300):
        if pathlib.Path(other).exists():
            return
        time.sleep(0.1)
    raise TimeoutError("the other task never began")
"""
    statuses = []

    def start(own, other):
        values = {"own": str(tmp_path / own), "other": str(tmp_path / other)}
        given = {
            "inputs": {"parameterValues": values},
            "outputs": {"outputFile": str(tmp_path / f"{own}.json")},
        }
        options = ["--executor_input", json.dumps(given), "--function_to_execute", "task"]
        statuses.append(server.run(["sh", "-ec", "kfp.dsl.executor_main", meet, *options]))

    threads = [threading.Thread(target=start, args=names) for names in (("a", "b"), ("b", "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [0, 0]


def test_an_interrupted_task_is_told_to_stop_and_a_second_signal_kills_it(run, capsys, tmp_path):
    from softpref.interruption import Interrupted
    from softpref.pipelines.tasks import TaskServer

    program = PROGRAM.replace("ValueError", "").replace(
        'if how == "fail":',
        """if how == "wait":
        print("waits", flush=True)
        signal.signal(signal.SIGTERM, lambda *_: print("told", flush=True))
        while True:
            signal.pause()
    if how == "fail":""",
    )
    script = "_KFP_RUNTIME=true python3 -m kfp.dsl.executor_main …"
    given = {"inputs": {"parameterValues": {"how": "wait"}}, "outputs": {"outputFile": str(tmp_path / "o")}}
    options = ["--executor_input", json.dumps(given), "--function_to_execute", "task"]
    statuses, printed = [], []

    def signals():
        until = time.monotonic() + 60
        for said in ("waits", "told"):
            while said not in "".join(printed) and time.monotonic() < until:
                printed.append(capsys.readouterr().out)
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)

    with TaskServer("sqlite:///mlflow.db") as server:
        worker = threading.Thread(
            target=lambda: statuses.append(server.run(["sh", "-ec", script, program, *options]))
        )
        threading.Thread(target=signals).start()
        with server.interruptible():
            worker.start()
            with pytest.raises(Interrupted, match="SIGTERM"):
                time.sleep(60)
            worker.join(30)
        assert statuses == [1]
        assert server.run(["never"]) == 1  # no other task begins


@pytest.mark.parametrize("importing", [True, False])
def test_a_killed_launcher_leaves_no_process(importing, tmp_path):
    script = f"""
import threading, time
from softpref.pipelines.tasks import TaskServer
server = TaskServer("sqlite:///{tmp_path}/mlflow.db")
print(server._process.pid, flush=True)
if not {importing}:
    program = "import time, os\\ndef task():\\n    print(os.getpid(), flush=True)\\n    time.sleep(100)"
    options = ["--executor_input", '{{"outputs": {{"outputFile": "o"}}}}', "--function_to_execute", "task"]
    threading.Thread(target=server.run, args=[["kfp.dsl.executor_main", program, *options]]).start()
time.sleep(100)
"""
    launcher = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    said = (line.strip() for line in launcher.stdout)
    processes = [int(next(line for line in said if line.isdecimal())) for _ in range(1 if importing else 2)]
    launcher.kill()
    launcher.wait()
    until = time.monotonic() + 10
    while any(map(running, processes)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(running, processes))


def running(process):
    """Whether a process lives; a dead one that nobody has waited for does not."""
    try:
        return Path("/proc", str(process), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
