"""Tracking training can rely on: a JSONL mirror first, MLflow behind it. Decides nothing, stops nothing.

Every call writes one line to `<output_dir>/tracking.jsonl` and returns; a background thread carries the
lines to MLflow in order and notes in `tracking.sent` how far it came. While the server is away the lines
wait; a restart of the stage, or `sync(output_dir)`, delivers the rest.

What makes a second delivery harmless: a point keeps the time of its first writing, and MLflow's store drops
a metric whose run, key, step, time and value it already has; a parameter may be sent again with the same
value; tags and files replace themselves; a run carries the tag `softpref.tracking_key`, by which a run
whose creation was never acknowledged is found again.

What MLflow cannot do is forget. After `rewind(step)` the mirror holds one trajectory only; a point that is
logged again with the same value takes its old time, so MLflow keeps one; with another value MLflow shows
the new point as the latest and keeps the old one in the history at the same step.
"""

from __future__ import annotations

import getpass
import importlib
import json
import logging
import math
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from softpref.errors import ConfigError

logger = logging.getLogger(__name__)

KEY_TAG = "softpref.tracking_key"
PARENT_TAG = "mlflow.parentRunId"
_PARAM_LENGTH, _TAG_LENGTH, _NAME_LENGTH = 6000, 8000, 250  # MLflow's own limits
_BATCH_RECORDS, _BATCH_BYTES = 200, 400_000
_BATCH_SECONDS, _LONGEST_PAUSE = 1.0, 60.0
_EXIT_WAIT, _RESTART_WAIT, _LONGEST_EXIT_WAIT = (
    30.0,
    180.0,
    900.0,
)  # seconds; a server restarts in two minutes
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST"}

_short_lock = threading.Lock()
_short_users = 0
_short_set: list[str] = []


class SyncResult(NamedTuple):
    """What `sync` did: records delivered now, and the run they went to."""

    delivered: int
    run_id: str | None


