"""A step that is told to stop (SIGTERM) ends its MLflow runs as KILLED, within the second that it has.

Order matters here. The thread and its pipe must be there before the handler; the wakeup descriptor is written
by the signal itself, even while the main thread is in a long call of torch; a fork must not inherit either.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from softpref.tracking.mlflow_store import mlflow_ready, open_client, resolve_tracking_uri, short_requests
from softpref.tracking.pipeline_run import current_pipeline_run, experiment_of, find_or_open_root
from softpref.tracking.tracker import open_trackers

if TYPE_CHECKING:
    from mlflow import MlflowClient


def watch_termination(experiment: str, tracking_uri: str | None = None) -> None:
    """From now on SIGTERM marks the runs of this step and of its pipeline as KILLED.

    A deleted pod has only seconds, which a long training step may take up; so a thread of its own does it,
    woken by the signal itself. A retried step reopens both runs. Does nothing outside a pipeline, or in
    another thread than the main one.
    """
    run, uri = current_pipeline_run(), resolve_tracking_uri(tracking_uri)
    if run is None or threading.current_thread() is not threading.main_thread() or not mlflow_ready(uri):
        return
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    stopped, runs_ended = threading.Event(), threading.Event()

    def wait() -> None:
        def look_up() -> tuple[MlflowClient, str] | None:
            with suppress(Exception), short_requests(timeout=5):
                client = open_client(uri)
                # reopens the run, which an earlier attempt of this step had ended
                return client, find_or_open_root(client, experiment_of(client, experiment, uri), run)
            return None

        # now already: once told to stop, a container has less than a second
        known = None if uri.startswith("sqlite:") else look_up()
        while (number := os.read(woken, 1)) and number[0] != signal.SIGTERM:
            pass
        if known := known or look_up():
            client, root = known
            own = [tracker.run_id for tracker in list(open_trackers) if tracker.run_id and tracker.owned]
            with suppress(Exception), short_requests(timeout=2):
                for run_id in (root, *own):
                    client.set_terminated(run_id, "KILLED")
        runs_ended.set()

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cut off what the first began
        stopped.set()
        sys.exit(128 + signal.SIGTERM)

    atexit.register(lambda: stopped.is_set() and runs_ended.wait(10))
    threading.Thread(target=wait, name="softpref-termination", daemon=True).start()
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_watch_no_more)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, leave)


def _watch_no_more() -> None:
    """In a forked worker, signals act as usual again."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
