"""What a version in the registry says of itself, and how the champion's is read again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from softpref.artifacts import plain
from softpref.fitness import figure_text
from softpref.records.comparison import Comparison
from softpref.records.evaluation import Evaluation
from softpref.records.figures import figures_of
from softpref.records.model import ModelMetadata
from softpref.registry.gate import Champion

if TYPE_CHECKING:
    from mlflow import MlflowClient

HASH_TAG = "model_hash"
_SCORES_TAG, _EVALUATED_ON_TAG = "scores", "evaluated_on"
_DESCRIBED = ("win_rate", "expected_reward", "kl_sequence", "entropy_sequence", "preference_accuracy")


def version_tags(
    metadata: ModelMetadata,
    evaluation: Evaluation,
    comparison: Comparison | None,
    digest: str,
) -> dict[str, str]:
    """Tags of a version: origin, hyperparameters, and every figure with its interval."""
    said = {key: value for key, value in metadata.items() if value is not None}
    known: dict[str, object] = {
        HASH_TAG: digest,
        "evaluation_id": evaluation.evaluation_id,
        "judge": evaluation.judge.name,
        "base_model": said.get("base_model"),
        "code_version": said.get("code_version"),
        _SCORES_TAG: json.dumps({name: figure._asdict() for name, figure in evaluation.metrics.items()}),
    }
    for key in ("name", "method", "alpha", "anchor", "beta", "extrapolation", "dataset_hash"):
        known[key] = said.get(key, getattr(evaluation, key))
    if comparison is not None:
        known |= {"chosen_by": comparison.rule, "chosen_because": comparison.reason}
    if evaluation.evaluated_on:
        known[_EVALUATED_ON_TAG] = json.dumps(evaluation.evaluated_on)
    for group, figures in {"": evaluation.metrics, "exact.": evaluation.exact or {}}.items():
        for name, figure in figures.items():
            if figure.value is not None:
                known[group + name] = figure_text(figure)
    return {key: str(value) for key, value in known.items() if value is not None and value != ""}


def version_description(
    metadata: ModelMetadata, evaluation: Evaluation, comparison: Comparison | None
) -> str:
    """The page of a version: method, softness, why it was chosen, its figures."""
    known = {"alpha": evaluation.alpha, "anchor": evaluation.anchor, "beta": evaluation.beta, **metadata}
    told = [
        f"{key.replace('_', ' ')} {plain(str(known[key]))}"
        for key in ("alpha", "anchor", "beta", "base_model")
        if known.get(key) not in (None, "")
    ]
    method = plain(metadata.get("method") or evaluation.method or "")
    lines = [f"**{plain(evaluation.name)}**: {', '.join(filter(None, [method, *told]))}", ""]
    if comparison is not None and comparison.reason:
        lines += [plain(comparison.reason), ""]
    shown = {name: evaluation.metrics[name] for name in _DESCRIBED if name in evaluation.metrics}
    lines += ["| figure | value [95% interval] |", "| :-- | :-- |"]
    lines += [
        f"| {name} ({figure.unit}) | {figure_text(figure)} |"
        for name, figure in shown.items()
        if figure.value is not None
    ]
    return "\n".join(lines) + "\n"


def find_champion(client: MlflowClient, name: str, version: str | None, candidate: str) -> Champion | None:
    """The current champion, unless there is none or it is the candidate."""
    if version is None or version == candidate:
        return None
    tags = client.get_model_version(name, version).tags
    parts = []
    for tag in (_SCORES_TAG, _EVALUATED_ON_TAG):
        try:
            parts.append(json.loads(tags.get(tag, "{}")))
        except json.JSONDecodeError:
            parts.append({})
    metrics, evaluated_on = parts
    return Champion(str(version), tags.get("evaluation_id"), figures_of(metrics) or {}, evaluated_on or None)