class Tracker:
    """Parameters, metrics, tags and files of one run, mirrored to disk and carried to MLflow.

    The run is, in this order: the one named by the environment's `MLFLOW_RUN_ID` (the Kubeflow backend's
    MLflow plugin sets it), the one named by `run_id`, the unfinished one that an earlier process tracked
    from the same folder, or a new one. Only a run that the tracker itself opened gets its status set.

    No method raises for trouble with the server or the disk: it is logged once, and training goes on.

    Args:
        output_dir: Folder of the stage's output; made when absent. Holds `tracking.jsonl`, `tracking.sent`.
        experiment: MLflow experiment; made when absent.
        run_name: Name of a run that is opened here.
        parent_run_id: Parent of a run that is opened here, for a sweep.
        run_id: An existing run to continue; it is neither opened nor ended.
        tags: Tags of the run.
        tracking_uri: MLflow store. Default: `MLFLOW_TRACKING_URI`, else `sqlite:///mlflow.db` in the
            current directory.
        exit_wait: Seconds that `close` waits at most for what is not yet delivered. Default: a tenth of the
            run's time so far and at most a quarter of an hour, but three minutes at least for a server that
            has answered before, and half a minute for one that never has. A killed run waits half a minute.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        experiment: str,
        run_name: str,
        parent_run_id: str | None = None,
        run_id: str | None = None,
        tags: Mapping[str, Any] | None = None,
        tracking_uri: str | None = None,
        exit_wait: float | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.tracking_uri = resolve_tracking_uri(tracking_uri)
        attached = os.environ.get("MLFLOW_RUN_ID") or run_id or None
        self._exit_wait = exit_wait
        self._opened = time.monotonic()
        self._answered = False
        self._changed = threading.Condition()
        self._closing = self._abandoned = self._closed = False
        self._trouble: str | None = None
        self._unusable: set[str] = set()
        self._sender: threading.Thread | None = None
        self._mirror: _Mirror | None = None
        header = {
            "kind": "run",
            "key": uuid.uuid4().hex,
            "run_id": attached,
            "owned": attached is None,
            "experiment": experiment,
            "run_name": run_name,
            "parent_run_id": parent_run_id if attached is None else None,
            "tracking_uri": self.tracking_uri,
        }
        try:
            self._mirror = _Mirror.for_run(self.output_dir, header)
        except OSError as error:
            logger.warning("nothing of this run is tracked: %s cannot be written: %s", self.output_dir, error)
            return
        if tags:
            self.tags(tags)
        if not mlflow_ready(self.tracking_uri):
            logger.warning(
                "mlflow is not installed here: metrics go to %s only; where it is installed, "
                "`softpref track-sync %s` sends them",
                self._mirror.path,
                self.output_dir,
            )
            return
        _hold_short_requests()
        self._sender = threading.Thread(target=self._send, name="softpref-tracking", daemon=True)
        self._sender.start()

    @property
    def run_id(self) -> str | None:
        """The MLflow run, or None while the server has not yet answered (`flush` waits for it)."""
        return self._mirror.run_id if self._mirror is not None else None

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters. A value over MLflow's length limit is cut and kept whole as a text artifact.

        MLflow's parameters never change: a different value for a known name goes to the tag
        `param_changed.NAME`, with a warning.
        """
        self._write("params", values={_name(key): _text(value) for key, value in values.items()})

    def metrics(self, values: Mapping[str, Any], step: int) -> None:
        """Record numbers at one step, now. NaN and infinities are kept; what is no number is left out."""
        if self._mirror is None:
            return
        numbers: dict[str, float] = {}
        for key, value in values.items():
            try:
                numbers[_name(key)] = float(value)
            except (TypeError, ValueError):
                if key not in self._unusable:
                    self._unusable.add(key)
                    logger.warning("metric %s is not tracked: %r is no number", key, value)
        with self._changed:
            for moment, group in self._mirror.times(numbers, int(step)):
                self._append({"kind": "metrics", "step": int(step), "time": moment, "values": group})
            self._changed.notify_all()

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Upload a file, or what a folder holds, to `folder` of the run's artifacts, as it is when sent."""
        path = Path(path).absolute()
        with suppress(ValueError):  # relative, so that a moved output folder can still be synced
            path = path.relative_to(self.output_dir.absolute())
        self._write("artifact", path=str(path), folder=folder)

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags of the run; a later value replaces an earlier one."""
        self._write("tags", values={_name(key): _text(value) for key, value in values.items()})

    def rewind(self, step: int) -> None:
        """Forget the mirror's points after `step`, for they will be logged again after a resume from `step`.

        In MLflow a repeated point of equal value stays one point; of another value it becomes the latest
        one of its step and the old one stays in the history.
        """
        if self._mirror is None:
            return
        with self._changed:
            try:
                self._mirror.rewind(int(step))
            except OSError as error:
                self._mirror_failed(error)

    def flush(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds until everything is delivered; True when it is."""
        if self._mirror is None or self._sender is None:
            return False
        mirror = self._mirror
        with self._changed:
            return self._changed.wait_for(lambda: not mirror.waiting(), timeout)

    def close(self, status: str = "FINISHED") -> None:
        """End the run when it was opened here (`FINISHED`, `FAILED` or `KILLED`) and deliver what is left.

        Waits at most `exit_wait` seconds; what is still undelivered then is named in a warning.
        """
        wait = self._exit_wait
        if wait is None:
            wait = _EXIT_WAIT
            if status != "KILLED":
                least = _RESTART_WAIT if self._answered else _EXIT_WAIT
                wait = min(max(least, (time.monotonic() - self._opened) / 10), _LONGEST_EXIT_WAIT)
        if self._closed or self._mirror is None:
            return
        self._closed = True
        if self._mirror.owned:
            self._write("end", status=status)
        sender = self._sender
        if sender is None:
            self._mirror.close()
            return
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        sender.join(wait)
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()
            left = self._mirror.waiting_records()
        if left:
            logger.warning(
                "%d tracking records did not reach MLflow at %s (%s); they are in %s, "
                "and `softpref track-sync %s` sends them",
                left,
                self.tracking_uri,
                self._trouble or "it is slow",
                self._mirror.path,
                self.output_dir,
            )
        sender.join(0.5)
        if not sender.is_alive():  # else it closes the mirror itself, when its last request has returned
            self._mirror.close()
        _release_short_requests()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.close("FINISHED")
        else:
            self.close("FAILED" if issubclass(kind, Exception) else "KILLED")

    def _write(self, kind: str, **content: Any) -> None:
        with self._changed:
            self._append({"kind": kind, "time": _now(), **content})
            self._changed.notify_all()

    def _append(self, record: dict[str, Any]) -> None:
        if self._mirror is None:
            return
        try:
            self._mirror.append(record)
        except (OSError, ValueError) as error:  # ValueError: written to after close
            self._mirror_failed(error)

    def _mirror_failed(self, error: Exception) -> None:
        if "mirror" not in self._unusable:
            self._unusable.add("mirror")
            logger.warning("tracking of %s loses records: %s", self.output_dir, error)

    def _send(self) -> None:
        """The sender thread: one batch at a time, with growing pauses while the server is away."""
        mirror = self._mirror
        assert mirror is not None
        delivery = _Delivery(mirror, self.tracking_uri, self._changed)
        failures = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._abandoned or mirror.waiting())
                if self._abandoned or not mirror.waiting():
                    break
            try:
                delivery.deliver_batch()
            except _RunGone as error:
                self._trouble = str(error)
                logger.warning("MLflow tracking stops: %s; records stay in %s", error, mirror.path)
                break
            except Exception as error:  # whatever the network, the store or its driver came up with
                failures += 1
                self._trouble = in_short(error)
                if failures == 1:
                    logger.warning(
                        "MLflow at %s cannot be reached (%s); going on, records wait in %s",
                        self.tracking_uri,
                        self._trouble,
                        mirror.path,
                    )
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._closing or self._abandoned, min(2.0**failures, _LONGEST_PAUSE)
                    )
                    if self._closing:
                        self._changed.wait_for(lambda: self._abandoned, 1.0)
            else:
                self._answered = True
                if failures:
                    logger.warning("MLflow at %s answers again", self.tracking_uri)
                    failures, self._trouble = 0, None
                with self._changed:  # gather the next batch
                    self._changed.wait_for(lambda: self._closing or self._abandoned, _BATCH_SECONDS)
        if self._abandoned:
            mirror.close()


