"""Work in a fork of this process, which can be killed at its n-th change of a file, or after some time."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "sqlite3.connect")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Fuse(NamedTuple):
    """When a fork is killed: at its n-th change of a file in `folder`, or so many seconds after it began."""

    folder: Path
    change: int = 0
    seconds: float = 0.0


class Ended(NamedTuple):
    """How a fork ended.

    Attributes:
        status: 0; 2 for an error that softpref explains; 1 for any other; -9 where it was killed, -14 where
            it took too long.
        said: what it printed.
        changes: of files in the fuse's folder; unknown where it was killed.
    """

    status: int
    said: str
    changes: int


def in_fork(work: Callable[[], object], log: Path, fuse: Fuse | None = None, *, longest: int = 0) -> Ended:
    """Do `work` in a fork of this process, whose imports it shares.

    Args:
        log: file for what it prints.
        longest: seconds that it may take; 0 for any.
    """
    counted, write_count = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        signal.alarm(longest)
        _run(work, log, fuse, write_count)
    os.close(write_count)
    with open(counted, encoding="ascii") as pipe:
        count = pipe.read()
    _, status = os.waitpid(process, 0)
    return Ended(
        os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8", errors="replace"), int(count or -1)
    )


def _run(work: Callable[[], object], log: Path, fuse: Fuse | None, write_count: int) -> None:
    from softpref.errors import SoftprefError

    status, changes = 1, [0]
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if fuse:
            _light(fuse, changes)
        work()
        status = 0
    except SoftprefError as error:
        print(f"error: {error}")
        status = 2
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os.write(write_count, str(changes[0]).encode())
        os._exit(status)


def writes(event: str, arguments: tuple[object, ...]) -> str:
    """The file or folder that an audit event of Python's begins to change; empty for any other event."""
    if event == "open":
        path, _, flags = arguments
        if not (isinstance(flags, int) and flags & _WRITING):
            return ""
    elif event in _CHANGES:
        path = arguments[0]
    else:
        return ""
    return str(path) if isinstance(path, (str, os.PathLike)) else ""


def _light(fuse: Fuse, changes: list[int]) -> None:
    """Arm the fuse in this process."""
    within, lock = str(fuse.folder.absolute()), threading.Lock()

    def changed(event: str, arguments: tuple[object, ...]) -> None:
        if within not in writes(event, arguments):
            return
        with lock:
            changes[0] += 1
            if changes[0] == fuse.change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(changed)
    if fuse.seconds:
        bomb = threading.Timer(fuse.seconds, os.kill, [os.getpid(), signal.SIGKILL])
        bomb.daemon = True
        bomb.start()
