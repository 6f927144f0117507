"""One run's records on disk, and how many of them are delivered. Knows no server."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Literal, TypedDict

logger = logging.getLogger(__name__)

TAG_LENGTH, NAME_LENGTH = 8000, 250  # MLflow's own limits
HOUSEKEEPING = ("run", "reopen", "rewind")  # kinds of records that send nothing
_BATCH_RECORDS, _BATCH_BYTES = 200, 400_000


class Record(TypedDict, total=False):
    """A line of the mirror. Every record has the first three keys; the others belong to some kinds only."""

    n: int
    kind: Literal["run", "reopen", "metrics", "params", "tags", "artifact", "dataset", "rewind", "end"]
    time: int  # milliseconds since 1970
    values: Mapping[str, float | str]  # metrics, params, tags
    step: int  # metrics, rewind
    replaced: list[tuple[str, int, float | str, int]]  # rewind: key, step, value, time
    path: str  # artifact
    folder: str
    dataset: dict[str, str]  # dataset: name, digest, source, profile and context
    status: str  # end
    parent_run_id: str | None  # run, reopen
    run_id: str | None  # run, and what follows
    key: str
    owned: bool
    experiment: str
    run_name: str
    pipeline_run: dict[str, str] | None
    root: bool
    tracking_uri: str


class Unreadable(Exception):
    """The file is no mirror."""


class Mirror:
    """A run's records (NAME.jsonl), and the number of the last one delivered (NAME.sent).

    Numbers (`n`) are never reused, so `rewind` may remove lines without touching NAME.sent. Both files are
    only appended to, in whole lines: the torn line of a killed process is cut off when the file is reopened.
    """

    def __init__(self, path: Path, sent: IO[bytes], header: Record | None = None) -> None:
        self.path = path
        self._sent_file = sent
        self._sent = -1
        self.run_id: str | None = None
        self._replaced: dict[tuple[str, int], tuple[float, int]] = {}
        if header is not None:
            _write_private(path, _line({"n": 0, "time": milliseconds(), **header}))
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
                for key, step, value, moment in record["replaced"]:
                    self._replaced[key, step] = (float(value), moment)
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
    def for_run(cls, folder: Path, header: Record) -> Mirror:
        """Continue the folder's mirror if it belongs to this unfinished run; else set it aside and start."""
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
                    path = _free_name(folder)  # another process still writes to the file
                elif mirror._continues(header):
                    if mirror.owned:
                        parent = header["parent_run_id"]
                        mirror.append({"kind": "reopen", "time": milliseconds(), "parent_run_id": parent})
                    return mirror
                else:
                    mirror._set_aside(folder)
        sent = path.with_suffix(".sent").open("ab")
        lock(sent)
        return cls(path, sent, header)

    @classmethod
    def existing(cls, path: Path) -> Mirror | None:
        """Open an existing mirror; None while another process has it open."""
        sent = path.with_suffix(".sent").open("ab")
        if not lock(sent):
            sent.close()
            return None
        try:
            return cls(path, sent)
        except (ValueError, KeyError, AttributeError) as error:
            sent.close()
            raise Unreadable(f"{path} is no tracking mirror ({error})") from error

    def _continues(self, header: Record) -> bool:
        names: tuple[Literal["tracking_uri", "run_id", "experiment", "run_name"], ...]
        if header["run_id"] is not None:
            names, unfinished = ("tracking_uri", "run_id"), True
        else:
            names = ("tracking_uri", "experiment", "run_name")
            unfinished = self.owned and self.status != "FINISHED"
        return unfinished and all(self.header[name] == header[name] for name in names)

    def _set_aside(self, folder: Path) -> None:
        """Close the mirror and rename its files, because another run begins in its folder."""
        left = self.waiting_records()
        aside = _free_name(folder)
        self.close()
        self.path.rename(aside)
        self.path.with_suffix(".sent").rename(aside.with_suffix(".sent"))
        if left:
            logger.warning(
                f"{left} tracking records of an earlier run never reached MLflow; they are in {aside}, "
                f"and `softpref track-sync {folder}` sends them"
            )

    def append(self, record: Record) -> None:
        self._file.write(_line({"n": self._last + 1, **record}))
        self._file.flush()
        self._last += 1
        self._end = self._file.tell()

    def times(self, numbers: dict[str, float], step: int) -> list[tuple[int, dict[str, float]]]:
        """The numbers grouped by their time: now, or that of the removed point which a number repeats."""
        now = milliseconds()
        groups: dict[int, dict[str, float]] = {}
        for key, number in numbers.items():
            value, moment = self._replaced.pop((key, step), (None, now))
            same = value is not None and (value == number or (math.isnan(value) and math.isnan(number)))
            groups.setdefault(moment if same else now, {})[key] = number
        return sorted(groups.items())

    def rewind(self, step: int) -> None:
        """Remove the metrics after `step` from the file; one record keeps their values and times."""
        replaced = dict(self._replaced)
        kept: list[bytes] = []
        for record, line in _records(self.path):
            if record["kind"] == "metrics" and record["step"] > step:
                for key, value in record["values"].items():
                    replaced[key, record["step"]] = (float(value), record["time"])
            elif record["kind"] != "rewind":
                kept.append(line)
        self._last += 1
        note: Record = {"n": self._last, "kind": "rewind", "time": milliseconds(), "step": step}
        note["replaced"] = [(key, at, _plain(value), time) for (key, at), (value, time) in replaced.items()]
        new = self.path.with_suffix(".new")
        _write_private(new, b"".join([*kept, _line(note)]))
        os.replace(new, self.path)
        self._file.close()
        self._file = self.path.open("ab")
        self._replaced = replaced
        self._generation += 1
        self._seek()

    def waiting(self) -> bool:
        return self._cursor < self._end

    def waiting_records(self) -> int:
        """How many records are not delivered, without those of housekeeping."""
        return sum(
            record["n"] > self._sent and record["kind"] not in HOUSEKEEPING
            for record, _ in _records(self.path)
        )

    def next_records(self) -> tuple[list[Record], tuple[int, int]]:
        """A batch of undelivered records, oldest first, and the place after it for `delivered`."""
        records: list[Record] = []
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
        else:  # `rewind` has shifted all places meanwhile
            self._seek()

    def remember_run(self, run_id: str) -> None:
        self.run_id = run_id
        self._note({"run_id": run_id})

    def close(self) -> None:
        self._file.close()
        unlock(self._sent_file)
        self._sent_file.close()

    def _note(self, note: Record) -> None:
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


