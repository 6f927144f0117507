"""What Kubeflow's UI shows of an artifact: its name, values, Markdown. Computes no figure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from softpref.records.model import load_metadata

OUTCOME_MARK = "[softpref] "
_NAMED = ("name", "stage", "method", "dataset_hash", "code_version")


class _Artifact(Protocol):
    metadata: dict[str, Any]


def describe(artifact: _Artifact, display_name: str, /, **values: object) -> None:
    """Give a KFP artifact the name and the values that its page in the UI shows.

    None, numbers that are not finite and empty texts are left out: KFP fails a step over the first two.

    Args:
        artifact: keeps the name that KFP gave it, on which caches and later steps rely.
        display_name: for people, such as "spo-alpha-0.5: policy".
    """
    artifact.metadata["display_name"] = display_name
    artifact.metadata.update({key: value for key, value in values.items() if _says(value)})


def readable(figures: Mapping[str, object]) -> dict[str, float]:
    """Those of the figures that are finite numbers, to six significant digits.

    KFP fails a step that logs any other value, and its UI prints every digit.
    """
    return {
        name: float(f"{value:.6g}") if isinstance(value, float) else value
        for name, value in figures.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def plain(text: str) -> str:
    """Text that Markdown shows unchanged: KFP's UI sets what is between two underscores in italics."""
    return re.sub(r"([\\`*_|<])", r"\\\1", text)


def say_outcome(lines: Iterable[str]) -> None:
    """Print lines that a runner repeats at the end of a run; it recognises them by their mark."""
    for line in lines:
        print(f"{OUTCOME_MARK}{line}", flush=True)


def model_values(folder: str | Path) -> dict[str, object]:
    """What a model folder's `softpref.json` says of the model, under the names that artifacts carry."""
    metadata = load_metadata(folder)
    base_model = metadata.get("base_model")
    return {
        **{key: value for key, value in metadata.items() if key in _NAMED},
        **strengths(metadata),
        "base_model": "from nothing" if base_model == "" else base_model,
        "mlflow_run_id": metadata.get("run_id"),
        "framework": "transformers",
    }


def strengths(model: Mapping[str, object]) -> dict[str, object]:
    """Softness α and its anchor, which only spo has, and β, of a model or its evaluation."""
    soft = model.get("method") == "spo"
    return {
        "alpha": model.get("alpha") if soft else None,
        "anchor": model.get("anchor") or None if soft else None,  # 0 is the method as published
        "beta": model.get("beta"),
    }


def _says(value: object) -> bool:
    return value not in (None, "") and not (isinstance(value, float) and not math.isfinite(value))
