"""Stage 2: the reference model, by supervised fine-tuning on completions. Knows no preference loss."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from softpref.artifacts import readable
from softpref.config import closest
from softpref.errors import ConfigError, DataError, SoftprefError
from softpref.lm.course import TRAINING_OPTIONS, Course, dataset_stats
from softpref.lm.head import completion_hidden
from softpref.lm.kept_rows import keep_rows
from softpref.lm.loading import (
    load_model,
    load_tokenizer,
    local_source,
    source_name,
)
from softpref.lm.packing import PackedBatch, pack_sequences
from softpref.lm.scoring import Ids, TeamScorer, check_ids, check_positions, score_sequences
from softpref.lm.sharding import whole_weights
from softpref.lm.tokenization import TokenizedSequence, log_findings, row_findings, stop_token_ids
from softpref.lm.tokenizing import RowText, tokenize_rows
from softpref.lm.training import (
    GuardedTrainer,
)
from softpref.progress import follow
from softpref.sft.config import SFTConfig

_TRACKED = ("max_prompt_length", "max_completion_length", *TRAINING_OPTIONS)
_LOSS_LIMIT = 700.0  # whose exponential is still a number


class SFTTrainer(GuardedTrainer):
    """A trainer whose loss is the mean negative log-probability of completion tokens, in nats.

    The mean is over all completion tokens of an optimizer step, however it is cut.
    """

    args: SFTConfig

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.model_accepts_loss_kwargs = False  # losses are scaled here, over the global batch

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, and how many completion tokens all processes have."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = torch.tensor(float(sum(len(batch["targets"]) for batch in batches)), device=device)
        return batches, self.accelerator.reduce(tokens, reduction="sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = PackedBatch(*(inputs[name] for name in PackedBatch._fields))
        losses = -completion_hidden(model, batch, plain=self.args.plain_forward).logps()
        if num_items_in_batch is None:
            return losses.mean()
        scale = self.current_gradient_accumulation_steps * self.args.world_size
        return losses.sum() / num_items_in_batch * scale

    @contextmanager
    def scoring_team(self) -> Iterator[TeamScorer]:
        """All processes score sequences under the model for the first, while that one is within."""
        model = self.accelerator.unwrap_model(self.model)

        def compute(sequences: list[tuple[Ids, Ids]]) -> list[float]:
            size = self.args.per_device_train_batch_size
            return score_sequences(model, sequences, batch_size=size, plain=self.args.plain_forward).tolist()

        with whole_weights(model), self.compute_loss_context_manager():
            team = TeamScorer(compute, self.args.process_index, self.args.world_size)
            if self.args.process_index:
                team.help()
                yield team
                return
            try:
                yield team
            finally:
                team.dismiss()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of an evaluation batch; no predictions are collected."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None


def run(
    config: SFTConfig,
    *,
    dataset_dir: str,
    output_dir: str,
    name: str = "reference",
    experiment: str = "softpref",
    parent_run_id: str = "",
    tracking_uri: str = "",
    checkpoint_dir: str = "",
) -> dict[str, float]:
    """Train the reference model on demonstrations, or on the best completions where there are none.

    Args:
        dataset_dir: a dataset folder of stage 1.
        output_dir: the model folder to write; must not hold a finished model.
        name: name of the model and of its tracking run.
        experiment, parent_run_id, tracking_uri: where tracking puts the run, and where a registered base
            model is; an empty URI takes `MLFLOW_TRACKING_URI`, or a local store.
        checkpoint_dir: where checkpoints are kept while training; by default inside `output_dir`. A run that
            was cut off continues from the newest complete one, and they are removed at the end.

    Returns:
        The final metrics, `train_loss` and `eval_loss` among them (nats per completion token), and
        `rows/NAME`, what was counted of the training demonstrations.

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
    dataset_hash = dataset_stats(dataset_dir).get("dataset_hash", "")
    demonstrations = _load_demonstrations(dataset_dir)
    if config.base_model:
        options: dict[str, Any] = {
            "trust_remote_code": config.trust_remote_code,
            "revision": config.revision or None,
        }
        base = local_source(config.base_model, tracking_uri=tracking_uri)
        config.base_model = source_name(config.base_model, tracking_uri=tracking_uri)  # as it is recorded
        tokenizer = load_tokenizer(base, **options)
        model = load_model(base, **options)
    else:
        tokenizer = build_tokenizer(_texts(demonstrations["train"]), vocab_size=config.vocab_size)
        model = build_model(config.model_config, tokenizer)
    course.timer.enter("tokenizing")
    stop_ids = stop_token_ids(tokenizer, model)
    splits = {
        split: _Demonstrations(rows, tokenizer, config, stop_ids, f"{split} demonstration")
        for split, rows in demonstrations.items()
    }
    sequences = [row for split in splits.values() for row in split.rows]
    longest = max(sequences, key=_length)
    remedy = "lower max_prompt_length or max_completion_length"
    check_positions(model, len(longest.prompt), len(longest.completion), remedy)
    check_ids(model, (ids for row in sequences for ids in (row.prompt, row.completion)))
    from_nothing = {"model_config": config.model_config, "vocab_size": config.vocab_size}
    course.claim(
        {
            "dataset_hash": dataset_hash,
            "base_model": config.base_model or "from nothing",
            **({} if config.base_model else from_nothing),
            **{key: getattr(config, key) for key in _TRACKED},
        }
    )
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
    with course.trained(trainer, row_counts, parameters=weights) as trained:
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


