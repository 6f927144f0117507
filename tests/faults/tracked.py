"""What an MLflow store in a file holds, read by SQL: MLflow's client hides that a point was logged twice."""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from pathlib import Path
from typing import NamedTuple

_OF_CLOCKS = re.compile(r"seconds|runtime|per_second|memory|sampling/t")


class Tracked(NamedTuple):
    """The runs of a store.

    Attributes:
        statuses: of the runs, by name; two of one name are a fault of their own (`doubled`).
        points: how often each (run, metric, step) was logged.
        values: the last value of each; those of clocks are left out.
    """

    statuses: dict[str, str]
    points: Counter[tuple[str, str, int]]
    values: dict[tuple[str, str, int], float]


def tracked_in(store: Path) -> Tracked:
    """Read a store; an absent one holds nothing.

    Raises:
        sqlite3.DatabaseError: it is broken.
    """
    if not store.exists():
        return Tracked({}, Counter(), {})
    connection = sqlite3.connect(store)
    try:
        (whole,) = connection.execute("PRAGMA integrity_check").fetchone()
        if whole != "ok":
            raise sqlite3.DatabaseError(whole)
        runs = connection.execute("SELECT name, status FROM runs WHERE lifecycle_stage = 'active'").fetchall()
        logged = connection.execute(
            "SELECT runs.name, metrics.key, step, value FROM metrics JOIN runs USING (run_uuid) "
            "WHERE lifecycle_stage = 'active'"
        ).fetchall()
    finally:
        connection.close()
    names = Counter(name for name, _ in runs)
    statuses = {name if names[name] == 1 else f"{name}, {names[name]} times": status for name, status in runs}
    points = Counter((run, key, step) for run, key, step, _ in logged)
    values = {(run, key, step): value for run, key, step, value in logged if not _OF_CLOCKS.search(key)}
    return Tracked(statuses, points, values)


def differences(found: Tracked, whole: Tracked) -> list[str]:
    """In what a store differs from that of the uninterrupted work.

    How long its phases took, a process says as its last word: one that was killed has not said it.
    """
    said = []
    if found.statuses != whole.statuses:
        said.append(f"runs are {found.statuses}, not {whole.statuses}")
    if doubled := [point for point, times in found.points.items() if times > whole.points.get(point, 1)]:
        said.append(f"{len(doubled)} points are doubled, such as {doubled[0]}")
    lost = whole.points.keys() - found.points.keys()
    if lost := {point for point in lost if not point[1].startswith("seconds/")}:
        said.append(f"{len(lost)} points are lost, such as {min(lost)}")
    if more := found.points.keys() - whole.points.keys():
        said.append(f"{len(more)} points are new, such as {min(more)}")
    unlike = [
        point
        for point in found.values.keys() & whole.values.keys()
        if found.values[point] != whole.values[point]
    ]
    if unlike:
        at = min(unlike)
        said.append(f"{len(unlike)} values differ: {at} is {found.values[at]}, not {whole.values[at]}")
    return said
