"""Two dimensions of preference, one after the other, beside the exact optimum and beside both at once.

    python tests/benchmarks/sequential.py --output runs

The story world, judged by trait and by brevity. Both orders; the second round with each weight λ of what the
first has learned; and for comparison one training on the labels of both dimensions, by shares. All models
start from one reference, with the settings of the embedded recipe, and are measured on every story of the
held-out prompts. An hour on one core; models that are there already are not trained again, so that it can be
stopped and started again. Writes `sequential.md`, and a line for each model to `sequential.jsonl`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPE = yaml.safe_load((ROOT / "pipelines" / "recipes" / "embedded.yaml").read_text(encoding="utf-8"))
DIMENSIONS = ("trait", "brevity")
# of the first round and of the second, which begins near its optimum; a pass has some 800 steps
ALPHAS, PASSES, SAMPLES = (1.0, 2.0), (1.5, 0.5), (128, 64)
PROMPTS = 4  # held-out ones that models are measured on, every story of each
WEIGHTS = (0.0, 0.5, 1.0, 2.0)
SHARES = (0.25, 0.5, 0.75)  # of trait among the labels of both
MOST_KL = 0.05  # KL(optimum ‖ policy) in nats, for every model whose optimum is known


class Run(NamedTuple):
    """A model: the dimensions that it learned, one after the other or both at once.

    Attributes:
        rounds: the dimensions; one of them is a first round.
        weight: λ of the second round.
        share: of trait's labels, where both are learned at once.
    """

    rounds: tuple[str, ...]
    weight: float = 0.0
    share: float | None = None

    @property
    def name(self) -> str:
        if self.share is not None:
            return f"both-share-{self.share:g}"
        return "-".join(self.rounds) + (f"-weight-{self.weight:g}" if len(self.rounds) > 1 else "")


def plan() -> list[Run]:
    """All runs, each after the one that it begins with."""
    orders = (DIMENSIONS, DIMENSIONS[::-1])
    first = [Run(order[:1]) for order in orders]
    second = [Run(order, weight) for weight in WEIGHTS for order in orders]
    return [*first, *second, *(Run(DIMENSIONS, share=share) for share in SHARES)]


def options(run: Run, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the training stage; both at once has the softness of a first round."""
    place = len(run.rounds) - 1
    asked = {name: RECIPE[name] for name in ("learning_rate", "sampling_interval", "beta")}
    asked |= RECIPE["train_overrides"] | {"save_strategy": "no", "per_device_eval_batch_size": 256}
    asked |= {"num_train_epochs": PASSES[place], "samples_per_refresh": SAMPLES[place], **overrides}
    if run.share is not None:  # of twice as many rows
        return {**asked, "alpha": ALPHAS[0]}
    own = {"dimensions": run.rounds[-1], "alpha": ALPHAS[place]}
    return {**asked, **own, **({"dimension_weights": run.weight} if len(run.rounds) > 1 else {})}


def prepare(folder: Path, data: Mapping[str, Any]) -> None:
    """The dataset and the reference of all runs, where they are not there yet."""
    from softpref.config import build_config
    from softpref.data import stage as data_stage
    from softpref.data.config import DataConfig
    from softpref.sft import stage as reference_stage
    from softpref.sft.config import SFTConfig

    if not (folder / "dataset" / "stats.json").is_file():
        own = {"votes": 0, "dimensions": {name: {} for name in DIMENSIONS}}
        asked = {"source": "story", "rows": RECIPE["rows"], **RECIPE["data_overrides"], **own, **data}
        data_stage.run(build_config(DataConfig, asked), str(folder / "dataset"))
    if not (folder / "reference" / "softpref.json").is_file():
        shutil.rmtree(folder / "reference", ignore_errors=True)
        asked = {name: RECIPE[f"sft_{name}"] for name in ("learning_rate", "num_train_epochs")}
        config = build_config(SFTConfig, asked | RECIPE["sft_overrides"])
        folders = {"dataset_dir": str(folder / "dataset"), "output_dir": str(folder / "reference")}
        reference_stage.run(config, **folders)


def by_shares(dataset: Path, share: float) -> Path:
    """The dataset with weights, of which trait's rows have this share."""
    from datasets import load_from_disk

    folder = dataset.with_name(f"dataset-share-{share:g}")
    if not (folder / "dataset_dict.json").is_file():
        shutil.copytree(dataset, folder, ignore=shutil.ignore_patterns("train", "validation", "test"))
        shares = {"trait": share, "brevity": 1 - share}
        rows = load_from_disk(str(dataset))
        rows.map(lambda row: {"weight": shares[row["dimension"]]}).save_to_disk(str(folder))
    return folder


