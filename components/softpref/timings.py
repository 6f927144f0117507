"""Seconds of a stage by phase, kept beside what the stage wrote."""

from __future__ import annotations

import json
import time
from pathlib import Path

from softpref.records.files import TIMINGS_FILE


class PhaseTimer:
    """Wall-clock seconds of a stage by phase, one phase at a time.

    Stages share names, so that sums over stages mean something: `loading`, `tokenizing` (or `reading`, of the
    tokens that another stage has kept), `training` (with the sampling it needs), `evaluation`, `saving`.

    Args:
        phase: the first one, which begins now.
    """

    def __init__(self, phase: str) -> None:
        self._phase, self._since = phase, time.perf_counter()
        self._seconds: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """End the current phase and begin another, or continue an earlier one."""
        now = time.perf_counter()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def seconds(self) -> dict[str, float]:
        """Seconds by phase, up to now."""
        self.enter(self._phase)
        return dict(self._seconds)

    def metrics(self) -> dict[str, float]:
        """`{seconds/PHASE: seconds}` up to now, for tracking."""
        return {f"seconds/{phase}": seconds for phase, seconds in self.seconds().items()}

    def write(self, folder: str | Path) -> None:
        """Write `timings.json`: seconds by phase, up to now."""
        rounded = {phase: round(seconds, 3) for phase, seconds in self.seconds().items()}
        (Path(folder) / TIMINGS_FILE).write_text(json.dumps(rounded, indent=2) + "\n", encoding="utf-8")
