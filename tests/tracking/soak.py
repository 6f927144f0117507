"""Many runs that log to one server at once, each in a process of its own as stages are; no test in it.

`soak(uri, folder)` logs and returns what was measured. `differences(soaked, query)` then compares what the
server's database holds with what was logged. It reads rows by SQL, for MLflow's client hides that a point was
logged twice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from softpref.tracking import run_tracked_in
from softpref.tracking.waiting import WAIT

METRICS, PARAMS = ("loss", "kl/sequence", "rewards/accuracies"), 30
_PACE = 0.02  # seconds between steps; a step that is trained takes longer

_ONE_RUN = """
import json, os, sys, time
from pathlib import Path
import mlflow.artifacts
from softpref.tracking import Tracker, mlflow_ready

uri, folder, runs, steps, pace, metrics, params = json.loads(sys.argv[1])
mlflow_ready(uri)

def log(number):
    output, slowest = Path(folder, str(number)), 0.0
    output.mkdir()
    (output / "note.txt").write_text(f"of run {number}")
    with Tracker(output, experiment="soak", run_name=f"run-{number}", tracking_uri=uri) as tracked:
        calls = [lambda: tracked.params({f"parameter_{one}": number + one for one in range(params)})]
        calls += [
            lambda step=step: tracked.metrics({name: number + step / 1000 for name in metrics}, step)
            for step in range(steps)
        ]
        calls += [lambda: tracked.artifact(output / "note.txt", "notes")]
        for call in calls:
            begun = time.monotonic()
            call()
            slowest = max(slowest, time.monotonic() - begun)
            time.sleep(pace)
        logged = time.monotonic()
    (output / "measured.json").write_text(json.dumps([slowest, time.monotonic() - logged]))

begun = time.monotonic()
forks = []
for number in range(runs):
    forks.append(os.fork())
    if not forks[-1]:
        status = 1
        try:
            log(number)
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
failed = sum(os.waitpid(fork, 0)[1] != 0 for fork in forks)
print(time.monotonic() - begun)
sys.exit(failed > 0)
"""


class Soak(NamedTuple):
    """What many runs logged at once.

    Attributes:
        folder: holds an output folder for each run, by its number.
        runs, steps: how many runs, and of each one how many steps of the `METRICS`.
        seconds: from the first run's start to the last one's end.
        slowest_call: seconds that the slowest call of a tracker held its stage up.
        slowest_end: seconds that a stage waited at its end for what was left.
        warnings: what the runs said.
    """

    folder: Path
    runs: int
    steps: int
    seconds: float
    slowest_call: float
    slowest_end: float
    warnings: list[str]

    def __str__(self) -> str:
        points = self.runs * self.steps * len(METRICS)
        return (
            f"{self.runs} runs, {points} points: {self.seconds:.1f} s, {points / self.seconds:.0f} points/s; "
            f"slowest call {1000 * self.slowest_call:.0f} ms, slowest end {self.slowest_end:.1f} s; "
            f"{len(self.warnings)} warnings"
        )


def soak(uri: str, folder: Path, runs: int = 50, steps: int = 200) -> Soak:
    """Log that many runs to the server at `uri`, all at once; returns what was measured.

    Args:
        uri: of a server whose experiment `soak` is new.
        folder: an empty folder for the runs' outputs.
        runs: how many processes.
        steps: of each; a step logs the `METRICS`.

    Raises:
        AssertionError: a run failed.
    """
    given = json.dumps([uri, str(folder), runs, steps, _PACE, METRICS, PARAMS])
    done = subprocess.run(
        [sys.executable, "-c", _ONE_RUN, given],
        capture_output=True,
        text=True,
        timeout=1200,
        cwd=folder,
        env={**os.environ, WAIT: "120"},  # a few cores serve all: a run may get no answer for ten seconds
    )
    assert done.returncode == 0, done.stderr[-5000:]
    measured = [json.loads((folder / f"{number}/measured.json").read_text()) for number in range(runs)]
    calls, ends = zip(*measured, strict=True)
    seconds = float(done.stdout.splitlines()[-1])
    return Soak(folder, runs, steps, seconds, max(calls), max(ends), done.stderr.splitlines())


def differences(soaked: Soak, query: Callable[[str], Sequence[Sequence[Any]]]) -> list[str]:
    """In what a database differs from what was logged: points lost or doubled, other values, runs not ended.

    Args:
        soaked: what was logged.
        query: gives the rows of a SELECT in the server's database.
    """

    def stored(what: str, table: str, only: str = "") -> Counter[tuple[Any, ...]]:
        joined = f"{table} JOIN experiments USING (experiment_id)"
        return Counter(
            map(tuple, query(f"SELECT {what} FROM {joined} WHERE experiments.name = 'soak'{only}"))
        )

    numbers = {run_tracked_in(soaked.folder / str(number)): number for number in range(soaked.runs)}
    logged = Counter(
        (run, name, step, number + step / 1000)
        for run, number in numbers.items()
        for name in METRICS
        for step in range(soaked.steps)
    )
    params = Counter(
        (run, f"parameter_{one}", str(number + one))
        for run, number in numbers.items()
        for one in range(PARAMS)
    )
    points = stored("run_uuid, metrics.key, step, value", "metrics JOIN runs USING (run_uuid)")
    said = []
    if lost := logged - points:
        said.append(f"{lost.total()} points are lost, such as {min(lost, key=str)}")
    if more := points - logged:
        said.append(f"{more.total()} points are doubled or of another value, such as {min(more)}")
    found = stored("run_uuid, params.key, value", "params JOIN runs USING (run_uuid)")
    if found != params:
        said.append(f"parameters differ: {found.total()} of {params.total()} are stored")
    # a run that was opened twice is deleted; what was logged to it would be doubled above
    runs = stored("run_uuid, runs.name, status", "runs", " AND runs.lifecycle_stage = 'active'")
    if runs != Counter((run, f"run-{number}", "FINISHED") for run, number in numbers.items()):
        said.append(f"runs are {sorted(runs)}")
    return said
