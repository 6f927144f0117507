"""Runs a local pipeline's tasks as forks of one process that has done the imports.

KFP's local runner starts a Python process for every task, which spends seconds on importing torch,
transformers and MLflow, and two more on tearing them down. Here one process imports them once, while the
launcher checks the parameters, and forks for every task. Tasks stay separate: each has its own environment,
output and exit status.

The process starts no Python thread and uses no GPU, so its forks may do both.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from softpref.interruption import interruptible

# what the stages import at run time, and what those modules import lazily
_IMPORTS = (
    "kfp.dsl.executor_main",
    "softpref.preflight.stage",
    "softpref.data.stage",
    "softpref.sft.stage",
    "softpref.spo.stage",
    "softpref.evaluation.optima",
    "softpref.evaluation.measure",
    "softpref.evaluation.metrics",
    "softpref.evaluation.report",
    "softpref.evaluation.frontier",
    "softpref.evaluation.compare",
    "softpref.registry.stage",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_svg",
)
_PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent dies


class TaskServer:
    """Starts the process that is forked; `run` replaces KFP's `run_local_subprocess`."""

    def __init__(self, tracking_uri: str) -> None:
        self._interrupted = False
        self.lock: int | None = None
        """An open file that each task holds until it ends."""
        self._control, there = socket.socketpair()
        with there:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(there.fileno()), str(os.getpid()), tracking_uri],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # signals reach it and its forks through `interruptible` alone
            )

    def __enter__(self) -> TaskServer:
        return self

    def __exit__(self, *error: object) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait()

    def run(self, full_command: Sequence[str], env_vars: Mapping[str, str] | None = None) -> int:
        """Run one task, print its output, and return its exit status.

        Args:
            full_command: of a lightweight component: a shell, its script, the component's program, arguments.
            env_vars: added to this process's environment.
        """
        if self._interrupted:
            return 1
        start = 1 + next(i for i, part in enumerate(full_command) if "kfp.dsl.executor_main" in part)
        request = {
            "program": full_command[start],
            "arguments": list(full_command[start + 1 :]),
            "environment": {**os.environ, **(env_vars or {})},
            "folder": os.getcwd(),
        }
        output, write_output = os.pipe()
        status, write_status = os.pipe()
        with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
            json.dump(request, file)
            file.flush()
            file.seek(0)
            held = [] if self.lock is None else [self.lock]
            with contextlib.suppress(OSError):  # the process has died; then there is no status below
                socket.send_fds(self._control, [b"."], [file.fileno(), write_output, write_status, *held])
        os.close(write_output)
        os.close(write_status)
        with open(output, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                print(line, end="")
        with open(status, encoding="ascii") as file_of_one_number:
            code = file_of_one_number.read()
        if not self._interrupted:
            print(
                "\n" if code else "ERROR - the process of the task was killed, perhaps for want of memory\n"
            )
        return int(code or 1)

    def interruptible(self) -> contextlib.AbstractContextManager[None]:
        """Within it SIGINT and SIGTERM end the tasks and raise `Interrupted`; a second one kills them."""
        return interruptible(self._end)

    def _end(self, grace: float) -> None:
        """Tell every task to stop, and kill those that still run after `grace` seconds."""
        self._interrupted = True
        until = time.monotonic() + grace
        with contextlib.suppress(ProcessLookupError):  # none is left
            os.killpg(self._process.pid, signal.SIGTERM)
            while time.monotonic() < until:
                self._process.poll()
                os.killpg(self._process.pid, 0)
                time.sleep(0.1)
            os.killpg(self._process.pid, signal.SIGKILL)


def serve(control: socket.socket, launcher: int, tracking_uri: str) -> None:
    """Import, then fork a task for every request, until the launcher closes its end or dies.

    Args:
        launcher: its process.
    """
    _end_with_parent(launcher, signal.SIGKILL)
    os.environ["_KFP_RUNTIME"] = "true"  # makes kfp import only what tasks need
    with contextlib.suppress(Exception):  # a task that needs the missing module reports it
        for name in _IMPORTS:
            importlib.import_module(name)
        from softpref.tracking import mlflow_ready

        mlflow_ready(tracking_uri)
    gc.collect()
    gc.freeze()  # or the first collection in each fork would copy every page
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no fork is waited for: each reports its own status
    while True:
        message, files, _, _ = socket.recv_fds(control, 1, 4)
        if not message:
            return
        server = os.getpid()
        if os.fork() == 0:
            control.close()
            _run_task(server, *files)
        for file in files:
            os.close(file)


def _end_with_parent(parent: int, number: signal.Signals) -> None:
    """Have this process get a signal when its parent dies, however that happens."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def _run_task(server: int, request: int, output: int, status: int, lock: int = -1) -> None:
    """In the fork: run the component as its shell command would, report the exit status, and end.

    Args:
        server: the process that was forked.
        lock: open file that is held until this process ends.
    """
    code = 1
    try:
        _end_with_parent(server, signal.SIGTERM)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with open(request, encoding="utf-8") as file:
            task = json.load(file)
        os.environ.clear()
        os.environ.update(task["environment"], _KFP_RUNTIME="true")
        os.chdir(task["folder"])
        _execute(task["program"], task["arguments"])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            # as an interpreter ends, but without destroying every object
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os.write(status, str(code).encode())
        os._exit(code)


def _execute(program: str, arguments: Sequence[str]) -> None:
    from kfp.dsl import executor_main

    with contextlib.suppress(ImportError):  # or all forks would draw the same names of cache files
        from datasets.fingerprint import fingerprint_rng

        fingerprint_rng.seed()
    with tempfile.TemporaryDirectory() as folder:
        component = Path(folder) / "ephemeral_component.py"
        component.write_text(program, encoding="utf-8")
        sys.argv = [str(executor_main.__file__), "--component_module_path", str(component), *arguments]
        executor_main.executor_main()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
