"""The tracker of a stage, and what is sent after its end. Knows neither files nor MLflow's API."""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from softpref.errors import ConfigError
from softpref.tracking.delivery import TAG_LENGTH, Delivery, cut
from softpref.tracking.mirror import Mirror, Unreadable, as_text, milliseconds, usable_name
from softpref.tracking.mlflow_store import (
    RunGone,
    find_experiment,
    hold_short_requests,
    in_short,
    mlflow_ready,
    open_client,
    refusal_of,
    release_short_requests,
    short_requests,
    source_tags,
)

logger = logging.getLogger(__name__)

_BATCH_SECONDS, _LONGEST_PAUSE = 1.0, 60.0
# seconds that a run waits at its end: for a server that never answered, one that did (it restarts in two
# minutes), and at most
_EXIT_WAIT, _RESTART_WAIT, _LONGEST_EXIT_WAIT = 30.0, 180.0, 900.0


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
        self._mirror: Mirror | None = None
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
            self._mirror = Mirror.for_run(self.output_dir, header)
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
        hold_short_requests()
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
        self._write("params", values={usable_name(key): as_text(value) for key, value in values.items()})

    def metrics(self, values: Mapping[str, Any], step: int) -> None:
        """Record numbers at one step, now. NaN and infinities are kept; what is no number is left out."""
        if self._mirror is None:
            return
        numbers: dict[str, float] = {}
        for key, value in values.items():
            try:
                numbers[usable_name(key)] = float(value)
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
        self._write("tags", values={usable_name(key): as_text(value) for key, value in values.items()})

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
        release_short_requests()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.close("FINISHED")
        else:
            self.close("FAILED" if issubclass(kind, Exception) else "KILLED")

    def _write(self, kind: str, **content: Any) -> None:
        with self._changed:
            self._append({"kind": kind, "time": milliseconds(), **content})
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
        delivery = Delivery(mirror, self.tracking_uri, self._changed)
        failures = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._abandoned or mirror.waiting())
                if self._abandoned or not mirror.waiting():
                    break
            try:
                delivery.deliver_batch()
            except RunGone as error:
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
            mirror = Mirror.existing(path)
        except Unreadable as error:
            raise ConfigError(str(error)) from error
        if mirror is None:
            raise ConfigError(f"{path} is being written by a running stage, which delivers it by itself")
        try:
            uri = resolve_tracking_uri(tracking_uri) if tracking_uri else mirror.header["tracking_uri"]
            if not mlflow_ready(uri):
                raise ConfigError("mlflow is not installed here, so nothing can be sent")
            delivery = Delivery(mirror, uri, threading.Condition(), artifact_attempts=1)
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
            texts = {usable_name(key): cut(as_text(value), TAG_LENGTH) for key, value in (tags or {}).items()}
            if inherited:
                for key, text in texts.items():
                    client.set_tag(inherited, key, text)
                return inherited
            run = client.create_run(
                find_experiment(client, experiment, uri), run_name=name, tags={**source_tags(), **texts}
            )
            return run.info.run_id
    except Exception as error:
        refusal = refusal_of(error)
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
