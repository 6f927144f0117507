"""`SPOTrainer`: preference loss plus KL on the policy's own samples, as a `transformers.Trainer`.

The mathematics is in `softpref.objectives`; here rows become batches, samples are drawn when they are due,
and one optimizer step is scaled so that it does not depend on how it is cut into micro-batches or processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from softpref.errors import ConfigError
from softpref.lm.sampling import Sample, evaluation_mode, sample_completions
from softpref.lm.scoring import (
    SequenceBatch,
    completion_logits,
    entropies,
    gather_logps,
    pad_sequences,
    sequence_logps,
    sum_by_sequence,
)
from softpref.lm.tokenization import stop_token_ids
from softpref.lm.training import GuardedTrainer
from softpref.objectives import (
    dpo_loss,
    kl_loss,
    kl_per_token,
    log_group_weights,
    preference_loss,
    reward_to_go,
)
from softpref.spo.buffer import SampleBuffer
from softpref.spo.config import SPOConfig
from softpref.spo.gauges import Means, SamplingClock
from softpref.spo.rows import Collator, PreferenceRows, check_positions, tokenize_prompts


class SPOTrainer(GuardedTrainer):
    """Train a policy on preferences by soft preference optimization, or by a baseline on the same rows.

    Args:
        model: the policy to train, as it was before training, also when a run is resumed: the reference is
            copied from it.
        args: see `SPOConfig`; `args.method` picks the objective.
        train_dataset: rows with `prompt`, `completions` (best first) and optionally `probability`
            (P(first beats second), None for a hard label) and `kind`; also rows with `prompt`, `chosen` and
            `rejected`. Text or messages. Any sequence of mappings, such as a `datasets.Dataset`.
        eval_dataset: rows alike.
        processing_class: the tokenizer.
        ref_model: the frozen reference; by default the model as handed in (with an adapter: the adapter off).
        prompt_dataset: rows with `prompt` from which the KL term draws; by default the training prompts.
        peft_config: a `peft.LoraConfig`, to train an adapter.
        callbacks: as in `transformers.Trainer`.

    Metrics, averaged over all rows or samples since the last log: `loss/preference`, `logps/chosen`,
    `logps/rejected`, `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies` (the
    method's own implicit reward: α·logp for `spo`, β·(logp − logp_ref) for `dpo`), `kl/sequence` and
    `kl/token` (nats), `entropy` (nats per token), `completions/mean_length`,
    `completions/truncated_fraction`, `sampling/age` (steps since the samples were drawn), `sampling/ess`
    (effective sample size, a fraction), `sampling/tokens_per_second`, `sampling/time_fraction`.

    Raises:
        ConfigError, DataError: before training, for anything that cannot be trained on.
    """

    args: SPOConfig

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: SPOConfig,
        train_dataset: Sequence[Mapping[str, Any]] | None = None,
        eval_dataset: Sequence[Mapping[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: PreTrainedModel | nn.Module | None = None,
        prompt_dataset: Iterable[Mapping[str, Any]] | None = None,
        peft_config: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if processing_class is None:
            raise ConfigError("SPOTrainer needs processing_class, the tokenizer of the model")
        pad_id = processing_class.pad_token_id
        if pad_id is None:
            pad_id = processing_class.eos_token_id
        if ref_model is not None and ref_model is model:
            raise ConfigError(
                "ref_model is the model to train itself, and would move with it; leave ref_model out, then a "
                "frozen copy is made"
            )
        if args.samples_policy and args.samples_per_refresh < args.sampling_interval * args.world_size:
            raise ConfigError(
                "SPOConfig.samples_per_refresh must be at least sampling_interval times the number of "
                f"processes ({args.sampling_interval} × {args.world_size}), for every process takes part in "
                f"every step's slice; got {args.samples_per_refresh}"
            )
        self._uses_adapter = peft_config is not None or hasattr(model, "peft_config")
        if peft_config is not None:
            from peft import get_peft_model

            try:
                model = get_peft_model(model, peft_config)
            except ValueError as error:  # layers that the model does not have, a rank that is none
                raise ConfigError(f"peft_config does not fit the model: {error}") from error
        _switch_dropout_off(model)
        self._needs_reference = args.method == "dpo" or args.samples_policy
        if ref_model is None and self._needs_reference and not self._uses_adapter:
            ref_model = deepcopy(model)
        train_rows = None if train_dataset is None else PreferenceRows(train_dataset, processing_class, args)
        eval_rows = None if eval_dataset is None else PreferenceRows(eval_dataset, processing_class, args)
        for rows in (train_rows, eval_rows):
            if rows is not None:
                check_positions(model, rows, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=Collator(pad_id),
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = False  # losses are scaled here, over the global batch
        self.ref_model = ref_model
        if ref_model is not None:
            ref_model.requires_grad_(False)
            ref_model.to(self.args.device).eval()
        self._pad_id = pad_id
        self._stop_ids = stop_token_ids(processing_class, model)
        self._means: dict[str, Means] = {"train": Means(), "eval": Means()}
        self._clock = SamplingClock()
        self.buffer: SampleBuffer | None = None
        if args.samples_policy and train_rows is not None:
            prompts = (
                [row["prompt"] for row in train_rows.rows]
                if prompt_dataset is None
                else tokenize_prompts(prompt_dataset, processing_class, args.max_prompt_length)
            )
            self.buffer = SampleBuffer(
                prompts,
                size=args.samples_per_refresh,
                interval=args.sampling_interval,
                max_new_tokens=args.max_completion_length,
                seed=args.seed,
                draw=self._draw,
                rank=args.process_index,
                world_size=args.world_size,
            )

    # ------------------------------------------------------------------ one optimizer step

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one optimizer step, each with its share of the policy's samples."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        rows = self._sum_over_processes(sum(len(batch["group_sizes"]) for batch in batches))
        if not batches:
            return batches, rows
        cut = len(batches) > 1 or self.args.world_size > 1
        if self.buffer is not None:
            samples = self.buffer.slice_for(self.state.global_step)
            size = self.buffer.slice_size(self.state.global_step)
            for i, batch in enumerate(batches):
                share = samples[len(samples) * i // len(batches) : len(samples) * (i + 1) // len(batches)]
                batch.update(self._sample_tensors(share))
                batch["samples_in_step"] = size
            if cut and self.args.kl_gradient == "full":
                total = self._to_go_total(batches)
                for batch in batches:
                    batch["to_go_total"] = total
        if cut and self.args.method == "spo" and self.args.weight_exponent:
            log_mean = self._log_mean_weight(batches, rows)
            for batch in batches:
                batch["log_mean_weight"] = log_mean
        return batches, rows

    @torch.no_grad()
    def _to_go_total(self, batches: list[dict[str, Any]]) -> Tensor:
        """Σ of `reward_to_go` over the samples of the whole step, all processes: `[positions]`."""
        total = torch.zeros(self.args.max_completion_length, device=self.args.device)
        policy = self.accelerator.unwrap_model(self.model)
        for batch in batches:
            if "sample_input_ids" in batch:
                inputs = self._prepare_inputs(batch)
                with evaluation_mode(policy), self.compute_loss_context_manager():
                    sequences = _sample_batch(inputs)
                    logits, _ = completion_logits(policy, sequences)
                    token_kl = kl_per_token(logits, self._reference_logits(policy, sequences))
                to_go = reward_to_go(token_kl, sequences.lengths)
                total[: to_go.shape[1]] += to_go.sum(0)
        return self.accelerator.reduce(total, reduction="sum")

    @torch.no_grad()
    def _log_mean_weight(self, batches: list[dict[str, Any]], rows: float) -> Tensor:
        """log of the mean row weight over the whole step, all processes; a scalar."""
        policy = self.accelerator.unwrap_model(self.model)
        log_weights = []
        for batch in batches:
            inputs = self._prepare_inputs(batch)
            with evaluation_mode(policy), self.compute_loss_context_manager():
                logps = sequence_logps(policy, _preference_batch(inputs))
            log_weights.append(
                log_group_weights(logps, inputs["group_sizes"], weight_exponent=self.args.weight_exponent)
            )
        total = torch.cat(log_weights).logsumexp(0)
        return self.accelerator.gather(total[None]).logsumexp(0) - math.log(rows)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective of one micro-batch, as its share of the optimizer step's mean.

        Sums are divided by the step's row and sample counts over all micro-batches and processes, then
        multiplied by what the trainer and DDP divide by afterwards.
        """
        mode = "train" if model.training else "eval"
        losses = self._preference_losses(model, inputs, self._means[mode])
        if num_items_in_batch is None:
            return losses.mean()
        loss = losses.sum() / num_items_in_batch
        if "sample_input_ids" in inputs:
            kl = self._kl_losses(model, inputs, self._means[mode])
            loss = loss + self.args.beta * kl.sum() / inputs["samples_in_step"]
        return loss * self.current_gradient_accumulation_steps * self.args.world_size

    def _preference_losses(self, model, inputs, means: Means) -> Tensor:
        args = self.args
        batch = _preference_batch(inputs)
        logps = sequence_logps(model, batch)
        sizes, probabilities = inputs["group_sizes"], inputs["probabilities"]
        rewards = args.alpha * logps.detach()
        if args.method == "dpo":
            with torch.no_grad(), self._reference(model) as reference:
                ref_logps = sequence_logps(reference, batch)
            rewards = args.beta * (logps.detach() - ref_logps)
            losses = dpo_loss(
                logps,
                ref_logps,
                beta=args.beta,
                label_smoothing=args.label_smoothing,
                probabilities=probabilities,
                soft_labels=args.soft_labels,
            )
        else:
            losses = preference_loss(
                logps,
                sizes,
                alpha=args.alpha,
                kind=inputs["kind"],
                probabilities=probabilities,
                soft_labels=args.soft_labels,
                weight_exponent=args.weight_exponent,
                log_mean_weight=inputs.get("log_mean_weight"),
            )
        best = sizes.cumsum(0) - sizes
        worst = sizes.cumsum(0) - 1
        chosen, rejected = logps.detach()[best], logps.detach()[worst]
        margins = rewards[best] - rewards[worst]
        means.add("loss/preference", losses.detach())
        means.add("logps/chosen", chosen)
        means.add("logps/rejected", rejected)
        means.add("rewards/chosen", rewards[best])
        means.add("rewards/rejected", rewards[worst])
        means.add("rewards/margins", margins)
        means.add("rewards/accuracies", (margins > 0).float() + 0.5 * (margins == 0).float())
        return losses

    def _kl_losses(self, model, inputs, means: Means) -> Tensor:
        batch = _sample_batch(inputs)
        logits, targets = completion_logits(model, batch)
        token_kl = kl_per_token(logits, self._reference_logits(model, batch))
        token_logps = gather_logps(logits, targets)
        losses = kl_loss(
            token_kl,
            token_logps,
            batch.lengths,
            kl_gradient=self.args.kl_gradient,
            to_go_total=inputs.get("to_go_total"),
            sequences=inputs["samples_in_step"],
        )
        with torch.no_grad():
            log_weights = sum_by_sequence(token_logps, batch.lengths) - inputs["sample_logps"]
            means.add("kl/sequence", losses)
            means.add("kl/token", token_kl)
            means.add("entropy", entropies(logits))
            means.add("completions/mean_length", batch.lengths.float())
            means.add("completions/truncated_fraction", inputs["sample_truncated"])
            weights = log_weights.clamp(-40, 40).exp()  # squares stay within fp32
            means.add("weight", weights)
            means.add("squared_weight", weights**2)
            means.add("sampling/age", inputs["sample_age"])
        return losses

    @torch.no_grad()
    def _reference_logits(self, model, batch: SequenceBatch) -> Tensor:
        with self._reference(model) as reference:
            return completion_logits(reference, batch).logits

    def _reference(self, model):
        """Context that gives the reference: a model of its own, or the policy with its adapter off."""
        if self.ref_model is not None:
            return nullcontext(self.ref_model)
        return _adapter_off(self.accelerator.unwrap_model(model))

    # ------------------------------------------------------------------ sampling

    def _draw(self, prompts: list[list[int]], noise: Any) -> list[Sample]:
        started = time.perf_counter()
        policy = self.accelerator.unwrap_model(self.model)
        with self.compute_loss_context_manager():
            samples = sample_completions(
                policy,
                prompts,
                noise=noise,
                stop_ids=self._stop_ids,
                pad_id=self._pad_id,
                batch_size=self.args.sampling_batch_size,
            )
        self._clock.add(time.perf_counter() - started, sum(len(sample.completion) for sample in samples))
        return samples

    def _sample_tensors(self, samples: list[Sample]) -> dict[str, Any]:
        if not samples:
            return {}
        batch = pad_sequences([(sample.prompt, sample.completion) for sample in samples], self._pad_id)
        assert self.buffer is not None
        assert self.buffer.policy_step is not None
        age = self.state.global_step - self.buffer.policy_step
        return {
            **{f"sample_{name}": tensor for name, tensor in batch._asdict().items()},
            "sample_logps": torch.tensor([sample.logp for sample in samples]),
            "sample_truncated": torch.tensor([float(sample.truncated) for sample in samples]),
            "sample_age": torch.full((len(samples),), float(age)),
        }

    # ------------------------------------------------------------------ evaluation, logs, checkpoints

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss and metrics of an evaluation batch; no predictions are collected."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), evaluation_mode(model), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """As in the base class; what it returns and logs has the metrics of `SPOTrainer` too."""
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        means = self._means["eval"].take(self._sum_over_processes)
        named = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the training metrics gathered since the last log; the last steps' go with the summary."""
        if "loss" in logs or "train_loss" in logs:
            means = self._means["train"].take(self._sum_over_processes)
            if "weight" in means:  # (Σw)² / (n Σw²)
                means["sampling/ess"] = means.pop("weight") ** 2 / means.pop("squared_weight")
            if self.buffer is not None:
                means.update(self._clock.take())
            logs = {**logs, **means}
        super().log(logs, start_time)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.buffer is not None:
            self.buffer.save(output_dir)
            self.accelerator.wait_for_everyone()  # the file that marks a checkpoint complete comes after all

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.buffer is not None:
            self.buffer.load(checkpoint)

    def _sum_over_processes(self, value: float) -> float:
        if self.args.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.args.device)
        return self.accelerator.reduce(total, reduction="sum").item()


def _switch_dropout_off(model: nn.Module) -> None:
    """Preference training runs without dropout: in modules, and where layers keep its rate as a number."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def _preference_batch(inputs: Mapping[str, Any]) -> SequenceBatch:
    return SequenceBatch(*(inputs[name] for name in SequenceBatch._fields))


def _sample_batch(inputs: Mapping[str, Any]) -> SequenceBatch:
    return SequenceBatch(*(inputs[f"sample_{name}"] for name in SequenceBatch._fields))


class _adapter_off:
    """Context that yields a PEFT model with its adapter disabled: the reference."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._context = model.disable_adapter()

    def __enter__(self) -> Any:
        self._context.__enter__()
        return self._model

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)