def _records(path: Path) -> Iterator[tuple[Record, bytes]]:
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line), line


def _write_private(path: Path, content: bytes) -> None:
    """Only its owner may read it: the address of a database may hold a password, and `sync` needs it."""
    path.unlink(missing_ok=True)
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(content)


def _cut_torn_line(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _free_name(folder: Path) -> Path:
    paths = (folder / f"tracking-{number}.jsonl" for number in itertools.count(1))
    return next(path for path in paths if not path.exists())


def lock(file: IO[bytes], patience: float = 2.0) -> bool:
    """Lock a file for this process until it is closed; False if another holds it for `patience` seconds.

    The patience is for the orphaned workers of a process that was killed a moment ago. Systems without such
    locks count as locked.
    """
    try:
        import fcntl
    except ImportError:
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
    """Release the lock even if a forked worker still has the file open."""
    with suppress(ImportError, OSError, ValueError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)


def _line(record: Record) -> bytes:
    if record.get("kind") == "metrics":
        record = {**record, "values": {key: _plain(value) for key, value in record["values"].items()}}
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _plain(value: float | str) -> float | str:
    """JSON has no NaN and no infinity; `float` reads their names back."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def usable_name(key: object) -> str:
    """A name that MLflow accepts."""
    return re.sub(r"[^\w\-. :/]", "_", str(key))[:NAME_LENGTH]


def as_text(value: object) -> str:
    """The text of a parameter or tag; a container as JSON."""
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def milliseconds() -> int:
    """Now, since 1970, as MLflow counts."""
    return int(time.time() * 1000)
