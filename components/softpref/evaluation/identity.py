"""What makes the figures of two evaluations comparable, as one hash and its parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from softpref.evaluation.config import EvaluationConfig
from softpref.records.dataset import PreferenceRow
from softpref.records.evaluation import EvaluatedOn

if TYPE_CHECKING:
    from softpref.judges.protocol import Judge

# what changes the meaning of a figure; batch sizes, devices and addresses do not
DEFINING = ("split", "max_prompts", "max_rows", "samples_per_prompt", "judge_max_rows", "seed")


def identify(
    config: EvaluationConfig,
    rows: Sequence[PreferenceRow],
    judge: Judge,
    reference_dir: str,
    max_new: int,
) -> tuple[str, EvaluatedOn]:
    """`evaluation_id`, equal for two evaluations exactly when their figures can be compared, and its parts.

    The reference is one of the parts, since win rate and KL are relative to it.
    """
    data = hashlib.sha256()
    for row in rows:
        part = {key: row[key] for key in ("prompt", "completions", "kind", "probability")}
        data.update(json.dumps(part, sort_keys=True).encode())
    settings = {key: getattr(config, key) for key in DEFINING} | {"max_new_tokens": max_new}
    weights = b""
    for file in sorted(Path(reference_dir).glob("*.safetensors")):
        with open(file, "rb") as content:
            weights += hashlib.file_digest(content, "sha256").digest()
    weights = weights or reference_dir.encode()
    whole = data.copy()
    whole.update(json.dumps([judge.name, judge.fingerprint, settings], sort_keys=True).encode())
    whole.update(weights)
    parts: EvaluatedOn = {
        "data": data.hexdigest()[:16],
        "judge": f"{judge.name} {judge.fingerprint}",
        "reference": hashlib.sha256(weights).hexdigest()[:16],
        "settings": settings,
    }
    return whole.hexdigest()[:16], parts
