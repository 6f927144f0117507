"""The optimum of a policy's own objective, over every outcome or over samples of the reference.

Scores with the models; the mathematics is in `exact` and `theory`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from softpref.disk import content_hash
from softpref.evaluation.config import EvaluationConfig
from softpref.evaluation.measure import draw_samples
from softpref.evaluation.models import Models
from softpref.judges.expert import RewardJudge
from softpref.progress import progress
from softpref.records.dataset import DatasetStats, Text
from softpref.records.evaluation import PromptRecord
from softpref.records.model import ModelMetadata

if TYPE_CHECKING:
    import numpy as np

    from softpref.evaluation.exact import ExactPrompt, Objective
    from softpref.evaluation.theory import ReferenceSamples, SampledPrompt
    from softpref.judges.outcomes import Outcomes
    from softpref.judges.protocol import Judge
    from softpref.lm.tokenization import TokenizedPrompt


def theory_samples(
    models: Models,
    prompts: Sequence[Text],
    tokenized: Sequence[TokenizedPrompt],
    judge: Judge,
    config: EvaluationConfig,
) -> list[ReferenceSamples]:
    """Samples of the reference with their rewards, for the first `exact_prompts` prompts.

    Empty unless the judge is an expert that knows the reward of any text.
    """
    import numpy as np

    from softpref.evaluation.theory import ReferenceSamples

    if not isinstance(judge, RewardJudge) or not config.theory_samples or not config.exact_prompts:
        return []
    count = config.exact_prompts
    many = dataclasses.replace(config, samples_per_prompt=config.theory_samples)
    drawn, shown = draw_samples(models, "reference", prompts[:count], tokenized[:count], judge, many)
    found = []
    for samples, texts in zip(drawn, shown, strict=True):
        sequences = [(sample.prompt, sample.completion) for sample in samples]
        logps = models.asked.logps(sequences, **models.scoring).double().numpy()
        told = [text.text for text in texts]  # of which the expert needs no prompt
        dimensions = {name: one.scores([""] * len(told), told) for name, one in judge.dimensions.items()}
        rewards = np.array([text.score for text in texts], dtype=float)
        found.append(ReferenceSamples(rewards, logps, sequences, dimensions))
    return found


def enumerated(
    models: Models,
    outcomes: Mapping[str, Outcomes],
    prompts: Sequence[Text],
    config: EvaluationConfig,
    metadata: ModelMetadata,
    stats: DatasetStats,
    warnings: list[str],
    *,
    reference: str = "",
) -> list[ExactPrompt]:
    """Score every outcome of the first `exact_prompts` prompts whose outcomes are known.

    Args:
        reference: the folder of the reference, which is not checked without it.
    """
    from softpref.evaluation.exact import exact_prompt, why_unknown
    from softpref.lm.scoring import check_positions, score_sequences
    from softpref.lm.tokenization import stop_token_ids, tokenize_row

    known = [prompt for prompt in prompts if isinstance(prompt, str) and prompt in outcomes]
    known = known[: config.exact_prompts]
    if not known:
        return []
    objective = _objective(metadata, stats, reference)
    if reason := why_unknown(objective):
        warnings.append(f"The exact optimum is not known: {reason}.")
    found = []
    total = 2 * sum(len(outcomes[prompt].completions) for prompt in known)
    with progress("every outcome", total=total, unit="sequence") as loop:
        for prompt in known:
            entry = outcomes[prompt]
            tokenized = tokenize_row(
                models.tokenizer,
                prompt,
                entry.completions,
                stop_ids=stop_token_ids(models.tokenizer, models.policy),
                max_prompt_length=models.max_prompt_length,
            )
            sequences = [(each.prompt, each.completion) for each in tokenized]
            longest = max(len(completion) for _, completion in sequences)
            for model in (models.policy, models.reference):
                check_positions(model, len(sequences[0][0]), longest, "set exact_prompts to 0")
            policy, of_reference = (
                scores(sequences, **models.scoring, progress=loop.update).double().numpy()
                for scores in (partial(score_sequences, models.policy), models.asked.logps)
            )
            found.append(exact_prompt(entry, policy, of_reference, objective, seed=config.seed))
    return found


def against_theory(
    models: Models,
    theory: Sequence[ReferenceSamples],
    records: Sequence[PromptRecord],
    metadata: ModelMetadata,
    stats: DatasetStats,
    seed: int,
    warnings: list[str],
    *,
    reference: str = "",
) -> list[SampledPrompt]:
    """Compare the policy with the optimum over samples of the reference, prompt by prompt: what it makes of
    them, and its own samples.

    Args:
        theory: of `theory_samples`.
        records: of all prompts, in the same order.
        warnings: is told why the optimum is unknown.
        reference: as in `enumerated`.
    """
    from statistics import fmean

    import numpy as np

    from softpref.evaluation.exact import why_unknown
    from softpref.evaluation.theory import sampled_prompt
    from softpref.lm.scoring import score_sequences

    def scored(samples: ReferenceSamples) -> np.ndarray:
        if reason:  # there is nothing to compare with
            return np.full_like(samples.logps, np.nan)
        return score_sequences(models.policy, samples.sequences, **models.scoring).double().numpy()

    objective = _objective(metadata, stats, reference)
    reason = why_unknown(objective)
    if theory and reason:
        warnings.append(f"The optimum is not known: {reason}.")
    return [
        sampled_prompt(
            samples.rewards,
            samples.logps,
            scored(samples),
            objective,
            dimensions=samples.dimensions,
            policy_reward=fmean(sample.score or 0.0 for sample in record.policy),
            policy_kl=fmean(sample.kl or 0.0 for sample in record.policy),
            seed=seed,
        )
        for samples, record in zip(theory, records, strict=False)
    ]


def _objective(metadata: ModelMetadata, stats: DatasetStats, reference: str) -> Objective:
    """What was trained; of a model with rounds behind it, only beside the model that the first began with."""
    from softpref.evaluation.exact import trained_objective

    objective, lineage = trained_objective(metadata, stats), metadata.get("lineage")
    files = sorted(Path(reference).glob("*.safetensors")) if reference and lineage else []
    if lineage and files and lineage[0]["reference_hash"] not in ("", content_hash(*files)):
        reason = f"the reference is not the model that the first round ({lineage[0]['dimension']}) began with"
        return objective._replace(altered=reason)
    return objective
