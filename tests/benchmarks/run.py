"""Every benchmark after another, and RESULTS.md beside this file: what `make bench` runs.

    python tests/benchmarks/run.py                      # quick: the whole within 25 minutes on two idle cores
    python tests/benchmarks/run.py --rounds 5 --output results.md
    python tests/benchmarks/run.py --only training:pairs memory
    python tests/benchmarks/run.py --model SmolLM2-135M-Instruct.Q4_1.gguf --output RESULTS-smollm2.md
    python tests/benchmarks/run.py --device cuda --size 1b --output h200-1b.md

A real model's table takes an hour, for SmolLM2-135M.

Each part runs in a process of its own, so that none inherits another's memory, and a part that fails is
listed with its last line while the rest goes on. TRL, the peer, comes with the extra `bench`; without it
softpref is measured alone. Nothing else should run on the machine meanwhile: the load before each part is
written down.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import report
from harness import HERE, SIZES
from report import Comparison, Section

# script and part, with the options that keep the whole within its time
PLAN = {
    "training:pairs": ["--steps", "3"],
    "training:kl": ["--steps", "4", "--rounds", "2"],
    "training:online": ["--steps", "4", "--rounds", "2"],
    "memory": ["--steps", "1"],
    "training:shared": ["--steps", "2"],
    "sampling:generate": [],
    "sampling:ways": ["--rounds", "2"],
    "products:products": ["--steps", "4"],
    "products:profile": ["--steps", "2"],
    "precision": [],
}
# a real model's steps take seconds each, and its vocabulary is its own
PLAN_OF_REAL_MODELS = {
    "training:pairs": ["--steps", "1", "--rounds", "2"],
    "training:kl": ["--steps", "2", "--rounds", "1"],
    "training:online": ["--steps", "2", "--rounds", "1"],
    "memory": ["--steps", "1"],
    "sampling:generate": ["--rounds", "1"],
    "products:products": ["--steps", "1", "--rounds", "2"],
}
# neither two trainers nor a trainer with its reference beside another fit on one device
PLAN_OF_8B = {"training:pairs": ["--apart"], "memory": ["--steps", "1"], "sampling:generate": []}


def measure(name: str, extra: list[str], words: list[str], folder: Path) -> list[Section]:
    """One part in its own process; its sections, or one that says how it failed."""
    script, _, part = name.partition(":")
    result = folder / f"{script}-{part}.json"
    command = [sys.executable, str(HERE / f"bench_{script}.py"), *extra, *words, "--json", str(result)]
    command += ["--parts", part] if part else []
    load, started = os.getloadavg()[0], time.monotonic()
    report.progress(f"== {name}, load {load:.1f}")
    last = "no message"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            last = line.strip() or last
    took = time.monotonic() - started
    if process.returncode:
        return [Section(name, f"Failed with exit status {process.returncode} after {took:.0f} s: {last}")]
    sections = report.read_sections(result)
    sections[-1].notes.append(f"Took {took:.0f} s; load average before it: {load:.1f}.")
    return sections


def document(sections: list[Section], facts: list[tuple[str, str]], chart: str = "") -> str:
    """The whole table: where and when, everything with a goal, then each section."""
    lines = ["# Benchmarks", ""]
    lines += [*report.table(["", ""], [list(fact) for fact in facts]), ""]
    lines += [
        "softpref beside its peers: in one process, in turn, after a warm-up; medians, and in brackets the "
        "least and the greatest; the ratio is that of the medians. `python tests/benchmarks/run.py` makes "
        "this file.",
        "",
    ]
    if goals := with_goals(sections):
        lines += ["## Goals", "", *report.comparison_table(goals), ""]
        lines += [f"![Ratios and goals]({chart})", ""] if chart else []
    return "\n".join(lines) + "\n" + "\n".join(section.markdown() for section in sections)


def with_goals(sections: list[Section]) -> list[Comparison]:
    """The comparisons that a goal is set for, named with their section."""
    return [
        dataclasses.replace(each, what=f"{section.title}: {each.what}")
        for section in sections
        for each in section.comparisons
        if each.goal is not None
    ]


def draw(goals: list[Comparison], file: Path) -> None:
    """How far each comparison is from its goal: 1 is the goal, more is better."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    reached = [each.goal / each.ratio if each.at_most else each.ratio / each.goal for each in goals]  # type: ignore[operator]
    figure, axes = plt.subplots(figsize=(9, 0.6 + 0.38 * len(goals)), layout="constrained")
    bars = axes.barh(range(len(goals)), reached, color=["C2" if value >= 1 else "C1" for value in reached])
    said = [f"{each.ratio:.2f} ({'≤' if each.at_most else '≥'} {each.goal:g})" for each in goals]
    axes.bar_label(bars, said, padding=3, fontsize=7)
    axes.set_yticks(range(len(goals)), [each.what for each in goals], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="grey", lw=1)
    axes.margins(x=0.25)
    axes.set_xlabel("ratio against goal; 1 is the goal")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PLAN), help="these parts alone")
    parser.add_argument(
        "--output",
        type=Path,
        help="file to write; RESULTS.md of a whole run on a CPU, a file named after device, size and model "
        "of others, and none of parts alone",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="in place of each part's own number")
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--model", default="", help="a real model instead of random weights")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all lengths")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    # hours of parts would each fail on these
    if options.output is not None and not options.output.parent.is_dir():
        parser.error(f"--output: there is no folder {options.output.parent}")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no such device here")
    if options.model:
        from softpref.errors import SoftprefError
        from softpref.lm.loading import load_tokenizer

        try:
            load_tokenizer(options.model)
        except SoftprefError as error:
            parser.error(f"--model: {error}")
    facts = report.environment(options.device, options.threads)
    words = ["--device", options.device, "--threads", str(options.threads), "--size", options.size]
    words += ["--scale", str(options.scale)]
    plan = PLAN_OF_REAL_MODELS if options.model else PLAN_OF_8B if options.size == "8b" else PLAN
    if options.model:
        words += ["--model", options.model]
    if options.rounds:
        words += ["--rounds", str(options.rounds)]
    output = options.output
    if output is None and not options.only:
        default = (options.device, options.size, options.model) == ("cpu", "small", "")
        what = Path(options.model).stem or f"{options.device}-{options.size}"
        output = HERE / ("RESULTS.md" if default else f"RESULTS-{what}.md")
    sections, text = [], ""
    with tempfile.TemporaryDirectory() as folder:
        for name in [name for name in plan if not options.only or name in options.only]:
            sections += measure(name, plan[name], words, Path(folder))
            chart, goals = "", with_goals(sections)
            if output is not None and goals:
                chart = f"{output.stem.lower()}.png"
                draw(goals, output.with_name(chart))
            text = document(sections, facts, chart)
            if output is not None:
                output.write_text(text, encoding="utf-8")  # what there is so far
    print(text)
    if failed := [section.title for section in sections if section.title in plan]:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
