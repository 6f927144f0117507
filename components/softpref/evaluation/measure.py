"""Draws from models, and compares policy and reference along samples. Turns nothing into figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from softpref.errors import ConfigError
from softpref.lm.head import completion_hidden
from softpref.lm.sampling import Sample, sample_completions, sampling_noise
from softpref.lm.scoring import scoring_batches, sum_by_sequence

Progress = Callable[[int], Any]
Ids = Sequence[int]


class Divergences(NamedTuple):
    """What policy and reference say along policy samples.

    Attributes:
        kl: `[samples]`, Σ_t KL_t(policy ‖ reference) over the whole vocabulary, nats.
        entropy: `[samples]`, Σ_t H_t of the policy, nats.
        surprisal: `[samples]`, −log π_ref of the sample, nats.
    """

    kl: np.ndarray
    entropy: np.ndarray
    surprisal: np.ndarray


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


def draw(
    model: Any,
    prompts: Sequence[Ids],
    samples_per_prompt: int,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
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
        batch_size=batch_size,
        progress=progress,
    )
    return [flat[i : i + samples_per_prompt] for i in range(0, len(flat), samples_per_prompt)]


@torch.no_grad()
def divergences(
    policy: Any,
    reference: Any,
    samples: Sequence[Sample],
    *,
    batch_size: int,
    plain: bool = False,
    progress: Progress | None = None,
) -> Divergences:
    """KL to the reference, entropy of the policy, and surprisal of the reference along the policy's samples.

    The first two are whole-vocabulary sums at each sampled prefix: the same expectation as log-ratios of the
    sampled tokens, with less variance.
    """
    kl, entropy, surprisal = (np.empty(len(samples)) for _ in range(3))
    sequences = [(sample.prompt, sample.completion) for sample in samples]
    for rows, batch in scoring_batches(policy, sequences, batch_size=batch_size, plain=plain):
        states, theirs = (completion_hidden(model, batch, plain=plain) for model in (policy, reference))
        found = states.kl(theirs)
        kl[rows] = sum_by_sequence(found.kl, batch.lengths).cpu().numpy()
        entropy[rows] = sum_by_sequence(found.entropy, batch.lengths).cpu().numpy()
        surprisal[rows] = -sum_by_sequence(found.ref_logps, batch.lengths).cpu().numpy()
        if progress:
            progress(len(rows))
    return Divergences(kl, entropy, surprisal)
