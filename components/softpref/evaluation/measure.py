"""Figures of a policy on held-out prompts: of preferences and of its samples. Loads no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from softpref.errors import DataError
from softpref.evaluation.config import EvaluationConfig
from softpref.evaluation.models import Models
from softpref.judges.expert import ExpertJudge, RewardJudge
from softpref.judges.protocol import ScoringJudge, is_scoring, sigmoid
from softpref.judges.reward_model import RewardModelJudge
from softpref.judges.texts import as_text
from softpref.progress import progress
from softpref.records.dataset import PreferenceRow, Text
from softpref.records.evaluation import DrawnText, PromptRecord, Reliability
from softpref.records.figures import Figure, Figures
from softpref.records.model import ModelMetadata

if TYPE_CHECKING:
    import numpy as np

    from softpref.intervals import Bootstrap
    from softpref.judges.protocol import Judge
    from softpref.lm.sampling import Sample
    from softpref.lm.tokenization import TokenizedPrompt, TokenizedSequence

Progress = Callable[[int], object]
Ids = Sequence[int]
Scores = list[list[float]]  # of the completions of each row


class HeldOut(NamedTuple):
    """What the held-out preferences tell of a policy.

    Attributes:
        figures: by name.
        reliability: bins of the reliability diagram; None where the method implies no preferences.
        by_prompt: values of each prompt, by figure.
        warnings: about rows.
    """

    figures: Figures
    reliability: list[Reliability] | None
    by_prompt: dict[str, list[float]]
    warnings: list[str]


def held_out(
    models: Models, rows: Sequence[PreferenceRow], metadata: ModelMetadata, bootstrap: Bootstrap
) -> HeldOut:
    """Score the held-out preferences under the policy and under its reference.

    `preference_accuracy` goes by log π, `relative_accuracy` by log π − log π_ref, `reference_accuracy` by
    log π_ref; where rows have dimensions, each also as `NAME/DIMENSION`. The figures of
    `softpref.evaluation.calibration` go by the preferences that the policy's method implies, on the rows of
    the dimension that it was trained on; after several rounds these are not known of policy and reference
    alone.
    """
    from softpref.evaluation.calibration import calibration
    from softpref.evaluation.metrics import PerplexityMetric, PreferenceMetric, prompt_key
    from softpref.lm.tokenization import findings_text, row_findings

    used, tokens = _tokenized(models, models.policy, rows)
    if not used:
        raise DataError("no held-out row can be tokenized with the policy's tokenizer")
    keys = [prompt_key(row["prompt"]) for row in used]
    logps, ref_logps = _scored(models, tokens)

    relative = _less(logps, ref_logps, 1.0)
    of_dimension: dict[str, list[int]] = {}
    for place, row in enumerate(used):
        if name := row.get("dimension"):
            of_dimension.setdefault(name, []).append(place)

    def ranked(scores: Scores, name: str, places: Sequence[int] = range(len(used))) -> Figures:
        found = PreferenceMetric.figures(
            bootstrap,
            scores=[scores[place] for place in places],
            kind=[used[place]["kind"] for place in places],
            probability=[used[place]["probability"] for place in places],
            prompt=[keys[place] for place in places],
        )
        return {figure.replace("preference", name, 1): value for figure, value in found.items()}

    figures = {
        **ranked(logps, "preference"),
        **ranked(relative, "relative"),
        "reference_accuracy": ranked(ref_logps, "reference")["reference_accuracy"],
        **{
            f"{what}_accuracy/{name}": ranked(scores, what, places)[f"{what}_accuracy"]
            for name, places in sorted(of_dimension.items())
            for what, scores in (("preference", logps), ("relative", relative), ("reference", ref_logps))
        },
        **PerplexityMetric.figures(
            bootstrap,
            logp=[group[0] for group in logps],
            tokens=[len(group[0].completion) for group in tokens],
            prompt=keys,
        ),
    }
    reliability, by_prompt = None, dict[str, list[float]]()
    lineage = metadata.get("lineage") or []
    trained_on = of_dimension.get(lineage[0]["dimension"], ()) if lineage else range(len(used))
    pairs = [place for place in trained_on if used[place]["kind"] == "pairwise"]
    if pairs and len(lineage) < 2 and (implied := implied_preferences(metadata)):
        scale, anchor = implied
        scores = _less(logps, ref_logps, anchor)
        found = calibration(
            [scale * (scores[place][0] - scores[place][1]) for place in pairs],
            [1.0 if (share := used[place]["probability"]) is None else share for place in pairs],
            [keys[place] for place in pairs],
            bootstrap=bootstrap,
        )
        figures, reliability = {**figures, **found.figures}, found.bins
        by_prompt["vote_divergence"] = found.divergence
    warnings = []
    if len(used) < len(rows):
        warnings.append(
            f"{len(rows) - len(used)} of {len(rows)} held-out rows cannot be tokenized and were left out."
        )
    counts = Counter(name for group in tokens for name in row_findings(group))
    counts["given"] = len(tokens)
    return HeldOut(figures, reliability, by_prompt, warnings + findings_text(counts, "held-out rows"))


def reference_accuracy(models: Models, rows: Sequence[PreferenceRow], bootstrap: Bootstrap) -> Figure | None:
    """How often the reference gives the completion that most people preferred the higher log-probability.

    None where no row decides anything, or can be tokenized.
    """
    from softpref.evaluation.metrics import PreferenceMetric

    used, tokens = _tokenized(models, models.reference, rows)
    if not used:
        return None
    pairs = [(sequence.prompt, sequence.completion) for group in tokens for sequence in group]
    with progress("reference on the judge's pairs", total=len(pairs), unit="sequence") as loop:
        scores = iter(models.asked.logps(pairs, **models.scoring, progress=loop.update).tolist())
    return PreferenceMetric.figures(
        bootstrap,
        scores=[[next(scores) for _ in group] for group in tokens],
        kind=[row["kind"] for row in used],
        probability=[row["probability"] for row in used],
        prompt=[as_text(row["prompt"], roles=True) for row in used],
    )["preference_accuracy"]


def _tokenized(
    models: Models, model: Any, rows: Sequence[PreferenceRow]
) -> tuple[list[PreferenceRow], list[list[TokenizedSequence]]]:
    """Rows with their tokens, without those that the tokenizer cannot express."""
    from softpref.lm.tokenization import stop_token_ids, tokenize_row

    stop_ids = stop_token_ids(models.tokenizer, model)
    used, tokens = [], []
    for row in rows:
        try:
            sequences = tokenize_row(
                models.tokenizer,
                row["prompt"],
                row["completions"],
                stop_ids=stop_ids,
                max_prompt_length=models.max_prompt_length,
                max_completion_length=models.max_new_tokens,
            )
        except DataError:
            continue
        used.append(row)
        tokens.append(sequences)
    return used, tokens


def implied_preferences(metadata: ModelMetadata) -> tuple[float, float] | None:
    """Scale s and anchor a of P(first beats second) = σ(s · (m_first − m_second)), m = log π − a · log π_ref.

    None for a method whose loss is no likelihood of preferences.
    """
    method = metadata.get("method")
    if method == "spo" and (alpha := metadata.get("alpha")):
        return alpha, metadata.get("anchor") or 0.0
    if method in ("dpo", "rdpo") and (beta := metadata.get("beta")):
        return beta, 1.0
    return None


def _scored(models: Models, rows: Sequence[Sequence[TokenizedSequence]]) -> tuple[Scores, Scores]:
    """Log-probabilities of the completions of each row, under the policy and under the reference."""
    from softpref.lm.scoring import score_sequences

    pairs = [(sequence.prompt, sequence.completion) for group in rows for sequence in group]
    found = []
    with progress("held-out preferences", total=2 * len(pairs), unit="sequence") as loop:
        for scorer in (partial(score_sequences, models.policy), models.asked.logps):
            scores = iter(scorer(pairs, **models.scoring, progress=loop.update).tolist())
            found.append([[next(scores) for _ in group] for group in rows])
    return found[0], found[1]


def _less(logps: Scores, ref_logps: Scores, anchor: float) -> Scores:
    """log π − anchor · log π_ref."""
    return [
        [ours - anchor * theirs for ours, theirs in zip(*pair, strict=True)]
        for pair in zip(logps, ref_logps, strict=True)
    ]


def draw_samples(
    models: Models,
    side: Literal["policy", "reference"],
    prompts: Sequence[Text],
    tokenized: Sequence[TokenizedPrompt],
    judge: Judge,
    config: EvaluationConfig,
) -> tuple[list[list[Sample]], list[list[DrawnText]]]:
    """Draw from one model for each prompt: the samples, and their texts with the judge's scores, if any."""
    from softpref.evaluation.metrics import repetition
    from softpref.lm.tokenization import decode_completion, stop_token_ids

    ids = [prompt.ids for prompt in tokenized]
    count = config.samples_per_prompt
    model = getattr(models, side)
    sampler = partial(models.asked.draws, draw) if side == "reference" else partial(draw, model)
    with progress(f"{side} samples", total=len(ids) * count, unit="sample") as loop:
        drawn = sampler(
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
        scores, heads = _scores(judge, as_text(prompt, roles=True), completions)
        shown.append(
            [
                DrawnText(
                    completion,
                    score,
                    drawing.truncated,
                    len(drawing.completion),
                    repetition(drawing.completion),
                    -sum(drawing.token_logps),  # under the model itself; see `sampled`
                    heads=by_head,
                )
                for completion, score, by_head, drawing in zip(completions, scores, heads, group, strict=True)
            ]
        )
    return drawn, shown


def _scores(
    judge: Judge, prompt: str, completions: Sequence[str]
) -> tuple[Sequence[float | None], Sequence[Sequence[float]]]:
    """Scores of completions of a prompt, and those by each head of a judge that has several."""
    asked, no_heads = [prompt] * len(completions), [()] * len(completions)
    if isinstance(judge, RewardModelJudge):
        heads = judge.heads(asked, completions)
        return heads.mean(1).tolist(), heads.tolist() if heads.shape[1] > 1 else no_heads
    if is_scoring(judge):
        return judge.scores(asked, completions).tolist(), no_heads
    return [None] * len(completions), no_heads


class Sampled(NamedTuple):
    """What samples tell of a policy.

    Attributes:
        figures: by name.
        by_prompt: values of each prompt, by figure; None for a prompt of which the judge judged nothing.
        records: the samples, beside those of the reference.
        warnings: about what was not judged.
    """

    figures: Figures
    by_prompt: dict[str, list[float | None]]
    records: list[PromptRecord]
    warnings: list[str]


def sampled(
    models: Models,
    prompts: Sequence[Text],
    tokenized: Sequence[TokenizedPrompt],
    reference: Sequence[list[DrawnText]],
    judge: Judge,
    config: EvaluationConfig,
    bootstrap: Bootstrap,
) -> Sampled:
    """Draw from the policy, and measure its samples beside those of the `reference`.

    A judge without scores is asked of the first `judge_pairs_per_prompt` samples of each prompt.
    """
    from softpref.evaluation.comparing import compare_samples
    from softpref.evaluation.diversity import variety, variety_by_prompt
    from softpref.evaluation.metrics import DiversityMetric, HealthMetric, SampleMetric, WinRateMetric
    from softpref.evaluation.quality import quality

    count = config.samples_per_prompt
    drawn, shown = draw_samples(models, "policy", prompts, tokenized, judge, config)
    with progress("KL and entropy", total=len(drawn) * count, unit="sample") as loop:
        along = divergences(
            models.policy,
            models.reference,
            [sample for group in drawn for sample in group],
            **models.scoring,
            progress=loop.update,
        )
    kl, entropy, surprisal = (values.reshape(-1, count).tolist() for values in along)
    shown = [
        [text._replace(kl=own, surprisal=under) for text, own, under in zip(*group, strict=True)]
        for group in zip(shown, kl, surprisal, strict=True)
    ]
    warnings: list[str] = []
    if is_scoring(judge):
        scores = {"policy": _each(shown, "score"), "reference": _each(reference, "score")}
        judged = WinRateMetric.figures(bootstrap, **scores)
    else:
        texts = [as_text(prompt, roles=True) for prompt in prompts]
        shown, judged, warnings = compare_samples(
            judge, texts, shown, reference, config.judge_pairs_per_prompt, bootstrap
        )
    figures = {
        **judged,
        **SampleMetric.figures(bootstrap, kl=kl, entropy=entropy, length=_each(shown, "tokens")),
        **DiversityMetric.figures(bootstrap, completions=[[text.text for text in group] for group in shown]),
        **quality(shown, reference, bootstrap),
    }
    experts = judge.dimensions if isinstance(judge, (ExpertJudge, RewardJudge)) else {}
    varieties = [variety_by_prompt(side, reference) for side in (shown, reference)]
    for prefix, side, varied in zip(("", "reference_"), (shown, reference), varieties, strict=True):
        for name, expert in experts.items():
            figures[f"{prefix}expected_reward/{name}"] = _mean_score(expert, prompts, side, bootstrap)
        figures |= {f"{prefix}{name}": one for name, one in variety(varied, bootstrap).items()}
        health = HealthMetric.figures(
            bootstrap,
            length=_each(side, "tokens"),
            **{part: _each(side, part) for part in ("truncated", "repetition", "surprisal")},
        )
        figures |= {f"{prefix}{name}": figure for name, figure in health.items()}
    records = [
        PromptRecord(as_text(prompt, roles=True), theirs, ours)
        for prompt, theirs, ours in zip(prompts, reference, shown, strict=True)
    ]
    return Sampled(figures, by_prompt(shown, reference, varieties[0]), records, warnings)


def by_prompt(
    samples: Sequence[Sequence[DrawnText]],
    reference: Sequence[Sequence[DrawnText]],
    varied: Mapping[str, Sequence[float]],
) -> dict[str, list[float | None]]:
    """Values of each prompt, by figure, for paired comparisons of members of a sweep.

    Of a judge without scores the win rate alone; None for a prompt of which it judged nothing.

    Args:
        samples, reference: of the model that is measured, and of its reference, by prompt.
        varied: see `variety_by_prompt`.
    """
    import numpy as np

    from softpref.evaluation.quality import SEARCHED, best_of, scores_of

    scores, theirs = scores_of(samples), scores_of(reference)
    if scores is None or theirs is None:
        wins = [[text.win for text in group if text.win is not None] for group in samples]
        return {"win_rate": [float(np.mean(group)) if group else None for group in wins]}
    values = {
        "expected_reward": [float(np.mean(group)) for group in scores],
        "win_rate": [
            float(sigmoid(np.subtract.outer(ours, group)).mean())
            for ours, group in zip(scores, theirs, strict=True)
        ],
        f"best_of_{SEARCHED}": [best_of(group, SEARCHED) for group in scores],
        "good_diversity": varied["good_diversity"],
    }
    return {name: [*found] for name, found in values.items() if np.isfinite(found).all()}


def _mean_score(
    judge: ScoringJudge, prompts: Sequence[Text], drawn: Sequence[Sequence[DrawnText]], bootstrap: Bootstrap
) -> Figure:
    """The mean score of samples under a judge that they do not carry the scores of."""
    from softpref.intervals import over_prompts

    means = [
        float(
            judge.scores([as_text(prompt, roles=True)] * len(group), [sample.text for sample in group]).mean()
        )
        for prompt, group in zip(prompts, drawn, strict=True)
    ]
    return over_prompts(means, bootstrap=bootstrap)


def _each(texts: Sequence[Sequence[DrawnText]], part: str) -> list[list[float]]:
    """A number of each sample, by prompt."""
    return [[float(getattr(text, part)) for text in group] for group in texts]


class Divergences(NamedTuple):
    """Figures of policy samples.

    Attributes:
        kl: `[samples]`, Σ_t KL_t(policy ‖ reference) over the whole vocabulary, nats.
        entropy: `[samples]`, Σ_t H_t of the policy, nats.
        surprisal: `[samples]`, −log π_ref of the sample, nats.
    """

    kl: np.ndarray
    entropy: np.ndarray
    surprisal: np.ndarray


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
    from softpref.lm.sampling import sample_completions, sampling_noise

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
    import numpy as np
    import torch

    from softpref.lm.head import completion_hidden
    from softpref.lm.scoring import scoring_batches, sum_by_sequence

    kl, entropy, surprisal = (np.empty(len(samples)) for _ in range(3))
    sequences = [(sample.prompt, sample.completion) for sample in samples]
    with torch.no_grad():
        for rows, batch in scoring_batches(policy, sequences, batch_size=batch_size, plain=plain):
            states, theirs = (completion_hidden(model, batch, plain=plain) for model in (policy, reference))
            found = states.kl(theirs)
            kl[rows] = sum_by_sequence(found.kl, batch.lengths).cpu().numpy()
            entropy[rows] = sum_by_sequence(found.entropy, batch.lengths).cpu().numpy()
            surprisal[rows] = -sum_by_sequence(found.ref_logps, batch.lengths).cpu().numpy()
            if progress:
                progress(len(rows))
    return Divergences(kl, entropy, surprisal)
