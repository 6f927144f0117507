"""Processes of a stage under `accelerate launch`: their output, failure and end. Trains nothing itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO, NamedTuple

MODULES = {"sft": "softpref.sft", "train": "softpref.spo", "judge": "softpref.reward_model"}
"""The module that runs a training stage, by the stage's name on the command line."""

_GRACE = 20.0  # seconds from SIGTERM to SIGKILL; Kubernetes kills a pod after 30
_LAST_LINES = 60  # the launcher closes with some forty of its own


class StageFailed(RuntimeError):
    """A training stage failed in other processes; the message ends with its last lines."""


class Cancelled(BaseException):
    """SIGTERM or SIGINT came; like KeyboardInterrupt, it is not an error to handle."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Rendezvous(NamedTuple):
    """Where the nodes of a run meet.

    Attributes:
        nodes: how many there are.
        rank: which of them this is, from 0.
        address, port: of node 0; unused where it is alone.
    """

    nodes: int = 1
    rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0


def launch_command(
    stage: str, arguments: Sequence[str], *, processes: int, rendezvous: Rendezvous | None = None
) -> list[str]:
    """The command that runs a training stage in `processes` processes of this machine.

    Args:
        stage: `sft`, `train` or `judge`.
        arguments: of the stage, as on the console.
        processes: on this machine; every node must have as many.
        rendezvous: of several nodes; None: this machine alone.
    """
    meet = rendezvous or Rendezvous()
    module = MODULES[stage]
    if processes * meet.nodes == 1:
        return [sys.executable, "-m", module, *arguments]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", str(processes * meet.nodes), "--num_machines", str(meet.nodes)]
    command += ["--machine_rank", str(meet.rank), "--main_process_port", str(meet.port)]
    if meet.nodes > 1:
        command += ["--main_process_ip", meet.address]
    # precision and compilation are options of the stage: a user's accelerate file must not decide them
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*command, "-m", module, *arguments]


def launch_environment(processes: int, *, gpus: int) -> dict[str, str]:
    """This environment for `launch_command`: without another launcher's variables, threads shared out."""
    taken = ("PET_", "TORCHELASTIC_")
    one = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
    env = {key: value for key, value in os.environ.items() if not key.startswith(taken) and key not in one}
    if not gpus and processes > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    return env


def run_watched(command: Sequence[str], *, env: Mapping[str, str] | None = None, what: str = "") -> None:
    """Run a command to its end and pass its output on as it comes.

    SIGTERM or SIGINT to this process ends all of the command's processes, and then this process as it would
    have without the command.

    Args:
        what: what failed, for the message.

    Raises:
        StageFailed: the exit status was not 0; with the last lines of output.
    """
    last: deque[str] = deque(maxlen=_LAST_LINES)
    with cancellable():
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=None if env is None else dict(env),
            start_new_session=True,  # signals reach it through this process alone, once
        )
        try:
            assert process.stdout is not None
            pass_on(process.stdout, last)
            status = process.wait()
        finally:
            _end(process)
    if status:
        ended = f"by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
        raise StageFailed("\n".join([f"{what or command[0]} ended {ended}; its last lines:", *last]))


def pass_on(stream: IO[bytes], last: deque[str]) -> None:
    """Print output as it comes, progress bars too, and keep the last whole lines."""
    rest = b""
    while block := stream.read1(1 << 16):  # type: ignore[attr-defined]
        sys.stdout.write(block.decode(errors="replace"))
        sys.stdout.flush()
        *lines, rest = (rest + block).split(b"\n")
        last.extend(_final(line) for line in lines)
    if rest:
        last.append(_final(rest))


def _final(line: bytes) -> str:
    """What a terminal shows of a line in the end: a progress bar overwrites itself."""
    return line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]


@contextmanager
def cancellable(clean_up: Callable[[], None] | None = None) -> Iterator[None]:
    """SIGTERM and SIGINT raise `Cancelled` inside; after `clean_up` the signal has its usual effect.

    Outside the main thread, where Python delivers no signals, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def cancel(signum: int, frame: object) -> None:
        for each in signals:  # a second one must not interrupt the clean-up
            signal.signal(each, signal.SIG_IGN)
        raise Cancelled(signum)

    signals = (signal.SIGTERM, signal.SIGINT)
    former = {each: signal.getsignal(each) for each in signals}
    for each in signals:
        signal.signal(each, cancel)
    cancelled: Cancelled | None = None
    try:
        yield
    except Cancelled as reason:
        cancelled = reason
        if clean_up is not None:
            clean_up()
        raise
    finally:
        for each in signals:
            signal.signal(each, former[each] or signal.SIG_DFL)
        if cancelled is not None:
            signal.raise_signal(cancelled.signum)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a command and whatever it started, with time to shut down cleanly."""
    group = process.pid  # it leads a session of its own
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
