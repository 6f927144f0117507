"""Training on demonstrations: their rows, their loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softpref.lm.head import completion_hidden
from softpref.lm.packing import PackedBatch, pack_sequences
from softpref.lm.scoring import Ids, TeamScorer, score_sequences
from softpref.lm.sharding import whole_weights
from softpref.lm.tokenization import TokenizedSequence, log_findings, row_findings
from softpref.lm.tokenizing import RowText, tokenize_rows
from softpref.lm.training import GuardedTrainer
from softpref.progress import follow
from softpref.sft.config import SFTConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SFTTrainer(GuardedTrainer):
    """A trainer whose loss is the mean negative log-probability of completion tokens, in nats.

    The mean is over all completion tokens of an optimizer step, however it is cut.
    """

    args: SFTConfig

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.model_accepts_loss_kwargs = False  # losses are scaled here, over the global batch

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """The micro-batches of one optimizer step, and how many completion tokens all processes have."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = torch.tensor(float(sum(len(batch["targets"]) for batch in batches)), device=device)
        return batches, self.accelerator.reduce(tokens, reduction="sum")

    def _token_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """−log P of each completion token, `[T]`."""
        batch = PackedBatch(*(inputs[name] for name in PackedBatch._fields))
        return -completion_hidden(model, batch, plain=self.args.plain_forward).logps()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        losses = self._token_losses(model, inputs)
        if num_items_in_batch is None:
            return losses.mean()
        scale = self.current_gradient_accumulation_steps * self.args.world_size
        loss: Tensor = losses.sum() / num_items_in_batch * scale
        return loss

    @contextmanager
    def scoring_team(self) -> Iterator[TeamScorer]:
        """All processes score sequences under the model for the first one, while that is inside."""
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

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss of an evaluation batch over its own rows; no predictions are collected."""
        inputs = self._prepare_inputs(inputs)
        own = self.own_rows(len(inputs["lengths"]))
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = self._token_losses(model, inputs)
        return losses[: int(inputs["lengths"][:own].sum())].mean(), None, None


class Demonstrations(torch.utils.data.Dataset[TokenizedSequence]):
    """Tokenized demonstrations, and what was counted of them.

    Args:
        rows: `prompt` and `completion`, text or messages.
        stop_ids: see `softpref.lm.tokenization.stop_token_ids`.
        name: what messages call one of them.

    Raises:
        DataError: names the row and what is wrong with it.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        config: SFTConfig,
        stop_ids: Sequence[int],
        name: str,
    ) -> None:
        self.rows: list[TokenizedSequence] = []
        self.counts: Counter[str] = Counter()
        quiet = bool(config.disable_tqdm) or config.process_index > 0

        def jobs() -> Iterator[tuple[None, RowText]]:
            for row in follow(rows, f"tokenizing {name}s", disable=quiet):
                yield None, RowText(row["prompt"], [row["completion"]])

        for _, found in tokenize_rows(
            jobs,
            tokenizer,
            config,
            name=name,
            count=len(rows),
            stop_ids=stop_ids,
            max_prompt_length=config.max_prompt_length,
            max_completion_length=config.max_completion_length,
        ):
            self.rows += found
            self.counts.update(["given", *row_findings(found)])
        if config.process_index == 0:
            log_findings(self.counts, f"{name}s")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TokenizedSequence:
        return self.rows[index]


def collate(rows: list[TokenizedSequence]) -> dict[str, Any]:
    return pack_sequences([(row.prompt, row.completion) for row in rows])._asdict()
