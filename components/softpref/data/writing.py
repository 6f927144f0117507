"""Writes rows to the Arrow files of their splits, with statistics."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softpref.data.config import DataConfig
from softpref.data.degree import degree_rankings, sides
from softpref.data.finished import dataset_hash, row_bytes
from softpref.data.intake import Intake, RejectionLog
from softpref.data.splits import SPLITS, WITH_JUDGE
from softpref.data.texts import LeftOut, characters
from softpref.records.dataset import DatasetStats, PreferenceRow

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

EXAMPLES = 6  # rows shown on the page
_ROWS_PER_SHARD = 100_000
_LENGTH_BINS = 30
_QUANTILES = {"min": 0.0, "p05": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}


def write_preferences(
    intake: Intake,
    config: DataConfig,
    kept: list[int],
    splits: Mapping[int, str],
    folder: Path,
    rejections: RejectionLog,
    *,
    weighted: bool,
    dimensions: bool = False,
    names: Sequence[str] = (),
) -> tuple[DatasetStats, list[PreferenceRow]]:
    """The second pass: write kept rows to their splits. Returns what `stats.json` says of them, and examples.

    Args:
        weighted: whether rows have weights; those of a source without any weigh 1.
        dimensions: whether rows have dimensions.
        names: those of several sources.
    """
    made, several = bool(config.degree_ranking_weight), bool(names)
    features = _features(
        bool(intake.conversational), weighted or made, dimensions, several=several, made=made
    )
    present = WITH_JUDGE if config.judge_fraction else SPLITS
    writer = SplitWriter(folder / "work", present, features)
    shown = set(
        hash_order([i for i in kept if splits[intake.prompt_ids[i]] == "train"], config.seed)[:EXAMPLES]
    )
    keep = set(kept)
    prompts = {split: len({i for i in intake.prompt_ids if splits.get(i) == split}) for split in present}
    hashes = {split: hashlib.sha256() for split in present}
    kinds: Counter[str] = Counter()
    of_dimension: Counter[str] = Counter()
    sizes: Counter[int] = Counter()
    prompt_lengths, chosen_lengths, rejected_lengths = array("L"), array("L"), array("L")
    longer = 0.0  # pairs whose better completion is the longer one; of equal length: half
    confidences = array("d")
    rankings = 0
    examples: list[PreferenceRow] = []
    for index, accepted in enumerate(intake.accepted()):
        row = accepted.row
        if index not in keep:
            if intake.set_ids[index] in intake.contradictory and config.contradictions == "drop":
                reason = LeftOut("contradiction", "another row of these completions has another winner")
                origin = names[accepted.source] if names else ""
                rejections.add(accepted.source_row, accepted.place, reason, origin=origin)
            continue
        split = splits[intake.prompt_ids[index]]
        weight = accepted.weight if accepted.weight is not None or not (weighted or made) else 1.0
        record: PreferenceRow = {
            "prompt": row.prompt,
            "completions": row.completions,
            "kind": row.kind,
            "probability": row.probability,
            "weight": weight,
            "dimension": row.dimension,
            "source_row": accepted.source_row,
        }
        if names:
            record["source"] = names[accepted.source]
        if made:
            record["degree"] = False
        writer.write(split, {name: value for name, value in record.items() if name in features})
        hashes[split].update(row_bytes(row, weight))
        kinds[row.kind] += 1
        of_dimension[row.dimension] += 1
        sizes[len(row.completions)] += 1
        prompt_lengths.append(characters(row.prompt))
        best, *others = map(characters, row.completions)
        chosen_lengths.append(best)
        rejected_lengths.extend(others)
        longer += sum((best > other) + 0.5 * (best == other) for other in others)
        if row.probability is not None:
            confidences.append(row.probability)
        if index in shown:
            examples.append(record)
        if not made or split != "train":
            continue
        assert weight is not None
        for ranking in degree_rankings(row, config):
            share = weight * config.degree_ranking_weight / len(sides(config))
            writer.write(split, {**record, **ranking._asdict(), "weight": share, "degree": True})
            hashes[split].update(row_bytes(ranking, share))
            kinds[ranking.kind] += 1
            sizes[len(ranking.completions)] += 1
            rankings += 1
    writer.save(folder)
    completions = chosen_lengths + rejected_lengths
    return {
        "not_sampled": len(intake.set_ids) - len(kept) - rejections.left_out["contradiction"],
        **({"degree_rankings": rankings} if made else {}),
        "rows": dict(writer.counts),
        "prompts": prompts,
        "kinds": dict(kinds),
        **({"dimensions": dict(sorted(of_dimension.items()))} if dimensions else {}),
        "completions_per_row": {str(size): sizes[size] for size in sorted(sizes)},
        "labels": {"hard": len(kept) - len(confidences), "soft": len(confidences)},
        "confidence": _histogram(confidences, bins=10, limits=(0.5, 1.0)),
        "characters": {
            "prompt": _lengths(prompt_lengths, prompt_lengths),
            "completion": _lengths(completions, completions),
            "chosen": _lengths(chosen_lengths, completions),
            "rejected": _lengths(rejected_lengths, completions),
        },
        "longer_chosen": longer / len(rejected_lengths),
        "dataset_hash": dataset_hash([hashes[split].hexdigest() for split in present]),
        "test_hash": hashes["test"].hexdigest(),
    }, examples


def hash_order(indices: Iterable[int], seed: int) -> list[int]:
    return sorted(indices, key=lambda index: hashlib.blake2b(f"{seed} {index}".encode()).digest())


class SplitWriter:
    """Writes records to one Arrow file per split as they come, then saves them as a dataset."""

    def __init__(
        self, folder: Path, splits: Iterable[str], features: Mapping[str, Any], prefix: str = ""
    ) -> None:
        import datasets
        from datasets.arrow_writer import ArrowWriter

        self._features = datasets.Features(features)
        self._paths = {split: str(folder / f"{prefix}{split}.arrow") for split in splits}
        self._writers = {
            split: ArrowWriter(features=self._features, path=path, writer_batch_size=256)
            for split, path in self._paths.items()
        }
        self.counts = dict.fromkeys(self._paths, 0)

    def write(self, split: str, record: Mapping[str, object]) -> None:
        self._writers[split].write(dict(record))
        self.counts[split] += 1

    def dataset(self, split: str) -> Dataset:
        import datasets

        self._writers[split].finalize()
        return datasets.Dataset.from_file(self._paths[split])

    def save(self, folder: Path, skip_empty: bool = False) -> None:
        import datasets

        parts = {
            split: self.dataset(split) for split, count in self.counts.items() if count or not skip_empty
        }
        # An empty split saved with the default of no shards could not be loaded again.
        shards = {split: max(1, self.counts[split] // _ROWS_PER_SHARD) for split in parts}
        datasets.DatasetDict(parts).save_to_disk(str(folder), num_shards=shards)


def further_features(conversational: bool) -> dict[str, Any]:
    """Columns of what lies beside the preferences."""
    import datasets

    text = datasets.Value("string")
    messages = [{"role": text, "content": text}] if conversational else text
    return {"prompt": messages, "completion": messages, "label": datasets.Value("bool")}


def _features(
    conversational: bool, weighted: bool, dimensions: bool, *, several: bool, made: bool
) -> dict[str, Any]:
    import datasets

    text = further_features(conversational)["prompt"]
    return {
        "prompt": text,
        "completions": datasets.List(text),
        "kind": datasets.Value("string"),
        "probability": datasets.Value("float64"),
        **({"weight": datasets.Value("float64")} if weighted else {}),
        **({"dimension": datasets.Value("string")} if dimensions else {}),
        "source_row": datasets.Value("int64"),
        **({"source": datasets.Value("string")} if several else {}),
        **({"degree": datasets.Value("bool")} if made else {}),
    }


def _lengths(lengths: array[int], of: array[int]) -> dict[str, object]:
    """Mean, quantiles and histogram of `lengths`, with the bins that suit those `of` a whole."""
    import numpy as np

    values, whole = np.asarray(lengths), np.asarray(of)
    quantiles = {name: float(np.quantile(values, share)) for name, share in _QUANTILES.items()}
    # The longest hundredth shares the last bin, or an outlier would flatten all others. Bins are whole
    # characters wide, or some would hold more lengths than their neighbours.
    low, high = int(whole.min()), int(np.quantile(whole, 0.99))
    step = -(-(high + 1 - low) // _LENGTH_BINS)
    bins = -(-(high + 1 - low) // step)
    histogram = _histogram(np.minimum(values, high), bins, limits=(low, low + bins * step))
    return {"mean": float(values.mean()), **quantiles, "histogram": histogram}


def _histogram(
    values: array[float] | np.ndarray, bins: int, limits: tuple[float, float]
) -> dict[str, list[float]]:
    import numpy as np

    counts, edges = np.histogram(np.asarray(values, dtype=float), bins=bins, range=limits)
    return {"edges": [round(edge, 6) for edge in edges.tolist()], "counts": counts.tolist()}
