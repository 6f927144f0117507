"""Draws completions from exactly the model's own distribution. Offers no temperature, top-k or top-p.

The KL estimate weighs samples as if they came from the distribution that is scored. A checkpoint's generation
config (temperature 0.6, top-p 0.9 …) would silently break that, so the loop here reads the model's logits and
nothing else. Randomness comes as a table of uniform numbers, one row per sample, so that a sample depends on
its row alone: not on its batch, the number of processes, or what a run had drawn before it was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from softpref.lm.decoding import CachedRows, GrowingRows, WholeRows, decodes, decoding_attention
from softpref.lm.packing import evaluation_mode


class Sample(NamedTuple):
    """One sampled completion.

    Attributes:
        prompt: prompt ids.
        completion: sampled ids, the stop token included when one was drawn.
        token_logps: log-probability of each token under the model that sampled it, nats.
        truncated: the length limit came before a stop token.
    """

    prompt: list[int]
    completion: list[int]
    token_logps: list[float]
    truncated: bool

    @property
    def logp(self) -> float:
        """Log-probability of the completion under the model that sampled it, nats."""
        return sum(self.token_logps)


def sampling_noise(count: int, max_new_tokens: int, seed: int) -> torch.Tensor:
    """Uniform numbers in [0, 1) for `count` samples: `[count, max_new_tokens]` float64, fixed by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, max_new_tokens, generator=generator, dtype=torch.float64)


@torch.no_grad()
def sample_completions(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    noise: torch.Tensor,
    stop_ids: Sequence[int],
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> list[Sample]:
    """Sample one completion for each prompt at temperature 1 over the whole vocabulary, in eval mode.

    Prompts are taken in order of length, so that batches hold little padding; the result is in the order
    given. Once half of a batch's rows have ended, they leave it. Where a cache would not give the scores of
    one forward pass (`softpref.lm.decoding.decodes`), each token takes a whole pass, which is slow.

    Args:
        prompts: prompt ids, each with at least one token.
        noise: `[len(prompts), max_new_tokens]` uniform numbers, see `sampling_noise`; its width is the limit
            on a completion's length.
        stop_ids: tokens that end a completion; they belong to it.
        progress: called with the number of completions that a batch has added.
    """
    device = next(model.parameters()).device
    if len(noise) != len(prompts):
        raise ValueError(f"noise needs one row per prompt: {len(prompts)} prompts, {len(noise)} rows")
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    samples: list[Sample | None] = [None] * len(prompts)
    cached = decodes(model)
    with evaluation_mode(model), decoding_attention(model) if cached else nullcontext():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = [list(prompts[i]) for i in rows]
            for i, sample in zip(
                rows,
                _sample_batch(model, batch, noise[rows].to(device), stop_ids, cached),
                strict=True,
            ):
                samples[i] = sample
            if progress:
                progress(len(rows))
    return [sample for sample in samples if sample is not None]


def _sample_batch(
    model: Any,
    prompts: list[list[int]],
    noise: torch.Tensor,
    stop_ids: Sequence[int],
    cached: bool,
) -> list[Sample]:
    device, max_new_tokens = noise.device, noise.shape[1]
    growing: GrowingRows = (CachedRows if cached else WholeRows)(model, prompts)
    stops = torch.tensor(sorted(set(stop_ids)), device=device)
    alive = torch.arange(len(prompts), device=device)  # original row of each batch row
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    drawn = torch.zeros((len(prompts), max_new_tokens), dtype=torch.long, device=device)
    lengths = torch.zeros(len(prompts), dtype=torch.long, device=device)
    logps = torch.zeros((len(prompts), max_new_tokens), dtype=torch.float32, device=device)
    for step in range(max_new_tokens):
        scores = growing.logits().log_softmax(-1)
        cumulative = scores.exp().cumsum(-1, dtype=torch.float64)
        # the first token whose cumulative probability exceeds the noise: one of probability 0 never is
        threshold = noise[alive, step, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
        tokens = tokens.clamp_max(scores.shape[-1] - 1)
        going = ~ended[alive]
        rows = alive[going]
        drawn[rows, step] = tokens[going]
        lengths[rows] += 1
        logps[rows, step] = scores.gather(-1, tokens[:, None]).squeeze(-1)[going]
        ended[rows] = torch.isin(tokens[going], stops)
        left = int((~ended).sum())
        if left == 0:
            break
        growing.append(tokens)
        if left <= len(alive) // 2 or not cached:
            keep = (~ended[alive]).nonzero().squeeze(-1)
            alive = alive[keep]
            growing.keep(keep)
    return [
        Sample(prompt, completion[:length], token_logps[:length], not has_ended)
        for prompt, completion, length, token_logps, has_ended in zip(
            prompts, drawn.tolist(), lengths.tolist(), logps.tolist(), ended.tolist(), strict=True
        )
    ]