def sync(output_dir: str | Path, tracking_uri: str | None = None) -> SyncResult:
    """Deliver to MLflow what the stage that wrote `output_dir` could not, in order, nothing twice.

    Args:
        output_dir: Folder with `tracking.jsonl`, as a stage left it.
        tracking_uri: Another address of the same store; default is the one the stage used.

    Raises:
        ConfigError: no mirror there, another process is writing it, mlflow is not installed, the server
            does not answer, or the run was deleted. What was delivered until then is remembered.
    """
    paths = sorted(Path(output_dir).glob("tracking*.jsonl"))
    if not paths:
        raise ConfigError(f"{output_dir} holds no tracking.jsonl; give the output folder of a stage")
    delivered, run_id = 0, None
    for path in paths:
        try:
            mirror = _Mirror.existing(path)
        except _Unreadable as error:
            raise ConfigError(str(error)) from error
        if mirror is None:
            raise ConfigError(f"{path} is being written by a running stage, which delivers it by itself")
        try:
            uri = resolve_tracking_uri(tracking_uri) if tracking_uri else mirror.header["tracking_uri"]
            if not mlflow_ready(uri):
                raise ConfigError("mlflow is not installed here, so nothing can be sent")
            delivery = _Delivery(mirror, uri, threading.Condition(), artifact_attempts=1)
            with short_requests():
                while mirror.waiting():
                    delivered += delivery.deliver_batch()
            run_id = mirror.run_id
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"MLflow at {uri}: {in_short(error)}; {mirror.waiting_records()} records of {path} wait"
            ) from error
        finally:
            mirror.close()
    return SyncResult(delivered, run_id)


