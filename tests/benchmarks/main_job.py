"""Runs the main job over seeds, threads and instruction sets, and says how its worst run came out.

    python tests/benchmarks/main_job.py --seeds 10 --output main-job

Takes some four minutes for each seed and setting on two cores. Runs that are there already are not repeated,
so that it can be stopped and started again. Writes `main-job.md`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
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
    parser.add_argument("--output", type=Path, default=Path("main-job"), help="folder of runs and table")
    options, further = parser.parse_known_args()
    settings = list(
        itertools.starmap(
            Setting, itertools.product(range(options.seeds), options.threads, options.instructions)
        )
    )
    for setting in settings:
        run(setting, options.output, further)
        (options.output / "main-job.md").write_text(table(settings, options.output), encoding="utf-8")
    print(table(settings, options.output))
    return 0


def run(setting: Setting, output: Path, further: list[str]) -> None:
    """Run the sweep in a process of its own, unless its results are there; keep how it ended."""
    folder = output / setting.name
    if (folder / "ended.json").is_file():
        return
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(setting.threads),
        "ATEN_CPU_CAPABILITY": setting.instructions,
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder.absolute()}.db",
    }
    command = [sys.executable, str(ROOT / "pipelines" / "spo_sweep.py"), "--seed", str(setting.seed)]
    command += ["--output", str(folder), "--evaluation-overrides", '{"exact_prompts": 100}', *further]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    folder.mkdir(parents=True, exist_ok=True)
    report = {"status": ended.returncode, "output": ended.stdout[-4000:] + ended.stderr[-4000:]}
    (folder / "ended.json").write_text(json.dumps(report), encoding="utf-8")


def members(folder: Path) -> list[dict[str, Any]]:
    """The comparison's members, empty where the run did not come so far."""
    found = sorted(folder.rglob("comparison.json"))
    return json.loads(found[0].read_text(encoding="utf-8"))["members"] if found else []


def table(settings: list[Setting], output: Path) -> str:
    """A line for each model of the sweep, over all runs: least and greatest of its figures."""
    done = [setting for setting in settings if (output / setting.name / "ended.json").is_file()]
    by_name: dict[str, list[dict[str, Any]]] = {}
    registered = 0
    for setting in done:
        folder = output / setting.name
        ended = json.loads((folder / "ended.json").read_text(encoding="utf-8"))
        registered += ended["status"] == 0
        for member in members(folder):
            by_name.setdefault(member["name"], []).append(member)
    lines = [
        f"{len(done)} of {len(settings)} runs; {registered} ended well, with a model registered.",
        "",
        "| model | runs | greatest KL(optimum‖policy) | goal: at most | least mass of a prompt on the set "
        "| goal: at least | expected reward |",
        "| :-- | --: | --: | --: | --: | --: | --: |",
    ]
    for name, group in sorted(by_name.items()):
        exact = [member["exact"] for member in group]
        kl = max(one["kl_optimum_to_policy"]["value"] for one in exact)
        mass = min(one["least_mass_on_set"]["value"] for one in exact)
        rewards = [member["metrics"]["expected_reward"]["value"] for member in group]
        ours = group[0]["method"] == "spo"
        limit = MOST_KL.get(group[0]["alpha"]) if ours else None
        lines.append(
            f"| {name} | {len(group)} | {kl:.3f} | {'–' if limit is None else limit} | {mass:.3f} "
            f"| {LEAST_MASS if ours else '–'} | {min(rewards):.2f} to {max(rewards):.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
