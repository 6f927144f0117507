"""Training on preferences by Bradley-Terry: rows as batches, the loss of several heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from softpref.judges.texts import as_text, ordered_pairs
from softpref.lm.rating import Encoded, head_scores, padded, rated_text, read
from softpref.lm.training import GuardedTrainer
from softpref.objectives.reward import bradley_terry_loss
from softpref.progress import follow, progress
from softpref.records.dataset import PreferenceRow
from softpref.reward_model.config import RewardModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RatedRow(NamedTuple):
    """A row of preferences as a reward model learns from it.

    Attributes:
        texts: of each completion, best first.
        pairs: places of the better and the worse one, and P(better wins).
        weights: `[heads]`, how much the row counts for each head.
        features: `[texts, width]`, what a model's heads are given of each text, where it has been read.
    """

    texts: list[Encoded]
    pairs: list[tuple[int, int, float]]
    weights: list[float]
    features: Tensor | None = None


class RewardTrainer(GuardedTrainer):
    """A trainer whose loss is the mean over rows and heads of −log-likelihood of preferences, in nats.

    The pairs of a row share its weight. The mean is over all rows of an optimizer step, however it is cut.
    """

    args: RewardModelConfig

    def __init__(self, *args: Any, **options: Any) -> None:
        pad_id = options["model"].config.get_text_config().pad_token_id
        super().__init__(*args, data_collator=partial(collate, pad_id=pad_id), **options)
        self.model_accepts_loss_kwargs = False  # losses are scaled here, over the global batch

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """The micro-batches of one optimizer step, and how many rows all processes have."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        rows = torch.tensor(float(sum(len(batch["rows"]) for batch in batches)), device=device)
        return batches, self.accelerator.reduce(rows, reduction="sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        losses = row_losses(model, inputs)
        if num_items_in_batch is None:
            return losses.mean()
        scale = self.current_gradient_accumulation_steps * self.args.world_size
        loss: Tensor = losses.sum() / num_items_in_batch * scale
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss of an evaluation batch over its own rows; no predictions are collected."""
        inputs = self._prepare_inputs(inputs)
        own = self.own_rows(len(inputs["rows"]))
        with torch.no_grad(), self.compute_loss_context_manager():
            losses = row_losses(model, inputs)
        return losses[:own].mean(), None, None


class RatedRows(torch.utils.data.Dataset[RatedRow]):
    """Preferences in tokens.

    Args:
        rows: of a split.
        weights: `[rows, heads]`, see `bootstrap_weights`.
        name: what progress calls one of them.

    Raises:
        DataError: the chat template refuses a conversation.
    """

    def __init__(
        self,
        rows: Sequence[PreferenceRow],
        weights: np.ndarray,
        tokenizer: PreTrainedTokenizerBase,
        config: RewardModelConfig,
        name: str,
    ) -> None:
        quiet = bool(config.disable_tqdm) or config.process_index > 0
        self.rows = [
            RatedRow(
                [rated_text(tokenizer, row["prompt"], one, config.max_length) for one in row["completions"]],
                list(ordered_pairs(row["kind"], len(row["completions"]), row["probability"])),
                own.tolist(),
            )
            for row, own in zip(follow(rows, f"tokenizing {name}s", disable=quiet), weights, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> RatedRow:
        return self.rows[index]

    def read_by(self, model: Any, name: str, *, quiet: bool) -> None:
        """Keep what the model's heads are given of every text; batches then hold it in place of tokens.

        For a body that training leaves as it is: each text is then read once, and not once for each of its
        pairs in each epoch.

        Args:
            model: a sequence-classification model.
            name: what progress calls one of the texts.
            quiet: show no progress.
        """
        places: dict[tuple[int, ...], int] = {}
        encoded: list[Encoded] = []
        for row in self.rows:
            for text in row.texts:
                if (key := tuple(text["input_ids"])) not in places:
                    places[key] = len(encoded)
                    encoded.append(text)
        with progress(f"reading {name}s", total=len(encoded), disable=quiet) as loop:
            features = read(model, encoded, progress=loop.update)
        self.rows = [
            row._replace(features=features[[places[tuple(text["input_ids"])] for text in row.texts]])
            for row in self.rows
        ]


def bootstrap_weights(rows: Sequence[PreferenceRow], heads: int, seed: int) -> np.ndarray:
    """`[rows, heads]`: how often each head has drawn a row's prompt, times the row's own weight.

    Prompts are drawn with replacement, as many as there are: rows of one prompt are alike, and drawing rows
    would make the heads agree more than the preferences warrant. A single head has every prompt once.
    """
    own = np.array([1.0 if (weight := row.get("weight")) is None else weight for row in rows])
    if heads == 1:
        return own[:, None]
    _, prompts = np.unique([as_text(row["prompt"], roles=True) for row in rows], return_inverse=True)
    count = int(prompts.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=heads)
    return own[:, None] * drawn.T[prompts]


def row_losses(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Loss of each row of a batch, the mean over its pairs and over heads: `[rows]`, nats."""
    texts = {name: part for name, part in batch.items() if name not in _OF_PAIRS}
    scores = head_scores(model, texts)
    losses = bradley_terry_loss(scores[batch["better"]] - scores[batch["worse"]], batch["share"][:, None])
    sizes = batch["rows"]
    row = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    by_row = losses.new_zeros(len(sizes), losses.shape[1]).index_add(0, row, losses) / sizes[:, None]
    weighted: Tensor = by_row * batch["weights"]
    return weighted.mean(1)


_OF_PAIRS = ("rows", "weights", "better", "worse", "share")


def collate(rows: Sequence[RatedRow], pad_id: int) -> dict[str, Tensor]:
    """One batch: the texts of all rows, `rows` (pairs of each), `weights` `[rows, heads]`, and the pairs.

    Texts are tokens, or `features` `[texts, width]`.
    """
    starts = np.cumsum([0, *(len(row.texts) for row in rows)])
    pairs = [
        (start + i, start + j, p) for start, row in zip(starts, rows, strict=False) for i, j, p in row.pairs
    ]
    better, worse, share = zip(*pairs, strict=True)
    features = [row.features for row in rows if row.features is not None]
    of_texts = (
        padded([text for row in rows for text in row.texts], pad_id)
        if not features
        else {"features": torch.cat(features)}
    )
    return {
        "rows": torch.tensor([len(row.pairs) for row in rows]),
        "weights": torch.tensor([row.weights for row in rows]),
        "better": torch.tensor(better),
        "worse": torch.tensor(worse),
        "share": torch.tensor(share),
        **of_texts,
    }
