"""Judges of real preferences: how often each agrees with people on held-out prompts, the same for all.

    python tests/benchmarks/judges.py --base-model SmolLM2-135M-Instruct.Q4_1.gguf --seeds 1

A reward model (`softpref judge`) and the judge of words and lengths (`bradley-terry`) learn from the same
split `judge`; beside them length alone. Splits by several seeds are pooled: intervals are over prompts,
however many splits hold one out. Runs that are there already are not repeated, so that it can be stopped and
started again. Writes `judges.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks.comparisons import REAL, ROOT

DATA: dict[str, dict[str, Any]] = {  # what differs from the comparisons' rows, which have no split for judges
    "convarg": {"prompt_template": "{debate}: {stance}", "min_votes": 3, "rows": 400},
    "pandalm": {},
}
CONVARG_COLUMNS = {
    "completion_a": "argument_a",
    "completion_b": "argument_b",
    "votes_a": "votes_a",
    "votes_b": "votes_b",
    "votes_equal": "votes_equal",
}
SPLITS = {"validation_fraction": 0.4, "test_fraction": 0.0, "judge_fraction": 0.9}
TRAINING = {"heads": 8, "max_length": 256, "per_device_train_batch_size": 4, "save_strategy": "no"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("judges"), help="folder of runs and table")
    parser.add_argument("--base-model", default="", help="of the reward model")
    parser.add_argument("--datasets", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="where they are")
    parser.add_argument("--seeds", type=int, default=1, help="splits by seeds 0 … SEEDS-1 (default 1)")
    parser.add_argument("--data-overrides", default="{}", help="JSON, options of `softpref data`")
    parser.add_argument("--overrides", default="{}", help="JSON, options of `softpref judge`")
    parser.add_argument(
        "--shares", nargs="+", type=float, help="of the training prompts; then of words and lengths alone"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{options.output.absolute()}/mlflow.db")
    if options.shares:
        print("\n".join(line for name in options.datasets for line in by_share(name, options)))
        return 0
    for name in options.datasets:
        for seed in range(options.seeds):
            file = options.output / f"{name}-{seed}.json"
            if not file.is_file():
                file.write_text(json.dumps(measured(name, seed, options)))
            (options.output / "judges.md").write_text(table(options.output), encoding="utf-8")
    print(table(options.output))
    return 0


def measured(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Whether each judge is right on each held-out pair of one split, and the pair's prompt."""
    import datasets
    from softpref.config import build_config
    from softpref.judges.loading import load_judge
    from softpref.judges.reliability import decided_pairs, right
    from softpref.judges.texts import text_rows
    from softpref.reward_model.config import RewardModelConfig
    from softpref.reward_model.stage import run as train

    data = options.output / f"{name}-{seed}-data"
    prepare(name, data, options, seed=seed, **SPLITS)
    splits = datasets.load_from_disk(str(data))
    pairs = decided_pairs(text_rows(splits["validation"]))
    prompts, better, worse = (list(part) for part in zip(*pairs, strict=True))
    training = {**TRAINING, "base_model": options.base_model, "seed": seed}
    config = build_config(RewardModelConfig, training, json.loads(options.overrides))
    model = options.output / f"{name}-{seed}-judge"
    metrics = train(config, dataset_dir=data, output_dir=model)
    judges = {
        "reward model": load_judge("reward-model", data, model=str(model)),
        "words and lengths": load_judge("bradley-terry", data, seed=seed),
    }
    found = {
        one: right(judge.probabilities(prompts, better, worse) - 0.5).tolist()
        for one, judge in judges.items()
    }
    longer = right(np.array([len(one) - len(other) for _, one, other in pairs], float)).tolist()
    rows = len(splits["judge"])
    return {"prompts": prompts, "rows": rows, "metrics": metrics, "right": {**found, "longer": longer}}


