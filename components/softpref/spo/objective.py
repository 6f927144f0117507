"""The objective of a micro-batch: the losses of its rows and of its samples, and their metrics.

The mathematics is in `softpref.objectives`; here it is applied to a batch, a policy and its reference. Draws
nothing, and knows nothing of steps and processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from softpref.lm.head import CompletionHidden, completion_hidden, output_head
from softpref.lm.packing import PackedBatch, pack_sequences
from softpref.lm.sampling import Sample
from softpref.lm.scoring import scoring_batches, sequence_logps, sum_by_sequence
from softpref.objectives import kl_lambda, kl_loss, log_group_weights, prefix_ratios, reward_to_go
from softpref.spo.config import SPOConfig
from softpref.spo.degree_head import DegreeHead
from softpref.spo.gauges import LengthLevels, Means, WeightSums
from softpref.spo.losses import implicit_rewards, method_losses, preference_metrics


class RowLosses(NamedTuple):
    """Losses of a batch's rows.

    Attributes:
        losses: the preference loss of each row, `[rows]`.
        kl: in training with a KL term on rows, that of each row, `[rows]`; else None.
        logps, rewards: of each completion, `[sequences]`, without gradient.
        degree: with a degree loss, the cross-entropy of the level of each of the batch's texts, `[texts]`.
    """

    losses: Tensor
    kl: Tensor | None
    logps: Tensor
    rewards: Tensor
    degree: Tensor | None


class Objective:
    """Losses of batches as `SPOConfig` wants them.

    Args:
        args: see `SPOConfig`.
        reference: from the policy to a context that gives its reference.
        stop_ids: ids that end a completion.

    Attributes:
        means: of training and of evaluation: the metrics of `SPOTrainer`.
        step_weights, log_weights: importance weights since they were last taken, for two readers.
        lengths: with a degree loss, the lengths of its texts by level, of training and of evaluation.
    """

    def __init__(
        self,
        args: SPOConfig,
        reference: Callable[[Any], AbstractContextManager[Any]],
        stop_ids: Sequence[int],
    ) -> None:
        self.args = args
        self._reference, self._stop_ids = reference, list(stop_ids)
        self.means = {"train": Means(), "eval": Means()}
        self.step_weights, self.log_weights = (WeightSums(args.device) for _ in range(2))
        self.lengths = {
            mode: LengthLevels(args.max_completion_length, args.degree_levels, args.device)
            for mode in (self.means if args.degree_weight else ())
        }
        self._kept_head: CompletionHidden | None = None  # how the reference's kept states become scores

    def means_of(self, model: Any) -> Means:
        return self.means["train" if model.training else "eval"]

    def row_losses(
        self, model: Any, inputs: Mapping[str, Any], degree_head: DegreeHead | None = None
    ) -> RowLosses:
        """The losses of a batch's rows, and the policy's log-probabilities and rewards of them."""
        means = self.means_of(model)
        args, sizes = self.args, inputs["group_sizes"]
        batch = packed(inputs)
        states, degree = self._row_states(model, batch, inputs, degree_head)
        ref_logps, divergences, row_kl = inputs.get("ref_logps"), None, None
        regularises = args.regularises_rows and model.training
        lacks_logps = args.scores_reference and ref_logps is None
        theirs: Any = None  # the reference's hidden states of the rows
        found: Any = None  # its divergence from the policy
        if regularises or lacks_logps or args.takes_divergences:
            theirs = self._reference_hidden(model, batch)
        if args.takes_divergences:
            found = states.kl(theirs, reverse=True)
            divergences = sum_by_sequence(found.kl, batch.lengths)
        if regularises:
            found = states.kl(theirs)
            row_kl = sum_by_sequence(sum_by_sequence(found.kl, batch.lengths), sizes) / sizes
            means.add("kl/data", row_kl)
        token_logps = states.logps() if found is None else found.logps
        if lacks_logps:
            ref_token_logps = theirs.logps() if found is None else found.ref_logps
            ref_logps = sum_by_sequence(ref_token_logps, batch.lengths)
        logps = sum_by_sequence(token_logps, batch.lengths)
        losses = method_losses(
            args,
            logps,
            inputs,
            ref_logps=ref_logps,
            divergences=divergences,
            weight_scores=self._weight_scores(logps, batch),
            weighted=model.training,  # weights have mean 1 over a step; an evaluation has none
        )
        own = inputs.get("own_rows", len(sizes))  # the others are counted in another batch
        figures = {
            name: values[:own] for name, values in preference_metrics(args, logps, inputs, ref_logps).items()
        }
        last = (batch.lengths.cumsum(0) - 1)[sizes.cumsum(0) - sizes]  # token of each row's chosen completion
        ended = torch.isin(batch.targets[last], torch.tensor(self._stop_ids, device=last.device))
        ended &= (sizes > 1) | (inputs["probabilities"] > 0.5)
        counted = torch.ones_like(ended)
        if "row_weights" in inputs:
            losses, counted = losses * inputs["row_weights"], inputs["row_weights"] > 0
        means.add("loss/preference", losses[:own])
        means.add("logps/end", token_logps[last[:own][(ended & counted)[:own]]])
        for name, values in figures.items():
            lacking = (sizes[:own] == 1) & values.isnan()
            means.add(name, values[counted[:own] & ~lacking])
        rewards = implicit_rewards(args, logps.detach(), inputs, ref_logps)
        return RowLosses(losses, row_kl, logps.detach(), rewards, degree)

    def _row_states(
        self, model: Any, batch: PackedBatch, inputs: Mapping[str, Any], degree_head: DegreeHead | None
    ) -> tuple[CompletionHidden, Tensor | None]:
        """What the model knows at the tokens of a batch's rows, and the degree losses of the texts."""
        if degree_head is None:
            return self._hidden(model, batch), None
        means, own = self.means_of(model), inputs.get("own_rows", len(inputs["group_sizes"]))
        means.add("degree/skipped", inputs["degree_skipped"][:own])
        if "degree_levels" not in inputs:
            for name in ("loss", "accuracy", "mean_absolute_error"):
                means.add(f"degree/{name}", torch.zeros(0))  # all processes must have the same names
            return self._hidden(model, batch), None
        both = packed(inputs, "degree_")
        found = completion_hidden(model, both, plain=self.args.plain_forward, beneath=True)
        places, rows = inputs["degree_places"], inputs["degree_own"]
        ends = found.states[both.lengths.cumsum(0)[places] - 1]
        levels, mine = inputs["degree_levels"], inputs["degree_rows"] < own
        logits = degree_head(ends, inputs["degree_sides"])
        losses = nn.functional.cross_entropy(logits, levels, reduction="none")
        errors = (logits.argmax(-1) - levels)[mine].abs()
        means.add("degree/loss", losses[mine])
        means.add("degree/accuracy", errors == 0)
        means.add("degree/mean_absolute_error", errors)
        lengths = self.lengths["train" if model.training else "eval"]
        lengths.add(both.lengths[places][mine] - 1, levels[mine])
        return found._replace(hidden=found.hidden[rows], targets=found.targets[rows], beneath=None), losses

    def sample_losses(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """The KL term's loss of each of a batch's samples, `[samples]`."""
        means = self.means_of(model)
        states, theirs = self._sample_states(model, inputs)
        found = states.kl(theirs)
        lengths = inputs["sample_lengths"]
        losses = kl_loss(
            found.kl,
            found.logps,
            lengths,
            kl_gradient=self.args.kl_gradient,
            old_token_logps=None if self.args.max_importance_ratio is None else inputs["sample_token_logps"],
            max_importance_ratio=self.args.max_importance_ratio,
            to_go_total=inputs.get("to_go_total"),
            sequences=inputs["samples_in_step"],
        )
        with torch.no_grad():
            log_weights = sum_by_sequence(found.logps - inputs["sample_token_logps"], lengths)
            means.add("kl/sequence", losses)
            means.add("kl/token", found.kl)
            means.add("entropy", found.entropy)
            means.add("completions/mean_length", lengths.float())
            means.add("completions/truncated_fraction", inputs["sample_truncated"])
            self.step_weights.add(log_weights)
            self.log_weights.add(log_weights)
            means.add("sampling/age", inputs["sample_age"])
        if self.args.reverse_kl_limit is not None:
            # where the policy is sure of one token, KL(policy ‖ reference) has no gradient left; this has
            over = (states.kl(theirs, reverse=True).kl - self.args.reverse_kl_limit).clamp_min(0)
            excess = sum_by_sequence(over, lengths)
            means.add("kl/reverse_excess", excess)
            losses = losses + excess
        return losses

    def _sample_states(
        self, model: Any, inputs: Mapping[str, Any]
    ) -> tuple[CompletionHidden, CompletionHidden]:
        """Hidden states at each token of a batch's samples, the policy's and the reference's."""
        batch = packed(inputs, "sample_")
        states = self._hidden(model, batch)
        if "sample_ref_hidden" not in inputs:
            return states, self._reference_hidden(model, batch)
        assert self._kept_head is not None
        kept = self._kept_head._replace(hidden=inputs["sample_ref_hidden"], targets=batch.targets)
        return states, kept

    def to_go(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Σ of `reward_to_go` over a batch's samples: `[positions]`."""
        states, theirs = self._sample_states(model, inputs)
        found = states.kl(theirs)
        token_kl, lengths = found.kl, inputs["sample_lengths"]
        if self.args.max_importance_ratio is not None:
            token_kl = token_kl * prefix_ratios(
                found.logps,
                inputs["sample_token_logps"],
                lengths,
                max_ratio=self.args.max_importance_ratio,
            )
        return reward_to_go(token_kl, lengths, kl_lambda(self.args.kl_gradient)).sum(0)

    def row_log_weights(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """log of each row's weight, `[rows]`."""
        batch = packed(inputs)
        logps = sequence_logps(model, batch, plain=self.args.plain_forward)
        scores = self._weight_scores(logps, batch)
        return log_group_weights(scores, inputs["group_sizes"], weight_exponent=self.args.weight_exponent)

    @torch.no_grad()
    def reference_states(self, model: Any, samples: list[Sample]) -> list[Tensor | None]:
        """The reference's hidden states at each sample's tokens, on the CPU: it runs once a refresh.

        Where it has no known head, full logits would have to be kept; it then runs with each batch.
        """
        states: list[Tensor | None] = [None] * len(samples)
        sequences = [(sample.prompt, sample.completion) for sample in samples]
        with self._reference(model) as reference:
            if self.args.plain_forward or output_head(reference) is None:
                return states
            for rows, batch in scoring_batches(
                reference, sequences, batch_size=self.args.sampling_batch_size
            ):
                found = self._hidden(reference, batch)
                self._kept_head = found._replace(hidden=found.hidden[:0], targets=found.targets[:0])
                hidden = torch.split(found.hidden.cpu(), batch.lengths.tolist())
                for row, own in zip(rows, hidden, strict=True):
                    states[row] = own.clone()  # not a view that would keep the whole batch
        return states

    def _weight_scores(self, logps: Tensor, batch: PackedBatch) -> Tensor:
        return logps / batch.lengths if self.args.weight_scores == "token" else logps

    def _hidden(self, model: Any, batch: PackedBatch) -> CompletionHidden:
        return completion_hidden(model, batch, plain=self.args.plain_forward)

    @torch.no_grad()
    def _reference_hidden(self, model: Any, batch: PackedBatch) -> CompletionHidden:
        with self._reference(model) as reference:
            return self._hidden(reference, batch)


def sample_tensors(samples: list[Sample], states: list[Tensor | None], age: float) -> dict[str, Any]:
    """A batch's tensors of its samples.

    Args:
        states: the reference's, see `Objective.reference_states`.
        age: optimizer steps since the samples were drawn.
    """
    if not samples:
        return {}
    batch = pack_sequences([(sample.prompt, sample.completion) for sample in samples])
    kept = [each for each in states if each is not None]
    return {
        **{f"sample_{name}": value for name, value in batch._asdict().items()},
        **({"sample_ref_hidden": torch.cat(kept)} if len(kept) == len(samples) else {}),
        "sample_token_logps": torch.tensor([logp for sample in samples for logp in sample.token_logps]),
        "sample_truncated": torch.tensor([float(sample.truncated) for sample in samples]),
        "sample_age": torch.full((len(samples),), float(age)),
    }


def mismatched(batches: Sequence[Mapping[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """The completions of each row of some batches under the prompt of the row before; none of a row alone."""
    rows: list[list[tuple[list[int], list[int]]]] = []
    for batch in batches:
        sequences = iter(packed(batch).sequences())
        rows += [[next(sequences) for _ in range(size)] for size in batch["group_sizes"].tolist()]
    if len(rows) < 2:
        return []
    return [(rows[i - 1][0][0], completion) for i, row in enumerate(rows) for _, completion in row]


def packed(inputs: Mapping[str, Any], prefix: str = "") -> PackedBatch:
    return PackedBatch(*(inputs[f"{prefix}{name}"] for name in PackedBatch._fields))


def by_row(values: Tensor, sizes: Tensor, most: int) -> Tensor:
    """Values of completions, one line for each row, NaN behind them: `[sequences] -> [rows, ≥ most]`."""
    lines = torch.split(values, sizes.tolist())
    width = max(most, *map(len, lines))
    return torch.stack([nn.functional.pad(one, (0, width - len(one)), value=torch.nan) for one in lines])
