"""The tracker of a stage: what it records, and when that is sent. Files are the mirror's, requests the
delivery's."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, SupportsFloat

from softpref.remote import public_url
from softpref.tracking.delivery import Delivery
from softpref.tracking.mirror import Mirror, Record, as_text, milliseconds, usable_name
from softpref.tracking.mlflow_store import (
    RunGone,
    in_short,
    mlflow_ready,
    resolve_tracking_uri,
    short_requests,
)
from softpref.tracking.pipeline_run import current_pipeline_run
from softpref.tracking.waiting import (
    END,
    LONGEST,
    LONGEST_KILLED,
    WAIT,
    Answers,
    is_busy,
    patience,
    with_store,
)

if TYPE_CHECKING:
    from softpref.records.dataset import DatasetStats

logger = logging.getLogger(__name__)

_BATCH_SECONDS, _LONGEST_PAUSE = 1.0, 60.0


class Tracker:
    """Parameters, metrics, tags and files of one run, mirrored to disk and carried to MLflow.

    The run is the first of these that exists: outside a pipeline, that of the environment's `MLFLOW_RUN_ID`;
    that of `run_id`; the unfinished run that an earlier process tracked in the same folder; a new one. In a
    step of a pipeline a new run is a child of the pipeline's run (`softpref.tracking.pipeline_run`), and a
    retried step continues the run of its first attempt. Only a run opened here gets its status set.

    No method raises for trouble with the server or the disk: it is logged once, and training goes on.

    Args:
        output_dir: Folder of the stage's output; made when absent. Holds `tracking.jsonl`, `tracking.sent`.
        experiment: MLflow experiment; made when absent.
        run_name: Name of a run that is opened here.
        parent_run_id: Parent of a run that is opened here; in a step of a pipeline, the pipeline's run is.
        root: Track the pipeline's run itself; no effect outside a pipeline.
        anew: Open a new run also where the folder has an unfinished one, which is of something else.
        run_id: An existing run to continue; it is neither opened nor ended.
        tags: Tags of the run.
        tracking_uri: MLflow store. Default: `MLFLOW_TRACKING_URI`, else `sqlite:///mlflow.db` in the
            current directory.
        exit_wait: Seconds without an answer of MLflow that `flush` and `close` wait in all. Default: the
            environment's `SOFTPREF_TRACKING_WAIT`, else 8, and a minute for a SQLite file that others use.

    Raises:
        ConfigError: `SOFTPREF_TRACKING_WAIT` is no number of seconds.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        experiment: str,
        run_name: str,
        parent_run_id: str | None = None,
        run_id: str | None = None,
        tags: Mapping[str, object] | None = None,
        tracking_uri: str | None = None,
        exit_wait: float | None = None,
        root: bool = False,
        anew: bool = False,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.tracking_uri = resolve_tracking_uri(tracking_uri)
        pipeline_run = current_pipeline_run()
        # in a pipeline this variable names the run that KFP's plugin opened only for the step
        inherited = None if pipeline_run else os.environ.get("MLFLOW_RUN_ID")
        attached = inherited or run_id or None
        root = root and pipeline_run is not None
        self._least_patience = patience(END) if exit_wait is None else exit_wait
        self._patience = self._least_patience
        if exit_wait is None:
            self._patience = with_store(self._patience, self.tracking_uri)
        self._answers = Answers()
        self._changed = threading.Condition()
        self._waited_for = self._closing = self._abandoned = self._closed = self._sender_done = False
        self._trouble: str | None = None
        self._refused_since = 0.0  # the store answers, but takes nothing; by `time.monotonic`, 0 for never
        self._unusable: set[str] = set()
        self._sender: threading.Thread | None = None
        self._mirror: Mirror | None = None
        self._short_requests = ExitStack()
        header: Record = {
            "kind": "run",
            # in a pipeline the same for every attempt of the step
            "key": _hash(f"{pipeline_run.id}\n{run_name}") if pipeline_run else uuid.uuid4().hex,
            "run_id": attached,
            "owned": attached is None and not root,
            "experiment": experiment,
            "run_name": run_name,
            "parent_run_id": parent_run_id if attached is None else None,
            "pipeline_run": pipeline_run._asdict() if pipeline_run and attached is None else None,
            "root": root,
            "tracking_uri": self.tracking_uri,
        }
        try:
            self._mirror = Mirror.for_run(self.output_dir, header, anew=anew)
        except OSError as error:
            logger.warning("nothing of this run is tracked: %s cannot be written: %s", self.output_dir, error)
            return
        if tags:
            self.tags(tags)
        if not mlflow_ready(self.tracking_uri):
            logger.warning(
                f"mlflow is not installed here: metrics go to {self._mirror.path} only; where it is "
                f"installed, `softpref track-sync {self.output_dir}` sends them"
            )
            return
        self._short_requests.enter_context(short_requests())
        self._sender = threading.Thread(target=self._send, name="softpref-tracking", daemon=True)
        self._sender.start()
        open_trackers.add(self)

    @property
    def run_id(self) -> str | None:
        """The MLflow run; None until the server has answered (`flush` waits for it)."""
        return self._mirror.run_id if self._mirror is not None else None

    @property
    def owned(self) -> bool:
        """Whether the run was opened here, and is therefore ended here."""
        return self._mirror is not None and self._mirror.owned

    def params(self, values: Mapping[str, object]) -> None:
        """Record parameters. A value over MLflow's length limit is cut and kept whole as a text artifact.

        MLflow's parameters never change: a different value for a known name goes to the tag
        `param_changed.NAME`, with a warning.
        """
        self._write({"kind": "params", "values": _texts(values)})

    def metrics(self, values: Mapping[str, object], step: int) -> None:
        """Record numbers at one step, now. NaN and infinities are kept; anything else is left out.

        A number that this folder's run has already at that step is not recorded again.
        """
        if self._mirror is None:
            return
        numbers: dict[str, float] = {}
        for key, value in values.items():
            with suppress(TypeError, ValueError):
                if isinstance(value, (SupportsFloat, str)):
                    numbers[usable_name(key)] = float(value)
                    continue
            if key not in self._unusable:
                self._unusable.add(key)
                logger.warning("metric %s is not tracked: %r is no number", key, value)
        with self._changed:
            if new := self._mirror.unrecorded(numbers, int(step)):
                self._append({"kind": "metrics", "step": int(step), "time": milliseconds(), "values": new})
                self._changed.notify_all()

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Upload a file, or a folder's content, to `folder` of the run's artifacts, as it is when sent."""
        path = Path(path).absolute()
        with suppress(ValueError):  # relative, so that a moved output folder can still be synced
            path = path.relative_to(self.output_dir.absolute())
        self._write({"kind": "artifact", "path": str(path), "folder": folder})

    def dataset(self, stats: DatasetStats, context: str) -> None:
        """Log what the run used of a dataset: its source, hash and numbers of rows.

        Args:
            stats: of the data stage; without a hash nothing is logged.
            context: what it was used for, `training` or `evaluation`.
        """
        if digest := stats.get("dataset_hash"):
            source = stats.get("source") or "preferences"
            profile = {name: stats[name] for name in ("rows", "prompts", "kinds", "labels") if name in stats}
            dataset = {
                "name": Path(source).name or source,
                "digest": digest[:36],
                "source": json.dumps({"uri": source}),
                "profile": json.dumps(profile),
                "context": context,
            }
            self._write({"kind": "dataset", "dataset": dataset})

    def tags(self, values: Mapping[str, object]) -> None:
        """Set tags of the run; a later value replaces an earlier one."""
        self._write({"kind": "tags", "values": _texts(values)})

    def resume(self, step: int) -> None:
        """Say that a run goes on from `step`: what an earlier process has recorded from there on stays.

        A resumed training repeats steps. MLflow cannot forget, and would show each twice.
        """
        if self._mirror is not None:
            with self._changed:
                self._mirror.resume(int(step))

    def flush(self, timeout: float) -> bool:
        """Wait until everything is delivered, up to `timeout` seconds; returns whether it is.

        It waits no longer than `exit_wait` for a store that does not answer, and `close` waits as much less.
        """
        if self._mirror is None or self._sender is None:
            return False
        mirror = self._mirror
        return self._wait(lambda: not mirror.waiting(), timeout)

    def close(self, status: str = "FINISHED") -> None:
        """End a run that was opened here (`FINISHED`, `FAILED` or `KILLED`), and deliver what is left.

        Waits while MLflow answers, at most 15 minutes (half a minute when killed), and `exit_wait` seconds
        for an answer; a warning names what is still undelivered then.
        """
        if self._closed or self._mirror is None:
            return
        self._closed = True
        open_trackers.discard(self)
        if self._mirror.owned:
            self._write({"kind": "end", "status": status})
        sender = self._sender
        if sender is None:
            self._mirror.close()
            return
        self._closing = True
        self._wait(lambda: self._sender_done, LONGEST_KILLED if status == "KILLED" else LONGEST)
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()
            left = self._mirror.waiting_records()
        if left:
            logger.warning(
                f"{left} tracking records did not reach MLflow at {public_url(self.tracking_uri)} "
                f"({self._trouble or 'no answer yet'}); they are in {self._mirror.path}, "
                f"and `softpref track-sync {self.output_dir}` sends them ({WAIT}=SECONDS waits longer)"
            )
        if self._sender_done:  # else it closes the mirror itself, when its last request has returned
            self._mirror.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.close("FINISHED")
        else:
            self.close("FAILED" if issubclass(kind, Exception) else "KILLED")

    def _wait(self, done: Callable[[], bool], longest: float) -> bool:
        """Wait until it is done, at most `longest` seconds; the store's silence uses up the patience."""
        begun = time.monotonic()
        with self._changed:
            self._waited_for = True
            self._changed.notify_all()
            while not done():
                # a store that is read, and takes nothing, is of no more use than a silent one
                refused = self._refused_since > self._answers.taken()
                silent_since = max(begun, self._refused_since if refused else self._answers.last())
                left = min(silent_since + self._patience, begun + longest) - time.monotonic()
                if left <= 0:
                    self._patience = max(0.0, self._patience - (time.monotonic() - silent_since))
                    break
                self._changed.wait(left)
            self._waited_for = False
            return done()

    def _write(self, record: Record) -> None:
        with self._changed:
            self._append({"kind": record["kind"], "time": milliseconds(), **record})
            self._changed.notify_all()

    def _append(self, record: Record) -> None:
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
        delivery = Delivery(mirror, self.tracking_uri, self._answers, self._changed)
        failures = refusals = 0  # batches in a row: all, and those of which nothing was taken
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._abandoned or mirror.waiting())
                if self._abandoned or not mirror.waiting():
                    break
            begun = time.monotonic()
            try:
                delivery.deliver_batch()
            except RunGone as error:
                self._trouble = str(error)
                logger.warning("MLflow tracking stops: %s; records stay in %s", error, mirror.path)
                break
            except Exception as error:  # of the network, the store or its driver
                failures += 1
                self._trouble = in_short(error)
                if self._answers.taken() > begun:
                    refusals, self._refused_since = 0, 0.0
                elif self._answers.last() > begun:
                    refusals += 1
                    if refusals == 2:  # one may be a late answer
                        self._refused_since = time.monotonic()
                if not is_busy(error):
                    with self._changed:
                        self._patience = min(self._patience, self._least_patience)
                        self._changed.notify_all()
                if failures == 1:
                    logger.warning(
                        f"MLflow at {public_url(self.tracking_uri)} cannot be reached ({self._trouble}); "
                        f"going on, records wait in {mirror.path}"
                    )
                with self._changed:
                    if self._is_hurried():
                        self._changed.wait_for(lambda: self._abandoned, _BATCH_SECONDS)
                    else:
                        self._changed.wait_for(self._is_hurried, min(2.0**failures, _LONGEST_PAUSE))
            else:
                if failures:
                    logger.warning("MLflow at %s answers again", public_url(self.tracking_uri))
                    failures, self._trouble = 0, None
                refusals, self._refused_since = 0, 0.0
                with self._changed:  # gather the next batch
                    self._changed.wait_for(self._is_hurried, _BATCH_SECONDS)
        self._short_requests.close()
        with self._changed:
            self._sender_done = True
            if self._abandoned:
                mirror.close()
            self._changed.notify_all()

    def _is_hurried(self) -> bool:
        return self._waited_for or self._closing or self._abandoned


open_trackers: weakref.WeakSet[Tracker] = weakref.WeakSet()
"""Of this process; `softpref.tracking.termination` ends their runs."""


def _texts(values: Mapping[str, object]) -> dict[str, str]:
    return {usable_name(key): as_text(value) for key, value in values.items()}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
