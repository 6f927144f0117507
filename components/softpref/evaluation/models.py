"""The two models of an evaluation, and held-out prompts as their tokens. Draws and scores nothing."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from softpref.disk import in_brief
from softpref.errors import ConfigError, DataError
from softpref.evaluation.config import EvaluationConfig
from softpref.evaluation.reference_cache import REFERENCE_CACHE, ReferenceCache
from softpref.judges.texts import as_text
from softpref.records.dataset import PreferenceRow, Text
from softpref.records.model import ModelMetadata

if TYPE_CHECKING:
    from softpref.lm.tokenization import TokenizedPrompt


class Scoring(TypedDict):
    """How many sequences are scored at once, and whether in the plain way."""

    batch_size: int
    plain: bool


class Models(NamedTuple):
    """Both models (the policy None until it is loaded), and how texts become their tokens.

    `asked` has what the reference was asked before, by other evaluations, too.
    """

    policy: Any
    reference: Any
    asked: ReferenceCache
    tokenizer: Any
    max_prompt_length: int | None
    max_new_tokens: int
    scoring: Scoring


def load_reference(config: EvaluationConfig, places: Mapping[str, str], metadata: ModelMetadata) -> Models:
    """The reference, without the policy.

    Raises:
        ConfigError: the policy has another vocabulary.
    """
    import torch
    from transformers import AutoConfig

    from softpref.lm.loading import load_model, load_tokenizer

    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    trusted = config.trust_remote_code
    reference = load_model(
        places["reference"], dtype=config.dtype, device=device, trust_remote_code=trusted
    ).eval()
    if (Path(places["policy"]) / "config.json").is_file():  # said before anything is drawn
        try:
            of_the_policy = AutoConfig.from_pretrained(places["policy"], trust_remote_code=trusted)
        except Exception as error:  # as `load_model` says it
            raise ConfigError(f"model {places['policy']} cannot be loaded: {in_brief(error)}") from error
        check_same_vocabulary(SimpleNamespace(config=of_the_policy), reference)
    return Models(
        None,
        reference,
        ReferenceCache(reference, config.reference_cache or os.environ.get(REFERENCE_CACHE, "")),
        load_tokenizer(places["policy"], trust_remote_code=trusted),
        metadata.get("max_prompt_length"),
        config.max_new_tokens or metadata["max_completion_length"],
        {"batch_size": config.batch_size, "plain": config.plain_forward},
    )


def load_policy(config: EvaluationConfig, models: Models, folder: str) -> Models:
    from softpref.lm.loading import load_model

    device = next(models.reference.parameters()).device
    policy = load_model(
        folder, dtype=config.dtype, device=str(device), trust_remote_code=config.trust_remote_code
    ).eval()
    check_same_vocabulary(policy, models.reference)
    return models._replace(policy=policy)


def tokenize_prompts(
    models: Models, prompts: Sequence[Text], rows: Sequence[PreferenceRow]
) -> list[TokenizedPrompt]:
    """Ids of each prompt, ending where training parted it from the completions of its rows.

    Raises:
        DataError: names the prompt that the tokenizer or its chat template refuses.
    """
    from softpref.evaluation.metrics import prompt_key
    from softpref.lm.tokenization import tokenize_prompt

    completions: dict[str, list[Text]] = defaultdict(list)
    for row in rows:
        completions[prompt_key(row["prompt"])] += row["completions"]
    limit = models.max_prompt_length
    found = []
    for prompt in prompts:
        try:
            try:
                ids = tokenize_prompt(
                    models.tokenizer, prompt, completions[prompt_key(prompt)], max_length=limit
                )
            except DataError:  # a completion that this tokenizer cannot express; `held_out` counts such rows
                ids = tokenize_prompt(models.tokenizer, prompt, max_length=limit)
            found.append(ids)
        except DataError as error:
            raise DataError(f"held-out prompt {as_text(prompt, roles=True)[:80]!r}: {error}") from error
    return found


def check_prompts(model: Any, models: Models, prompts: Sequence[TokenizedPrompt]) -> None:
    """Refuse prompts after which the longest completion would exceed the model's positions."""
    from softpref.lm.scoring import check_ids, check_positions

    remedy = "lower max_new_tokens, or train with a lower max_prompt_length"
    check_positions(model, max(len(prompt.ids) for prompt in prompts), models.max_new_tokens, remedy)
    check_ids(model, (prompt.ids for prompt in prompts))


def check_same_vocabulary(policy: Any, reference: Any) -> None:
    """Refuse two models whose vocabularies differ in size."""
    ours, theirs = policy.config.vocab_size, reference.config.vocab_size
    if ours != theirs:
        raise ConfigError(
            f"the policy has {ours} tokens, the reference {theirs}; "
            "give the reference that the policy was trained from"
        )
