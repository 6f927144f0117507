"""One run's records on disk, and how far they were delivered. Knows no server."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)

_NAME_LENGTH = 250  # MLflow's own limit
_BATCH_RECORDS, _BATCH_BYTES = 200, 400_000


class Unreadable(Exception):
    """A file that should be a mirror is none."""


class Mirror:
    """One run's records on disk (NAME.jsonl) and how far they were delivered (NAME.sent). Knows no server.

    Records are numbered by `n`, never reused, so that lines may be removed by `rewind` without touching
    what NAME.sent says. Both files are only appended to, whole lines at a time: a process killed in the
    middle of a line leaves a torn one, which is cut off when the file is opened again.
    """

    def __init__(self, path: Path, sent: IO[bytes], header: dict[str, Any] | None = None) -> None:
        self.path = path
        self._sent_file = sent
        self._sent = -1
        self.run_id: str | None = None
        self._replaced: dict[tuple[str, int], tuple[float, int]] = {}
        if header is not None:
            path.write_bytes(_line({"n": 0, "time": milliseconds(), **header}))
        _cut_torn_line(path)
        _cut_torn_line(path.with_suffix(".sent"))
        for line in path.with_suffix(".sent").read_bytes().splitlines():
            note = json.loads(line)
            self._sent = max(self._sent, note.get("n", -1))
            self.run_id = note.get("run_id", self.run_id)
        self._last = -1
        self.status: str | None = None
        for record, _ in _records(path):
            if self._last == -1:
                self.header = record
            self._last = record["n"]
            if record["kind"] in ("end", "reopen"):
                self.status = record.get("status")
            elif record["kind"] == "rewind":
                self._replaced.update(
                    {(key, step): (value, moment) for key, step, value, moment in record["replaced"]}
                )
            elif record["kind"] == "metrics":
                for key in record["values"]:
                    self._replaced.pop((key, record["step"]), None)
        self._last = max(self._last, self._sent)
        self.run_id = self.header["run_id"] or self.run_id
        self.owned: bool = self.header["owned"]
        self._file = path.open("ab")
        self._generation = 0
        self._seek()

    @classmethod
    def for_run(cls, folder: Path, header: dict[str, Any]) -> Mirror:
        """Continue the folder's mirror if it is of the same unfinished run; else set it aside, start one."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "tracking.jsonl"
        if path.exists():
            try:
                mirror = cls.existing(path)
            except Unreadable as error:
                logger.warning("%s; it is set aside as %s.broken", error, path)
                path.rename(path.with_name(path.name + ".broken"))
                path.with_suffix(".sent").unlink(missing_ok=True)
            else:
                if mirror is None:
                    path = _free_name(folder)  # some process still writes there; leave it its file
                elif mirror.continues(header):
                    if mirror.owned:
                        mirror.append(
                            {
                                "kind": "reopen",
                                "time": milliseconds(),
                                "parent_run_id": header["parent_run_id"],
                            }
                        )
                    return mirror
                else:
                    mirror.set_aside(folder)
        sent = path.with_suffix(".sent").open("ab")
        lock(sent)
        return cls(path, sent, header)

    @classmethod
    def existing(cls, path: Path) -> Mirror | None:
        """Open a mirror that is there; None while another process has it open."""
        sent = path.with_suffix(".sent").open("ab")
        if not lock(sent):
            sent.close()
            return None
        try:
            return cls(path, sent)
        except (ValueError, KeyError, AttributeError) as error:
            sent.close()
            raise Unreadable(f"{path} is no tracking mirror ({error})") from error

    def continues(self, header: Mapping[str, Any]) -> bool:
        if header["run_id"] is not None:
            same = self.header["run_id"] == header["run_id"]
        else:
            same = self.owned and self.status != "FINISHED"
            same = same and all(self.header[name] == header[name] for name in ("experiment", "run_name"))
        return same and self.header["tracking_uri"] == header["tracking_uri"]

    def set_aside(self, folder: Path) -> None:
        """Close the mirror and give its files the next free name, for another run begins in its folder."""
        left = self.waiting_records()
        aside = _free_name(folder)
        self.close()
        self.path.rename(aside)
        self.path.with_suffix(".sent").rename(aside.with_suffix(".sent"))
        if left:
            logger.warning(
                "%d tracking records of an earlier run never reached MLflow; they are in %s, "
                "and `softpref track-sync %s` sends them",
                left,
                aside,
                folder,
            )

    def append(self, record: dict[str, Any]) -> None:
        self._file.write(_line({"n": self._last + 1, **record}))
        self._file.flush()
        self._last += 1
        self._end = self._file.tell()

    def times(self, numbers: dict[str, float], step: int) -> list[tuple[int, dict[str, float]]]:
        """The numbers grouped by the time they get: now, or the old one of a forgotten point they repeat."""
        now = milliseconds()
        groups: dict[int, dict[str, float]] = {}
        for key, number in numbers.items():
            value, moment = self._replaced.pop((key, step), (None, now))
            same = value is not None and (value == number or (math.isnan(value) and math.isnan(number)))
            groups.setdefault(moment if same else now, {})[key] = number
        return sorted(groups.items())

    def rewind(self, step: int) -> None:
        """Take the metrics after `step` out of the file, and keep their values and times in one record."""
        replaced = dict(self._replaced)
        kept: list[bytes] = []
        for record, line in _records(self.path):
            if record["kind"] == "metrics" and record["step"] > step:
                for key, value in record["values"].items():
                    replaced[key, record["step"]] = (float(value), record["time"])
            elif record["kind"] != "rewind":
                kept.append(line)
        self._last += 1
        record = {
            "n": self._last,
            "kind": "rewind",
            "time": milliseconds(),
            "step": step,
            "replaced": [[key, at, _plain(value), moment] for (key, at), (value, moment) in replaced.items()],
        }
        new = self.path.with_suffix(".new")
        new.write_bytes(b"".join([*kept, _line(record)]))
        os.replace(new, self.path)
        self._file.close()
        self._file = self.path.open("ab")
        self._replaced = replaced
        self._generation += 1
        self._seek()

    def waiting(self) -> bool:
        return self._cursor < self._end

    def waiting_records(self) -> int:
        """How many records are not delivered, housekeeping ones not counted."""
        return sum(
            record["n"] > self._sent and record["kind"] not in ("rewind", "run", "reopen")
            for record, _ in _records(self.path)
        )

    def next_records(self) -> tuple[list[dict[str, Any]], tuple[int, int]]:
        """A batch of undelivered records, oldest first, and the place after it for `delivered`."""
        records: list[dict[str, Any]] = []
        size = 0
        with self.path.open("rb") as file:
            file.seek(self._cursor)
            while len(records) < _BATCH_RECORDS and size < _BATCH_BYTES:
                line = file.readline()
                if not line.endswith(b"\n"):
                    break
                size += len(line)
                records.append(json.loads(line))
            return records, (self._generation, self._cursor + size)

    def delivered(self, last: int, place: tuple[int, int]) -> None:
        self._sent = last
        self._note({"n": last})
        generation, cursor = place
        if generation == self._generation:
            self._cursor = cursor
        else:  # rewound meanwhile, so places have shifted
            self._seek()

    def remember_run(self, run_id: str) -> None:
        self.run_id = run_id
        self._note({"run_id": run_id})

    def close(self) -> None:
        self._file.close()
        unlock(self._sent_file)
        self._sent_file.close()

    def _note(self, note: dict[str, Any]) -> None:
        self._sent_file.write(_line(note))
        self._sent_file.flush()

    def _seek(self) -> None:
        """Put the cursor before the first undelivered record."""
        self._end = self.path.stat().st_size
        self._cursor = 0
        for record, line in _records(self.path):
            if record["n"] > self._sent:
                break
            self._cursor += len(line)


