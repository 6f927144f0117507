"""Trains a judge: a language model with reward heads, on preferences that no policy learns from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from softpref.artifacts import readable
from softpref.disk import says_disk_trouble
from softpref.errors import ConfigError, DataError
from softpref.judges.reliability import agreement
from softpref.judges.reward_model import RewardModelJudge
from softpref.judges.texts import text_rows
from softpref.lm.course import TRAINING_OPTIONS, Course, dataset_stats
from softpref.lm.loading import load_model, load_tokenizer, with_reward_heads
from softpref.lm.rating import RewardHeads
from softpref.lm.scoring import check_ids
from softpref.lm.sources import local_source, source_name
from softpref.records.dataset import JUDGE_SPLIT, read_dataset
from softpref.records.model import REWARD_STAGE
from softpref.reward_model.config import RewardModelConfig
from softpref.reward_model.trainer import RatedRows, RewardTrainer, bootstrap_weights

logger = logging.getLogger(__name__)

_TRACKED = (
    "split",
    "heads",
    "max_length",
    "layers",
    "frozen_layers",
    "use_peft",
    "lora_r",
    *TRAINING_OPTIONS,
)


@says_disk_trouble
def run(
    config: RewardModelConfig,
    *,
    dataset_dir: str | Path,
    output_dir: str | Path,
    name: str = "judge",
    experiment: str = "softpref",
    parent_run_id: str = "",
    tracking_uri: str = "",
    checkpoint_dir: str = "",
) -> dict[str, float]:
    """Train a reward model on the preferences of a split, and measure it on the validation split.

    The output folder is a checkpoint that `AutoModelForSequenceClassification.from_pretrained` loads, with a
    label for each head; `judge_model` of evaluation and training takes it.

    Args:
        dataset_dir: a dataset folder of stage 1, made with `judge_fraction`.
        output_dir, name, experiment, parent_run_id, tracking_uri, checkpoint_dir: see
            `softpref.lm.course.Course`.

    Returns:
        The final metrics: `train_loss` and `eval_loss` in nats (a coin has log 2), and for the figures of
        `softpref.judges.reliability.agreement` on the validation split `accuracy`, `accuracy/low`,
        `accuracy/high` and so on.

    Raises:
        ConfigError, DataError: before training.
    """
    course = Course(
        REWARD_STAGE,
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
    splits = _load_splits(dataset_dir, config.split)
    options: dict[str, Any] = {
        "trust_remote_code": config.trust_remote_code,
        "revision": config.revision or None,
    }
    base = local_source(config.base_model, tracking_uri=tracking_uri)
    config.base_model = source_name(config.base_model, tracking_uri=tracking_uri)  # as it is recorded
    identity = {
        "dataset_hash": dataset_hash,
        "base_model": config.base_model,
        **{key: getattr(config, key) for key in _TRACKED},
    }
    finished = course.finished(identity)
    if finished is not None:
        return finished
    tokenizer = load_tokenizer(base, **options)
    model = with_reward_heads(
        load_model(base, **options), config.heads, tokenizer.pad_token_id, config.layers
    )
    _freeze(model, config.frozen_layers)
    course.timer.enter("tokenizing")
    learned, held_out = splits["train"], splits.get("validation")
    train = RatedRows(
        learned, bootstrap_weights(learned, config.heads, config.seed), tokenizer, config, "preference"
    )
    validation = None
    if held_out is not None:
        even = np.ones((len(held_out), config.heads))
        validation = RatedRows(held_out, even, tokenizer, config, "held-out preference")
    check_ids(model, (text["input_ids"] for row in train.rows for text in row.texts))
    course.claim()
    trained_part = _with_adapter(model, config)
    if _only_heads_learn(model, config):
        course.timer.enter("reading")
        quiet = bool(config.disable_tqdm) or config.process_index > 0
        model.to(config.device)
        train.read_by(model, "text", quiet=quiet)
        if validation is not None:
            validation.read_by(model, "held-out text", quiet=quiet)
        trained_part = RewardHeads(model)
    trainer = RewardTrainer(
        model=trained_part,
        args=config,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
    )
    row_counts = {"train": {"given": len(train)}}
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with course.trained(trainer, stats, row_counts, trained_parameters=weights) as trained:
        if trained.model is not None:
            whole = trained.model.merge_and_unload() if config.use_peft else trained.model
            if isinstance(whole, RewardHeads):
                whole = model  # whose heads they are
            course.timer.enter("evaluation")
            judge = RewardModelJudge(whole, tokenizer, max_length=config.max_length)
            found, _ = agreement(judge, text_rows(held_out or ()))
            trained.metrics.update(_numbers(found))
            trainer.log({f"judge/{one}": value for one, value in _numbers(found).items()})  # and so tracked
            _say(found)
            course.timer.enter("saving")
            description = course.description(trained, base_model=config.base_model, dataset_hash=dataset_hash)
            description |= {"split": config.split, "heads": config.heads, "row_counts": row_counts}
            course.save(whole, tokenizer, {**description, **readable(_numbers(found))}, _write_files)
    return trained.metrics


def headline(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Final losses in nats per row, and the agreement with held-out preferences beside length alone.

    Args:
        metrics: what `run` returned.
    """
    return readable(
        {name: metrics.get(name) for name in ("train_loss", "eval_loss", "accuracy", "length_accuracy")}
    )


