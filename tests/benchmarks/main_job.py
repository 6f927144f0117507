"""Runs the main job over seeds, threads and instruction sets, and says how its worst run came out.

    python tests/benchmarks/main_job.py --seeds 10

Takes some four minutes for each seed and setting on two cores. Each run adds a line to `main-job.jsonl`, and
those that have one are not run again: it can be stopped and started again, here or on another machine.
Further options are `spo_sweep.py`'s. Prints a table.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
MOST_KL = {0.5: 0.08, 1.0: 0.04, 2.0: 0.02}  # KL(optimum ‖ policy) in nats, by softness
LEAST_MASS = 0.98  # on the set, for every held-out prompt


class Setting(NamedTuple):
    """What differs between runs that should come out alike."""

    seed: int
    threads: int
    instructions: str

    @property
    def name(self) -> str:
        return f"seed-{self.seed}-threads-{self.threads}-{self.instructions}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="seeds 0 … SEEDS-1 (default 10)")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--instructions", nargs="*", default=["avx2", "default"], help="ATEN_CPU_CAPABILITY")
    parser.add_argument("--output", type=Path, default=Path("main-job"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("main-job.jsonl"))
    options, further = parser.parse_known_args()
    for setting in itertools.starmap(
        Setting, itertools.product(range(options.seeds), options.threads, options.instructions)
    ):
        if setting not in {Setting(**line["setting"]) for line in read(options.results)}:
            line = run(setting, options.output, further)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    print(table(read(options.results)))
    return 0


def read(results: Path) -> list[dict[str, Any]]:
    """The lines so far."""
    return [json.loads(line) for line in results.open(encoding="utf-8")] if results.is_file() else []


def run(setting: Setting, output: Path, further: list[str]) -> dict[str, Any]:
    """Run the sweep in a process of its own; a run that failed leaves its folder and `.log` behind."""
    folder = output / setting.name
    shutil.rmtree(folder, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(setting.threads),
        "ATEN_CPU_CAPABILITY": setting.instructions,
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder.absolute()}.db",
    }
    command = [sys.executable, str(ROOT / "pipelines" / "spo_sweep.py"), "--seed", str(setting.seed)]
    command += ["--output", str(folder), "--evaluation-overrides", '{"exact_prompts": 100}', *further]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    (output / f"{setting.name}.log").write_text(ended.stdout + ended.stderr, encoding="utf-8")
    found = sorted(folder.rglob("comparison.json"))
    members = json.loads(found[0].read_text(encoding="utf-8"))["members"] if found else []
    if ended.returncode == 0:
        shutil.rmtree(folder)
    return {
        "setting": setting._asdict(),
        "status": ended.returncode,  # 0: a model was registered
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "options": further,
        "models": [figures(member) for member in members],
    }


def figures(member: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a member of the comparison: exact values over all held-out prompts."""
    kept = ("kl_optimum_to_policy", "mass_on_set", "least_mass_on_set", "expected_reward")
    values = {name: member["exact"][name]["value"] for name in (*kept, "optimum_expected_reward")}
    return {**{name: member[name] for name in ("name", "method", "alpha")}, **values}


def table(lines: Iterable[dict[str, Any]]) -> str:
    """A line for each model of the sweep, over all runs: least and greatest of its figures."""
    lines = list(lines)
    by_name: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        for model in line["models"]:
            by_name.setdefault(model["name"], []).append(model)
    registered = sum(line["status"] == 0 for line in lines)
    rows = [
        f"{len(lines)} runs; {registered} ended well, with a model registered.",
        "",
        "| model | runs | KL(optimum‖policy) | goal: at most | least mass of a prompt on the set "
        "| goal: at least | expected reward on set | optimum's |",
        "| :-- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for name, group in sorted(by_name.items()):

        def span(figure: str, digits: int, group: list[dict[str, Any]] = group) -> str:
            values = [model[figure] for model in group]
            return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

        ours = group[0]["method"] == "spo"
        limit = MOST_KL.get(group[0]["alpha"], "–") if ours else "–"
        cells = [name, len(group), span("kl_optimum_to_policy", 3), limit, span("least_mass_on_set", 3)]
        cells += [LEAST_MASS if ours else "–", span("expected_reward", 2), span("optimum_expected_reward", 2)]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
