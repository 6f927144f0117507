"""Seconds by phase: every moment belongs to one phase, and the file says what the metrics say."""

import json
import time

import pytest
from softpref.timings import TIMINGS_FILE, PhaseTimer

pytestmark = pytest.mark.fast


def test_every_moment_belongs_to_one_phase(tmp_path, monkeypatch):
    clock = iter([0.0, 2.0, 5.0, 6.0, 10.0, 10.0, 10.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timer = PhaseTimer("loading")
    timer.enter("training")
    timer.enter("loading")
    timer.enter("saving")
    assert timer.seconds() == {"loading": 3.0, "training": 3.0, "saving": 4.0}
    assert timer.metrics() == {"seconds/loading": 3.0, "seconds/training": 3.0, "seconds/saving": 4.0}
    timer.write(tmp_path)
    written = json.loads((tmp_path / TIMINGS_FILE).read_text(encoding="utf-8"))
    assert written == {"loading": 3.0, "training": 3.0, "saving": pytest.approx(4.5)}
