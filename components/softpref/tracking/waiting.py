"""How long a stage waits for MLflow: while it answers, and only seconds where it does not."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, cast

from softpref.errors import ConfigError
from softpref.tracking.mlflow_store import sqlite_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

WAIT = "SOFTPREF_TRACKING_WAIT"
START, END = 5.0, 8.0  # seconds without an answer; after a stage's end a link is looked up for two more
LONGEST, LONGEST_KILLED = 900.0, 30.0  # seconds, however often the store answers
_FILE = 60.0
_DAY = 86_400.0


def patience(default: float) -> float:
    """Seconds without an answer after which a stage goes on: `SOFTPREF_TRACKING_WAIT`, else the default.

    Raises:
        ConfigError: the variable holds no number of seconds.
    """
    given = os.environ.get(WAIT, "").strip()
    try:
        seconds = float(given or default)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= _DAY:
        raise ConfigError(f"{WAIT} must be a number of seconds from 0 to {_DAY:.0f}, got {given!r}")
    return seconds


def with_store(seconds: float, uri: str) -> float:
    """The patience with the store at `uri`: at least a minute with a file, which others may be using."""
    return seconds if sqlite_file(uri) is None else max(seconds, _FILE)


def is_busy(error: BaseException) -> bool:
    """Whether others use a store in a file just now; no other trouble with one passes by itself."""
    return "database is locked" in str(error)


class Answers:
    """Notes when the store last answered, and last took something, for whoever waits for it."""

    def __init__(self) -> None:
        self._last = self._taken = time.monotonic()

    def last(self) -> float:
        """The moment of the last answer, or that of the making, by `time.monotonic`."""
        return self._last

    def taken(self) -> float:
        """The moment of the last answer to what changes the store, or that of the making."""
        return self._taken

    def of(self, client: MlflowClient) -> MlflowClient:
        """The client, each of whose answers is noted."""
        return cast("MlflowClient", _Noted(client, self))


class _Noted:
    def __init__(self, client: MlflowClient, answers: Answers) -> None:
        self._client, self._answers = client, answers

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            answer = call(*arguments, **options)
            self._answers._last = time.monotonic()
            if not name.startswith(("get_", "search_")):
                self._answers._taken = self._answers._last
            return answer

        return noted
