"""The paper's comparisons in kind: losses, regularisers and weights side by side, on the same rows.

    python tests/benchmarks/comparisons.py --parts story storyteller --seeds 2
    python tests/benchmarks/comparisons.py --parts real --base-model SmolLM2-135M-Instruct.Q4_1.gguf

`story` is measured exactly, `storyteller` beside theory, `real` on held-out human preferences. All models of
a dataset start from one reference. Takes hours on one core; runs that are there already are not repeated, so
that it can be stopped and started again. Writes a table for each part: `story.md` and so on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {"story": "embedded", "storyteller": "storyteller", "real": "smollm2"}
# What differs from the recipes: smaller, for many runs are made.
DATA: dict[str, dict[str, Any]] = {
    "story": {"rows": 8000},
    "storyteller": {"rows": 8000},
    "real": {
        "as_messages": True,
        "system_prompt": "Answer briefly.",
        "validation_fraction": 0,
        "test_fraction": 0.3,
        "rows": 250,
    },
}
TRAIN: dict[str, dict[str, Any]] = {
    "story": {},
    "storyteller": {"per_device_train_batch_size": 16},
    "real": {
        "learning_rate": 0.0002,
        "per_device_train_batch_size": 2,
        "samples_per_refresh": 32,
        "sampling_interval": 32,
        "max_completion_length": 64,
    },
}
# Short texts alone: a step of training is then some seconds on one core.
REAL: dict[str, dict[str, Any]] = {
    "pandalm": {
        "max_characters": 350,
        "min_votes": 1,
        "prompt_template": "",
        "columns": {
            "prompt": "instruction",
            "input": "input",
            "completion_a": "response1",
            "completion_b": "response2",
            "votes": ["annotator1", "annotator2", "annotator3"],
        },
    },
    "convarg": {"max_characters": 280},
}
# Of each part: heading, figure of a run, digits.
COLUMNS: dict[str, list[tuple[str, str, int]]] = {
    "story": [
        ("expected reward on set", "expected_reward", 2), ("optimum's", "optimum_expected_reward", 2),
        ("KL to the reference on set", "kl", 2), ("most reward at this KL", "most_reward", 2),
        ("KL(optimum‖policy)", "kl_optimum_to_policy", 3),
        ("least mass of a prompt on the set", "least_mass_on_set", 3),
    ],
    "storyteller": [
        ("expected reward", "expected_reward", 2), ("theory's", "optimum_expected_reward", 2),
        ("KL to the reference", "kl", 2), ("theory's", "optimum_kl", 2),
        ("most reward at this KL", "most_reward", 2), ("effective share", "effective_sample_size", 2),
        ("truncated", "truncated_fraction", 2),
    ],
    "real": [
        ("accuracy of logp − logp_ref", "implicit", 2), ("accuracy of logp", "absolute", 2),
        ("saturated", "saturated", 2), ("KL to the reference", "kl", 1), ("log P(end)", "end", 1),
        ("sampled length", "length", 0), ("truncated", "truncated", 2),
    ],
}  # fmt: skip


class World(NamedTuple):
    """One dataset and one reference, which several runs share."""

    part: str
    kind: str  # of rows, or for real data the dataset's name
    seed: int

    @property
    def name(self) -> str:
        return f"{self.part}-{self.kind}-seed-{self.seed}"


class Run(NamedTuple):
    """One model of a world: its loss, softness (α, or β of dpo), what the KL term goes along, weights' γ."""

    world: World
    loss: str  # dpo, or spo and its anchor
    softness: float
    kl_on: str
    gamma: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.loss}-{self.softness:g}-kl-{self.kl_on}-gamma-{self.gamma:g}".replace(" ", "-")

    def options(self, strength: float) -> dict[str, Any]:
        """Options of the training stage; with every loss the KL term has the same `strength`."""
        strength = 0.0 if self.kl_on == "none" else strength
        shared = {"kl_on": self.kl_on, "seed": self.world.seed, "save_strategy": "no"}
        if self.loss == "dpo":
            return {**shared, "method": "dpo", "beta": self.softness, "kl_beta": strength}
        own = {"alpha": self.softness, "anchor": float(self.loss.split()[-1]), "beta": strength}
        return {**shared, "method": "spo", **own, "weight_exponent": self.gamma}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(RECIPES), default=["story", "storyteller"])
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 … SEEDS-1 (default 1)")
    parser.add_argument("--output", type=Path, default=Path("comparisons"), help="folder of runs and tables")
    parser.add_argument("--real", nargs="+", choices=list(REAL), default=list(REAL), help="datasets of real")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="where they are")
    parser.add_argument("--base-model", default="", help="of real; by default the recipe's, from the Hub")
    parser.add_argument("--data-overrides", default="{}", help="JSON, as in a recipe")
    parser.add_argument("--train-overrides", default="{}", help="JSON, as in a recipe")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{options.output.absolute()}/mlflow.db")
    for part in options.parts:
        runs = [run for seed in range(options.seeds) for run in plan(part, seed, options.real)]
        for run in runs:
            if not result_file(run, options.output).is_file():
                keep(run, options)
                (options.output / f"{part}.md").write_text(
                    table(part, runs, options.output), encoding="utf-8"
                )
        print(table(part, runs, options.output))
    return 0


