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
from typing import IO, Any, Literal, TypedDict

from softpref.disk import write_private

logger = logging.getLogger(__name__)

TAG_LENGTH, NAME_LENGTH = 8000, 250  # MLflow's own limits
HOUSEKEEPING = ("run", "reopen")  # kinds of records that send nothing
TOGETHER = ("run", "metrics", "params", "tags")  # kinds of which many are one request
_BATCH_RECORDS, _BATCH_BYTES = 200, 400_000


class Record(TypedDict, total=False):
    """A line of the mirror. Every record has the first three keys; the others belong to some kinds only."""

    n: int
    kind: Literal["run", "reopen", "metrics", "params", "tags", "artifact", "dataset", "end"]
    time: int  # milliseconds since 1970
    values: Mapping[str, float | str]  # metrics, params, tags
    step: int  # metrics
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


_NEEDED: dict[str, dict[str, type]] = {  # of each kind, what it must have
    "run": {"key": str, "owned": bool, "experiment": str, "run_name": str, "tracking_uri": str},
    "reopen": {},
    "metrics": {"step": int, "values": dict},
    "params": {"values": dict},
    "tags": {"values": dict},
    "artifact": {"path": str, "folder": str},
    "dataset": {"dataset": dict},
    "end": {"status": str},
}
_OF_A_DATASET = ("name", "digest", "source", "profile", "context")
_NO_NUMBERS = ("nan", "inf", "-inf")
_BITS = 63  # of MLflow's integers


class Unreadable(Exception):
    """The file is no mirror."""


