"""What one model does on held-out prompts, in figures: preferences, samples, and every outcome where known.

Loads the models and runs them; knows no folder of results, and judges no comparison.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from softpref.errors import DataError
from softpref.evaluation.config import EvaluationConfig
from softpref.judges import RewardJudge, as_text
from softpref.progress import progress
from softpref.records import DrawnText, Figure, PromptRecord

if TYPE_CHECKING:
    import numpy as np

    from softpref.evaluation.exact import ExactPrompt
    from softpref.evaluation.intervals import Bootstrap
    from softpref.evaluation.theory import SampledPrompt
    from softpref.judges import Judge
    from softpref.lm.sampling import Sample
    from softpref.lm.tokenization import TokenizedPrompt


class Models(NamedTuple):
    """Both models (the policy None until it is loaded), and how texts become their tokens."""

    policy: Any
    reference: Any
    tokenizer: Any
    max_prompt_length: int | None
    max_new_tokens: int
    scoring: dict[str, Any]  # how many at once, and whether in the plain way


def load_reference(
    config: EvaluationConfig, places: Mapping[str, str], metadata: Mapping[str, Any]
) -> Models:
    import torch
    from transformers import AutoConfig

    from softpref.evaluation.measure import check_same_vocabulary
    from softpref.lm.loading import load_model, load_tokenizer

    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    trusted = config.trust_remote_code
    reference = load_model(
        places["reference"], dtype=config.dtype, device=device, trust_remote_code=trusted
    ).eval()
    if (Path(places["policy"]) / "config.json").is_file():  # said before anything is drawn
        of_the_policy = AutoConfig.from_pretrained(places["policy"], trust_remote_code=trusted)
        check_same_vocabulary(SimpleNamespace(config=of_the_policy), reference)
    return Models(
        None,
        reference,
        load_tokenizer(places["policy"], trust_remote_code=trusted),
        metadata.get("max_prompt_length"),
        config.max_new_tokens or metadata["max_completion_length"],
        {"batch_size": config.batch_size, "plain": config.plain_forward},
    )


def load_policy(config: EvaluationConfig, models: Models, folder: str) -> Models:
    from softpref.evaluation.measure import check_same_vocabulary
    from softpref.lm.loading import load_model

    device = next(models.reference.parameters()).device
    policy = load_model(
        folder, dtype=config.dtype, device=str(device), trust_remote_code=config.trust_remote_code
    ).eval()
    check_same_vocabulary(policy, models.reference)
    return models._replace(policy=policy)


def tokenize_prompts(
    models: Models, prompts: Sequence[Any], rows: Sequence[Mapping[str, Any]]
) -> list[TokenizedPrompt]:
    """Ids of each prompt, ending where training parted it from the completions of its rows.

    Raises:
        DataError: names the prompt that the tokenizer or its chat template refuses.
    """
    from softpref.evaluation.metrics import prompt_key
    from softpref.lm.tokenization import tokenize_prompt

    completions: dict[str, list[Any]] = defaultdict(list)
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
    """Refuse prompts after which the longest completion would outgrow the model, before anything is drawn."""
    from softpref.lm.scoring import check_ids, check_positions

    remedy = "lower max_new_tokens, or train with a lower max_prompt_length"
    check_positions(model, max(len(prompt.ids) for prompt in prompts), models.max_new_tokens, remedy)
    check_ids(model, (prompt.ids for prompt in prompts))


def held_out(
    models: Models, rows: Sequence[Mapping[str, Any]], bootstrap: Bootstrap
) -> tuple[dict[str, Figure], list[str]]:
    """Score the held-out preferences under the policy: its figures, and warnings about rows."""
    from softpref.evaluation.metrics import PerplexityMetric, PreferenceMetric, prompt_key
    from softpref.lm.scoring import score_sequences
    from softpref.lm.tokenization import findings_text, row_findings, stop_token_ids, tokenize_row

    options: dict[str, Any] = {
        "stop_ids": stop_token_ids(models.tokenizer, models.policy),
        "max_prompt_length": models.max_prompt_length,
        "max_completion_length": models.max_new_tokens,
    }
    used, tokens = [], []
    for row in rows:
        try:
            tokens.append(tokenize_row(models.tokenizer, row["prompt"], row["completions"], **options))
        except DataError:  # a text that this tokenizer cannot express; counted below
            continue
        used.append(row)
    if not used:
        raise DataError("no held-out row can be tokenized with the policy's tokenizer")
    sequences = [sequence for group in tokens for sequence in group]
    with progress("held-out preferences", total=len(sequences), unit="sequence") as loop:
        flat = iter(
            score_sequences(
                models.policy,
                [(sequence.prompt, sequence.completion) for sequence in sequences],
                **models.scoring,
                progress=loop.update,
            ).tolist()
        )
    logps = [[next(flat) for _ in group] for group in tokens]
    keys = [prompt_key(row["prompt"]) for row in used]
    figures = PreferenceMetric(keep_in_memory=True).compute(
        scores=logps,
        kind=[row["kind"] for row in used],
        probability=[row["probability"] for row in used],
        prompt=keys,
        bootstrap=bootstrap,
    ) | PerplexityMetric(keep_in_memory=True).compute(
        logp=[group[0] for group in logps],
        tokens=[len(group[0].completion) for group in tokens],
        prompt=keys,
        bootstrap=bootstrap,
    )
    warnings = []
    if len(used) < len(rows):
        warnings.append(
            f"{len(rows) - len(used)} of {len(rows)} held-out rows cannot be tokenized and were left out."
        )
    counts = Counter({"given": len(tokens)}) + Counter(
        name for group in tokens for name in row_findings(group)
    )
    return figures, warnings + findings_text(counts, "held-out rows")


def draw_samples(
    models: Models,
    side: Literal["policy", "reference"],
    prompts: Sequence[Any],
    tokenized: Sequence[TokenizedPrompt],
    judge: Judge,
    config: EvaluationConfig,
) -> tuple[list[list[Sample]], list[list[DrawnText]]]:
    """Draw from one model for each prompt, let the judge score: what was drawn, and its texts and scores."""
    from softpref.evaluation import measure
    from softpref.evaluation.metrics import repetition
    from softpref.lm.tokenization import decode_completion, stop_token_ids

    ids = [prompt.ids for prompt in tokenized]
    count = config.samples_per_prompt
    model = getattr(models, side)
    with progress(f"{side} samples", total=len(ids) * count, unit="sample") as loop:
        drawn = measure.draw(
            model,
            ids,
            count,
            max_new_tokens=models.max_new_tokens,
            stop_ids=stop_token_ids(models.tokenizer, model),
            seed=2 * config.seed + (side == "reference"),  # independent streams of one seed
            batch_size=config.batch_size,
            progress=loop.update,
        )
    shown = []
    for prompt, own, group in zip(prompts, ids, drawn, strict=True):
        completions = [decode_completion(models.tokenizer, prompt, own, each.completion) for each in group]
        scores = judge.scores([as_text(prompt, roles=True)] * count, completions).tolist()
        shown.append(
            [
                DrawnText(
                    completion,
                    score,
                    drawing.truncated,
                    len(drawing.completion),
                    repetition(drawing.completion),
                    -sum(drawing.token_logps),  # under the model itself; see `sampled`
                )
                for completion, score, drawing in zip(completions, scores, group, strict=True)
            ]
        )
    return drawn, shown


def sampled(
    models: Models,
    prompts: Sequence[Any],
    tokenized: Sequence[TokenizedPrompt],
    reference: Sequence[list[DrawnText]],
    judge: Judge,
    config: EvaluationConfig,
    bootstrap: Bootstrap,
) -> tuple[dict[str, Figure], list[PromptRecord]]:
    """Draw from the policy on the prompts that the reference answered: figures, and what was drawn.

    Args:
        reference: the reference's samples of each prompt, as `draw_samples` shows them.
    """
    from softpref.evaluation import measure
    from softpref.evaluation.metrics import DiversityMetric, HealthMetric, SampleMetric, WinRateMetric

    count = config.samples_per_prompt
    drawn, shown = draw_samples(models, "policy", prompts, tokenized, judge, config)
    with progress("KL and entropy", total=len(drawn) * count, unit="sample") as loop:
        divergences = measure.divergences(
            models.policy,
            models.reference,
            [sample for group in drawn for sample in group],
            **models.scoring,
            progress=loop.update,
        )
    kl, entropy, surprisal = (values.reshape(-1, count).tolist() for values in divergences)
    shown = [
        [text._replace(kl=own, surprisal=under) for text, own, under in zip(*group, strict=True)]
        for group in zip(shown, kl, surprisal, strict=True)
    ]
    figures = WinRateMetric(keep_in_memory=True).compute(
        policy=[[sample.score for sample in group] for group in shown],
        reference=[[sample.score for sample in group] for group in reference],
        bootstrap=bootstrap,
    )
    figures |= SampleMetric(keep_in_memory=True).compute(
        kl=kl,
        entropy=entropy,
        length=[[float(sample.tokens) for sample in group] for group in shown],
        bootstrap=bootstrap,
    )
    for prefix, side in (("", shown), ("reference_", reference)):
        health = HealthMetric(keep_in_memory=True).compute(
            **{
                name: [[float(getattr(sample, part)) for sample in group] for group in side]
                for name, part in (
                    ("length", "tokens"),
                    *((one, one) for one in ("truncated", "repetition", "surprisal")),
                )
            },
            bootstrap=bootstrap,
        )
        figures |= {f"{prefix}{name}": figure for name, figure in health.items()}
    figures |= DiversityMetric(keep_in_memory=True).compute(
        completions=[[sample.text for sample in group] for group in shown], bootstrap=bootstrap
    )
    records = [
        PromptRecord(as_text(prompt, roles=True), theirs, ours)
        for prompt, theirs, ours in zip(prompts, reference, shown, strict=True)
    ]
    return figures, records


def theory_samples(
    models: Models,
    prompts: Sequence[Any],
    tokenized: Sequence[TokenizedPrompt],
    judge: Judge,
    config: EvaluationConfig,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What samples of the reference earn, and their log-probabilities, for the first `exact_prompts` prompts.

    Empty unless the judge is an expert that knows the reward of any text.
    """
    import numpy as np

    from softpref.lm.scoring import score_sequences

    if not isinstance(judge, RewardJudge) or not config.theory_samples or not config.exact_prompts:
        return []
    count = config.exact_prompts
    many = dataclasses.replace(config, samples_per_prompt=config.theory_samples)
    drawn, shown = draw_samples(models, "reference", prompts[:count], tokenized[:count], judge, many)
    found = []
    for samples, texts in zip(drawn, shown, strict=True):
        sequences = [(sample.prompt, sample.completion) for sample in samples]
        logps = score_sequences(models.reference, sequences, **models.scoring).double().numpy()
        found.append((np.array([text.score for text in texts]), logps))
    return found


