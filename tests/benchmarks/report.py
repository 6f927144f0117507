"""What benchmarks find: comparisons, sections, tables in Markdown, and the machine they were found on."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Comparison:
    """softpref beside a peer, or a way beside another: medians with least and greatest, and their ratio.

    `goal` is what the ratio should reach (`at_most`: stay under), None where none is set.
    """

    what: str
    ours: list[float]
    peer: list[float]
    unit: str
    peer_name: str
    goal: float | None = None
    at_most: bool = False

    @property
    def ratio(self) -> float:
        return statistics.median(self.ours) / statistics.median(self.peer)

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.ratio <= self.goal if self.at_most else self.ratio >= self.goal


@dataclass
class Section:
    """One benchmark's result: what was equal, comparisons, further tables in Markdown, images."""

    title: str
    setting: str
    comparisons: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def compare(
        self, what: str, ours: list[float], peer: list[float], unit: str, peer_name: str, **goal: Any
    ) -> None:
        self.comparisons.append(Comparison(what, ours, peer, unit, peer_name, **goal))
        progress(f"{what}: {spread(ours)} against {spread(peer)} {unit} of {peer_name}")

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", self.setting, ""]
        if self.comparisons:
            lines += [*comparison_table(self.comparisons), ""]
        for note in self.notes:
            lines += [note, ""]
        return "\n".join(lines)


def comparison_table(comparisons: Sequence[Comparison]) -> list[str]:
    rows = []
    for each in comparisons:
        goal = "" if each.goal is None else f"{'≤' if each.at_most else '≥'} {each.goal:g}"
        met = {None: "", True: "met", False: "not met"}[each.met]
        peer = f"{spread(each.peer)} ({each.peer_name})"
        rows.append([each.what, each.unit, spread(each.ours), peer, f"{each.ratio:.2f}", goal, met])
    return table(["what", "unit", "softpref", "peer", "ratio", "goal", ""], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown; all columns but the first are numbers."""
    rule = [":--", *["--:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def spread(values: Sequence[float]) -> str:
    """Median, with least and greatest where there are several values."""
    median = figure(statistics.median(values))
    return median if len(values) == 1 else f"{median} ({figure(min(values))} to {figure(max(values))})"


def figure(value: float) -> str:
    """Three significant digits; in full unless the number is very small."""
    if value and abs(value) < 1e-3:
        return f"{value:.2e}"
    before = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, 2 - before)}f}"


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_parts(
    parts: Mapping[str, Callable[[argparse.Namespace], Section]], options: argparse.Namespace
) -> None:
    """Measure the parts asked for and print them; write them for the table of all where that is asked for."""
    sections = []
    for name in options.parts or parts:
        section = parts[name](options)
        print(section.markdown(), flush=True)
        sections.append(section)
    if options.json:
        options.json.write_text(json.dumps([asdict(section) for section in sections]), encoding="utf-8")


def read_sections(file: Path) -> list[Section]:
    """What `run_parts` wrote."""
    sections = []
    for values in json.loads(file.read_text(encoding="utf-8")):
        values["comparisons"] = [Comparison(**each) for each in values["comparisons"]]
        sections.append(Section(**values))
    return sections


def environment(device: str, threads: int) -> list[tuple[str, str]]:
    """Date, hardware, versions, commit: what a figure is worth nothing without."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    versions = []
    for package in ("torch", "transformers", "accelerate", "trl"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    facts = [
        ("date", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())),
        ("processor", f"{cpu}, {os.cpu_count()} cores, {threads} torch threads"),
        ("versions", f"Python {platform.python_version()}, {', '.join(versions)}"),
        ("commit", _commit()),
        ("load average before", f"{os.getloadavg()[0]:.1f}"),
    ]
    if device == "cuda":
        import torch

        facts.insert(2, ("accelerator", torch.cuda.get_device_name()))
    return facts


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../../components")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")
