"""What a stage could not deliver is sent after its end, from the mirror that it left."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from softpref.disk import what_is_at
from softpref.errors import ConfigError
from softpref.remote import NotReached, public_url, within
from softpref.tracking.delivery import Delivery
from softpref.tracking.mirror import Mirror, Unreadable, milliseconds
from softpref.tracking.mlflow_store import (
    in_short,
    lasting_refusal,
    mlflow_ready,
    resolve_tracking_uri,
    short_requests,
)
from softpref.tracking.waiting import END, LONGEST, START, Answers, patience, with_store

logger = logging.getLogger(__name__)


class SyncResult(NamedTuple):
    """What `sync` delivered: the number of records, and the run they went to."""

    delivered: int
    run_id: str | None


def sync(output_dir: str | Path, tracking_uri: str | None = None, silence: float = LONGEST) -> SyncResult:
    """Deliver to MLflow what the stage that wrote `output_dir` could not, in order and nothing twice.

    Args:
        output_dir: Folder with `tracking.jsonl`, as a stage left it.
        tracking_uri: Another address of the same store; default: the one that the stage used.
        silence: Seconds without an answer after which it gives up; a single request has ten.

    Raises:
        ConfigError: there is no mirror, another process writes to it, mlflow is not installed, or the store
            or the run is not usable. What was delivered until then is remembered.
        NotReached: the store does not answer.
    """
    if not os.path.isdir(output_dir):
        raise ConfigError(f"{output_dir} {what_is_at(output_dir)}; give the output folder of a stage")
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
            raise ConfigError(f"{path} is being written by a running stage, which delivers it itself")
        uri = resolve_tracking_uri(tracking_uri) if tracking_uri else mirror.header["tracking_uri"]
        if not mirror.waiting():
            mirror.close()
        elif mlflow_ready(uri):
            delivered += _deliver_rest(mirror, uri, with_store(silence, uri))
        else:
            mirror.close()
            raise ConfigError("mlflow is not installed here, so nothing can be sent")
        run_id = mirror.run_id
        if mirror.owned and mirror.status is None:
            logger.warning("%s ends before its run does: the stage was cut off, or the file", path)
    return SyncResult(delivered, run_id)


def _deliver_rest(mirror: Mirror, uri: str, silence: float) -> int:
    """Deliver what waits in a mirror and close it; returns how many records. Call `mlflow_ready` first."""
    answers = Answers()

    def deliver() -> int:
        delivered = 0
        delivery = Delivery(mirror, uri, answers, threading.Condition(), artifact_attempts=1)
        try:
            with short_requests():
                while mirror.waiting():
                    delivered += delivery.deliver_batch()
        finally:  # here, because it goes on when nobody waits for it any longer
            mirror.close()
        return delivered

    try:
        return within(silence, deliver, answers.last)
    except Exception as error:  # of the network, the store or its driver
        kind = ConfigError if lasting_refusal(error, uri) else NotReached
        raise kind(
            f"MLflow at {public_url(uri)}: {in_short(error)}; {mirror.waiting_records()} records of "
            f"{mirror.path} wait"
        ) from error


def is_finished(output_dir: str | Path) -> bool:
    """Whether a folder's run was opened for it, and has ended as FINISHED."""
    path = Path(output_dir) / "tracking.jsonl"
    with suppress(OSError, Unreadable):
        if path.is_file() and (mirror := Mirror.existing(path)):
            mirror.close()
            return mirror.owned and mirror.status == "FINISHED"
    return False


def finish(output_dir: str | Path) -> None:
    """End the run of a stage that has finished, as FINISHED, where a kill left it open; deliver what is left.

    Never fails: what the server does not take is a warning.
    """
    path = Path(output_dir) / "tracking.jsonl"
    try:
        mirror = Mirror.existing(path) if path.is_file() else None
        if mirror is None:
            return
        if mirror.owned and mirror.status != "FINISHED":
            mirror.append({"kind": "end", "time": milliseconds(), "status": "FINISHED"})
        waits = mirror.waiting()
        mirror.close()
        if waits:
            sync(output_dir)
    except (ConfigError, OSError, Unreadable) as error:
        logger.warning("tracking: %s; `softpref track-sync %s` sends what is left", error, output_dir)


def deliver_missed(*folders: str | Path) -> None:
    """Deliver what earlier steps could not, from their output folders; never fails.

    A pod's records survive only in its outputs, so a later step sends them. It goes on without a store that
    does not answer, after as long as a stage waits at its start.
    """
    for folder in folders:
        if any(Path(folder).glob("tracking*.jsonl")):
            try:
                sync(folder, silence=patience(START))
            except NotReached as error:  # the others' server is the same
                logger.info("tracking of %s: %s", folder, error)
                return
            except (ConfigError, OSError) as error:  # another step delivers
                logger.info("tracking of %s: %s", folder, error)


def run_tracked_in(folder: str | Path) -> str | None:
    """Id of the MLflow run that tracked a stage's output folder; None if unknown."""
    path = Path(folder) / "tracking.jsonl"
    with suppress(OSError, Unreadable):
        if path.is_file() and (mirror := Mirror.existing(path)):
            mirror.close()
            return mirror.run_id
    return None


def sync_below(root: str | Path, tracking_uri: str | None = None) -> int:
    """`sync` of every stage below a folder, for the end of a pipeline; returns the number of records.

    A folder whose records still cannot be delivered is a warning. A store that does not answer is waited for
    as long as at the end of a stage, once.
    """
    delivered, silence = 0, patience(END)
    for folder in sorted({path.parent for path in Path(root).rglob("tracking*.jsonl")}):
        try:
            delivered += sync(folder, tracking_uri, silence).delivered
        except ConfigError as error:
            logger.warning("tracking: %s; `softpref track-sync %s` sends them", error, folder)
            if isinstance(error, NotReached):
                silence = 0.0
    return delivered