def sync_below(root: str | Path, tracking_uri: str | None = None) -> int:
    """Deliver what any stage below a folder could not, as `sync` does; returns how many records that were.

    For the end of a pipeline: by then a server that was away while a stage ended may be back. A folder whose
    records still cannot be delivered is a warning.
    """
    delivered = 0
    for folder in sorted({path.parent for path in Path(root).rglob("tracking*.jsonl")}):
        try:
            delivered += sync(folder, tracking_uri).delivered
        except ConfigError as error:
            logger.warning("tracking: %s; `softpref track-sync %s` sends them", error, folder)
    return delivered


def open_parent(
    experiment: str,
    name: str,
    tags: Mapping[str, Any] | None = None,
    tracking_uri: str | None = None,
) -> str | None:
    """Open the parent run of a sweep and return its id, or None with a warning when MLflow cannot be had.

    Like a stage, it takes the inherited `MLFLOW_RUN_ID` when there is one.

    Raises:
        ConfigError: the server is there and refuses the login or its own name. Waiting would not change that,
            and a sweep that begins here would find it out at its end, when it registers the model.
    """
    inherited = os.environ.get("MLFLOW_RUN_ID")
    uri = resolve_tracking_uri(tracking_uri)
    try:
        if not mlflow_ready(uri):
            raise ConfigError("mlflow is not installed here")
        with short_requests():
            client = open_client(uri)
            texts = {_name(key): _cut(_text(value), _TAG_LENGTH) for key, value in (tags or {}).items()}
            if inherited:
                for key, text in texts.items():
                    client.set_tag(inherited, key, text)
                return inherited
            run = client.create_run(
                find_experiment(client, experiment, uri), run_name=name, tags={**source_tags(), **texts}
            )
            return run.info.run_id
    except Exception as error:
        refusal = _refusal(error)
        if refusal:
            raise ConfigError(f"MLflow at {uri} {refusal}") from error
        logger.warning("no parent run: MLflow at %s: %s", uri, in_short(error))
        return inherited


def end_run(run_id: str | None, status: str = "FINISHED", tracking_uri: str | None = None) -> None:
    """Set the final status of a run from `open_parent`; a warning when MLflow cannot be reached.

    A run that was inherited belongs to whoever opened it and is left open.
    """
    if run_id is None or run_id == os.environ.get("MLFLOW_RUN_ID"):
        return
    uri = resolve_tracking_uri(tracking_uri)
    try:
        with short_requests():
            open_client(uri).set_terminated(run_id, status)
    except Exception as error:
        logger.warning("run %s was not ended: MLflow at %s: %s", run_id, uri, in_short(error))


def resolve_tracking_uri(tracking_uri: str | None = None) -> str:
    """The argument, else `MLFLOW_TRACKING_URI`, else `sqlite:///mlflow.db`; a SQLite path made absolute."""
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    path = uri.removeprefix("sqlite:///")
    if path != uri and path != ":memory:":
        uri = f"sqlite:///{Path(path).resolve()}"
    return uri


class _RunGone(Exception):
    """The run was deleted on the server, so nothing can be added to it."""


class _Unreadable(Exception):
    """A file that should be a mirror is none."""


