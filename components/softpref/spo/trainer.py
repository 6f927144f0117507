"""`SPOTrainer`: preference loss plus KL to the reference, as a `transformers.Trainer`.

The mathematics is in `softpref.objectives`; here rows become batches, samples are drawn when they are due,
and one optimizer step is scaled so that it does not depend on how it is cut into micro-batches or processes.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from softpref.errors import ConfigError, DataError
from softpref.lm.decoding import decodes
from softpref.lm.head import try_out
from softpref.lm.packing import evaluation_mode
from softpref.lm.sampling import Sample, sample_completions
from softpref.lm.scoring import check_sequences, computing_precision, score_sequences
from softpref.lm.sharding import whole_weights
from softpref.lm.tokenization import stop_token_ids
from softpref.lm.training import settle_model
from softpref.objectives import degree_loss, kl_lambda
from softpref.spo.buffer import SampleBuffer
from softpref.spo.checks import parse_dimension_weights
from softpref.spo.config import SPOConfig
from softpref.spo.degree import sides_of
from softpref.spo.degree_head import DegreeCallback, DegreeHead
from softpref.spo.engines import check_agreement, sampling_engine
from softpref.spo.evaluating import RowsTrainer
from softpref.spo.gauges import SamplingClock
from softpref.spo.given import (
    check_optimizer,
    check_reference,
    loaded,
    refuse_arguments,
    settled_arguments,
    switch_dropout_off,
    tokenizer_of,
    with_adapter,
)
from softpref.spo.health import health_warnings
from softpref.spo.lineage import EarlierRound, offsets_of
from softpref.spo.objective import Objective, mismatched, sample_tensors
from softpref.spo.prompts import kl_prompts
from softpref.spo.reference import (
    Scorer,
    adapter_off,
    computed_logps,
    kept_logps,
    scorer_fingerprint,
    set_reference_logps,
)
from softpref.spo.rounds import RoundRows
from softpref.spo.rows import (
    AnswerRows,
    PreferenceRows,
    Row,
    TrainingRows,
    collate,
    rows_of,
)

if TYPE_CHECKING:
    from softpref.judges.protocol import Judge

logger = logging.getLogger(__name__)


class SPOTrainer(RowsTrainer):
    """Train a policy on preferences by soft preference optimization, or by a baseline on the same rows.

    Args:
        model: the policy to train, as it was before training, also when a run is resumed: the reference is
            copied from it. A causal language model of transformers or peft; or the Hub id, folder or URL of
            one, which is loaded in fp32 (see `SPOConfig.model_init_kwargs`).
        args: see `SPOConfig`; `args.method` picks the objective.
        train_dataset: rows with `prompt`, `completions` (best first) and optionally `probability`
            (P(first beats second), None for a hard label), `kind` and `weight` (≥ 0, how much a row counts
            relative to the others); or rows with `chosen` and `rejected`, where the `prompt` may be what both
            begin with. Text or messages. Any sequence of mappings, such as a `datasets.Dataset`; an iterable
            is read to its end. With `train_on=samples` only the prompt is read; `self_play` needs only
            `prompt` and `completion`.
        eval_dataset: such rows, or a dict of several sets of them, whose metrics carry their names.
        processing_class: the tokenizer; by default that of the model's name.
        ref_model: the frozen reference, a model or its name; by default a copy of the model (with an adapter:
            the model with the adapter off).
        prompt_dataset: rows with `prompt` from which the KL term draws beside the training prompts (see
            `SPOConfig.kl_prompts`).
        peft_config: a `peft.LoraConfig`, to train an adapter; by default what `SPOConfig.use_peft` says.
        callbacks: as in `transformers.Trainer`.
        judge: judges completions drawn in rounds: anything with
            `probabilities(prompts, first, second) -> P(first beats second)` of texts; see
            `softpref.judges.protocol`.
        model_init: makes the model, anew for each call of `train`; given in place of `model`.
        compute_metrics: as in `transformers.Trainer`; it is given what `predict` returns.
        optimizers: optimizer and scheduler of the model's own parameters.
        earlier_rounds: the rounds on other dimensions of preference that led to the model, which is the
            reference (see `softpref.spo.lineage`): what they have learned of the rows' completions is
            computed once, before training, and weighed by `SPOConfig.dimension_weights`.

    Metrics, averaged over all rows or samples since the last log: `loss/preference`; `logps/chosen`,
    `logps/rejected`, `logps/accuracies` (chosen likelier than rejected) and `logps/end` (of the end
    token of chosen ones); `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies` (the
    method's own implicit reward: α·(logp − anchor·logp_ref) for `spo`, β·logp for `cpo`, that per token for
    `simpo`, the log-odds of the mean token for `orpo`, β·(logp − logp_ref) for the others; rejected is the
    last of a row, or the mean of a best-of-n row's others) and `rewards/saturated` (share of margins beyond 5
    nats, where softness has no effect); of samples `kl/sequence` and `kl/token` (nats),
    `kl/reverse_excess` where there is a limit (`reverse_kl_limit`, nats a sample), `entropy` (nats per
    token), `completions/mean_length`, `completions/truncated_fraction`, `sampling/age`
    (steps since the samples were drawn), `sampling/logps_difference` (of the engine's log-probabilities to
    the trainer's own when samples are drawn, nats per token), `sampling/ess` (effective sample size, a
    fraction), `sampling/tokens_per_second`, `sampling/time_fraction`; with `kl_on=data` in their place
    `kl/data` (nats along a completion of the rows); with rounds `round`, counted from 1, and
    `rows/left_out_fraction` of the rows drawn last (see `SPOConfig.cut_rows`); and with a degree loss, of the
    texts that take part, `degree/loss` (cross-entropy, nats), `degree/accuracy` and
    `degree/mean_absolute_error` of the level, `degree/length_baseline` (the best accuracy that these texts'
    lengths alone allow) and `degree/skipped` (share of the completions that take no part). An evaluation has
    these metrics, too; its loss is the method's own.

    Raises:
        ConfigError, DataError: before training, for anything that cannot be trained on.
    """

    args: SPOConfig

    def __init__(
        self,
        model: str | Path | PreTrainedModel | nn.Module | None = None,
        args: SPOConfig | None = None,
        train_dataset: Iterable[Mapping[str, Any]] | None = None,
        eval_dataset: Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: str | Path | PreTrainedModel | nn.Module | None = None,
        prompt_dataset: Iterable[Mapping[str, Any]] | None = None,
        peft_config: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        judge: Judge | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, LRScheduler | None] = (None, None),
        earlier_rounds: Sequence[EarlierRound] = (),
        **unknown: Any,
    ) -> None:
        refuse_arguments(unknown, inspect.signature(SPOTrainer.__init__).parameters)
        self.args = args = settled_arguments(args, model)
        if train_dataset is not None:
            train_dataset = rows_of(train_dataset, "train_dataset")
        self._check_arguments(model, model_init, judge, earlier_rounds)
        self._peft_config = peft_config
        self.ref_model = None if ref_model is None else loaded(ref_model, args)
        self._copies_policy = ref_model is None
        set_seed(args.seed)  # an adapter's weights are drawn
        self.model_init: Any = model_init
        policy = self.call_model_init() if model_init else self._ready(loaded(model, args))
        check_optimizer(optimizers[0], policy, args)
        # before anything costly: an engine may not be installed, or its server be away
        self._engine = sampling_engine(args, policy) if args.samples_policy or args.draws_rows else None
        fingerprint = ""
        if args.keeps_reference_logps and args.reference_cache:
            fingerprint = scorer_fingerprint(policy if self.ref_model is None else self.ref_model, args)
        self.processing_class = tokenizer_of(processing_class, model or policy, args)
        self.stop_ids = stop_token_ids(self.processing_class, policy)
        self.objective = Objective(args, self._reference, self.stop_ids)
        self._clock = SamplingClock()
        self._steps_per_round = self._steps_per_epoch = 1
        given = self._training_rows(train_dataset, policy)
        evaluated = self.evaluation_sets(eval_dataset, policy)
        self.row_counts: dict[str, dict[str, int]] = {
            name: dict(rows.counts)
            for name, rows in (*evaluated.items(), ("train", given))
            if rows is not None
        }
        """Of each set: rows `given`, of those `left_out`, and what was found of them (`row_findings`)."""
        self.rounds = self._round_rows(given, train_dataset, judge)
        super().__init__(
            model=policy,
            args=args,
            data_collator=collate,
            train_dataset=given if self.rounds is None else self.rounds,
            eval_dataset=evaluated if isinstance(eval_dataset, dict) else evaluated.get("validation"),
            processing_class=self.processing_class,
            compute_metrics=compute_metrics,
            callbacks=[*(callbacks or []), *self._own_callbacks()],
            optimizers=optimizers,
        )
        self.model_init = model_init  # which the base class takes in place of a model alone
        self.model_accepts_loss_kwargs = False  # losses are scaled here, over the global batch
        if self._engine is sample_completions:
            decodes(self.model)  # finds out, and says, before training whether a cache can be used
        if args.takes_reference_logps:
            self._keep_reference_logps([self.train_dataset, *evaluated.values()], fingerprint)
        weights = parse_dimension_weights(args.dimension_weights, len(earlier_rounds))
        self._has_offsets = any(weights)
        if self._has_offsets:
            self._add_offsets([self.train_dataset, *evaluated.values()], earlier_rounds)
        self.buffer = self._sample_buffer(given, prompt_dataset)

    # ------------------------------------------------------------------ what is handed over

    def _check_arguments(
        self, model: Any, model_init: Any, judge: Judge | None, earlier_rounds: Sequence[EarlierRound]
    ) -> None:
        """Refuse arguments that do not go together, whatever the model and the rows are."""
        args = self.args
        if model is not None and model_init is not None:
            raise ConfigError("SPOTrainer takes a model or a model_init that makes it, not both")
        if model_init is not None and args.reference_cache:
            raise ConfigError(
                "a model_init makes a new model, and reference, for each training: leave "
                "SPOConfig.reference_cache out"
            )
        if len(args.dimension_order) > 1 or (earlier_rounds and not args.dimension):
            raise ConfigError(
                "SPOTrainer trains one round: name in SPOConfig.dimensions the one that its rows are of, and "
                "hand over earlier_rounds; the stage `softpref train` trains several, one after another"
            )
        parse_dimension_weights(args.dimension_weights, len(earlier_rounds) if earlier_rounds else None)
        if args.uses_judge and judge is None:
            raise ConfigError(
                f"rounds={args.rounds}, train_on={args.train_on} draw completions that must be judged: give "
                "SPOTrainer a judge (see softpref.judges.protocol)"
            )
        if judge is not None and not hasattr(judge, "probabilities"):
            raise ConfigError(
                f"judge must have a method probabilities(prompts, first, second), got {judge!r:.60}; "
                "softpref.judges.loading has some"
            )

    def call_model_init(self, trial: Any = None) -> Any:
        """A fresh model as it is trained, and its reference."""
        model = self._ready(super().call_model_init(trial))
        if not self.args.plain_forward:
            try_out(model)
        return model

    def _ready(self, model: Any) -> Any:
        """A model ready to train, and its reference, where that is a copy of it."""
        args = self.args
        model = with_adapter(model, self._peft_config, args)
        self._uses_adapter = hasattr(model, "peft_config")
        switch_dropout_off(model)
        settle_model(model)
        self.degree_head = DegreeHead(model, args) if args.degree_weight else None
        if self._copies_policy:
            live = args.scores_reference and not args.keeps_reference_logps
            needed = args.kl_strength > 0 or live or args.mixes_references
            self.ref_model = deepcopy(model) if needed and not self._uses_adapter else None
        if self.ref_model is not None:
            check_reference(self.ref_model, model, args)
            settle_model(self.ref_model)
            self.ref_model.requires_grad_(False).to(args.device).eval()
            if not args.plain_forward:
                try_out(self.ref_model)
        return model

    def _training_rows(self, given: Any, model: Any) -> TrainingRows | None:
        if given is None:
            return None
        args = self.args
        kind = PreferenceRows if args.train_on == "preferences" else AnswerRows
        sampled = args.samples_policy or args.draws_rows
        rows = self.rows_for(kind, given, "training row", model, sampled=sampled)
        if rows.counts["degree_skipped"] == len(sides_of(args)) * len(rows):
            raise DataError(
                f"no completion of the {len(rows)} training rows has degree_levels − 1 = "
                f"{args.degree_levels - 1} key phrases; lower degree_levels, or leave degree_weight out"
            )
        return rows

    def _round_rows(self, given: TrainingRows | None, rows: Any, judge: Judge | None) -> RoundRows | None:
        """Rows that change with each round, made of those that were given."""
        args = self.args
        if given is None or not args.draws_rows:
            return None
        return RoundRows(
            given.rows,
            [given.text(rows[number]).prompt for number in given.numbers],
            args,
            tokenizer=self.processing_class,
            stop_ids=self.stop_ids,
            judge=judge if args.uses_judge else None,
            draw=self._draw,
            score=self._score,
            score_initial=self._score_initial,
            shares=self.whole_list,
            rank=args.process_index,
            world_size=args.world_size,
        )

    def _sample_buffer(self, given: TrainingRows | None, prompt_dataset: Any) -> SampleBuffer | None:
        """What holds the policy's samples between refreshes, where the objective needs any."""
        args = self.args
        if given is None or not args.samples_policy:
            return None
        prompts = kl_prompts(args, given.prompts, prompt_dataset, self.processing_class)
        asked: list[tuple[list[int], list[int]]] = [(prompt, []) for own in prompts for prompt in own]
        check_sequences(self.accelerator.unwrap_model(self.model), asked, args.max_completion_length)
        return SampleBuffer(
            prompts,
            size=args.samples_per_refresh,
            interval=args.sampling_interval,
            max_new_tokens=args.max_completion_length,
            seed=args.seed,
            draw=self._draw,
            annotate=self._reference_states,
            rank=args.process_index,
            world_size=args.world_size,
        )

    def _own_callbacks(self) -> list[TrainerCallback]:
        own: list[TrainerCallback] = [_RoundCallback(self._begin_round)] if self.rounds else []
        if self.args.degree_weight:
            own.append(DegreeCallback(self._present_head, self._average, self._begin_epoch))
        return own

    # ------------------------------------------------------------------ one optimizer step

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], int]:
        """The micro-batches of one optimizer step, each with its share of the policy's samples."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        rows = int(self.sum_over_processes(sum(len(batch["group_sizes"]) for batch in batches)))
        if not batches:
            return batches, rows
        cut = len(batches) > 1 or self.args.world_size > 1
        if self.buffer is not None:
            self._expire_samples()
            samples = self.buffer.slice_for(self.state.global_step)
            states = self.buffer.annotations_for(self.state.global_step)
            size = self.buffer.slice_size(self.state.global_step)
            age = self.state.global_step - (self.buffer.policy_step or 0)
            for i, batch in enumerate(batches):
                share = slice(len(samples) * i // len(batches), len(samples) * (i + 1) // len(batches))
                batch.update(sample_tensors(samples[share], states[share], age))
                batch["samples_in_step"] = size
                batch["sample_weight"] = self.buffer.sets / size  # of the mean over each set of prompts
            if cut and kl_lambda(self.args.kl_gradient) > 0:
                total = self._to_go_total(batches)
                for batch in batches:
                    batch["to_go_total"] = total
        if self.args.method == "kto":
            kl = self._mismatched_kl(batches)
            for batch in batches:
                batch["kl"] = kl
        if cut and self.args.method == "spo" and self.args.weight_exponent:
            log_mean = self._log_mean_weight(batches, rows)
            for batch in batches:
                batch["log_mean_weight"] = log_mean
        if self.args.degree_weight:
            sides = [batch["degree_sides"] for batch in batches if "degree_sides" in batch]
            counts = [
                self.sum_over_processes(sum(int((one == side).sum()) for one in sides)) for side in range(2)
            ]
            for batch in batches:
                batch["degree_counts"] = torch.tensor(counts)
        return batches, rows

    @torch.no_grad()
    def _to_go_total(self, batches: list[dict[str, Any]]) -> Tensor:
        """Σ of `reward_to_go` over the samples of the whole step, all processes: `[positions]`."""
        total = torch.zeros(self.args.max_completion_length, device=self.args.device)
        policy = self.accelerator.unwrap_model(self.model)
        for batch in batches:
            if "sample_lengths" in batch:
                inputs = self._prepare_inputs(batch)
                with evaluation_mode(policy), self.compute_loss_context_manager():
                    to_go = self.objective.to_go(policy, inputs)
                total[: len(to_go)] += to_go
        reduced: Tensor = self.accelerator.reduce(total, reduction="sum")
        return reduced

    @torch.no_grad()
    def _mismatched_kl(self, batches: list[dict[str, Any]]) -> float:
        """Mean of log π − log π_ref over the step's completions under other rows' prompts, all processes.

        An estimate of KL(π ‖ π_ref) that draws nothing; 0 where a process has but one row.
        """
        sequences = mismatched(batches)
        policy = self.accelerator.unwrap_model(self.model)
        with self._reference(self.model) as reference:
            theirs = self._own_scores(sequences, reference)
        total = float((self._own_scores(sequences, policy) - theirs).double().sum())
        count = self.sum_over_processes(len(sequences))
        return self.sum_over_processes(total) / count if count else 0.0

    @torch.no_grad()
    def _log_mean_weight(self, batches: list[dict[str, Any]], rows: int) -> Tensor:
        """log of the mean row weight over the whole step, all processes; a scalar."""
        policy = self.accelerator.unwrap_model(self.model)
        log_weights = []
        for batch in batches:
            inputs = self._prepare_inputs(batch)
            with evaluation_mode(policy), self.compute_loss_context_manager():
                log_weights.append(self.objective.row_log_weights(policy, inputs))
        totals: Tensor = self.accelerator.gather(torch.cat(log_weights).logsumexp(0)[None])
        return totals.logsumexp(0) - math.log(rows)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The objective of one micro-batch, as its share of the optimizer step's mean.

        Sums are divided by the step's row and sample counts over all micro-batches and processes, then
        multiplied by what the trainer and DDP divide by afterwards.

        Args:
            return_outputs: whether `logps` and `rewards` of the completions come with it, `[sequences]`.
        """
        if self.args.method == "kto" and "kl" not in inputs:  # an evaluation has no steps
            inputs = {**inputs, "kl": self._mismatched_kl([inputs])}
        losses, row_kl, logps, rewards, degree = self.objective.row_losses(model, inputs, self.degree_head)
        outputs = {"logps": logps, "rewards": rewards}
        if num_items_in_batch is None:
            loss = losses[: inputs.get("own_rows")].mean()
            return (loss, outputs) if return_outputs else loss
        loss = losses.sum() / num_items_in_batch
        if row_kl is not None:
            loss = loss + self.args.kl_strength * row_kl.sum() / num_items_in_batch
        if "sample_lengths" in inputs:
            kl = self.objective.sample_losses(model, inputs)
            loss = loss + self.args.kl_strength * kl.sum() * inputs["sample_weight"]
        if degree is not None:
            sides, counts = inputs["degree_sides"], inputs["degree_counts"]
            share = degree_loss(degree, sides, counts, len(sides_of(self.args)))
            loss = loss + self.args.degree_weight * share
        loss = loss * self.current_gradient_accumulation_steps * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def _reference(self, model: Any) -> AbstractContextManager[Any]:
        """Context that gives the reference: a model of its own, or the policy with its adapter off."""
        if self.ref_model is not None:
            return nullcontext(self.ref_model)
        if not self._uses_adapter:
            raise ConfigError(
                "these rows have no kept log-probabilities of the reference, and the reference itself is not "
                "in memory: hand the rows to SPOTrainer as its train_dataset or eval_dataset"
            )
        return adapter_off(self.accelerator.unwrap_model(model))

    # ------------------------------------------------------------------ sampling

    def _draw(
        self, prompts: list[list[int]], noise: Tensor, progress: Callable[[int], object] | None = None
    ) -> list[Sample]:
        assert self._engine is not None
        started = time.perf_counter()
        policy = self.accelerator.unwrap_model(self.model)
        with whole_weights(policy), self.compute_loss_context_manager():
            samples = self._engine(
                policy,
                prompts,
                noise=noise,
                stop_ids=self.stop_ids,
                batch_size=self.args.sampling_batch_size,
                progress=progress,
            )
            self._clock.add(time.perf_counter() - started, sum(len(sample.completion) for sample in samples))
            found = check_agreement(
                policy,
                samples,
                precision=computing_precision(self.args, policy),
                plain=self.args.plain_forward,
            )
            self.objective.means["train"].add("sampling/logps_difference", torch.tensor([found.mean]))
        return samples

    def _reference_states(self, samples: list[Sample]) -> list[Tensor | None]:
        """See `Objective.reference_states`; where the reference is the policy, its weights whole."""
        with (
            whole_weights(self.model) if self.ref_model is None else nullcontext(),
            self.compute_loss_context_manager(),
        ):
            return self.objective.reference_states(self.model, samples)

    def _expire_samples(self) -> None:
        """Under adaptive refresh, drop samples whose last slice has drifted too far from the policy."""
        if self.args.refresh != "adaptive" or self.buffer is None:
            return
        size = self.objective.step_weights.take(self.accelerator.gather)
        if size is not None and size < self.args.min_ess:
            self.buffer.expire()

    # ------------------------------------------------------------------ rounds

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: DataLoader[Any]
    ) -> tuple[int, int, int, int, int, int | None, int]:
        """As in the base class, for all rounds: `num_train_epochs` counts the passes of one."""
        for kept in (self.buffer, self.rounds):
            if kept is not None:
                kept.forget()  # an earlier training's; a checkpoint's samples and rows are loaded after this
        passes, rounds = args.num_train_epochs, self.args.rounds
        args.num_train_epochs = passes * rounds
        try:
            values = super().set_initial_training_values(args, dataloader)
        finally:
            args.num_train_epochs = passes
        self._steps_per_epoch = steps_of_epoch = values[1]
        max_steps = values[-1]
        self._steps_per_round = max(1, int(passes)) * steps_of_epoch
        if max_steps <= (rounds - 1) * self._steps_per_round and passes:
            logger.warning(
                "max_steps=%d ends training in round %d of %d; a round has %d steps",
                max_steps,
                -(-max_steps // self._steps_per_round),
                rounds,
                self._steps_per_round,
            )
        return values

    def _begin_round(self, step: int) -> None:
        """Prepare the rows of the round of optimizer step `step`; the last round has no end."""
        assert self.rounds is not None
        self.rounds.begin(min(step // self._steps_per_round, self.args.rounds - 1))

    # ------------------------------------------------------------------ the degree loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As in the base class; the head of the degree loss is a group of its own."""
        optimizer = super().create_optimizer(model)
        if self.degree_head is not None:
            self.degree_head.join(optimizer, self.args.learning_rate)
        return optimizer

    def _present_head(self) -> DegreeHead:
        assert self.degree_head is not None
        return self.degree_head

    def _average(self, value: Tensor) -> Tensor:
        mean: Tensor = self.accelerator.reduce(value, reduction="mean")
        return mean

    def _begin_epoch(self, step: int) -> None:
        """Have the rows draw the levels of the epoch of optimizer step `step`."""
        rows: Any = self.train_dataset
        rows.epoch = step // self._steps_per_epoch

    # ------------------------------------------------------------------ kept log-probabilities

    def _keep_reference_logps(self, sets: Sequence[Any], model_hash: str) -> None:
        """Give rows the reference's log-probabilities once, if asked to or if some rows bring their own."""
        for rows in sets:
            if not isinstance(rows, PreferenceRows):
                continue
            if self.args.reference_cache:
                for row, logps in zip(
                    rows.rows, self._kept_logps(rows.rows, model_hash, self._score_initial), strict=True
                ):
                    row["ref_logps"] = logps
                continue
            lacking = [row for row in rows.rows if "ref_logps" not in row]
            if lacking and (self.args.keeps_reference_logps or len(lacking) < len(rows.rows)):
                set_reference_logps(lacking, self._score_initial)

    def _add_offsets(self, sets: Sequence[Any], rounds: Sequence[EarlierRound]) -> None:
        """Give rows what earlier rounds have learned of them; of their models one at a time is in memory."""
        every = [rows.rows for rows in sets if isinstance(rows, PreferenceRows)]
        if any("offsets" in row for rows in every for row in rows):
            raise ConfigError("rows bring offsets, and earlier rounds make them: leave out one of the two")
        found: list[list[list[list[float]]]] = [[] for _ in every]  # of each set, by model
        for one in (*rounds, None):
            model, score = None, self._score_initial
            if one is not None:
                model = loaded(one.reference, self.args).to(self.args.device).eval()
                score = partial(self._score, model=model)
            fingerprint = ""
            if self.args.reference_cache:
                reference = self.model if self.ref_model is None else self.ref_model
                fingerprint = scorer_fingerprint(reference if model is None else model, self.args)
            for rows, logps in zip(every, found, strict=True):
                if self.args.reference_cache:
                    logps.append(self._kept_logps(rows, fingerprint, score))
                else:
                    logps.append(computed_logps(rows, score))
        weights = parse_dimension_weights(self.args.dimension_weights, len(rounds))
        for rows, logps in zip(every, found, strict=True):
            for row, offsets in zip(rows, offsets_of(rounds, weights, logps), strict=True):
                row["offsets"] = offsets
        first = [row["offsets"][0] - row["offsets"][-1] for rows in every[:1] for row in rows]
        if any(first) and self.is_world_process_zero():
            logger.warning(
                "earlier rounds speak for the better completion of a row by %.3f nats on average, against it "
                "in %.0f %% of the rows: the loss does not begin at that of no margin (ln 2 of dpo)",
                sum(first) / len(first),
                100 * sum(one < 0 for one in first) / len(first),
            )

    def _evaluated_rows(self, given: Any) -> TrainingRows | RoundRows:
        if self._has_offsets and not isinstance(given, (TrainingRows, RoundRows)):
            raise ConfigError(
                "what earlier rounds have learned is computed before training: hand these rows to SPOTrainer "
                "as a set of its eval_dataset"
            )
        return super()._evaluated_rows(given)

    def _score_initial(self, sequences: list[tuple[list[int], list[int]]]) -> list[float]:
        """Under the reference; where there is no copy of it, before training: under the policy."""
        model = self.model if self.ref_model is None else self.ref_model
        without_adapter = self.ref_model is None and self._uses_adapter
        with adapter_off(self.model) if without_adapter else nullcontext(model) as reference:
            return self._score(sequences, reference)

    def _kept_logps(self, rows: Sequence[Row], model_hash: str, score: Scorer) -> list[list[float]]:
        """See `softpref.spo.reference.kept_logps`; all processes must call it."""
        self.accelerator.wait_for_everyone()
        return kept_logps(
            rows,
            self.args.reference_cache,
            model_hash,
            score,
            writes=self.is_world_process_zero(),
            everywhere=lambda here: self.sum_over_processes(here) == self.args.world_size,
        )

    def _score(self, sequences: list[tuple[list[int], list[int]]], model: Any = None) -> list[float]:
        """Sequence log-probabilities, nats, under `model` (default: the policy), shared among processes."""
        model = self.accelerator.unwrap_model(self.model) if model is None else model
        logps = self._own_scores(sequences[self.args.process_index :: self.args.world_size], model)
        return self.whole_list(logps.tolist(), len(sequences))

    def _own_scores(self, sequences: list[tuple[list[int], list[int]]], model: Any) -> Tensor:
        """Those of this process's sequences: `[n]`, on the CPU."""
        with whole_weights(model), self.compute_loss_context_manager():
            return score_sequences(
                model,
                sequences,
                batch_size=self.args.per_device_eval_batch_size,
                plain=self.args.plain_forward,
            )

    # ------------------------------------------------------------------ evaluation, logs, checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the training metrics gathered since the last log; the last steps' go with the summary."""
        if "loss" in logs or "train_loss" in logs:
            means = self.objective.means["train"].take(self.sum_over_processes)
            if self.buffer is not None:
                size = self.objective.log_weights.take(self.accelerator.gather)
                means.update({} if size is None else {"sampling/ess": size})
            if self.buffer is not None or self.rounds is not None:
                means.update(self._clock.take())
            if self.degree_head is not None:
                means |= self._length_baseline("train")
            if self.is_world_process_zero():
                for warning in health_warnings(
                    self.args, means, self.state.log_history, ended="train_loss" in logs
                ):
                    logger.warning("%s", warning)
            if self.rounds is not None and self.rounds.number is not None:
                means["round"] = float(self.rounds.number + 1)
                means["rows/left_out_fraction"] = self.rounds.left_out
            logs = {**logs, **means}
        super().log(logs, start_time)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.rounds is not None and self.args.should_save:
            self.rounds.save(output_dir)
        if self.degree_head is not None and self.args.should_save:
            self.degree_head.save(output_dir)
        if self.buffer is not None:
            self._expire_samples()  # before the next step would
            os.makedirs(output_dir, exist_ok=True)  # the first process makes it, at its own pace
            self.buffer.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.degree_head is not None:
            self.degree_head.load(checkpoint)  # first: of a checkpoint without, the optimizer would complain
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.buffer is not None:
            self.buffer.load(checkpoint)
        if checkpoint is not None and self.rounds is not None:
            self.rounds.load(checkpoint)


class _RoundCallback(TrainerCallback):
    """Says at which optimizer step an epoch begins: a round may begin with it."""

    def __init__(self, begin: Callable[[int], None]) -> None:
        self._begin = begin

    def on_epoch_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        self._begin(state.global_step)
