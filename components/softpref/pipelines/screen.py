"""The output of a run on this machine: everything in a log file, the main events on the screen."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from softpref.artifacts import OUTCOME_MARK
from softpref.remote import masked

_REFUSAL = re.compile(r"softpref\.errors\.\w+Error: ")
_COLOUR = re.compile(r"\x1b\[\d+m")
# what softpref.progress writes: "spo-alpha-0.5: step 120 of 400, loss 0.41, 2 min 10 s left"
_PROGRESS = re.compile(r": \w+ \d+( of \d+)?, (.* )?(left|so far|took [\w ]+)$")
_OUTCOME = re.compile(rf"^\s*{re.escape(OUTCOME_MARK)}(.*)")
_BAR = re.compile(r"\d+%\|.*?\| *\S+/\S+ \[[^\]]*\]")  # of other programs


def plain_lines(text: str) -> list[str]:
    """The lines that a step printed, without colours, progress and empty lines."""
    lines = map(str.rstrip, _COLOUR.sub("", text).replace("\r", "\n").split("\n"))
    return [line for line in lines if line and not _PROGRESS.search(line) and not _BAR.search(line)]


def outcome(lines: Iterable[str]) -> list[str]:
    """The lines in which a step tells its outcome, for the end of the run."""
    return [match[1] for line in lines if (match := _OUTCOME.match(line))]


def refusal(lines: Sequence[str]) -> str:
    """The last error in which a stage refuses something; empty if there is none."""
    said = [line.partition("Error: ")[2] for line in lines if _REFUSAL.search(line)]
    return said[-1] if said else ""


class Screen:
    """The standard output of a local run: all goes to a log file, the main events also to the screen."""

    _EVENT = re.compile(r"^([\d:]+)\.\d+ - INFO - (Executing task|Task|Pipeline) '(.*?)'(.*)")
    _TROUBLE = re.compile(r"Traceback|Error\b|ERROR|WARNING|warning: ")
    _SECONDS_BETWEEN_PROGRESS = 10.0

    def __init__(self, screen: TextIO, log: TextIO) -> None:
        self._screen = screen
        self._log: TextIO | None = log
        self._rest, self._last_progress = "", 0.0
        self._recent: list[str] = []

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).replace("\r", "\n").split("\n")
        for line in map(masked, lines):  # KFP prints every parameter, and some are addresses with a password
            self._keep(line)
            if line.strip():
                line = _COLOUR.sub("", line)
                self._recent = [*self._recent[-200:], line]
                self._show(line.strip())
        return len(text)

    def _keep(self, line: str) -> None:
        """Write to the log. On a full disk the run goes on without it: the step that needs space says so."""
        if self._log:
            try:
                self._log.write(line + "\n")
            except OSError as error:
                self._log = None
                self._screen.write(f"warning: pipeline.log ends here: {error.strerror}\n")

    def flush(self) -> None:
        self._screen.flush()

    def isatty(self) -> bool:
        return False

    def last_lines(self, count: int) -> str:
        """The last lines printed, without progress."""
        return "\n".join(plain_lines("\n".join(self._recent))[-count:])

    def reason(self) -> str:
        """The last `refusal`, after a colon; empty if there is none."""
        said = refusal(self._recent)
        return f": {said}" if said else ""

    def _show(self, line: str) -> None:
        progress, event = _PROGRESS.search(line), self._EVENT.search(line)
        if progress:
            if time.monotonic() - self._last_progress < self._SECONDS_BETWEEN_PROGRESS:
                return
            self._last_progress = time.monotonic()
            line = f"          {line}"
        elif event:
            clock, what, name, rest = event.groups()
            if what == "Executing task":
                rest = " started"
            elif not any(word in rest for word in ("finished", "used again")):
                return
            line = f"{clock}  {name}{rest.replace('finished with status ', '').lower()}"
        elif _OUTCOME.match(line) or not self._TROUBLE.search(line):
            return
        self._screen.write(line + "\n")
        self._screen.flush()


@contextlib.contextmanager
def log_and_screen(log_file: Path) -> Iterator[Screen]:
    """Within it, standard output is a `Screen`. An earlier log is continued."""
    # nothing is held back: neither for a reader nor, on a full disk, to fail once more when it is closed
    with io.TextIOWrapper(io.FileIO(log_file, "a"), encoding="utf-8", write_through=True) as log:
        screen = Screen(sys.stdout, log)
        with contextlib.redirect_stdout(screen):
            yield screen
