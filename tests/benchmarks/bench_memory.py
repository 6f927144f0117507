"""Peak memory of a training step: softpref's beside TRL's DPOTrainer, and along the vocabulary.

    python tests/benchmarks/bench_memory.py
    python tests/benchmarks/bench_memory.py --device cuda --size 8b

Each figure comes from a process of its own, which makes the model, trains for a few steps and reports the
greatest resident set that it ever had, the libraries included; on a GPU, what the allocator gave out at once.
The fit sets the peaks against 16 bytes a parameter (fp32 weights, gradients and AdamW's two moments).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import harness
import report
from report import Section

PLOT = Path(__file__).with_name("memory.png")
CHECKPOINTING = ("softpref, gradient checkpointing", "DPOTrainer, gradient checkpointing")
SIDES = {  # name, whether it needs TRL
    "softpref": False,
    "softpref, KL term": False,
    CHECKPOINTING[0]: False,
    "DPOTrainer": True,
    "DPOTrainer, reference precomputed": True,
    CHECKPOINTING[1]: True,
}
GIB = 2**30


def measure_one(options: argparse.Namespace) -> None:
    """Train one side in this process and print its peak as JSON."""
    import torch

    harness.set_up(options)
    [vocabulary] = harness.vocabularies(options, (32000,))
    rows = harness.make_rows(options, vocabulary, options.batch * options.steps)
    if options.side.startswith("softpref"):
        from softpref.spo import SPOTrainer  # noqa: F401  the libraries belong to what is there before
    else:
        from trl import DPOTrainer  # noqa: F401
    before = harness.peak_memory("cpu")
    if options.side in ("softpref", CHECKPOINTING[0]):
        checkpointing = options.side != "softpref"
        timed = harness.spo_trainer(options, rows, vocabulary, gradient_checkpointing=checkpointing)
    elif options.side == "softpref, KL term":
        timed = harness.spo_trainer(
            options,
            rows,
            vocabulary,
            beta=0.05,
            sampling_interval=options.steps,
            samples_per_refresh=options.steps * (options.batch // 2),
            max_completion_length=round(128 * options.scale),
        )
    else:
        extra = {
            "DPOTrainer": {},
            "DPOTrainer, reference precomputed": {"precompute_ref_log_probs": True},
            CHECKPOINTING[1]: {"gradient_checkpointing": True},
        }[options.side]
        timed = harness.dpo_trainer(options, rows, vocabulary, **extra)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timed.seconds()
    parameters = sum(p.numel() for p in timed.trainer.model.parameters())
    peak = harness.peak_memory(options.device)
    print(json.dumps({"peak": peak, "libraries": before, "parameters": parameters, "vocabulary": vocabulary}))


def measure_memory(options: argparse.Namespace) -> Section:
    section = Section(
        "Peak memory of training",
        f"{harness.describe(options).partition(';')[0]}. {options.batch} pairs a step as above, "
        f"{options.steps + 1} steps, each side in a process of its own: the greatest resident set, "
        "libraries included (on a GPU the allocator's peak). softpref's KL term adds the reference and "
        "samples; DPOTrainer has its reference in memory unless it is precomputed.",
    )
    usual = (4096, 32000, 128000)
    chosen = harness.vocabularies(options, usual)
    sides = [name for name, needs_trl in SIDES.items() if harness.has_trl() or not needs_trl]
    peaks: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in sides}
    for vocabulary in chosen:
        for name in sides:
            if vocabulary > 32000 and len(chosen) > 1 and name not in ("softpref", "DPOTrainer"):
                continue  # the variants say nothing new there, and the whole has its time
            peaks[name][vocabulary] = one = _in_own_process(options, name, vocabulary)
            report.progress(f"  vocabulary {vocabulary:,}, {name}: {one['peak'] / GIB:.2f} GiB")
    for vocabulary in chosen:
        ours = [peaks["softpref"][vocabulary]["peak"] / GIB]
        for name in sides:
            if name.startswith("DPO") and vocabulary in peaks[name]:
                agreed = name == "DPOTrainer" and options.batch == 8
                goal = 0.33 if agreed and harness.goals_of(options, vocabulary) == 32000 else None
                theirs = [peaks[name][vocabulary]["peak"] / GIB]
                section.compare(
                    f"vocabulary {vocabulary:,}", ours, theirs, "GiB", name, goal=goal, at_most=True
                )
        if CHECKPOINTING[1] in sides and vocabulary in peaks[CHECKPOINTING[1]]:
            ours, theirs = ([peaks[side][vocabulary]["peak"] / GIB] for side in CHECKPOINTING)
            what = f"vocabulary {vocabulary:,}, {CHECKPOINTING[0]}"
            section.compare(what, ours, theirs, "GiB", CHECKPOINTING[1])
    state_bytes = 16 if harness.precision(options) == "fp32" else 8
    rows = []
    for name, found in peaks.items():
        for vocabulary, one in found.items():
            state = state_bytes * one["parameters"]
            libraries = one["libraries"] if options.device == "cpu" else 0
            values = (one["peak"], libraries, state, one["peak"] - libraries - state)
            rows.append([name, f"{vocabulary:,}", f"{one['parameters'] / 1e6:.1f}", *map(_gib, values)])
    head = [
        "side",
        "vocabulary",
        "million parameters",
        "peak, GiB",
        "libraries",
        f"{state_bytes} bytes a parameter",
        "rest",
    ]
    section.notes.append("\n".join(report.table(head, rows)))
    if len(chosen) > 2 and options.device == "cpu" and state_bytes == 16:
        section.notes += _fit_and_plot(peaks)
    return section


def _in_own_process(options: argparse.Namespace, side: str, vocabulary: int) -> dict[str, Any]:
    words = ["--side", side, "--device", options.device, "--threads", str(options.threads)]
    words += ["--size", options.size, "--model", options.model, "--steps", str(options.steps)]
    words += ["--precision", harness.precision(options)]
    words += ["--batch", str(options.batch), "--scale", str(options.scale), "--vocabularies", str(vocabulary)]
    return harness.in_own_process("bench_memory.py", *words)


def _gib(value: float) -> str:
    return f"{value / GIB:.2f}"


def _fit_and_plot(peaks: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """Peaks against 16 bytes a parameter: a line through softpref's, and all of them in a figure."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = {
        name: sorted((16 * one["parameters"] / GIB, one["peak"] / GIB) for one in found.values())
        for name, found in peaks.items()
    }
    states, sizes = np.array(points["softpref"]).T
    slope, constant = np.polyfit(states, sizes, 1)
    worst = float(np.abs(sizes - (slope * states + constant)).max())
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for (name, where), colour in zip(points.items(), ("C0", "C2", "C4", "C3", "C1", "C5"), strict=False):
        x, y = zip(*where, strict=True)
        axes.plot(x, y, "o-" if name != "softpref" else "o", color=colour, label=name, lw=1)
    line = np.linspace(0, states.max(), 2)
    label = f"fit: {slope:.2f} · 16 bytes a parameter + {constant:.2f} GiB"
    axes.plot(line, slope * line + constant, "--", color="C0", lw=1, label=label)
    axes.plot(line, line, ":", color="grey", lw=1, label="16 bytes a parameter")
    for state, vocabulary in zip(states, sorted(peaks["softpref"]), strict=True):
        axes.annotate(f"V = {vocabulary:,}", (state, 0), rotation=90, fontsize=7, color="grey", va="bottom")
    axes.set(xlabel="weights, gradients, optimizer state (GiB)", ylabel="peak resident set (GiB)")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    figure.savefig(PLOT, dpi=150)
    plt.close(figure)
    return [
        f"softpref's peaks are {slope:.2f} times 16 bytes a parameter plus {constant:.2f} GiB; the farthest "
        f"of them is {worst:.2f} GiB off that line.",
        f"![Peak memory against the state of training]({PLOT.name})",
    ]


PARTS = {"memory": measure_memory}


def main() -> None:
    parser = harness.arguments(__doc__, PARTS, rounds=1, steps=2)
    parser.add_argument("--side", choices=list(SIDES), help="train this one here and print its peak")
    options = parser.parse_args()
    if options.side:
        measure_one(options)
    else:
        report.run_parts(PARTS, options)


if __name__ == "__main__":
    main()