def plan(part: str, seed: int, real: Sequence[str] = tuple(REAL)) -> list[Run]:
    """The runs of a part, in order."""
    if part == "real":
        return [
            Run(World(part, dataset, seed), loss, softness, kl_on)
            for dataset in real
            for softness in (0.5, 0.1, 2.0)
            for loss in ("spo 0", "spo 1", "dpo")
            for kl_on in ("samples", "none")
        ]
    ours = "spo 0" if part == "story" else "spo 1"
    runs = []
    for kind in ("pairwise", "best_of_n", "ranking"):
        world, pairs = World(part, kind, seed), kind == "pairwise"
        curve = (0.25, 0.5, 1.0, 2.0, 4.0) if pairs else (0.5, 1.0, 2.0)
        runs += [Run(world, ours, alpha, "samples") for alpha in curve]
        runs += [Run(world, "dpo", beta, kl_on) for kl_on in ("none", "samples") for beta in curve]
        if pairs:
            runs += [
                Run(world, ours, alpha, kl_on) for kl_on in ("data", "none") for alpha in (0.5, 1.0, 2.0)
            ]
            runs += [
                Run(world, ours, alpha, "samples", gamma) for gamma in (0.5, 1.0) for alpha in (0.5, 1.0)
            ]
    return runs


def result_file(run: Run, output: Path) -> Path:
    return output / run.world.name / run.name / "result.json"


