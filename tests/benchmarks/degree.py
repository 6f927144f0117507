"""What the degree loss does on human preferences: the same training with and without it, over seeds.

    python tests/benchmarks/degree.py --weights 0 0.1 0.3 --seeds 3 --output /tmp/degree-benchmark

ConvArg's pairs of arguments and the story model of 260 thousand parameters, both beside this repository. Of
each seed a third of the arguments is held out, and some pairs of the others; training rows are further pairs
of these, and the reference has learned from the better argument of each. Measured on held-out pairs, of
arguments that were seen in training and of those that were not: accuracy of the implicit reward, and how it
differs from that without the loss, on the same rows. Besides the mean length of sampled completions, and how
it differs from that of the reference; and of arguments not seen, accuracy of the degree levels beside that of
length alone. Intervals are bootstraps over debates, of all seeds together. What is there already is not run
again; writes `degree.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
DATA: dict[str, Any] = {
    "columns": {name: name for name in ("votes_a", "votes_b", "votes_equal")}
    | {"completion_a": "argument_a", "completion_b": "argument_b"},
    "prompt_template": "{stance}\n",
    "min_votes": 3,
    "max_characters": 240,
    "validation_fraction": 0.0,
    "test_fraction": 0.0,
}
BOTH: dict[str, Any] = {  # of both trainings
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "max_prompt_length": 64,
    "max_completion_length": 130,
    "per_device_train_batch_size": 8,
}
REFERENCE: dict[str, Any] = {"learning_rate": 2e-3, "num_train_epochs": 3}
TRAIN: dict[str, Any] = {
    "method": "dpo",
    "beta": 0.1,
    "learning_rate": 5e-4,
    "num_train_epochs": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "logging_steps": 10,
}
SAMPLES = 64  # completions drawn of a model, on the held-out prompts in turn


class Run(NamedTuple):
    """One model."""

    seed: int
    weight: float

    def file(self, output: Path) -> Path:
        return output / f"seed-{self.seed}" / f"gamma-{self.weight:g}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--weights", nargs="+", type=float, default=[0.0, 0.1, 0.3], help="degree_weight")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 … SEEDS-1 (default 3)")
    parser.add_argument("--rows", type=int, default=240, help="training pairs (default 240)")
    parser.add_argument("--held-out", type=int, default=120, help="held-out pairs of each kind (default 120)")
    parser.add_argument("--levels", type=int, default=4, help="degree_levels (default 4)")
    parser.add_argument("--output", type=Path, default=Path("degree"), help="folder of runs and the table")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "convarg" / "pairs.jsonl")
    parser.add_argument("--base-model", default=str(SHARED / "models" / "stories260k"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{options.output.absolute()}/mlflow.db")
    runs = [Run(seed, weight) for seed in range(options.seeds) for weight in options.weights]
    for run in runs:
        if not run.file(options.output).is_file():
            figures = trained(run, options)
            run.file(options.output).write_text(json.dumps(figures), encoding="utf-8")
            (options.output / "degree.md").write_text(table(runs, options.output), encoding="utf-8")
            print(table(runs, options.output), flush=True)
    return 0


class World(NamedTuple):
    """Datasets of a seed and its reference: folders."""

    rows: Path
    seen: Path
    unseen: Path
    reference: Path


def prepare(seed: int, options: argparse.Namespace) -> World:
    """A seed's rows and its reference, which are made where they are not there yet."""
    from softpref.config import build_config
    from softpref.data import stage as data_stage
    from softpref.data.config import DataConfig
    from softpref.sft import stage as reference_stage
    from softpref.sft.config import SFTConfig

    folder = options.output / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    world = World(*(folder / name for name in World._fields))
    counts = options.rows, options.held_out, options.held_out
    for place, part, count in zip(world, divided(options.data, seed), counts, strict=False):
        if not (place / "stats.json").is_file():
            source = folder / f"{place.name}.jsonl"
            source.write_text("\n".join(part), encoding="utf-8")
            asked = {**DATA, "source": str(source), "rows": count, "seed": seed}
            data_stage.run(build_config(DataConfig, asked), str(place))
    if not (world.reference / "softpref.json").is_file():
        asked = {**BOTH, **REFERENCE, "base_model": options.base_model, "seed": seed}
        config = build_config(SFTConfig, asked)
        reference_stage.run(config, dataset_dir=str(world.rows), output_dir=str(world.reference))
    return world


