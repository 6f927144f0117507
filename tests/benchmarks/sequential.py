"""Two dimensions of preference, one after the other, beside the optimum and beside both at once.

    python tests/benchmarks/sequential.py --output runs
    python tests/benchmarks/sequential.py --world storyteller --alphas 4 4 --output runs-on-text

The story world, judged by trait and by brevity, or the storyteller, by warmth and by brevity. Both orders;
the second round with each weight λ of what the first has learned; and for comparison one training on the
labels of both dimensions, by shares. All models start from one reference, with the settings of the world's
recipe. They are measured on every story of held-out prompts; where stories cannot be enumerated, by their
own samples, beside theory by importance sampling. An hour on one core; models that are there already are not
trained again, so that it can be stopped and started again. Writes `sequential.md`, and a line for each model
to `sequential.jsonl`.
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
from softpref.evaluation.theory import TRUSTED

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = 4  # held-out ones of the story world that models are measured on, every story of each
WEIGHTS = (0.0, 0.5, 1.0, 2.0)
SHARES = (0.25, 0.5, 0.75)  # of trait among the labels of both
MOST_KL = 0.05  # KL(optimum ‖ policy) in nats, for every model whose optimum is known


class World(NamedTuple):
    """Where the dimensions come from, and how their rounds are trained.

    Attributes:
        name: of the data stage's source; `recipe` is that of the pipelines whose settings are used.
        alphas, passes, samples: of the first round, and of the second, which begins near its optimum.
    """

    name: str
    recipe: str
    dimensions: tuple[str, str]
    alphas: tuple[float, float]
    passes: tuple[float, float]
    samples: tuple[int, int]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The recipe."""
        file = ROOT / "pipelines" / "recipes" / f"{self.recipe}.yaml"
        return dict(yaml.safe_load(file.read_text(encoding="utf-8")))


STORY = World("story", "embedded", ("trait", "brevity"), (1.0, 2.0), (1.5, 1.0), (128, 64))
# theory needs optima that samples of the reference still represent: with λ = 2 reward is weighed by 1.5
STORYTELLER = World("storyteller", "storyteller", ("warmth", "brevity"), (2.0, 2.0), (1.0, 0.5), (128, 64))
WORLDS = {world.name: world for world in (STORY, STORYTELLER)}


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


def plan(world: World) -> list[Run]:
    """All runs, each after the one that it begins with."""
    orders = (world.dimensions, world.dimensions[::-1])
    first = [Run(order[:1]) for order in orders]
    second = [Run(order, weight) for weight in WEIGHTS for order in orders]
    return [*first, *second, *(Run(world.dimensions, share=share) for share in SHARES)]