class Mirror:
    """A run's records (NAME.jsonl), and the number of the last one delivered (NAME.sent).

    Numbers (`n`) are never reused. Both files are only appended to, in whole lines: the torn line of a killed
    process is cut off when the file is reopened, and a line that is no record is passed over.

    Attributes:
        lost: whether records that were delivered are no longer there.
    """

    def __init__(self, path: Path, sent: IO[bytes], header: Record | None = None) -> None:
        self.path = path
        self._sent_file = sent
        self._sent = -1
        self.run_id: str | None = None
        self._recorded: dict[tuple[str, int], float] = {}
        self._last_of: dict[str, tuple[int, float]] = {}
        self._resumed = False
        self._cursor = self._end = 0  # before the first record that is not delivered; after the last one
        if header is not None:
            write_private(path, _line({"n": 0, "time": milliseconds(), **header}).decode())
        _cut_torn_line(path)
        _cut_torn_line(path.with_suffix(".sent"))
        for line in path.with_suffix(".sent").read_bytes().splitlines():
            note = _json(line)
            if note.keys() == {"n"} and isinstance(note["n"], int) and _is_number(note["n"]):
                self._sent = max(self._sent, note["n"])
            elif note.keys() == {"run_id"} and isinstance(note["run_id"], str):
                self.run_id = note["run_id"]
        self._last = -1
        delivered = set[int]()
        self.status: str | None = None
        self.header: Record = {}
        for record, _ in _records(path):
            if record["kind"] == "run" and not self.header:
                self.header = record
            self._last = max(self._last, record["n"])
            if record["n"] <= self._sent:
                delivered.add(record["n"])
            if record["kind"] in ("end", "reopen"):
                self.status = record.get("status")
            elif record["kind"] == "metrics":
                for key, value in record["values"].items():
                    self._recorded[key, record["step"]] = float(value)
        if not self.header:
            raise Unreadable(f"{path} does not say which run it is of")
        self._last = max(self._last, self._sent)
        self.lost = len(delivered) <= self._sent
        self.run_id = self.header.get("run_id") or self.run_id
        self.owned: bool = self.header["owned"]
        self._file = path.open("ab", buffering=0)
        self._seek()

    @classmethod
    def for_run(cls, folder: Path, header: Record, *, anew: bool = False) -> Mirror:
        """Continue the folder's mirror if it belongs to this unfinished run; else set it aside and start.

        Args:
            anew: start in any case.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "tracking.jsonl"
        if path.exists():
            try:
                mirror = cls.existing(path)
            except Unreadable as error:
                logger.warning("%s; what can be read of it is taken as this run's", error)
                _put_before(path, header)
                mirror = cls.existing(path)
            if mirror is None:
                path = _free_name(folder)  # another process still writes to the file
            elif mirror._continues(header) and not anew:
                if mirror.owned:
                    parent = header["parent_run_id"]
                    mirror.append({"kind": "reopen", "time": milliseconds(), "parent_run_id": parent})
                return mirror
            else:
                mirror._set_aside(folder)
        sent = _open_sent(path)
        lock(sent)
        return cls(path, sent, header)

    @classmethod
    def existing(cls, path: Path) -> Mirror | None:
        """Open an existing mirror; None while another process has it open.

        Raises:
            Unreadable: it holds no record of a run.
        """
        sent = _open_sent(path)
        if not lock(sent):
            sent.close()
            return None
        try:
            return cls(path, sent)
        except Unreadable:
            sent.close()
            raise

    def _continues(self, header: Record) -> bool:
        names: tuple[Literal["tracking_uri", "run_id", "experiment", "run_name"], ...]
        if header["run_id"] is not None:
            names, unfinished = ("tracking_uri", "run_id"), True
        else:
            names = ("tracking_uri", "experiment", "run_name")
            unfinished = self.owned and self.status != "FINISHED"
        return unfinished and all(self.header.get(name) == header[name] for name in names)

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
        """Write a record, or nothing of it.

        Raises:
            OSError: the disk does not take it.
        """
        line = _line({"n": self._last + 1, **record})
        try:
            while line:  # a disk that becomes full takes a part
                line = line[self._file.write(line) or 0 :]
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, self._end)
            raise
        self._last += 1
        self._end = self._file.tell()

    def resume(self, step: int) -> None:
        """From now on, points that are recorded for `step` or later ones are not recorded again."""
        self._recorded = {place: value for place, value in self._recorded.items() if place[1] >= step}
        self._resumed = True

    def unrecorded(self, numbers: Mapping[str, float], step: int) -> dict[str, float]:
        """Those of a step's numbers that are to be recorded: that are not yet, or with another value.

        Of a resumed run the first value stays, since MLflow cannot forget.
        """

        def is_new(key: str, number: float) -> bool:
            earlier = self._recorded.get((key, step))
            if earlier is not None and (self._resumed or _same(earlier, number)):
                return False
            place, last = self._last_of.get(key, (None, 0.0))
            return place != step or not _same(last, number)

        new = {key: number for key, number in numbers.items() if is_new(key, number)}
        self._last_of |= {key: (step, number) for key, number in new.items()}
        return new

    def waiting(self) -> bool:
        return self._cursor < self._end

    def waiting_records(self) -> int:
        """How many records are not delivered, without those of housekeeping."""
        return sum(
            record["n"] > self._sent and record["kind"] not in HOUSEKEEPING
            for record, _ in _records(self.path)
        )

    def next_records(self) -> tuple[list[Record], int]:
        """A batch of undelivered records, oldest first, and the place after it for `delivered`.

        What takes a request of its own is a batch of its own: what the server has taken is not sent again
        because it does not take the next one.
        """
        records: list[Record] = []
        size = 0
        with self.path.open("rb") as file:
            file.seek(self._cursor)
            while len(records) < _BATCH_RECORDS and size < _BATCH_BYTES:
                line = file.readline()
                if not line.endswith(b"\n"):
                    break
                record = _record(line)
                alone = record is not None and record["kind"] not in TOGETHER
                if alone and records:
                    break
                size += len(line)
                if record:
                    records.append(record)
                if alone:
                    break
        if not records:  # what is no record need not be delivered
            self._cursor += size
        return records, self._cursor + size

    def delivered(self, last: int, place: int) -> None:
        self._sent = last
        self._note({"n": last})
        self._cursor = place

    def remember_run(self, run_id: str) -> None:
        self.run_id = run_id
        self._note({"run_id": run_id})

    def close(self) -> None:
        self._file.close()
        unlock(self._sent_file)
        self._sent_file.close()

    def _note(self, note: Record) -> None:
        with suppress(OSError):  # the records are then sent again, which is harmless
            self._sent_file.write(_line(note))

    def _seek(self) -> None:
        """Put the cursor before the first undelivered record."""
        self._end = self.path.stat().st_size
        self._cursor = 0
        with self.path.open("rb") as file:
            for line in file:
                record = _record(line)
                if record and record["n"] > self._sent:
                    break
                self._cursor += len(line)


def _records(path: Path) -> Iterator[tuple[Record, bytes]]:
    """The records of a file, and their lines."""
    foreign = 0
    with path.open("rb") as file:
        for line in file:
            if record := _record(line):
                yield record, line
            else:
                foreign += 1
    if foreign:
        logger.warning("%s: %d of its lines are no records of tracking, and are passed over", path, foreign)


def _record(line: bytes) -> Record | None:
    """The record in a line, if it is one."""
    found: Any = _json(line)
    needed = _NEEDED.get(str(found.get("kind")))
    if needed is None or not all(
        isinstance(found.get(name), kind) and (kind is not int or _is_number(found[name]))
        for name, kind in {"n": int, "time": int, **needed}.items()
    ):
        return None
    if found["kind"] == "metrics":
        numbers = found["values"].values()
        usable = all(_is_number(one) or one in _NO_NUMBERS for one in numbers)
    elif found["kind"] == "dataset":
        usable = all(isinstance(found["dataset"].get(name), str) for name in _OF_A_DATASET)
    else:
        usable = found["kind"] != "end" or found["status"] in ("FINISHED", "FAILED", "KILLED")
    record: Record = found
    return record if usable else None


def _is_number(value: object) -> bool:
    """Whether `float` takes it; it does not take every int."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**_BITS)


def _json(line: bytes) -> dict[str, Any]:
    """The object in a line; empty where there is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _put_before(path: Path, header: Record) -> None:
    """Give a mirror that lacks its first record one."""
    lines = [_line({"n": 0, "time": milliseconds(), **header}), *(line for _, line in _records(path))]
    new = path.with_suffix(".new")
    write_private(new, b"".join(lines).decode())
    os.replace(new, path)


def _open_sent(path: Path) -> IO[bytes]:
    return path.with_suffix(".sent").open("ab", buffering=0)


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


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
    """The text of a parameter or tag; a container as JSON, keys in order: KFP gives them in any."""
    if isinstance(value, (dict, list, tuple)):
        plain = json.loads(json.dumps(value, default=str))  # with keys that can be compared
        return json.dumps(plain, ensure_ascii=False, sort_keys=True)
    return str(value)


def milliseconds() -> int:
    """Now, since 1970, as MLflow counts."""
    return int(time.time() * 1000)
