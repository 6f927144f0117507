"""The page of one evaluated policy: sentences, figures in order, drawings. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from softpref.artifacts import strengths
from softpref.evaluation.interactive import MOST_PROMPTS, calibrated, samples_data
from softpref.evaluation.meanings import LABELS, rows
from softpref.fitness import ailments, number
from softpref.pages import number as in_digits
from softpref.pages import render
from softpref.records.evaluation import Evaluation, PromptRecord
from softpref.records.figures import Figures

if TYPE_CHECKING:
    from softpref.evaluation.exact import ExactPrompt


def trust_sentence(theory: Figures) -> str:
    """How far the optimum's figures can be trusted where they are estimated from samples."""
    from softpref.evaluation.theory import TRUSTED

    share = number(theory, "effective_sample_size")
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

    sides = {side: [getattr(record, side) for record in records] for side in ("reference", "policy")}
    scores = {
        side: [sample.score for drawn in samples for sample in drawn if sample.score is not None]
        for side, samples in sides.items()
    }
    drawings = dict.fromkeys(("scores", "reliability", "optimum", "entropy"), "")
    if all(scores.values()):
        drawings["scores"] = charts.reward_distribution(scores["policy"], scores["reference"], exact)
    if evaluation.reliability:
        policy = (evaluation.name, charts.POLICY, evaluation.reliability)
        drawings["reliability"] = charts.reliability_diagram([policy])
    if exact:
        if evaluation.exact and number(evaluation.exact, "optimum_entropy") is not None:
            drawings["optimum"] = charts.optimum_against_policy(exact)
        drawings["entropy"] = charts.entropy_and_reward(exact)
    shown = [("Reference", sides["reference"]), (evaluation.name, sides["policy"])]
    samples = samples_data(shown, [record.prompt for record in records[:MOST_PROMPTS]], of=len(records))
    page = render(
        "evaluation.html",
        data={
            "samples": samples,
            "reliability": [one._asdict() for one in calibrated([evaluation])],
        },
        evaluation=evaluation,
        settings=evaluation.settings,
        verdict=verdict(evaluation),
        groups={
            group: rows(figures)
            for group in ("metrics", "exact", "theory")
            if (figures := getattr(evaluation, group))
        },
        labels=LABELS,
        prompts=len(records),
        samples=samples,
        drawings=drawings,
        enumerated=len(exact),
        set_size=len(exact[0].rewards) if exact else 0,
        chips=chips(evaluation),
        softness=softness_sentence(evaluation),
        trust=trust_sentence(evaluation.theory) if evaluation.theory else "",
        provenance=provenance([evaluation]),
    )
    path.write_text(page, encoding="utf-8")


def verdict(evaluation: Evaluation) -> str:
    """Whether the model is better than its reference, and at what distance, in one sentence."""
    win, low, high = (number(evaluation.metrics, "win_rate", part) for part in ("value", "low", "high"))
    if ills := ailments(evaluation):
        return f"This model is broken: it {' and '.join(ills)}."
    if win is None:
        return "No judge compared this model with its reference."
    if low is None or high is None or low <= 0.5 <= high:
        standing = "It is not sure whether this model is better than its reference"
    else:
        standing = f"This model is {'better' if low > 0.5 else 'worse'} than its reference"
    interval = "" if low is None or high is None else f" [{low:.1%}, {high:.1%}]"
    kl = number(evaluation.metrics, "kl_sequence")
    distance = "" if kl is None else f", at {in_digits(kl)} nats of KL from it"
    return f"{standing}: its samples win {win:.1%}{interval} of comparisons{distance}."


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
    if evaluation.dimensions:
        parts.append(", then ".join(evaluation.dimensions))
    if evaluation.dimension_weights:
        parts.append(f"λ {', '.join(format(weight, 'g') for weight in evaluation.dimension_weights)}")
    if evaluation.extrapolation:
        parts.append(f"extrapolated by {evaluation.extrapolation:g}")
    return [*parts, f"judge: {evaluation.judge.name}"]


def provenance(evaluations: Sequence[Evaluation]) -> list[tuple[str, str]]:
    """Where the figures come from: of several evaluations, what is the same of all."""
    first, *others = map(_facts, evaluations)
    return [fact for fact in first if all(fact in facts for facts in others)]


def _facts(evaluation: Evaluation) -> list[tuple[str, str]]:
    facts = {
        "data": evaluation.data_source,
        "base model": evaluation.base_model,
        "policy": evaluation.model_uri,
        "reference": evaluation.reference_uri,
        "run": evaluation.run_id,
        "data hash": evaluation.dataset_hash,
        "evaluation id": evaluation.evaluation_id,
        "settings": ", ".join(f"{key} {value}" for key, value in evaluation.settings.items()),
    }
    return [(name, value) for name, value in facts.items() if value]
