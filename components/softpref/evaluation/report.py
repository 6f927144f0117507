"""The page of one evaluated policy: sentences, figures in order, drawings. Measures nothing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from softpref.artifacts import strengths
from softpref.evaluation.quality import scores_of
from softpref.pages import render
from softpref.records import Evaluation, Figures, PromptRecord

if TYPE_CHECKING:
    from softpref.evaluation.exact import ExactPrompt

LABELS = {
    "win_rate": ("Win rate", "probability that the judge prefers its sample to the reference's"),
    "position_consistency": ("Position consistency", "pairs judged the same in both orders"),
    "expected_reward": ("Expected reward", "mean score under the judge"),
    "reference_expected_reward": ("Expected reward of the reference", "the same for the SFT model"),
    "kl_sequence": ("KL to the reference", "per completion, from its own samples"),
    "entropy_sequence": ("Entropy", "per completion: how varied its answers are"),
    "length_controlled_win_rate": ("Win rate at equal length", "what it would be without longer answers"),
    "best_of_8": ("Best of eight", "expected score of the best of eight samples"),
    "reference_best_of_8": ("Best of eight, of the reference's", "the same of its samples"),
    "preference_accuracy": ("Preference accuracy", "held-out pairs ranked as people did, by log π"),
    "preference_margin": ("Preference margin", "log-probability of preferred minus other"),
    "relative_accuracy": ("… relative to the reference", "the same, by log π − log π_ref"),
    "relative_margin": ("Relative margin", "the same difference, less the reference's"),
    "reference_accuracy": ("… of the reference alone", "the same, by log π_ref"),
    "implied_accuracy": ("Accuracy of implied preferences", "majorities that the model is with"),
    "implied_log_loss": ("Log-loss of implied preferences", "against shares of votes"),
    "vote_entropy": ("Entropy of the votes", "the log-loss of a perfect model"),
    "vote_divergence": ("Divergence from the votes", "Jensen-Shannon; 0: the voters' own distribution"),
    "overconfidence": ("Overconfidence", "mean confidence less the share of votes; below 0: too cautious"),
    "calibration_error": ("Calibration error", "mean distance of confidence from share, by bins"),
    "calibration_floor": ("… by chance alone", "what a calibrated model would show here"),
    "perplexity": ("Perplexity", "per token, on the best held-out completions"),
    "distinct_1": ("Distinct-1", "distinct words among all words of a prompt's samples"),
    "distinct_2": ("Distinct-2", "distinct word pairs among all"),
    "self_bleu": ("Self-BLEU", "likeness of a prompt's samples to each other; 1 = all equal"),
    "good_diversity": ("Variety among good answers", "unlikeness of two, 0 unless both are good"),
    "reference_good_diversity": ("… of the reference's", "the same of its samples"),
    "vendi_score": ("Vendi score", "effective number of different answers"),
    "reference_vendi_score": ("… of the reference's", "the same of its samples"),
    "distinct_answers": ("Distinct answers", "answers that are not nearly another one"),
    "reference_distinct_answers": ("… of the reference's", "the same of its samples"),
    "mode_share": ("Share of the commonest answer", "1: the model has collapsed on one"),
    "reference_mode_share": ("… of the reference's", "the same of its samples"),
    "compression_ratio": ("Compression ratio", "higher: samples repeat each other"),
    "reference_compression_ratio": ("… of the reference's", "the same of its samples"),
    "completion_length": ("Completion length", "tokens, end included"),
    "kl_token": ("KL to the reference per token", "the same, by the tokens"),
    "truncated_fraction": ("Truncated", "samples that reached the length limit"),
    "reference_truncated_fraction": ("Truncated, of the reference's", "its samples that reached the limit"),
    "repetition": ("Repetition", "share of 4-grams of tokens that repeat within a sample"),
    "reference_repetition": ("Repetition, of the reference's", "the same in its samples"),
    "cross_entropy": ("Cross-entropy under the reference", "how much its samples surprise the reference"),
    "reference_cross_entropy": ("Cross-entropy, of the reference's", "its own samples: its entropy"),
    "kl_optimum_to_policy": ("KL(optimum ‖ policy)", "how far the policy is from theory; 0 is perfect"),
    "entropy": ("Entropy on the set", "of the policy, exact"),
    "optimum_entropy": ("Entropy of the optimum", "by theory"),
    "reference_entropy": ("Entropy of the reference", "where training began"),
    "optimum_expected_reward": ("Expected reward of the optimum", "by theory"),
    "kl": ("KL to the reference", "of the policy, per completion"),
    "optimum_kl": ("KL of the optimum to the reference", "by theory"),
    "effective_sample_size": ("Effective share of the samples", "how many of them carry the optimum"),
    "mass_on_set": ("Mass on the set", "probability the policy gives to texts the experts know"),
    "least_mass_on_set": ("Least mass on the set", "of the prompt that leaks most"),
    "reference_mass_on_set": ("Mass of the reference", "probability it gives to these texts"),
}


def trust_sentence(theory: Figures) -> str:
    """How far the optimum's figures can be trusted where they are estimated from samples."""
    from softpref.evaluation.theory import TRUSTED

    share = theory["effective_sample_size"].value
    if share is None:
        return "That minimiser is unknown."
    if share < TRUSTED:
        return (
            f"They cannot be trusted: the optimum rests on {share:.1%} of the samples, less than "
            f"{TRUSTED:.0%}; it lies too far from the reference."
        )
    return f"The optimum rests on {share:.0%} of the samples."


