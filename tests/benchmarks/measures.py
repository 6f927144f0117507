"""What `comparisons.py` measures of a trained model: exactly, beside theory, or on human preferences."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import load_from_disk
from softpref.evaluation.config import EvaluationConfig
from softpref.evaluation.exact import ExactPrompt, exact_figures
from softpref.evaluation.measure import divergences, draw
from softpref.evaluation.metrics import PreferenceMetric, prompt_key
from softpref.evaluation.models import load_policy, load_reference
from softpref.evaluation.optima import enumerated
from softpref.evaluation.stage import run as evaluate
from softpref.judges.outcomes import read_outcomes
from softpref.lm.head import completion_hidden
from softpref.lm.loading import load_model, load_tokenizer
from softpref.lm.sampling import Sample
from softpref.lm.scoring import scoring_batches, sum_by_sequence
from softpref.lm.tokenization import stop_token_ids, tokenize_row
from softpref.records.model import load_metadata

SAMPLES = 24  # of a real model, on the held-out prompts in turn
LONGEST = 64  # tokens of such a sample


def exactly(policy: Path, reference: Path, dataset: Path, most: int | None = None) -> dict[str, Any]:
    """Score every outcome of every held-out prompt; `kl` is that to the reference given the set, in nats.

    Args:
        most: prompts; None: all.
    """
    metadata, config = load_metadata(policy), EvaluationConfig(exact_prompts=1000)
    places = {"policy": str(policy), "reference": str(reference)}
    models = load_policy(config, load_reference(config, places, metadata), str(policy))
    rows = load_from_disk(str(dataset))
    prompts = sorted({*rows["validation"]["prompt"], *rows["test"]["prompt"]})[:most]
    stats = json.loads((dataset / "stats.json").read_text(encoding="utf-8"))
    outcomes = read_outcomes(dataset / "outcomes.jsonl")
    found = enumerated(models, outcomes, prompts, config, metadata, stats, [])
    kl = statistics.fmean(float(np.exp(one.policy) @ (one.policy - one.reference)) for one in found)
    figures = {name: figure.value for name, figure in exact_figures(found).items()}
    return {**figures, "kl": kl, "most_reward": float(np.interp(kl, *frontier(found)))}


def frontier(prompts: Sequence[ExactPrompt]) -> tuple[list[float], list[float]]:
    """The most expected reward that policies on the set can have at each KL to the reference: KLs, rewards.

    It is reached by π_ref · exp(reward / τ) with one τ for all prompts.
    """
    kls, rewards = [], []
    for sharpness in (0.0, *np.geomspace(0.05, 30.0, 100)):
        tilted = [one.reference + sharpness * one.rewards for one in prompts]
        logps = [values - np.logaddexp.reduce(values) for values in tilted]
        pairs = list(zip(logps, prompts, strict=True))
        kls.append(statistics.fmean(float(np.exp(logp) @ (logp - one.reference)) for logp, one in pairs))
        rewards.append(statistics.fmean(float(np.exp(logp) @ one.rewards) for logp, one in pairs))
    return kls, rewards


def beside_theory(policy: Path, reference: Path, dataset: Path, prompts: int = 32) -> dict[str, Any]:
    """What the evaluation stage says of samples, and of the optimum by importance sampling."""
    config = EvaluationConfig(
        samples_per_prompt=32, max_prompts=prompts, exact_prompts=prompts, theory_samples=192
    )
    folders = {"dataset_dir": str(dataset), "reference_dir": str(reference), "policy_dir": str(policy)}
    found = evaluate(config, **folders, output_dir=str(policy / "evaluation"))
    assert found.theory is not None
    assert found.reward_frontier is not None
    figures = {name: figure.value for name, figure in {**found.metrics, **found.theory}.items()}
    kls, rewards = zip(*found.reward_frontier, strict=True)
    reached = figures["kl"] <= kls[-1]  # beyond, too few samples of the reference tell
    return {**figures, "most_reward": float(np.interp(figures["kl"], kls, rewards)) if reached else None}


def on_preferences(policy: Path, reference: Path, dataset: Path) -> dict[str, Any]:
    """Accuracy on held-out human preferences, with intervals by prompt, and how the model ends its texts.

    `beside` holds the same of the reference, and the accuracy of taking the longer one, in tokens.
    """
    rows = load_from_disk(str(dataset))["test"]
    model = load_model(str(policy)).eval()
    base, theirs = _reference(reference, dataset)
    ours = look(model, reference, dataset)

    def accuracy(scores: np.ndarray) -> dict[str, Any]:
        figures = PreferenceMetric(keep_in_memory=True).compute(
            scores=scores.reshape(-1, 2).tolist(),
            kind=rows["kind"],
            probability=rows["probability"],
            prompt=[prompt_key(prompt) for prompt in rows["prompt"]],
        )
        return figures["preference_accuracy"]._asdict()

    def own(found: Look) -> dict[str, Any]:
        return {
            "absolute": accuracy(found.logps),
            "end": float(found.ends.mean()),
            "length": statistics.fmean(len(sample.completion) for sample in found.samples),
            "truncated": statistics.fmean(sample.truncated for sample in found.samples),
        }

    return {
        **own(ours),
        "implicit": accuracy(ours.logps - theirs.logps),
        "saturated": load_metadata(policy).get("saturated"),
        "kl": float(divergences(model, base, ours.samples, batch_size=SAMPLES).kl.mean()),
        "beside": {"reference": own(theirs), "the longer": {"absolute": accuracy(ours.lengths)}},
    }


class Look(NamedTuple):
    """What a model says of the `n` held-out completions, a row's behind one another.

    Attributes:
        logps, ends: `[n]`, log-probability of the whole completion, and of its end token at its place; nats.
        lengths: `[n]`, tokens.
        samples: its own completions of the held-out prompts.
    """

    logps: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray
    samples: list[Sample]


@torch.no_grad()
def look(model: Any, reference: Path, dataset: Path) -> Look:
    """Score the held-out rows of a dataset, and draw on their prompts, with the reference's tokenizer."""
    tokenizer = load_tokenizer(str(reference))
    stops = stop_token_ids(tokenizer, model)
    sequences = [
        (each.prompt, each.completion)
        for row in load_from_disk(str(dataset))["test"]
        for each in tokenize_row(tokenizer, row["prompt"], row["completions"], stop_ids=stops)
    ]
    logps, ends = np.empty(len(sequences)), np.empty(len(sequences))
    for places, batch in scoring_batches(model, sequences, batch_size=32):
        found = completion_hidden(model, batch).logps()
        logps[places] = sum_by_sequence(found, batch.lengths).numpy()
        ends[places] = found[batch.lengths.cumsum(0) - 1].numpy()
    distinct = [list(prompt) for prompt in dict.fromkeys(tuple(prompt) for prompt, _ in sequences)]
    prompts = [distinct[i % len(distinct)] for i in range(SAMPLES)]
    drawn = draw(model, prompts, 1, max_new_tokens=LONGEST, stop_ids=stops, seed=0, batch_size=SAMPLES)
    lengths = np.array([float(len(completion)) for _, completion in sequences])
    return Look(logps, ends, lengths, [sample for (sample,) in drawn])


@functools.cache
def _reference(reference: Path, dataset: Path) -> tuple[Any, Look]:
    model = load_model(str(reference)).eval()
    return model, look(model, reference, dataset)


MEASURES = {"story": exactly, "storyteller": beside_theory, "real": on_preferences}