def options(world: World, run: Run, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the training stage; both at once has the softness of a first round."""
    place, recipe = len(run.rounds) - 1, world.settings
    asked = {name: recipe[name] for name in ("learning_rate", "sampling_interval", "beta")}
    asked |= recipe["train_overrides"] | {"save_strategy": "no", "per_device_eval_batch_size": 256}
    asked |= {"anchor": recipe.get("anchor", 0.0), "samples_per_refresh": world.samples[place]}
    asked |= {"num_train_epochs": world.passes[place], **overrides}
    if run.share is not None:  # of twice as many rows
        return {**asked, "alpha": world.alphas[0]}
    own = {"dimensions": run.rounds[-1], "alpha": world.alphas[place]}
    return {**asked, **own, **({"dimension_weights": run.weight} if len(run.rounds) > 1 else {})}


def prepare(world: World, folder: Path, data: Mapping[str, Any]) -> None:
    """The dataset and the reference of all runs, where they are not there yet."""
    recipe = world.settings
    from softpref.config import build_config
    from softpref.data import stage as data_stage
    from softpref.data.config import DataConfig
    from softpref.sft import stage as reference_stage
    from softpref.sft.config import SFTConfig

    if not (folder / "dataset" / "stats.json").is_file():
        own = {"votes": 0, "dimensions": {name: {} for name in world.dimensions}}
        asked = {"source": world.name, "rows": recipe["rows"], **recipe["data_overrides"], **own, **data}
        data_stage.run(build_config(DataConfig, asked), str(folder / "dataset"))
    if not (folder / "reference" / "softpref.json").is_file():
        shutil.rmtree(folder / "reference", ignore_errors=True)
        asked = {name: recipe[f"sft_{name}"] for name in ("learning_rate", "num_train_epochs")}
        config = build_config(SFTConfig, asked | recipe["sft_overrides"])
        folders = {"dataset_dir": str(folder / "dataset"), "output_dir": str(folder / "reference")}
        reference_stage.run(config, **folders)


def by_shares(world: World, dataset: Path, share: float) -> Path:
    """The dataset with weights, of which the rows of the first dimension have this share."""
    from datasets import load_from_disk
    from softpref.records.dataset import hashes_in, read_stats

    folder = dataset.with_name(f"dataset-share-{share:g}")
    if not folder.is_dir():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        rows = load_from_disk(str(dataset))
        shutil.copytree(dataset, partial, ignore=lambda path, _: rows if Path(path) == dataset else ())
        shares = dict(zip(world.dimensions, (share, 1 - share), strict=True))
        rows.map(lambda row: {"weight": shares[row["dimension"]]}).save_to_disk(str(partial))
        stats = {**read_stats(dataset), "files": hashes_in(partial)}
        (partial / "stats.json").write_text(json.dumps(stats), encoding="utf-8")
        partial.rename(folder)
    return folder


def train_and_measure(world: World, run: Run, folder: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Train a model, which is kept, and measure it; figures that are means over held-out prompts."""
    from measures import beside_theory, exactly
    from softpref.config import build_config
    from softpref.spo.config import SPOConfig
    from softpref.spo.stage import run as train

    dataset, begins = folder / "dataset", folder / "reference"
    if run.share is not None:
        dataset = by_shares(world, dataset, run.share)
    elif len(run.rounds) > 1:
        begins = folder / Run(run.rounds[:1]).name
    policy, asked = folder / run.name, options(world, run, overrides)
    if not (policy / "softpref.json").is_file():
        shutil.rmtree(policy, ignore_errors=True)
        cache = (
            {"reference_cache": str(folder / "logps")} if len(run.rounds) > 1 and run.share is None else {}
        )
        config = build_config(SPOConfig, asked, cache)
        train(config, dataset_dir=str(dataset), reference_dir=str(begins), output_dir=str(policy))
    places = policy, folder / "reference", folder / "dataset"
    figures = exactly(*places, PROMPTS) if world.name == STORY.name else beside_theory(*places)
    return {"figures": figures, "options": asked}


def read(results: Path) -> dict[str, dict[str, Any]]:
    """The figures so far, by the name of the run."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    return {line["run"]: line for line in map(json.loads, lines)}


# figure and digits of the columns behind the rewards: of exact figures, and of figures beside theory
_EXACT = {
    "KL(optimum‖policy)": ("kl_optimum_to_policy", 3),
    "least mass of a prompt on the set": ("least_mass_on_set", 3),
}
_SAMPLED = {
    "KL(optimum‖policy)": ("kl_optimum_to_policy", 3),
    "effective share": ("effective_sample_size", 2),
    "truncated": ("truncated_fraction", 3),
}


def table(world: World, runs: Iterable[Run], found: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each model, with theory's figures behind its own, and whether the goals are met."""
    columns = _EXACT if world.name == STORY.name else _SAMPLED
    rewards = {f"reward of {name}": f"expected_reward/{name}" for name in world.dimensions}
    head = ["learned", "λ", *rewards, "KL to the first reference", *columns]
    lines = [f"| {' | '.join(head)} |", "| :-- |" + " --: |" * (len(head) - 1)]
    known = [(run, found[run.name]["figures"]) for run in runs if run.name in found]
    for run, figures in known:
        both = f"both at once, {run.share or 0:.0%} {world.dimensions[0]}"
        cells = [both if run.share is not None else ", then ".join(run.rounds)]
        cells.append(f"{run.weight:g}" if len(run.rounds) > 1 and run.share is None else "–")
        for name in (*rewards.values(), "kl"):
            theory = figures.get(f"optimum_{name}")
            beside = "" if theory is None or run.share is not None else f" ({theory:.2f})"
            cells.append(f"{figures[name]:.2f}{beside}")
        for name, digits in columns.values():
            value = figures.get(name)
            cells.append("–" if value is None else f"{value:.{digits}f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *verdicts(world, known)]) + "\n"


def verdicts(world: World, known: Sequence[tuple[Run, Mapping[str, Any]]]) -> list[str]:
    """What was to be shown, and whether it is."""
    alone = [(run, figures) for run, figures in known if run.share is None]
    # where theory rests on samples, on enough of them
    trusted = [figures for _, figures in alone if figures.get("effective_sample_size", 1.0) >= TRUSTED]
    distances = [figures["kl_optimum_to_policy"] for figures in trusted]
    worst = max(distances, default=0.0)
    count = "" if len(trusted) == len(alone) else f"{len(trusted)} of {len(alone)} models, "
    said = [f"- KL(optimum‖policy): {count}at most {worst:.3f}, goal {MOST_KL}: {_met(worst <= MOST_KL)}"]
    for order in (world.dimensions, world.dimensions[::-1]):
        of_order = sorted((run.weight, figures) for run, figures in alone if run.rounds == order)
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
    parser.add_argument("--world", choices=list(WORLDS), default="story")
    parser.add_argument("--output", type=Path, default=Path("sequential"), help="folder of models and tables")
    parser.add_argument(
        "--alphas", type=float, nargs=2, metavar=("FIRST", "SECOND"), help="softness of the two rounds"
    )
    parser.add_argument("--data-overrides", default="{}", help="JSON, as in a recipe")
    parser.add_argument("--train-overrides", default="{}", help="JSON, as in a recipe")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{given.output.absolute()}/mlflow.db")
    world = WORLDS[given.world]
    if given.alphas:
        world = world._replace(alphas=tuple(given.alphas))
    results, runs = given.output / "sequential.jsonl", plan(world)
    prepare(world, given.output, json.loads(given.data_overrides))
    for run in runs:
        if run.name not in read(results):
            overrides = json.loads(given.train_overrides)
            line = {"run": run.name} | train_and_measure(world, run, given.output, overrides)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        (given.output / "sequential.md").write_text(table(world, runs, read(results)), encoding="utf-8")
    print(table(world, runs, read(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