def enumerated(
    models: Models,
    outcomes: Mapping[str, Any],
    prompts: Sequence[Any],
    config: EvaluationConfig,
    metadata: Mapping[str, Any],
    stats: Mapping[str, Any],
    warnings: list[str],
) -> list[ExactPrompt]:
    """Score every outcome of the first `exact_prompts` prompts whose outcomes are known."""
    from softpref.evaluation.exact import exact_prompt, trained_objective, why_unknown
    from softpref.lm.scoring import check_positions, score_sequences
    from softpref.lm.tokenization import stop_token_ids, tokenize_row

    known = [prompt for prompt in prompts if isinstance(prompt, str) and prompt in outcomes]
    known = known[: config.exact_prompts]
    if not known:
        return []
    objective = trained_objective(metadata, stats)
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
            scores = []
            for model in (models.policy, models.reference):
                check_positions(model, len(sequences[0][0]), longest, "set exact_prompts to 0")
                found_scores = score_sequences(model, sequences, **models.scoring, progress=loop.update)
                scores.append(found_scores.double().numpy())
            policy, reference = scores
            found.append(exact_prompt(entry, policy, reference, objective, seed=config.seed))
    return found


def against_theory(
    theory: Sequence[tuple[np.ndarray, np.ndarray]],
    records: Sequence[PromptRecord],
    metadata: Mapping[str, Any],
    stats: Mapping[str, Any],
    seed: int,
    warnings: list[str],
) -> list[SampledPrompt]:
    """Set the policy's samples beside the optimum over those of the reference, prompt by prompt.

    Args:
        theory: of `theory_samples`; records: of all prompts, in the same order.
        warnings: what a reader should know of the optimum is added.
    """
    from statistics import fmean

    from softpref.evaluation.exact import trained_objective, why_unknown
    from softpref.evaluation.theory import sampled_prompt

    objective = trained_objective(metadata, stats)
    if theory and (reason := why_unknown(objective)):
        warnings.append(f"The optimum is not known: {reason}.")
    return [
        sampled_prompt(
            rewards,
            logps,
            objective,
            policy_reward=fmean(sample.score for sample in record.policy),
            policy_kl=fmean(sample.kl or 0.0 for sample in record.policy),
            seed=seed,
        )
        for (rewards, logps), record in zip(theory, records, strict=False)
    ]
