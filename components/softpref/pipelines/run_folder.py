"""The folder of a pipeline's run on this machine: whose it is, and that one process at a time works there.

The same command with the same folder goes on where it was stopped. `run.json` keeps the run's id, so that
MLflow sees one run; with other parameters the folder's results serve a new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from softpref.config import without_secrets
from softpref.disk import DAMAGED, what_is_at, write_whole
from softpref.errors import ConfigError
from softpref.finished import as_recorded

_RECORD, _LOCK = "run.json", ".lock"
_PATIENCE = 20.0  # seconds for the steps of a killed run to end


class RunFolder(NamedTuple):
    """A claimed folder.

    Attributes:
        id, name: of the pipeline's run.
        goes_on: whether an earlier process has begun it.
        lock: open file that steps inherit: the folder is taken until the last of them has ended.
    """

    path: Path
    id: str
    name: str
    goes_on: bool
    lock: int


@contextlib.contextmanager
def claimed(path: Path, name: str, parameters: Mapping[str, Any]) -> Iterator[RunFolder]:
    """Claim a new, an empty or an earlier run's folder; within it no other process can.

    Args:
        name: of a run that begins here.
        parameters: of the pipeline. A run with the same ones goes on under its id and name.

    Raises:
        ConfigError: the folder is a file, holds something else, or is another process's just now.
    """
    taken = f"--output {path}"
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{taken} {what_is_at(path)}; name a folder")
    # a process that was killed at its very start leaves the lock, and perhaps a part of the record
    begun = (path / _RECORD).is_file() or not path.exists() or all(map(_is_ours, path.iterdir()))
    if not begun:
        raise ConfigError(
            f"{taken} is not empty and holds no run of a pipeline; name a new folder, nothing is overwritten"
        )
    path.mkdir(parents=True, exist_ok=True)
    lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _wait_for(lock, path)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        found = _read(path / _RECORD)
        own = as_recorded({"folder": str(path.resolve()), "parameters": without_secrets(dict(parameters))})
        if found and all(found.get(key) == value for key, value in own.items()):
            yield RunFolder(path, found["id"], found["name"], True, lock)
            return
        run_id = f"local-{uuid.uuid4().hex}"
        write_whole(path / _RECORD, json.dumps({"id": run_id, "name": name, **own}, indent=2))
        yield RunFolder(path, run_id, name, bool(found), lock)
    finally:
        os.close(lock)


def _is_ours(file: Path) -> bool:
    return file.name.startswith((_LOCK, f".{_RECORD}"))


def _wait_for(lock: int, path: Path) -> None:
    """Lock the folder. The steps of a killed run hold it until they end, which takes them seconds."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            process = os.pread(lock, 20, 0).decode(errors="replace").strip() or "0"
            alive = process.isdecimal() and Path("/proc", process).exists()
            if alive or time.monotonic() > until:
                raise ConfigError(
                    f"--output {path} is in use: "
                    + (f"process {process} runs there" if alive else "steps of a stopped run have not ended")
                    + "; wait for it, or name another folder"
                ) from None
            time.sleep(0.2)


def _read(file: Path) -> dict[str, Any]:
    """The record; empty where there is none, or a cut one."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except DAMAGED:
        return {}
    return found if isinstance(found, dict) and {"id", "name"} <= found.keys() else {}