def write_report(
    path: Path,
    evaluation: Evaluation,
    records: Sequence[PromptRecord],
    exact: Sequence[ExactPrompt] = (),
) -> None:
    """Write the page of one evaluated policy.

    Args:
        evaluation: what `evaluation.json` holds.
        records: the samples of each prompt.
        exact: the enumerated prompts, empty where there are none.
    """
    from softpref.evaluation import charts

    drawings = {"scores": "", "optimum": ""}
    policy, reference = (
        scores_of([getattr(one, side) for one in records]) for side in ("policy", "reference")
    )
    if policy is not None and reference is not None:  # a judge may give none
        drawings["scores"] = charts.reward_distribution(
            [*itertools.chain(*policy)], [*itertools.chain(*reference)], exact
        )
    if evaluation.reliability:
        drawings["reliability"] = charts.reliability_diagram(evaluation.reliability)
    if exact:
        if evaluation.exact and evaluation.exact["optimum_entropy"].value is not None:
            drawings["optimum"] = charts.optimum_against_policy(exact)
        drawings["entropy"] = charts.entropy_and_reward(exact)
    page = render(
        "evaluation.html",
        evaluation=evaluation,
        settings=evaluation.settings,
        metrics={name: evaluation.metrics[name] for name in LABELS if name in evaluation.metrics},
        labels=LABELS,
        records=records,
        drawings=drawings,
        enumerated=len(exact),
        set_size=len(exact[0].rewards) if exact else 0,
        chips=chips(evaluation),
        softness=softness_sentence(evaluation),
        trust=trust_sentence(evaluation.theory) if evaluation.theory else "",
        provenance=provenance(evaluation),
    )
    path.write_text(page, encoding="utf-8")


def softness_sentence(evaluation: Evaluation) -> str:
    """What this model's softness means, in one sentence."""
    alpha, method, anchor = evaluation.alpha, evaluation.method, evaluation.anchor
    if method == "spo" and alpha is not None and anchor:
        power = "" if anchor == 1 else f" to the power of {anchor:g}"
        return (
            f"Softness α = {alpha:g}, relative to the reference: the optimum is the reference{power} · "
            "exp(reward / α). α = 1 tilts it by the experts' own odds, α → 0 towards their favourite; the "
            "larger α, the closer the model stays to it."
        )
    if method == "spo" and alpha is not None:
        if alpha == 1:
            meaning = "the model should answer as diversely as the experts themselves would choose"
        elif alpha < 1:
            meaning = "the model should sharpen the experts' preferences towards their favourite answers"
        else:
            meaning = "the model should stay softer than the experts, spreading over more answers"
        return (
            f"Softness α = {alpha:g}: {meaning} (α = 1 is the experts' own distribution, α → 0 their single "
            "favourite, α → ∞ any answer alike)."
        )
    if method:
        return f"Trained with {method.upper()}, which has no softness: only β ties it to the reference."
    return "This model was not trained by softpref."


def chips(evaluation: Evaluation) -> list[str]:
    """Method, α, anchor, β, what the KL term is taken on, extrapolation and judge as small labels."""
    known = {"": evaluation.method, **strengths(vars(evaluation))}
    symbols = {"alpha": "α", "beta": "β"}
    parts = [
        f"{symbols.get(name, name)} {value:g}" if isinstance(value, float | int) else str(value)
        for name, value in known.items()
        if value is not None
    ]
    if evaluation.kl_on != "samples":
        parts.append(f"KL on {evaluation.kl_on}")
    if evaluation.extrapolation:
        parts.append(f"extrapolated by {evaluation.extrapolation:g}")
    return [*parts, f"judge: {evaluation.judge.name}"]


def provenance(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Where the figures come from."""
    facts = {
        "policy": evaluation.model_uri,
        "reference": evaluation.reference_uri,
        "run": evaluation.run_id,
        "data hash": evaluation.dataset_hash,
        "evaluation id": evaluation.evaluation_id,
        "settings": ", ".join(f"{key} {value}" for key, value in evaluation.settings.items()),
    }
    return [(name, value) for name, value in facts.items() if value]
