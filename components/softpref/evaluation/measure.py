"""Runs the policy and the reference over prompts and completions. Turns nothing into figures.

Batches shrink where long sequences meet a large vocabulary, so that the logits of one pass stay bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from softpref.errors import ConfigError
from softpref.lm.sampling import Sample, sample_completions, sampling_noise
from softpref.lm.scoring import (
    completion_logits,
    entropies,
    gather_logps,
    pad_sequences,
    score_sequences,
    sum_by_sequence,
)
from softpref.objectives import kl_per_token

_LOGITS_AT_ONCE = 2**26  # 256 MB in fp32

Progress = Callable[[int], Any]
Ids = Sequence[int]


class PromptRecord(NamedTuple):
    """Everything drawn for one prompt; a line of `samples.jsonl`.

    Attributes:
        prompt: the text shown to the models, messages flattened.
        reference: reference samples: `text`, `score` (judge, nats), `truncated`.
        policy: policy samples: the same and `kl`, Σ KL_t to the reference in nats.
    """

    prompt: str
    reference: list[dict[str, Any]]
    policy: list[dict[str, Any]]


class Divergences(NamedTuple):
    """What policy and reference say along policy samples.

    Attributes:
        kl: `[samples]`, Σ_t KL_t(policy ‖ reference) over the whole vocabulary, nats.
        entropy: `[samples]`, Σ_t H_t of the policy, nats.
    """

    kl: np.ndarray
    entropy: np.ndarray


def check_same_vocabulary(policy: Any, reference: Any) -> None:
    """Refuse two models whose next-token distributions cannot be compared.

    Raises:
        ConfigError: their vocabularies differ in size.
    """
    ours, theirs = policy.config.vocab_size, reference.config.vocab_size
    if ours != theirs:
        raise ConfigError(
            f"the policy has {ours} tokens, the reference {theirs}; "
            "give the reference that the policy was trained from"
        )


def check_positions(model: Any, prompt: int, completion: int, remedy: str) -> None:
    """Refuse sequences that the model has no positions for, before a batch of them fails.

    Args:
        prompt, completion: lengths in tokens, the longest that there can be.
        remedy: what the message ends with.

    Raises:
        ConfigError: together they exceed `max_position_embeddings`, where the model says it.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and prompt + completion > positions:
        raise ConfigError(
            f"prompts of up to {prompt} tokens with completions of up to {completion} do not fit the model's "
            f"{positions} positions; {remedy}"
        )


def score(
    model: Any,
    sequences: Sequence[tuple[Ids, Ids]],
    *,
    pad_id: int,
    batch_size: int,
    progress: Progress | None = None,
) -> np.ndarray:
    """Log-probabilities of `(prompt ids, completion ids)` pairs in nats, `[n]` float64."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]) + len(sequences[i][1]))
    scores = np.empty(len(sequences))
    start = 0
    while start < len(order):
        chosen = order[start : start + batch_size]
        longest = max(len(sequences[i][0]) + len(sequences[i][1]) for i in chosen)
        chosen = chosen[: _rows_at_once(model, longest)]
        scores[chosen] = score_sequences(
            model, [sequences[i] for i in chosen], pad_id=pad_id, batch_size=len(chosen)
        ).numpy()
        start += len(chosen)
        if progress:
            progress(len(chosen))
    return scores


@torch.inference_mode()
def score_outcomes(
    model: Any,
    prompt: Ids,
    completions: Sequence[Ids],
    *,
    pad_id: int,
    batch_size: int,
    progress: Progress | None = None,
) -> np.ndarray:
    """Log-probabilities of many completions of *one* prompt, whose work is done once: `[n]` float64, nats."""
    from transformers import DynamicCache

    device = next(model.parameters()).device
    ids = torch.as_tensor([list(prompt)], device=device)
    order = sorted(range(len(completions)), key=lambda i: len(completions[i]))
    longest = len(completions[order[-1]]) if order else 1
    check_positions(model, len(prompt), longest, "set exact_prompts to 0")
    size = min(batch_size, _rows_at_once(model, longest))
    scores = np.empty(len(completions))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        cache = DynamicCache(config=model.config)
        first = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        cache.batch_repeat_interleave(len(rows))
        # the last token is predicted, not read
        lengths = torch.tensor([len(completions[i]) for i in rows])
        width = int(lengths.max())
        tokens = torch.full((len(rows), width), pad_id, dtype=torch.long)
        for row, i in enumerate(rows):
            tokens[row, : lengths[row]] = torch.as_tensor(list(completions[i]))
        inside = torch.arange(width) < lengths[:, None]
        tokens, inside, lengths = tokens.to(device), inside.to(device), lengths.to(device)
        logits = first.expand(len(rows), 1, -1)
        if width > 1:
            mask = torch.cat([inside.new_ones(len(rows), len(prompt)), inside[:, :-1]], 1).long()
            output = model(
                input_ids=tokens[:, :-1], attention_mask=mask, past_key_values=cache, use_cache=True
            )
            logits = torch.cat([logits, output.logits], 1)
        logps = gather_logps(logits[inside].float(), tokens[inside])
        scores[rows] = sum_by_sequence(logps, lengths).cpu().numpy()
        if progress:
            progress(len(rows))
    return scores


def draw(
    model: Any,
    prompts: Sequence[Ids],
    samples_per_prompt: int,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    seed: int,
    batch_size: int,
    progress: Progress | None = None,
) -> list[list[Sample]]:
    """Samples from exactly the model's own distribution, `samples_per_prompt` for each prompt, by seed."""
    noise = sampling_noise(len(prompts) * samples_per_prompt, max_new_tokens, seed)
    flat = sample_completions(
        model,
        [prompt for prompt in prompts for _ in range(samples_per_prompt)],
        noise=noise,
        stop_ids=stop_ids,
        pad_id=pad_id,
        batch_size=batch_size,
        progress=progress,
    )
    return [flat[i : i + samples_per_prompt] for i in range(0, len(flat), samples_per_prompt)]


@torch.inference_mode()
def divergences(
    policy: Any,
    reference: Any,
    samples: Sequence[Sample],
    *,
    pad_id: int,
    batch_size: int,
    progress: Progress | None = None,
) -> Divergences:
    """KL to the reference and entropy of the policy along its own samples.

    Whole-vocabulary sums at each sampled prefix: the same expectation as log-ratios of the sampled tokens,
    with less variance.
    """
    device = next(policy.parameters()).device
    kl, entropy = np.empty(len(samples)), np.empty(len(samples))
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].prompt) + len(samples[i].completion))
    start = 0
    while start < len(order):
        rows = order[start : start + batch_size]
        longest = max(len(samples[i].prompt) + len(samples[i].completion) for i in rows)
        rows = rows[: max(1, _rows_at_once(policy, longest) // 2)]
        batch = pad_sequences([(samples[i].prompt, samples[i].completion) for i in rows], pad_id).to(device)
        logits = completion_logits(policy, batch).logits
        reference_logits = completion_logits(reference, batch).logits
        kl[rows] = sum_by_sequence(kl_per_token(logits, reference_logits), batch.lengths).cpu().numpy()
        entropy[rows] = sum_by_sequence(entropies(logits), batch.lengths).cpu().numpy()
        start += len(rows)
        if progress:
            progress(len(rows))
    return Divergences(kl, entropy)


def _rows_at_once(model: Any, length: int) -> int:
    return max(1, _LOGITS_AT_ONCE // (length * model.config.vocab_size))
