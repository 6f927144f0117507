"""Kills whole sweeps at any moment; the same command must then go on to the same figures."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from tests.faults.outcomes import Outcome, Say
from tests.faults.tracked import tracked_in

_ROOT = Path(__file__).resolve().parents[2]
_MOST_AGAIN = 2  # tasks that two calls of a sweep do twice, beside those that every call does
_ALWAYS = {"plan-sweep", "compare-models", "register-model", "importer"}


def kill_sweeps(folder: Path, kills: int, seed: int, say: Say) -> list[Outcome]:
    """Kill a sweep `kills` times at random moments, each in a folder of its own.

    Args:
        folder: to work in.
        seed: of the moments.
    """
    folder.mkdir(parents=True)
    chance, outcome = random.Random(seed), Outcome("sweep")
    recipe = _recipe(folder)
    began = time.monotonic()
    whole = _sweep(recipe, folder / "whole")
    took = time.monotonic() - began
    figures = _figures(folder / "whole")
    number = 0
    while outcome.cases < kills:
        number += 1
        here, moment = folder / f"kill-{number}", chance.uniform(0.15, 1.0) * took
        first = _sweep(recipe, here, killed_after=moment)
        if not (here / "out/run.json").exists():
            continue  # it was still reading its parameters
        again = _sweep(recipe, here)
        said = f"sweep killed after {moment:.0f} of {took:.0f} s ({here}): "
        own = []
        if again.returncode != whole.returncode:
            own.append(f"the same command ends with {again.returncode}: {again.stderr[-600:]}")
        elif _figures(here) != figures:
            own.append("its figures are others")
        twice = Counter(_done(first.stdout)) + Counter(_done(again.stdout)) - Counter(_done(whole.stdout))
        redone = {task: times for task, times in twice.items() if task not in _ALWAYS}
        if sum(redone.values()) > _MOST_AGAIN:
            own.append(f"it does tasks again: {redone}")
        statuses = tracked_in(here / "mlflow.db").statuses
        if wrong := {name: status for name, status in statuses.items() if status != "FINISHED"}:
            own.append(f"runs in MLflow are not finished: {wrong}")
        say(f"{said}{len(own)} faults; done again: {redone or 'nothing'}")
        for fault in own:
            say(f"    {fault}")
        outcome.note(fault=said + "; ".join(own) if own else "")
    return [outcome]


def small_recipe() -> dict[str, Any]:
    """The default recipe with two small models, which are trained in seconds."""
    recipe: dict[str, Any] = yaml.safe_load(
        (_ROOT / "pipelines/recipes/embedded.yaml").read_text(encoding="utf-8")
    )
    recipe |= {"rows": 600, "samples_per_refresh": 32, "samples_per_prompt": 4, "num_train_epochs": 8}
    recipe["data_overrides"] |= {"sft_rows": 600}
    recipe["sft_overrides"]["model_config"] |= {"hidden_size": 32, "num_hidden_layers": 1}
    recipe["train_overrides"] |= {"save_steps": 20, "logging_steps": 5}
    recipe["evaluation_overrides"] = {"exact_prompts": 2, "bootstrap_samples": 100}
    recipe |= {"alphas": [0.5, 1], "baselines": [], "registered_model_name": ""}
    return recipe


def _recipe(folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe()), encoding="utf-8")
    return path


def _sweep(recipe: Path, folder: Path, killed_after: float = 0.0) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    command = [
        sys.executable,
        _ROOT / "pipelines/spo_sweep.py",
        "--recipe",
        recipe,
        "--output",
        folder / "out",
    ]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    with subprocess.Popen(
        [*map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        if killed_after:
            time.sleep(killed_after)
            process.kill()
        out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _done(printed: str) -> list[str]:
    return re.findall(r"^[\d:]+  (\S+) started$", printed, re.MULTILINE)


def _figures(folder: Path) -> object:
    """Of all members and of the choice; names of places and runs left out."""
    comparison = json.loads((folder / "out/comparison/comparison.json").read_text(encoding="utf-8"))
    members = [(one["name"], one["metrics"], one["exact"]) for one in comparison["members"]]
    return comparison["chosen"], comparison["reason"], members