def train_and_measure(run: Run, folder: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Train a model, which is kept, and measure it; figures that are means over held-out prompts."""
    from measures import exactly
    from softpref.config import build_config
    from softpref.spo.config import SPOConfig
    from softpref.spo.stage import run as train

    dataset, begins = folder / "dataset", folder / "reference"
    if run.share is not None:
        dataset = by_shares(dataset, run.share)
    elif len(run.rounds) > 1:
        begins = folder / Run(run.rounds[:1]).name
    policy, asked = folder / run.name, options(run, overrides)
    if not (policy / "softpref.json").is_file():
        shutil.rmtree(policy, ignore_errors=True)
        cache = (
            {"reference_cache": str(folder / "logps")} if len(run.rounds) > 1 and run.share is None else {}
        )
        config = build_config(SPOConfig, asked, cache)
        train(config, dataset_dir=str(dataset), reference_dir=str(begins), output_dir=str(policy))
    figures = exactly(policy, folder / "reference", folder / "dataset", PROMPTS)
    return {"figures": figures, "options": asked}


def read(results: Path) -> dict[str, dict[str, Any]]:
    """The figures so far, by the name of the run."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    return {line["run"]: line for line in map(json.loads, lines)}


def table(runs: Iterable[Run], found: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each model, with theory's figures behind its own, and whether the goals are met."""
    head = ["learned", "λ", *(f"reward of {name}" for name in DIMENSIONS), "KL to the first reference"]
    head += ["KL(optimum‖policy)", "least mass of a prompt on the set"]
    lines = [f"| {' | '.join(head)} |", "| :-- |" + " --: |" * (len(head) - 1)]
    known = [(run, found[run.name]["figures"]) for run in runs if run.name in found]
    for run, figures in known:
        both = f"both at once, {run.share or 0:.0%} trait"
        cells = [both if run.share is not None else ", then ".join(run.rounds)]
        cells.append(f"{run.weight:g}" if len(run.rounds) > 1 and run.share is None else "–")
        for name in DIMENSIONS:
            theory = figures.get(f"optimum_expected_reward/{name}")
            beside = "" if theory is None else f" ({theory:.2f})"
            cells.append(f"{figures[f'expected_reward/{name}']:.2f}{beside}")
        kl = figures["kl_optimum_to_policy"]
        cells += [f"{figures['kl']:.2f}", "–" if kl is None else f"{kl:.3f}"]
        lines.append(f"| {' | '.join([*cells, format(figures['least_mass_on_set'], '.3f')])} |")
    return "\n".join([*lines, "", *verdicts(known)]) + "\n"


def verdicts(known: Sequence[tuple[Run, Mapping[str, Any]]]) -> list[str]:
    """What was to be shown, and whether it is."""
    measured = [figures["kl_optimum_to_policy"] for run, figures in known if run.share is None]
    said = []
    if measured:
        worst = max(measured)
        said.append(f"- KL(optimum‖policy): at most {worst:.3f}, goal {MOST_KL}: {_met(worst <= MOST_KL)}")
    for order in (DIMENSIONS, DIMENSIONS[::-1]):
        of_order = sorted(
            (run.weight, figures) for run, figures in known if run.rounds == order and run.share is None
        )
        for whose, word in (("", "of the models"), ("optimum_", "of theory")):
            rewards = [figures[f"{whose}expected_reward/{order[0]}"] for _, figures in of_order]
            rises = all(before < after for before, after in itertools.pairwise(rewards))
            if len(rewards) > 1:
                shown = ", ".join(f"{reward:.2f}" for reward in rewards)
                said.append(
                    f"- {order[0]} first: its expected reward rises with λ, {word} ({shown}): {_met(rises)}"
                )
    return said


def _met(holds: bool) -> str:
    return "yes" if holds else "no"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("sequential"), help="folder of models and tables")
    parser.add_argument("--data-overrides", default="{}", help="JSON, as in a recipe")
    parser.add_argument("--train-overrides", default="{}", help="JSON, as in a recipe")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{given.output.absolute()}/mlflow.db")
    results, runs = given.output / "sequential.jsonl", plan()
    prepare(given.output, json.loads(given.data_overrides))
    for run in runs:
        if run.name not in read(results):
            line = {"run": run.name} | train_and_measure(run, given.output, json.loads(given.train_overrides))
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        (given.output / "sequential.md").write_text(table(runs, read(results)), encoding="utf-8")
    print(table(runs, read(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