class _Mirror:
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
            path.write_bytes(_line({"n": 0, "time": _now(), **header}))
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
    def for_run(cls, folder: Path, header: dict[str, Any]) -> _Mirror:
        """Continue the folder's mirror if it is of the same unfinished run; else set it aside, start one."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "tracking.jsonl"
        if path.exists():
            try:
                mirror = cls.existing(path)
            except _Unreadable as error:
                logger.warning("%s; it is set aside as %s.broken", error, path)
                path.rename(path.with_name(path.name + ".broken"))
                path.with_suffix(".sent").unlink(missing_ok=True)
            else:
                if mirror is None:
                    path = _free_name(folder)  # some process still writes there; leave it its file
                elif mirror.continues(header):
                    if mirror.owned:
                        mirror.append(
                            {"kind": "reopen", "time": _now(), "parent_run_id": header["parent_run_id"]}
                        )
                    return mirror
                else:
                    mirror.set_aside(folder)
        sent = path.with_suffix(".sent").open("ab")
        _lock(sent)
        return cls(path, sent, header)

    @classmethod
    def existing(cls, path: Path) -> _Mirror | None:
        """Open a mirror that is there; None while another process has it open."""
        sent = path.with_suffix(".sent").open("ab")
        if not _lock(sent):
            sent.close()
            return None
        try:
            return cls(path, sent)
        except (ValueError, KeyError, AttributeError) as error:
            sent.close()
            raise _Unreadable(f"{path} is no tracking mirror ({error})") from error

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
        now = _now()
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
            "time": _now(),
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
        _unlock(self._sent_file)
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


class _Delivery:
    """Carries a mirror's records to MLflow, a batch a call; raises when the server does not take them."""

    def __init__(
        self, mirror: _Mirror, uri: str, lock: threading.Condition, artifact_attempts: int = 3
    ) -> None:
        self._mirror = mirror
        self._uri = uri
        self._lock = lock
        self._client: Any = None
        self._artifact_attempts = artifact_attempts
        self._failed_artifact = (-1, 0)  # its number, how often

    def deliver_batch(self) -> int:
        """Deliver the next records and note it; returns how many."""
        if self._client is None:
            self._client = open_client(self._uri)
        with self._lock:
            records, place = self._mirror.next_records()
        if not records:
            return 0
        run_id = self._mirror.run_id or self._open_run()
        points: list[Any] = []
        params: dict[str, str] = {}
        tags: dict[str, str] = {}

        def send() -> None:
            self._log(run_id, points, params, tags)
            points.clear()
            params.clear()
            tags.clear()

        from mlflow.entities import Metric

        for record in records:
            kind = record["kind"]
            if kind == "metrics":
                points += [
                    Metric(key, float(value), record["time"], record["step"])
                    for key, value in record["values"].items()
                ]
            elif kind == "params":
                if any(params.get(key, value) != value for key, value in record["values"].items()):
                    send()
                params.update(record["values"])
            elif kind == "tags":
                tags.update(record["values"])
            elif kind == "reopen":
                self._existing_run(run_id)
                self._client.update_run(run_id, status="RUNNING")
                if record.get("parent_run_id"):
                    tags[PARENT_TAG] = record["parent_run_id"]
            elif kind == "artifact":
                send()
                self._upload(run_id, record)
            elif kind == "end":
                send()
                self._existing_run(run_id)
                self._client.set_terminated(run_id, record["status"], record["time"])
        send()
        with self._lock:
            self._mirror.delivered(records[-1]["n"], place)
            self._lock.notify_all()
        return sum(record["kind"] not in ("rewind", "run", "reopen") for record in records)

    def _open_run(self) -> str:
        """Create the run, or find it when an earlier attempt created it and the answer was lost."""
        header = self._mirror.header
        experiment_id = find_experiment(self._client, header["experiment"], self._uri)
        found = self._client.search_runs(
            [experiment_id], filter_string=f"tags.`{KEY_TAG}` = '{header['key']}'", max_results=1
        )
        if found:
            run_id = found[0].info.run_id
        else:
            tags = {**source_tags(), KEY_TAG: header["key"]}
            if header["parent_run_id"]:
                tags[PARENT_TAG] = header["parent_run_id"]
            run_id = self._client.create_run(
                experiment_id, start_time=header["time"], tags=tags, run_name=header["run_name"]
            ).info.run_id
        with self._lock:
            self._mirror.remember_run(run_id)
        return run_id

    def _log(self, run_id: str, points: list[Any], params: dict[str, str], tags: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        short = {key: _cut(value, _PARAM_LENGTH) for key, value in params.items()}
        entities = [*points, *(Param(*item) for item in short.items())]
        entities += [RunTag(key, _cut(value, _TAG_LENGTH)) for key, value in tags.items()]
        if not entities:
            return
        self._log_entities(run_id, entities)
        for key, value in params.items():
            if short[key] != value:
                try:
                    self._client.log_text(run_id, value, f"params/{key}.txt")
                except Exception as error:
                    self._existing_run(run_id)  # raises when it is the server that is away
                    logger.warning(
                        "the whole value of parameter %s is not uploaded: %s", key, in_short(error)
                    )

    def _log_entities(self, run_id: str, entities: list[Any]) -> None:
        """Log a batch; when the server refuses it, log its parts, so that one bad value holds up nothing."""
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(
                run_id,
                metrics=[entity for entity in entities if isinstance(entity, Metric)],
                params=[entity for entity in entities if isinstance(entity, Param)],
                tags=[entity for entity in entities if isinstance(entity, RunTag)],
            )
            return
        except MlflowException as error:
            if error.error_code not in _REFUSALS and error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            refusal = in_short(error)
        run = self._existing_run(run_id)
        if len(entities) > 1:
            half = len(entities) // 2
            self._log_entities(run_id, entities[:half])
            self._log_entities(run_id, entities[half:])
            return
        entity = entities[0]
        if isinstance(entity, Param) and run.data.params.get(entity.key, entity.value) != entity.value:
            logger.warning(
                "parameter %s of run %s stays %r; %r goes to the tag param_changed.%s",
                entity.key,
                run_id,
                run.data.params[entity.key],
                entity.value,
                entity.key,
            )
            self._client.set_tag(run_id, f"param_changed.{entity.key}"[:_NAME_LENGTH], entity.value)
        else:
            logger.warning("MLflow refuses %s %r: %s", type(entity).__name__.lower(), entity.key, refusal)

    def _existing_run(self, run_id: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise _RunGone(f"run {run_id} does not exist at {self._uri}") from error
            raise
        if run.info.lifecycle_stage == "deleted":
            raise _RunGone(f"run {run_id} is deleted; `mlflow runs restore --run-id {run_id}` brings it back")
        return run

    def _upload(self, run_id: str, record: dict[str, Any]) -> None:
        """Upload a file or folder; while the server answers, a few failures are enough to go on without."""
        path = self._mirror.path.parent / record["path"]
        if not path.exists():
            logger.warning("artifact %s is not uploaded: it is not there any more", path)
            return
        try:
            if path.is_dir():
                self._client.log_artifacts(run_id, str(path), record["folder"] or None)
            else:
                self._client.log_artifact(run_id, str(path), record["folder"] or None)
        except Exception as error:
            self._existing_run(run_id)  # raises when it is the server that is away
            n, failures = self._failed_artifact
            failures = failures + 1 if n == record["n"] else 1
            self._failed_artifact = (record["n"], failures)
            if failures < self._artifact_attempts:
                raise
            logger.warning("artifact %s is not uploaded: %s", path, in_short(error))


def mlflow_ready(uri: str) -> bool:
    """Import what speaking to `uri` needs; False when mlflow is not installed.

    Done in the caller's thread before a sender starts, since imports from two threads can tangle.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        for module in ("mlflow", "mlflow.entities", "mlflow.tracking.fluent"):
            importlib.import_module(module)
        if uri.startswith(("http:", "https:")):
            importlib.import_module("mlflow.store.tracking.rest_store")
        else:
            importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
            for name in ("alembic", "mlflow.store.db.utils"):  # a hundred lines of schema migrations
                logging.getLogger(name).setLevel(logging.WARNING)
    except ImportError:
        return False
    return True


def open_client(uri: str) -> Any:
    """A client of the store at `uri`, which `mlflow_ready` has been asked about.

    MLflow makes a SQLite file's tables when it is first opened, and two processes that do so at once leave a
    file that nobody can open again: here the second waits for the first.
    """
    from filelock import FileLock
    from mlflow import MlflowClient

    path = uri.removeprefix("sqlite:///")
    if path == uri or path == ":memory:":
        return MlflowClient(uri)
    with FileLock(f"{path}.lock"):
        return MlflowClient(uri)


def find_experiment(client: Any, name: str, uri: str) -> str:
    """The id of an experiment; made when absent, also when another process makes it at the same moment."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=_artifact_location(name, uri))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found.lifecycle_stage == "deleted":
        raise _RunGone(
            f"experiment {name!r} is deleted; `mlflow experiments restore --experiment-id "
            f"{found.experiment_id}` brings it back"
        )
    return found.experiment_id


def _artifact_location(experiment: str, uri: str) -> str | None:
    """Beside a SQLite store (MLflow's own choice is the stage's current directory); else the server's."""
    path = uri.removeprefix("sqlite:///")
    if path == uri or path == ":memory:":
        return None
    return (Path(path).parent / "mlartifacts" / re.sub(r"[^\w.-]+", "_", experiment)).as_uri()


def source_tags() -> dict[str, str]:
    """The tags by which MLflow shows who ran what; its low-level client leaves them out."""
    tags = {"mlflow.source.name": Path(sys.argv[0]).name or "python", "mlflow.source.type": "LOCAL"}
    with suppress(Exception):  # a container's user id may have no name
        tags["mlflow.user"] = getpass.getuser()
    return tags


@contextmanager
def short_requests(retries: int = 0, timeout: int = 10) -> Iterator[None]:
    """Within it MLflow's requests end soon (its own default is about four minutes of retries).

    Args:
        retries: attempts after the first one.
        timeout: seconds per attempt.
    """
    _hold_short_requests(retries, timeout)
    try:
        yield
    finally:
        _release_short_requests()


def _hold_short_requests(retries: int = 0, timeout: int = 10) -> None:
    """By the environment, the one way MLflow has; the user's own values, and the first holder's, win."""
    global _short_users
    limits = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": retries, "MLFLOW_HTTP_REQUEST_TIMEOUT": timeout}
    with _short_lock:
        _short_users += 1
        for name, value in limits.items():
            if name not in os.environ:
                os.environ[name] = str(value)
                _short_set.append(name)


def _release_short_requests() -> None:
    global _short_users
    with _short_lock:
        _short_users -= 1
        if _short_users == 0:
            for name in _short_set:
                os.environ.pop(name, None)
            _short_set.clear()


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


def _lock(file: IO[bytes], patience: float = 2.0) -> bool:
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


def _unlock(file: IO[bytes]) -> None:
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


def _name(key: Any) -> str:
    return re.sub(r"[^\w\-. :/]", "_", str(key))[:_NAME_LENGTH]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _cut(text: str, length: int) -> str:
    note = " … [cut]"
    return text if len(text) <= length else text[: length - len(note)] + note


def in_short(error: BaseException) -> str:
    """An error's message on one line of at most 200 characters."""
    refusal = _refusal(error)
    if refusal:
        return f"it {refusal}"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " …"


def _refusal(error: BaseException) -> str | None:
    """What a server that answers does not accept of this client, and what to do; None for any other error."""
    code = getattr(error, "error_code", None)
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    if code == "PERMISSION_DENIED" and "Permission denied" in str(error):
        return (
            f"does not let user {user!r} write there: the experiment or model is another user's; name one of "
            "your own, or ask for the permission EDIT"
        )
    if code == "UNAUTHENTICATED":
        if os.environ.get("MLFLOW_TRACKING_TOKEN"):
            return "refuses the login: set MLFLOW_TRACKING_TOKEN to a token that it knows"
        who = f"the login of user {user!r}" if user else "a client without login"
        return f"refuses {who}: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to a login it knows"
    if "Invalid Host header" in str(error):
        return "does not answer to the name in its URL: it must stand in the server's --allowed-hosts"
    return None


def _now() -> int:
    return int(time.time() * 1000)