def _records(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line), line


def _cut_torn_line(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _free_name(folder: Path) -> Path:
    number = 1
    while (path := folder / f"tracking-{number}.jsonl").exists():
        number += 1
    return path


def lock(file: IO[bytes], patience: float = 2.0) -> bool:
    """Claim a file for this process until it is closed; False when another keeps it for `patience` seconds.

    The patience is for the orphaned workers of a process that was killed a moment ago.
    """
    try:
        import fcntl
    except ImportError:  # no such lock on this system
        return True
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        except OSError:  # some network file systems have no locks
            return True
        else:
            return True


def unlock(file: IO[bytes]) -> None:
    """Give the claim up although a forked worker may still hold the file open."""
    with suppress(ImportError, OSError, ValueError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)


def _line(record: dict[str, Any]) -> bytes:
    if record.get("kind") == "metrics":
        record = {**record, "values": {key: _plain(value) for key, value in record["values"].items()}}
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _plain(value: float) -> float | str:
    """JSON knows no NaN and no infinity; their names do, and `float` reads them back."""
    return value if math.isfinite(value) else str(value)


def usable_name(key: Any) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", str(key))[:_NAME_LENGTH]


def as_text(value: Any) -> str:
    """A parameter's or tag's text; JSON for what holds others."""
    if isinstance(value, str):
        return value
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def milliseconds() -> int:
    """The time of a record: since 1970, as MLflow counts."""
    return int(time.time() * 1000)
