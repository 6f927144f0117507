"""Stage 3: align a reference model to preferences, from dataset and model folders to a model folder."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from softpref.artifacts import readable, strengths
from softpref.config import parse_overrides
from softpref.disk import says_disk_trouble
from softpref.errors import ConfigError, DataError
from softpref.judges.loading import load_judge
from softpref.judges.protocol import Judge, is_scoring, verdicts_of
from softpref.judges.texts import as_text, text_rows
from softpref.lm.course import TRAINING_OPTIONS, Course, dataset_stats
from softpref.lm.extrapolation import parse_weights, write_extrapolations
from softpref.lm.kept_rows import kept_rows
from softpref.lm.loading import load_tokenizer
from softpref.lm.scoring import computing_precision
from softpref.lm.sources import check_remote_code, local_source, source_name
from softpref.lm.tokenization import stop_token_ids
from softpref.records.dataset import judged_rows, read_dataset
from softpref.records.model import ROUND_FOLDER, load_metadata
from softpref.spo.checks import member_name, parse_dimension_weights
from softpref.spo.config import SPOConfig
from softpref.spo.given import loaded
from softpref.spo.lineage import describe_round, earlier_rounds, lineage_of, of_dimension
from softpref.spo.rows import RowsWithTokens
from softpref.spo.trainer import SPOTrainer

logger = logging.getLogger(__name__)

# What the model is: the objective, for a reader and for the exact optimum.
_DEFINING = (
    "method",
    "alpha",
    "anchor",
    "beta",
    "kl_beta",
    "kl_on",
    "preference_kind",
    "soft_labels",
    "weight_exponent",
    "label_smoothing",
    "nll_weight",
    "degree_weight",
    "rounds",
    "train_on",
    "judge",
    "judge_model",
)
# Of its own options, where and how it is computed, which changes nothing of what a run is.
_NOT_TRACKED = {
    *("output_dir", "reference_cache", "sampling_engine", "vllm_server", "sampling_batch_size", "gpus"),
    *("temperature", "top_p", "top_k", "repetition_penalty", "dataset_num_proc", "plain_forward"),
    *("extrapolation", "merge_adapter", "trust_remote_code", "logging_steps", "save_total_limit"),
    "remove_unused_columns",
    "judge_options",  # mostly addresses and budgets
    "earlier_models",
}
_TRACKED = (*(name for name in SPOConfig.__annotations__ if name not in _NOT_TRACKED), *TRAINING_OPTIONS)
_WRITTEN = ("extrapolation", "merge_adapter")
# Logged of steps, each a mean over those since the log before.
_OF_STEPS = (
    "rewards/saturated",
    "kl/data",
    "kl/sequence",
    "entropy",
    "completions/mean_length",
    "sampling/ess",
    "degree/accuracy",
    "degree/length_baseline",
)
_HEADLINE = ("train_loss", "eval_loss", "eval_rewards/accuracies", *_OF_STEPS)


@says_disk_trouble
def run(
    config: SPOConfig,
    *,
    dataset_dir: str | Path,
    reference_dir: str | Path,
    output_dir: str | Path,
    name: str = "",
    experiment: str = "softpref",
    parent_run_id: str = "",
    tracking_uri: str = "",
    checkpoint_dir: str = "",
) -> dict[str, float]:
    """Train a policy from the reference on the preferences of a dataset folder.

    With several dimensions, a model for each, one after another: the last in `output_dir`, the others in
    `round-1` and so on within it.

    Args:
        dataset_dir: a dataset folder of stage 1; its `prompts/`, where there is one, feeds the KL term, and
            `kto` learns from its `unpaired/`, too.
        reference_dir: the model to start from, which is also the frozen reference: a model folder, the URL of
            one, or a model of the MLflow registry.
        name: by default method and α or β, and the dimension, where there is one.
        output_dir, experiment, parent_run_id, tracking_uri, checkpoint_dir: see `softpref.lm.course.Course`.

    Returns:
        The final metrics (see `SPOTrainer`); those of samples as they were logged last; and `rows/NAME`, the
        counts of the training rows (`SPOTrainer.row_counts`).

    Raises:
        ConfigError, DataError: before training.
    """
    if len(config.dimension_order) > 1:
        rounds = [config.of_round(dimension) for dimension in config.dimension_order]
        where = {"experiment": experiment, "parent_run_id": parent_run_id, "tracking_uri": tracking_uri}
        for number, one in enumerate(rounds, start=1):
            inner = f"{ROUND_FOLDER}{number}" if number < len(rounds) else ""
            metrics = run(
                one,
                dataset_dir=dataset_dir,
                reference_dir=reference_dir,
                output_dir=Path(output_dir) / inner,
                name=f"{name}-{inner}" if name and inner else name,
                checkpoint_dir=str(Path(checkpoint_dir) / inner) if checkpoint_dir else "",
                **where,
            )
            config.distributed_state.wait_for_everyone()  # the first process saves
            reference_dir = Path(output_dir) / inner
        return metrics
    reference_dir = str(reference_dir)
    check_remote_code(reference_dir, config.trust_remote_code)
    member = member_name(config.method, config.alpha, config.beta)
    course = Course(
        "train",
        config,
        output_dir,
        name=name or (f"{member}-{config.dimension}" if config.dimension else member),
        experiment=experiment,
        parent_run_id=parent_run_id,
        tracking_uri=tracking_uri,
        checkpoint_dir=checkpoint_dir,
    )
    stats = dataset_stats(dataset_dir)
    dataset_hash = stats.get("dataset_hash", "")
    preferences, prompts = _load_preferences(dataset_dir)
    preferences, places = _of_dimension(config, preferences, dataset_dir)
    training_rows = _training_rows(config, dataset_dir, preferences)
    unpaired = _unpaired(config, dataset_dir)
    judge = None
    if config.uses_judge:
        judge = load_judge(
            config.judge,
            dataset_dir,
            model=config.judge_model,
            options=parse_overrides(config.judge_options),
            trust_remote_code=config.trust_remote_code,
            device=str(config.device),
            tracking_uri=tracking_uri,
            seed=config.seed,
        )
        if judge.name == "reward-model":
            config.judge_model = source_name(config.judge_model, tracking_uri=tracking_uri)  # as recorded
        _try_judge(judge, training_rows)
    reference = source_name(reference_dir, tracking_uri=tracking_uri)
    reference_dir = local_source(reference_dir, tracking_uri=tracking_uri)
    reference_metadata = load_metadata(reference_dir)
    lineage = lineage_of(reference, reference_metadata) if config.dimension else []
    earlier = earlier_rounds(lineage, _listed(config.earlier_models), tracking_uri=tracking_uri)
    weights = parse_dimension_weights(config.dimension_weights, len(lineage))
    # of a folder, what it was made from; else the model itself
    base_model = reference_metadata.get("base_model", reference) if reference == reference_dir else reference
    identity = {
        "dataset_hash": dataset_hash,
        "reference": reference,
        "reference_run_id": reference_metadata.get("run_id") or "",
        **({"unpaired_hash": stats["unpaired"]["hash"]} if unpaired is not None else {}),
        **{key: getattr(config, key) for key in _TRACKED},
    }
    finished = course.finished(identity, **{key: getattr(config, key) for key in _WRITTEN})
    if finished is not None:
        return finished
    course.claim()
    tokenizer = load_tokenizer(reference_dir, trust_remote_code=config.trust_remote_code)
    model = loaded(reference_dir, config)
    other_model = config.init_kwargs.keys() - {"dtype", "attn_implementation"}  # such as a quantized one
    kept = kept_rows(
        dataset_dir,
        reference_dir,
        tokenizer,
        stop_token_ids(tokenizer, model),
        precision=""
        if not config.takes_reference_logps or other_model
        else computing_precision(config, model),
        quiet=config.process_index > 0,
    )
    splits = {"train": training_rows, "validation": preferences.get("validation")}
    for split, tokens in kept.items():
        tokens = replace(tokens, places=places.get(split))
        if split == "validation" or config.train_on == "preferences":  # else of a row not all is read
            splits[split] = RowsWithTokens(splits[split], tokens)
    if unpaired is not None:  # whose tokens are not kept
        from datasets import concatenate_datasets

        splits["train"] = concatenate_datasets([training_rows, unpaired])
    course.timer.enter("reading" if kept and unpaired is None else "tokenizing")
    trainer = SPOTrainer(
        model,
        config,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=tokenizer,
        prompt_dataset=prompts,
        judge=judge,
        earlier_rounds=earlier,
    )
    with course.trained(trainer, stats, trainer.row_counts) as trained:
        if trained.model is not None:
            merged = config.use_peft and config.merge_adapter
            whole = trained.model.merge_and_unload() if merged else trained.model
            description = course.description(
                trained,
                **{key: getattr(config, key) for key in _DEFINING},
                extrapolation=0.0,
                base_model=base_model,
                dataset_hash=dataset_hash,
            )
            if config.dimension:
                own = describe_round(
                    config,
                    reference,
                    reference_dir,
                    weights,
                    dataset_hash=dataset_hash,
                    defining=_DEFINING,
                )
                description["lineage"] = [*lineage, own]
            description |= {
                "cut_rows": config.cut_rows,
                "row_counts": trainer.row_counts,
                "saturated": _mean_saturated(trainer.state.log_history),
                "adapter": config.use_peft and not merged,
            }
            if weights := parse_weights(config.extrapolation):
                write_extrapolations(
                    whole,
                    reference_dir,
                    tokenizer,
                    output_dir,
                    description,
                    weights,
                    trust_remote_code=config.trust_remote_code,
                )
            course.save(whole, tokenizer, description)
        last = {what: log[what] for log in trainer.state.log_history for what in _OF_STEPS if what in log}
        trained.metrics.update({what: value for what, value in last.items() if what not in trained.metrics})
    return trained.metrics


def _of_dimension(
    config: SPOConfig, preferences: dict[str, Any], dataset_dir: str | Path
) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """The splits' rows of the dimension that is asked for, and their places, where one is.

    A split of validation that has none is left out.
    """
    judged = [split for split, rows in preferences.items() if "dimension" in rows.column_names]
    if not config.dimension:
        if judged:
            logger.warning("%s has rows of several dimensions; all are trained on alike", dataset_dir)
        return preferences, {}
    found: dict[str, Any] = {}
    places: dict[str, list[int]] = {}
    for split in ("train", "validation"):
        if split in preferences:
            rows, where = of_dimension(preferences[split], config.dimension)
            if where:
                found[split], places[split] = rows, where
    if "train" not in found:
        names = {name for split in judged for name in preferences[split].unique("dimension") if name}
        raise ConfigError(
            f"{dataset_dir} holds no training preference of the dimension {config.dimension!r}; its "
            f"dimensions: {', '.join(sorted(names)) or 'none'}"
        )
    return found, places


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _try_judge(judge: Judge, rows: Any) -> None:
    """Have what a judge cannot do fail now, not rounds later: a prompt that it does not know, no answer."""
    if judge.name == "expert" and is_scoring(judge):
        asked = [as_text(row["prompt"], roles=True) for row in rows]
        judge.scores(asked, [""] * len(asked))
        return
    row = next(text_rows([rows[0]]))
    verdicts_of(judge, [row["prompt"]], row["completions"][:1], row["completions"][-1:])


def headline(metadata: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, float]:
    """α, β and the figures of a training that people compare, few enough for one page of the UI's table.

    Args:
        metadata: the model's `method`, `alpha` and `beta`.
        metrics: what `run` returned.
    """
    return readable({**strengths(metadata), **{name: metrics.get(name) for name in _HEADLINE}})


def _mean_saturated(logged: Sequence[Mapping[str, float]]) -> float | None:
    """The share of saturated margins over training; None where nothing was logged."""
    found = [log["rewards/saturated"] for log in logged if "rewards/saturated" in log]
    return statistics.fmean(found) if found else None


def _load_preferences(dataset_dir: str | Path) -> tuple[dict[str, Any], Any]:
    """Preference splits that hold rows, and the separate prompts if any."""
    folder = Path(dataset_dir)
    splits = {split: rows for split, rows in read_dataset(folder).items() if len(rows)}
    if "train" not in splits:
        raise DataError(f"{folder} holds no training preferences")
    prompts = read_dataset(folder / "prompts") if (folder / "prompts").is_dir() else None
    return splits, prompts


def _unpaired(config: SPOConfig, dataset_dir: str | Path) -> Any:
    """The dataset's unpaired completions, where training takes them; None where there are none."""
    folder = Path(dataset_dir) / "unpaired"
    return read_dataset(folder) if config.takes_unpaired and folder.is_dir() else None


def _training_rows(config: SPOConfig, dataset_dir: str | Path, preferences: dict[str, Any]) -> Any:
    """The preferences, or for self-play the demonstrations where the dataset has some."""
    folder = Path(dataset_dir) / "sft"
    if config.train_on == "preferences":
        return preferences["train"]
    if config.train_on == "samples" or not folder.is_dir():
        return judged_rows(preferences["train"])
    demonstrations = read_dataset(folder).get("train", ())
    if not len(demonstrations):
        raise DataError(f"{folder} holds no training demonstration, which self-play learns from")
    return demonstrations