def build_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer: every text can be written with it, and read back unchanged.

    One special token closes a completion, another pads; a prompt is its text alone.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )


def build_model(model_config: Mapping[str, Any], tokenizer: Any) -> Any:
    """A randomly initialised causal language model for `tokenizer`.

    Raises:
        ConfigError: the model type is unknown, or an option does not fit it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {
        **_known_options(model_config),
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**options))
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConfigError(f"model_config {dict(model_config)} does not describe a model: {error}") from error


def _known_options(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """The options, if the model type has them all: transformers itself keeps an unknown one in silence.

    A whole number where the type's default is a float becomes one: what has been through a pipeline's form
    can no longer tell 1.0 from 1.
    """
    from transformers import AutoConfig

    try:
        defaults = AutoConfig.for_model(model_config["model_type"])
    except ValueError as error:
        raise ConfigError(f"model_config: {error}") from error
    known = {*defaults.to_dict(), *defaults.attribute_map, "rope_theta"}
    for option in model_config:
        if option not in known:
            raise ConfigError(f"model_config has no option {option!r}{closest(option, known)}")
    return {
        option: float(value)
        if type(value) is int and type(getattr(defaults, option, None)) is float
        else value
        for option, value in model_config.items()
    }


def collate(rows: list[TokenizedSequence]) -> dict[str, Any]:
    return pack_sequences([(row.prompt, row.completion) for row in rows])._asdict()


def _length(row: TokenizedSequence) -> int:
    return len(row.prompt) + len(row.completion)


class _Demonstrations(torch.utils.data.Dataset):
    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        config: SFTConfig,
        stop_ids: Sequence[int],
        name: str,
    ) -> None:
        self.rows: list[TokenizedSequence] = []
        self.counts: Counter[str] = Counter()
        quiet = bool(config.disable_tqdm) or config.process_index > 0

        def jobs() -> Iterator[tuple[int, RowText]]:
            for number, row in enumerate(follow(rows, f"tokenizing {name}s", disable=quiet)):
                yield number, RowText(row["prompt"], [row["completion"]])

        for number, found in tokenize_rows(
            jobs,
            tokenizer,
            config,
            name=name,
            count=len(rows),
            stop_ids=stop_ids,
            max_prompt_length=config.max_prompt_length,
            max_completion_length=config.max_completion_length,
        ):
            if isinstance(found, DataError):
                raise DataError(f"{name} {number}: {found}") from found
            if isinstance(found, SoftprefError):
                raise found
            self.rows += found
            self.counts.update(["given", *row_findings(found)])
        if config.process_index == 0:
            log_findings(self.counts, f"{name}s")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TokenizedSequence:
        return self.rows[index]


def _load_demonstrations(dataset_dir: str) -> dict[str, Any]:
    """Split name → rows with `prompt` and `completion`."""
    from datasets import load_from_disk

    folder = Path(dataset_dir)
    if (folder / "sft").is_dir():
        splits = {split: rows for split, rows in load_from_disk(str(folder / "sft")).items() if len(rows)}
    else:
        preferences = load_from_disk(str(folder))
        splits = {
            split: preferences[split]
            .map(
                lambda row: {"completion": row["completions"][0]}, keep_in_memory=True
            )  # no file beside its own
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
