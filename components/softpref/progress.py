"""Progress of long loops: a bar on a terminal, elsewhere a plain line now and then.

In a log, a pod's or a file's, every state of a bar would stay: thousands of characters for one number.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tqdm.auto import tqdm

Row = TypeVar("Row")

_SECONDS, _SHARE = 10.0, 0.05  # least time, and share of the loop, between two lines
_OFF = {  # some libraries read these when they are imported
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_SWITCHES = {
    "huggingface_hub.utils": "disable_progress_bars",
    "datasets": "disable_progress_bars",
    "transformers.utils.logging": "disable_progress_bar",
}


class Lines:
    """Lines on standard error: "policy samples: sample 640 of 3200, 40 s left".

    At most one per ten seconds and per twentieth of the loop, and one at the end of a loop of ten seconds.

    Args:
        title: of the loop.
        total: number of units; None if unknown.
        unit: name of one unit.
        done: units that were done before.
    """

    def __init__(self, title: str, total: int | None = None, unit: str = "row", done: int = 0) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.count = self._first = self._reported = done
        self.note = ""
        """An addition to the lines, such as "loss 0.41"."""
        self._began = self._spoke = time.monotonic()

    def update(self, count: int = 1) -> None:
        """Count what has been done since the last call."""
        self.count += count
        now = time.monotonic()
        step = _SHARE * (self.total or self.count)
        if now - self._spoke < _SECONDS or self.count - self._reported < step or self.count == self.total:
            return
        self._spoke, self._reported = now, self.count
        passed = now - self._began
        if self.total is None:
            self._say(f"{in_words(passed)} so far")
        else:
            left = passed / (self.count - self._first) * (self.total - self.count)
            self._say(f"{in_words(max(0.0, left))} left")

    def close(self) -> None:
        """Print how long a long loop took."""
        passed = time.monotonic() - self._began
        if passed >= _SECONDS:
            self._say(f"took {in_words(passed)}")

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        if kind is None:
            self.close()

    def _say(self, when: str) -> None:
        of = "" if self.total is None else f" of {self.total}"
        parts = [f"{self.title}: {self.unit} {self.count}{of}", self.note, when]
        print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)


def progress(
    title: str, *, total: int | None = None, unit: str = "row", disable: bool = False
) -> tqdm[None] | Lines:
    """A loop's progress, a context with `update(count)`: a bar that shows after a second, or `Lines`.

    Args:
        title, total, unit: see `Lines`.
        disable: show nothing.
    """
    if disable or on_terminal():
        from tqdm.auto import tqdm

        return tqdm(total=total, desc=title, unit=f" {unit}s", delay=1, disable=disable)
    return Lines(title, total, unit)


def follow(rows: Iterable[Row], title: str, *, disable: bool = False) -> Iterator[Row]:
    """The rows, with `progress` as they are consumed."""
    total = len(rows) if isinstance(rows, Sized) else None
    with progress(title, total=total, disable=disable) as loop:
        for row in rows:
            yield row
            loop.update(1)


def on_terminal() -> bool:
    """Whether standard error is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def settle_output() -> None:
    """For the start of a stage: no bars of libraries without a terminal, and each warning only once."""
    # both print by handlers of their own, and again by the root logger's if KFP or the user has set one up
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).propagate = False
    if on_terminal():
        return
    for variable, value in _OFF.items():
        os.environ.setdefault(variable, value)
    for module, switch in _SWITCHES.items():
        if module in sys.modules:
            getattr(sys.modules[module], switch)()


def in_words(seconds: float) -> str:
    """A duration in words: "40 s", "2 min 10 s", "3 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