def keep(run: Run, options: argparse.Namespace) -> None:
    """Train and measure a model in a folder beside its own; of it only the figures are kept."""
    from measures import MEASURES
    from softpref.config import build_config, parse_overrides
    from softpref.spo.config import SPOConfig
    from softpref.spo.stage import run as train

    file = ROOT / "pipelines" / "recipes" / f"{RECIPES[run.world.part]}.yaml"
    recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    dataset, reference = prepare(run.world, recipe, options)
    partial = dataset.parent / f".{run.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    names = "learning_rate", "num_train_epochs", "samples_per_refresh", "sampling_interval"
    asked = {name: recipe[name] for name in names} | recipe["train_overrides"] | TRAIN[run.world.part]
    if run.loss != "spo 0":  # else the reference's log-probabilities are not asked for
        asked["reference_cache"] = str(dataset.parent / "reference-logps")
    asked |= parse_overrides(options.train_overrides) | run.options(recipe["beta"])
    started = time.perf_counter()
    folders = {"dataset_dir": str(dataset), "reference_dir": str(reference)}
    train(build_config(SPOConfig, asked), **folders, output_dir=str(partial / "policy"))
    trained = time.perf_counter()
    figures = MEASURES[run.world.part](partial / "policy", reference, dataset)
    seconds = {"training": trained - started, "measuring": time.perf_counter() - trained}
    shutil.rmtree(partial / "policy")
    result = {"figures": figures, "options": asked, "seconds": seconds}
    (partial / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    os.replace(partial, dataset.parent / run.name)


def prepare(world: World, recipe: Mapping[str, Any], options: argparse.Namespace) -> tuple[Path, Path]:
    """The world's dataset and reference, which are made where they are not there yet."""
    from softpref.config import build_config, parse_overrides
    from softpref.data import stage as data_stage
    from softpref.data.config import DataConfig
    from softpref.sft import stage as reference_stage
    from softpref.sft.config import SFTConfig

    dataset, reference = (options.output / world.name / name for name in ("dataset", "reference"))
    asked = {"source": recipe["source"], "seed": world.seed, **recipe["data_overrides"], **DATA[world.part]}
    base_model = recipe["base_model"]
    if world.part == "real":
        asked |= {name: recipe[name] for name in ("columns", "prompt_template")} | REAL[world.kind]
        asked["source"] = str(options.data / world.kind / "pairs.jsonl")
        base_model = options.base_model or base_model
    elif world.kind != "pairwise":
        asked |= {"story_kind": world.kind, "votes": 1}
    if not (dataset / "stats.json").is_file():
        asked |= parse_overrides(options.data_overrides)
        data_stage.run(build_config(DataConfig, asked), str(dataset))
    if not (reference / "softpref.json").is_file():
        shutil.rmtree(reference, ignore_errors=True)
        asked = {"base_model": base_model, "seed": world.seed, **recipe.get("sft_overrides", {})}
        for name in ("learning_rate", "num_train_epochs"):
            if f"sft_{name}" in recipe:
                asked[name] = recipe[f"sft_{name}"]
        config = build_config(SFTConfig, asked)
        reference_stage.run(config, dataset_dir=str(dataset), output_dir=str(reference))
    return dataset, reference


def table(part: str, runs: Sequence[Run], output: Path) -> str:
    """A line for each model: least and greatest of its figures over seeds, or their intervals."""
    found: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    files = {run: result_file(run, output) for run in runs if result_file(run, output).is_file()}
    for run, file in files.items():
        figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
        for name, beside in figures.get("beside", {}).items():  # what a seed's models are compared with
            found.setdefault((run.world.kind, name, "–", "–", "–", str(run.world.seed)), [beside])
        loss = run.loss.replace(" ", ", anchor ")
        key = (run.world.kind, loss, f"{run.softness:g}", run.kl_on, f"{run.gamma:g}", "")
        found.setdefault(key, []).append(figures)
    headings = ["rows", "loss", "α or β", "KL term on", "γ", *(heading for heading, _, _ in COLUMNS[part])]
    lines = [f"{len(files)} of {len(runs)} runs.", "", f"| {' | '.join(headings)} |"]
    lines.append(f"|{' :-- |' * 5}{' --: |' * len(COLUMNS[part])}")
    for (*key, _), group in sorted(found.items(), key=lambda line: line[0][0]):
        cells = (cell([one.get(name) for one in group], digits) for _, name, digits in COLUMNS[part])
        lines.append(f"| {' | '.join((*key, *cells))} |")
    return "\n".join(lines) + "\n"


def cell(values: Sequence[Any], digits: int) -> str:
    """A value, of several seeds their range, each with its interval where it has one; a dash for none."""
    from softpref.records.figures import Figure

    known = [value for value in values if value is not None]
    if known and isinstance(known[0], dict):
        return "; ".join(Figure.of(one).text(digits) for one in known)
    return " to ".join(dict.fromkeys(f"{end(known):.{digits}f}" for end in (min, max))) if known else "–"


if __name__ == "__main__":
    sys.exit(main())