def by_share(name: str, options: argparse.Namespace) -> list[str]:
    """Agreement of words and lengths that learn from a share of the training prompts, beside all of them."""
    import datasets
    from softpref.data.splits import assign_splits, prompt_key
    from softpref.intervals import interval
    from softpref.judges.bradley_terry import BradleyTerryJudge
    from softpref.judges.reliability import decided_pairs, right
    from softpref.judges.texts import preference_pairs, text_rows

    folder = options.output / f"{name}-whole"
    prepare(name, folder, options, seed=0, validation_fraction=0.0, test_fraction=0.0)
    rows = list(text_rows(datasets.load_from_disk(str(folder))["train"]))
    keys = [prompt_key(row["prompt"]) for row in rows]
    found: dict[float, list[float]] = {share: [] for share in (1.0, *options.shares)}
    longer, prompts = [], []
    for seed in range(options.seeds):
        for share, values in found.items():
            given = {"validation_fraction": 0.3, "test_fraction": 0.0, "seed": seed}
            split = assign_splits(keys, judge_fraction=share % 1, **given)
            part = {
                name: [row for row, key in zip(rows, keys, strict=True) if split[key] == name]
                for name in ("train", "judge", "validation")
            }
            judge = BradleyTerryJudge(preference_pairs(part["judge"] or part["train"]), seed=seed)
            asked, better, worse = zip(*decided_pairs(part["validation"]), strict=True)
            values += right(judge.probabilities(asked, better, worse) - 0.5).tolist()
        prompts += map(str, asked)
        longer += right(
            np.array([len(a) - len(b) for a, b in zip(better, worse, strict=True)], float)
        ).tolist()
    lines = []
    for share, values in {**found, "longer is better": longer}.items():
        own, less = interval(values, prompts), interval(np.subtract(values, found[1.0]), prompts)
        spans = [one.text() for one in (own, less)]
        lines.append(f"| {name} | {own.prompts} | {own.n} | {share} | {spans[0]} | {spans[1]} |")
    return lines


def prepare(name: str, folder: Path, options: argparse.Namespace, **given: Any) -> None:
    """A dataset folder of the data stage, unless it is there."""
    from softpref.config import build_config
    from softpref.data.config import DataConfig
    from softpref.data.stage import run

    if (folder / "stats.json").is_file():
        return
    columns = {"columns": CONVARG_COLUMNS} if name == "convarg" else {}
    source = {"source": str(options.data / name / "pairs.jsonl"), **columns}
    values = {"as_messages": True, **DATA[name], **REAL[name], **source, **given}
    run(build_config(DataConfig, values, json.loads(options.data_overrides)), str(folder))


def table(folder: Path) -> str:
    """Agreement of each judge, and the paired differences to length and to words, over all splits there."""
    from softpref.intervals import interval

    lines = [
        "| preferences | splits | rows | held-out prompts | pairs | judge | agreement | less length "
        "| less words and lengths |",
        "| :-- | --: | --: | --: | --: | :-- | :-- | :-- | :-- |",
    ]
    for name in DATA:
        runs = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{name}-[0-9].json"))]
        if not runs:
            continue
        prompts = [prompt for run in runs for prompt in run["prompts"]]
        right = {judge: np.concatenate([run["right"][judge] for run in runs]) for judge in runs[0]["right"]}
        longer = right.pop("longer")
        which = "longer" if longer.mean() >= 0.5 else "shorter"
        length = longer if which == "longer" else 1 - longer
        sizes = sorted({run["rows"] for run in runs})
        rows = " to ".join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))
        for judge, values in {**right, f"{which} is better": length}.items():
            less = [
                interval(values - other, prompts)
                for other in (length, right["words and lengths"])
                if judge in right and other is not values
            ]
            spans = [one.text(3) for one in (interval(values, prompts), *less)]
            cells = [
                name,
                len(runs),
                rows,
                len({*prompts}),
                len(prompts),
                judge,
                *spans,
                *["", ""][len(less) :],
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