def _load_splits(dataset_dir: str | Path, split: str) -> dict[str, Any]:
    """The preferences to learn from, as `train`, and those of the validation split, if there are any."""
    splits = read_dataset(dataset_dir)
    if split not in splits or not len(splits[split]):
        remedy = "make the dataset anew with judge_fraction" if split == JUDGE_SPLIT else "name another"
        raise DataError(
            f"{dataset_dir} has no preferences in a split {split!r} for a judge to learn from; {remedy}"
        )
    if split == "validation":
        raise ConfigError("split validation is what a judge is measured on; let it learn from another")
    if split == "train":
        logger.warning(
            "the judge learns from the split train: no policy may learn from the same pairs, or both share "
            "their errors; judge_fraction of the data stage gives a judge prompts of its own"
        )
    found = {"train": splits[split]}
    if len(splits.get("validation", ())):
        found["validation"] = splits["validation"]
    return found


def _freeze(model: Any, layers: int) -> None:
    """Keep the embeddings and the lowest layers as they are.

    Raises:
        ConfigError: the model has fewer layers.
    """
    from torch import nn

    if not layers:
        return
    stacks = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    stack: Any = max(stacks, key=len, default=())
    if layers > len(stack):
        raise ConfigError(
            f"RewardModelConfig.frozen_layers is {layers}, and the model has {len(stack)} layers"
        )
    for module in (model.get_input_embeddings(), *stack[:layers]):
        module.requires_grad_(False)
    if layers == len(stack):  # what stands above the last layer, such as a norm
        model.base_model.requires_grad_(False)


def _only_heads_learn(model: Any, config: RewardModelConfig) -> bool:
    """Whether the heads are given the same of a text in every batch, and stand by themselves."""
    if config.fsdp or config.neftune_noise_alpha or not hasattr(model, "score"):
        return False
    return not any(weights.requires_grad for weights in model.base_model.parameters())


def _with_adapter(model: Any, config: RewardModelConfig) -> Any:
    if not config.use_peft:
        return model
    from peft import LoraConfig, get_peft_model

    targets: Any = config.lora_target_modules
    if targets != "all-linear":
        targets = [name.strip() for name in targets.split(",") if name.strip()]
    adapter = LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, target_modules=targets, task_type="SEQ_CLS"
    )
    return get_peft_model(model, adapter)


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """Figures as metrics: the value, and the ends of its interval."""
    return {
        f"{name}{end}": value
        for name, figure in figures.items()
        for end, value in (("", figure.value), ("/low", figure.low), ("/high", figure.high))
        if value is not None
    }


def _say(found: Mapping[str, Any]) -> None:
    if not found:
        logger.warning("there are no validation preferences: how far the judge can be trusted is unknown")
        return

    logger.warning(
        "the judge agrees with %s of the validation preferences, length alone with %s; difference %s",
        *(found[name].text() for name in ("accuracy", "length_accuracy", "over_length")),
    )


def _write_files(model: Any, tokenizer: Any, folder: Path, description: dict[str, Any]) -> None:
    """Write a reward model's safetensors, tokenizer and model card."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = "\n".join(f"| {key} | {value} |" for key, value in description.items())
    (folder / "README.md").write_text(
        "---\nlibrary_name: transformers\npipeline_tag: text-classification\n"
        "tags: [softpref, reward-model]\n---\n\n"
        f"# {description['name']}\n\n"
        "A reward model, trained with softpref. Each label is a reward head; the score of an answer is "
        "their mean, in nats by Bradley-Terry: σ(difference of two scores) is the probability that the first "
        f"answer is preferred.\n\n| setting | value |\n| --- | --- |\n{rows}\n",
        encoding="utf-8",
    )
