"""Stage 2: the reference model, by supervised fine-tuning on completions. Knows no preference loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from softpref.artifacts import readable
from softpref.disk import says_disk_trouble
from softpref.errors import ConfigError, DataError
from softpref.lm.course import TRAINING_OPTIONS, Course, dataset_stats
from softpref.lm.kept_rows import keep_rows
from softpref.lm.loading import load_model, load_tokenizer
from softpref.lm.scoring import check_sequences
from softpref.lm.sources import local_source, source_name
from softpref.lm.tokenization import stop_token_ids
from softpref.records.dataset import judged_rows, read_dataset
from softpref.sft.config import SFTConfig
from softpref.sft.scratch import build_model, build_tokenizer
from softpref.sft.trainer import Demonstrations, SFTTrainer, collate

_TRACKED = ("max_prompt_length", "max_completion_length", *TRAINING_OPTIONS)
_WRITTEN = ("keep_rows", "keep_reference_logps")
_LOSS_LIMIT = 700.0  # whose exponential is still a number


@says_disk_trouble
def run(
    config: SFTConfig,
    *,
    dataset_dir: str | Path,
    output_dir: str | Path,
    name: str = "reference",
    experiment: str = "softpref",
    parent_run_id: str = "",
    tracking_uri: str = "",
    checkpoint_dir: str = "",
) -> dict[str, float]:
    """Train the reference model on demonstrations, or on the best completions where there are none.

    Args:
        dataset_dir: a dataset folder of stage 1.
        output_dir, name, experiment, parent_run_id, tracking_uri, checkpoint_dir: see
            `softpref.lm.course.Course`.

    Returns:
        The final metrics, `train_loss` and `eval_loss` among them (nats per completion token), and
        `rows/NAME`, the counts of the training demonstrations.

    Raises:
        ConfigError, DataError: before training.
    """
    course = Course(
        "sft",
        config,
        output_dir,
        name=name,
        experiment=experiment,
        parent_run_id=parent_run_id,
        tracking_uri=tracking_uri,
        checkpoint_dir=checkpoint_dir,
    )
    stats = dataset_stats(dataset_dir)
    dataset_hash = stats.get("dataset_hash", "")
    demonstrations = _load_demonstrations(dataset_dir)
    if config.base_model:
        options: dict[str, Any] = {
            "trust_remote_code": config.trust_remote_code,
            "revision": config.revision or None,
        }
        base = local_source(config.base_model, tracking_uri=tracking_uri)
        config.base_model = source_name(config.base_model, tracking_uri=tracking_uri)  # as it is recorded
    from_nothing = {"model_config": config.model_config, "vocab_size": config.vocab_size}
    identity = {
        "dataset_hash": dataset_hash,
        "base_model": config.base_model or "from nothing",
        **({} if config.base_model else from_nothing),
        **{key: getattr(config, key) for key in _TRACKED},
    }
    finished = course.finished(identity, **{key: getattr(config, key) for key in _WRITTEN})
    if finished is not None:
        return finished
    if config.base_model:
        tokenizer = load_tokenizer(base, **options)
        model = load_model(base, **options)
    else:
        tokenizer = build_tokenizer(_texts(demonstrations["train"]), vocab_size=config.vocab_size)
        model = build_model(config.model_config, tokenizer)
    course.timer.enter("tokenizing")
    stop_ids = stop_token_ids(tokenizer, model)
    splits = {
        split: Demonstrations(rows, tokenizer, config, stop_ids, f"{split} demonstration")
        for split, rows in demonstrations.items()
    }
    check_sequences(model, [(row.prompt, row.completion) for split in splits.values() for row in split.rows])
    course.claim()
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=splits["train"],
        eval_dataset=splits.get("validation"),
        data_collator=collate,
        processing_class=tokenizer,
    )
    row_counts = {split: dict(rows.counts) for split, rows in splits.items()}
    weights = sum(parameter.numel() for parameter in model.parameters())
    with course.trained(trainer, stats, row_counts, parameters=weights) as trained:
        if trained.model is not None:
            description = course.description(trained, base_model=config.base_model, dataset_hash=dataset_hash)
            description |= {"row_counts": row_counts, "adapter": False}
            course.save(trained.model, tokenizer, description)
        if config.keep_rows:
            with trainer.scoring_team() if config.keep_reference_logps else nullcontext() as team:
                if trained.model is not None:
                    course.timer.enter("tokenizing")
                    keep_rows(dataset_dir, output_dir, trained.model, config, team)
    return trained.metrics


def headline(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Final losses in nats per completion token, and the perplexity of the validation demonstrations.

    Args:
        metrics: what `run` returned.
    """
    losses = {name: metrics.get(name) for name in ("train_loss", "eval_loss")}
    perplexity = math.exp(metrics["eval_loss"]) if metrics.get("eval_loss", math.inf) < _LOSS_LIMIT else None
    return readable({**losses, "eval_perplexity": perplexity})


def _load_demonstrations(dataset_dir: str | Path) -> dict[str, Any]:
    """Split name → rows with `prompt` and `completion`."""
    folder = Path(dataset_dir)
    if (folder / "sft").is_dir():
        splits = {split: rows for split, rows in read_dataset(folder / "sft").items() if len(rows)}
    else:
        preferences = read_dataset(folder)
        splits = {
            split: judged_rows(preferences[split])
            .map(lambda row: {"completion": row["completions"][0]}, keep_in_memory=True)
            .select_columns(["prompt", "completion"])
            for split in ("train", "validation")
            if split in preferences and len(preferences[split])
        }
    if "train" not in splits:
        raise DataError(f"{folder} holds no training row for SFT")
    return splits


def _texts(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for row in rows:
        for text in (row["prompt"], row["completion"]):
            if not isinstance(text, str):
                raise ConfigError(
                    "training from nothing needs plain text; messages need a chat model as base_model"
                )
            yield text
