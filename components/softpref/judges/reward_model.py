"""A reward model as a judge: a language model with heads that score a prompt with its completion."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from softpref.errors import ConfigError
from softpref.judges.protocol import ScoringJudge, digest
from softpref.judges.texts import as_given
from softpref.records.model import REWARD_STAGE, ModelMetadata, load_metadata

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOWER = 0.1
"""The quantile over heads that is sure: of scores, and of win rates."""


class RewardModelJudge(ScoringJudge):
    """A sequence-classification model whose logit is the score, or the mean of several heads' logits.

    Args:
        model: of transformers, with one label; with several only if they are the heads of an ensemble.
        tokenizer: the model's.
        max_length: tokens; longer texts lose their beginning. None sets no limit.
        origin: for a reader, where the model comes from.

    Attributes:
        metadata: `softpref.json` of a model that `softpref judge` trained; else empty.
    """

    name = "reward-model"

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        origin: str = "",
        metadata: ModelMetadata | None = None,
    ) -> None:
        self._model, self._tokenizer, self._max_length = model, tokenizer, max_length
        self.metadata: ModelMetadata = metadata or {}
        heads = model.config.num_labels
        trained = f", trained on the split {split}" if (split := self.metadata.get("split")) else ""
        self.description = (
            f"a reward model{f' ({origin})' if origin else ''}{trained}"
            f"{f', mean of {heads} heads' if heads > 1 else ''}; its win rate is worth as much as its "
            "agreement with held-out preferences"
        )
        self.fingerprint = digest([_weights_hash(model), tokenizer.chat_template, max_length])

    def scores(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """Scores in nats, `[n]`: the mean over heads."""
        scores: np.ndarray = self.heads(prompts, completions).mean(1)
        return scores

    def lower(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """`[n]`: the score that nine of ten heads exceed, see `lower_scores`; what the score is above it is
        uncertainty.
        """
        heads = self.heads(prompts, completions)
        lower = np.empty(len(prompts))
        places: dict[str, list[int]] = {}
        for place, prompt in enumerate(prompts):
            places.setdefault(prompt, []).append(place)
        for group in places.values():
            lower[group] = lower_scores(heads[group])
        return lower

    def heads(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        """Scores of each head in nats, `[n, heads]`."""
        from softpref.lm.rating import rate, rated_text

        places: dict[tuple[str, str], int] = {}  # a text may be asked for many times
        own = [places.setdefault(pair, len(places)) for pair in zip(prompts, completions, strict=True)]
        encoded = [
            rated_text(self._tokenizer, as_given(prompt), as_given(completion), self._max_length)
            for prompt, completion in places
        ]
        found: np.ndarray = rate(self._model, encoded).numpy().astype(np.float64)[own]
        return found


def lower_scores(heads: np.ndarray) -> np.ndarray:
    """The scores of completions of one prompt that nine of ten heads exceed (`LOWER`), `[n]` in nats.

    Only differences within a prompt mean anything, so each head counts from its own mean over the
    completions given here. Equal to the scores where there is one head, or one completion.

    Args:
        heads: `[n, heads]`, scores by each head.
    """
    means = heads.mean(0)
    lower: np.ndarray = np.quantile(heads - means, LOWER, axis=1) + means.mean()
    return lower


def load_reward_judge(
    source: str, *, trust_remote_code: bool = False, device: str = "", tracking_uri: str = ""
) -> RewardModelJudge:
    """A reward model from a checkpoint.

    Args:
        source: a folder, the URL of one, a model of the MLflow registry, or a Hub id.
        device: where it runs; empty takes a GPU when there is one.

    Raises:
        ConfigError: it is absent, cannot be loaded, or is no reward model.
    """
    import torch

    from softpref.lm.loading import load_reward_model, load_tokenizer
    from softpref.lm.sources import local_source, source_name

    origin = source_name(source, tracking_uri=tracking_uri)
    source = local_source(source, tracking_uri=tracking_uri)
    metadata = load_metadata(source)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_reward_model(source, trust_remote_code=trust_remote_code, device=device).eval()
    labels = model.config.num_labels
    if labels != 1 and metadata.get("stage") != REWARD_STAGE:
        raise ConfigError(
            f"reward model {origin} has {labels} labels, so its numbers are classes or aspects of an answer, "
            "of which none is known to be the reward; give a model with one label, or one of `softpref judge`"
        )
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code, needs_end=False)
    limits = (
        metadata.get("max_length"),
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
        tokenizer.model_max_length,  # 10^30 where the tokenizer does not know
    )
    return RewardModelJudge(
        model,
        tokenizer,
        max_length=min(limit for limit in limits if limit),
        origin=origin,
        metadata=metadata,
    )


def _weights_hash(model: Any) -> str:
    import torch

    found = hashlib.sha256()
    for name, weights in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(weights.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