def divided(source: Path, seed: int) -> tuple[list[str], list[str], list[str]]:
    """Lines of pairs to train on, of held-out ones of the same arguments, and of arguments held out.

    Pairs of an argument that is held out and one that is not are left out.
    """
    rng = random.Random(seed)
    lines = source.read_text(encoding="utf-8").splitlines()
    pairs = [
        [(pair["stance"], pair["argument_a"]), (pair["stance"], pair["argument_b"])]
        for pair in map(json.loads, lines)
    ]
    arguments = sorted({argument for pair in pairs for argument in pair})
    held = {argument for argument in arguments if rng.random() < 1 / 3}
    parts: tuple[list[str], list[str], list[str]] = [], [], []
    for line, (first, second) in zip(lines, pairs, strict=True):
        if first in held and second in held:
            parts[2].append(line)
        elif not held & {first, second}:
            parts[rng.random() < 1 / 4].append(line)
    return parts


def trained(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Train a model and measure it; of each held-out row and text, which prompt and whether it was right."""
    from datasets import load_from_disk
    from softpref.lm.loading import load_model, load_tokenizer
    from softpref.spo import SPOConfig, SPOTrainer

    world = prepare(run.seed, options)
    rows, seen, unseen = (load_from_disk(str(folder))["train"] for folder in world[:3])
    args = SPOConfig(
        output_dir=str(world.reference.parent / "checkpoints"),
        **BOTH,
        **TRAIN,
        degree_weight=run.weight,
        **({"degree_levels": options.levels} if run.weight else {}),
        seed=run.seed,
        disable_tqdm=True,
    )
    trainer = SPOTrainer(
        load_model(str(world.reference)),
        args,
        rows,
        {"seen": seen, "unseen": unseen},
        processing_class=load_tokenizer(str(world.reference)),
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    before = world.reference.parent / "reference-lengths.json"
    if not before.is_file():
        before.write_text(json.dumps(lengths(trainer, trainer.ref_model)), encoding="utf-8")
    return {
        "seen": accuracy(trainer, "seen", seen),
        "unseen": accuracy(trainer, "unseen", unseen),
        "lengths": lengths(trainer, trainer.model),
        "reference_lengths": json.loads(before.read_text(encoding="utf-8")),
        "degree": degrees(trainer) if run.weight else None,
        "skipped": trainer.row_counts["train"].get("degree_skipped", 0),
        "steps": trainer.state.global_step,
        "logged": [log for log in trainer.state.log_history if "loss" in log],
        "seconds": seconds,
    }


def accuracy(trainer: Any, name: str, rows: Any) -> dict[str, list[Any]]:
    """Of the pairs that somebody won, and that take part: the prompt, and whether the reward agrees."""
    found = trainer.predict(trainer.eval_dataset[name])
    rewards, odds = found.predictions["rewards"], np.asarray(found.label_ids)
    margins = np.where(odds < 0.5, -1, 1) * (rewards[:, 0] - rewards[:, 1])
    decided = np.isfinite(margins) & (odds != 0.5)
    return {
        "prompts": [prompt for prompt, one in zip(rows["prompt"], decided, strict=True) if one],
        "right": (margins[decided] > 0).astype(float).tolist(),
    }


def lengths(trainer: Any, model: Any) -> dict[str, list[Any]]:
    """Tokens of completions that a model draws on the prompts; the same noise for every model."""
    from softpref.evaluation.measure import draw

    data = trainer.eval_dataset["unseen"]
    distinct = [list(ids) for ids in dict.fromkeys(tuple(prompt) for prompt in data.prompts)]
    prompts = [distinct[i % len(distinct)] for i in range(SAMPLES)]
    longest = trainer.args.max_completion_length
    drawn = draw(
        model, prompts, 1, max_new_tokens=longest, stop_ids=trainer.stop_ids, seed=0, batch_size=SAMPLES
    )
    return {
        "prompts": [i % len(distinct) for i in range(SAMPLES)],
        "tokens": [len(sample.completion) for (sample,) in drawn],
        "truncated": [float(sample.truncated) for (sample,) in drawn],
    }


@torch.no_grad()
def degrees(trainer: Any) -> dict[str, list[Any]]:
    """Of held-out texts at the levels of two epochs: prompt, level, tokens, and what the head says."""
    from softpref.lm.head import completion_hidden
    from softpref.spo.objective import packed
    from softpref.spo.rows import collate

    data, found = trainer.eval_dataset["unseen"], {"prompts": [], "levels": [], "tokens": [], "said": []}
    model = trainer.model.eval()
    for data.epoch in range(2):
        for start in range(0, len(data), 32):
            batch = collate([data[i] for i in range(start, min(start + 32, len(data)))])
            both, places = packed(batch, "degree_"), batch["degree_places"]
            ends = completion_hidden(model, both).states[both.lengths.cumsum(0)[places] - 1]
            said = trainer.degree_head(ends, batch["degree_sides"]).argmax(-1)
            prompts = [" ".join(map(str, data.rows[start + row]["prompt"])) for row in batch["degree_rows"]]
            found["prompts"] += prompts
            found["levels"] += batch["degree_levels"].tolist()
            found["tokens"] += (both.lengths[places] - 1).tolist()
            found["said"] += said.tolist()
    return found


def table(runs: Sequence[Run], output: Path) -> str:
    """A line for each γ, over the seeds that are there."""
    found: dict[float, dict[int, Mapping[str, Any]]] = {}
    for run in runs:
        if run.file(output).is_file():
            result = json.loads(run.file(output).read_text(encoding="utf-8"))
            found.setdefault(run.weight, {})[run.seed] = result
    lines = [
        "| γ | seeds | pairs of seen arguments | more than without | of unseen ones | more than without |"
        " tokens of samples | more than the reference | truncated | degree accuracy | length alone |"
        " seconds |",
        f"|{' --: |' * 12}",
    ]
    for weight, seeds in sorted(found.items()):
        base = {seed: one for seed, one in found.get(0.0, {}).items() if seed in seeds}
        cells = [f"{weight:g}", str(len(seeds))]
        for kind in ("seen", "unseen"):
            cells.append(cell(*right(seeds, kind)))
            known = weight and len(base) == len(seeds)
            cells.append(cell(*difference(seeds, base, kind)) if known else "–")
        drawn = [one["lengths"] for one in seeds.values()]
        before = [one["reference_lengths"] for one in seeds.values()]
        tokens, places = joined(drawn, "tokens"), joined(drawn, "prompts")
        cells += [cell(tokens, places, 0), cell(tokens - joined(before, "tokens"), places, 1)]
        cells.append(cell(joined(drawn, "truncated"), places))
        cells += degree_cells([one["degree"] for one in seeds.values()]) if weight else ["–", "–"]
        cells.append(f"{np.mean([one['seconds'] for one in seeds.values()]):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def right(seeds: Mapping[int, Mapping[str, Any]], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Whether each held-out pair was right, and its prompt."""
    values = [one[kind] for one in seeds.values()]
    return joined(values, "right"), joined(values, "prompts")


def difference(
    seeds: Mapping[int, Mapping[str, Any]], base: Mapping[int, Mapping[str, Any]], kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Right with the loss less right without it, on the same rows."""
    pairs = [np.subtract(one[kind]["right"], base[seed][kind]["right"]) for seed, one in seeds.items()]
    return np.concatenate(pairs), right(seeds, kind)[1]


def degree_cells(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Accuracy of the heads, and of the best division of lengths, each found for its own seed's texts."""
    from softpref.objectives import length_accuracy

    heads = joined(found, "levels") == joined(found, "said")
    alone = []
    for one in found:
        counts = torch.zeros(max(one["tokens"]) + 1, max(one["levels"]) + 1)
        counts.index_put_(
            (torch.tensor(one["tokens"]), torch.tensor(one["levels"])), torch.tensor(1.0), accumulate=True
        )
        alone.append(length_accuracy(counts))
    return [cell(heads.astype(float), joined(found, "prompts")), f"{np.mean(alone):.3f}"]


def joined(found: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.concatenate([np.asarray(one[name]) for one in found])


def cell(values: np.ndarray, prompts: np.ndarray, digits: int = 3) -> str:
    """A mean with its interval over prompts, if there are enough for one."""
    from softpref.intervals import interval

    return interval(values, prompts).text(digits)


if __name__ == "__main__":
    sys.exit(main())
