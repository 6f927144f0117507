"""What every member of an evaluation is measured on and against. Measures no member."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from softpref.disk import what_is_at
from softpref.errors import ConfigError, DataError
from softpref.evaluation.config import EvaluationConfig
from softpref.evaluation.doubts import shared_pairs
from softpref.evaluation.harness import Tasks
from softpref.evaluation.identity import identify
from softpref.evaluation.measure import draw_samples, reference_accuracy
from softpref.evaluation.models import Models, check_prompts, load_reference, tokenize_prompts
from softpref.evaluation.optima import theory_samples
from softpref.judges.loading import check_judge, load_judge
from softpref.judges.outcomes import read_outcomes
from softpref.judges.protocol import is_scoring
from softpref.judges.reliability import agreement
from softpref.judges.texts import text_rows
from softpref.records.dataset import OUTCOMES_FILE, PreferenceRow, Text, read_dataset
from softpref.records.evaluation import DrawnText, EvaluatedOn, JudgedBy
from softpref.records.model import ModelMetadata
from softpref.timings import PhaseTimer

if TYPE_CHECKING:
    from datasets import DatasetDict

    from softpref.evaluation.theory import ReferenceSamples
    from softpref.intervals import Bootstrap
    from softpref.judges.outcomes import Outcomes
    from softpref.judges.protocol import Judge
    from softpref.lm.tokenization import TokenizedPrompt

Key = TypeVar("Key")
Value = TypeVar("Value")

logger = logging.getLogger(__name__)


class Task(NamedTuple):
    """What every member is measured on and against.

    Attributes:
        identity, identity_parts: `evaluation_id`, and `evaluated_on`, which it is made of.
        prompts, tokenized, rows: held-out prompts to draw from, their ids, their preference rows to score.
        outcomes: by prompt, where the dataset knows them.
        judged: what is known of the judge.
        judge_warnings: about how that was measured.
        models: without the policy.
        reference: samples of the reference, by prompt.
        theory: see `theory_samples`.
        tasks: of the LM Evaluation Harness, if any are asked for.
    """

    identity: str
    identity_parts: EvaluatedOn
    prompts: list[Text]
    tokenized: list[TokenizedPrompt]
    rows: list[PreferenceRow]
    outcomes: dict[str, Outcomes]
    judge: Judge
    judged: JudgedBy
    judge_warnings: list[str]
    bootstrap: Bootstrap
    models: Models
    reference: list[list[DrawnText]]
    theory: list[ReferenceSamples]
    tasks: Tasks | None


def prepare(
    config: EvaluationConfig,
    dataset: DatasetDict,
    places: Mapping[str, str],
    metadata: ModelMetadata,
    tasks: Tasks | None,
    timer: PhaseTimer,
) -> Task:
    """Choose prompts and rows, find the judge, load the reference and draw its samples."""
    from softpref.evaluation.metrics import prompt_key
    from softpref.intervals import Bootstrap

    bootstrap = Bootstrap(config.bootstrap_samples, config.confidence, config.seed)
    rows: list[PreferenceRow] = list(dataset[config.split])
    chosen = _choose(
        {prompt_key(row["prompt"]): row["prompt"] for row in rows}, config.max_prompts, config.seed
    )
    prompts = list(chosen.values())
    kept = list(_choose(dict(enumerate(rows)), config.max_rows, config.seed).values())
    outcomes_path = Path(places["dataset"]) / OUTCOMES_FILE
    outcomes = read_outcomes(outcomes_path) if outcomes_path.is_file() else {}
    judge, judged, judge_warnings = _judge(config, dataset, places["dataset"], outcomes, bootstrap)
    for doubt in shared_pairs(judge, metadata.get("dataset_hash")):
        logger.warning("%s", doubt)
    models = load_reference(config, places, metadata)
    tokenized = tokenize_prompts(models, prompts, rows)
    check_prompts(models.reference, models, tokenized)
    timer.enter("evaluation")
    if judged.accuracy is not None:
        held = dict(enumerate(dataset["validation"]))
        known = list(_choose(held, config.max_rows, config.seed).values())
        judged = judged._replace(reference_accuracy=reference_accuracy(models, known, bootstrap))
    return Task(
        *identify(config, rows, judge, places["reference"], models.max_new_tokens),
        prompts,
        tokenized,
        kept,
        outcomes,
        judge,
        judged,
        judge_warnings,
        bootstrap,
        models,
        draw_samples(models, "reference", prompts, tokenized, judge, config)[1],
        theory_samples(models, prompts, tokenized, judge, config),
        tasks,
    )


def load_dataset(dataset_dir: str, config: EvaluationConfig) -> DatasetDict:
    """The dataset, refused if it cannot give the judge or the split."""
    path, split = Path(dataset_dir), config.split
    if not os.path.isdir(path):
        raise ConfigError(f"dataset {path} {what_is_at(path)}; give a folder of the data stage")
    if not (path / "dataset_dict.json").is_file():
        raise ConfigError(f"{path} is not a dataset folder of the data stage (it has no dataset_dict.json)")
    # before the import below, which takes seconds
    check_judge(config.judge, path, model=config.judge_model, options=config.judge_options)
    dataset: DatasetDict = read_dataset(path)
    if split not in dataset:
        raise DataError(f"{path} has no split {split!r}; it has {', '.join(dataset)}")
    if not len(dataset[split]):
        raise DataError(f"{path}: the split {split!r} is empty; hold out a fraction of the prompts for it")
    return dataset


def _judge(
    config: EvaluationConfig,
    dataset: DatasetDict,
    dataset_dir: str,
    outcomes: dict[str, Outcomes],
    bootstrap: Bootstrap,
) -> tuple[Judge, JudgedBy, list[str]]:
    """The judge, how far it agrees with the preferences of the validation split, and warnings of that.

    The expert is not asked.

    The validation split, since nothing is chosen by it: neither policies nor judges, whose training ends
    when its schedule does. The test split's prompts rank policies.
    """
    judge = load_judge(
        config.judge,
        dataset_dir,
        model=config.judge_model,
        trust_remote_code=config.trust_remote_code,
        device=config.device,
        tracking_uri=config.tracking_uri,
        splits=dataset,
        outcomes=outcomes,
        seed=config.seed,
        max_rows=config.judge_max_rows,
        options=config.judge_options,
    )
    judged = JudgedBy(judge.name, judge.description)
    if judge.name == "expert":
        return judge, judged, []
    rows = text_rows(dataset.get("validation", ()))
    most = 0 if is_scoring(judge) else config.judge_validation_pairs
    found, warnings = agreement(judge, rows, bootstrap, most=most)
    return judge, judged._replace(**found), warnings


def _choose(items: dict[Key, Value], most: int, seed: int) -> dict[Key, Value]:
    """All items, or `most` of them by seed, in their order."""
    import numpy as np

    if not most or len(items) <= most:
        return items
    keep = set(np.random.default_rng(seed).choice(len(items), most, replace=False).tolist())
    return {key: value for i, (key, value) in enumerate(items.items()) if i in keep}
