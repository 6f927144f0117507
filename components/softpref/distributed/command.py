"""A training stage as the command of another process: its arguments, result and name. Starts nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from softpref.errors import ConfigError, SoftprefError
from softpref.records.dataset import STATS_FILE
from softpref.records.model import METADATA_FILE
from softpref.tracking.pipeline_run import current_pipeline_run

Stage = Literal["sft", "train", "judge"]


def stage_arguments(
    folders: Mapping[str, str], where: Mapping[str, str], *, config: Path, result: Path
) -> list[str]:
    """The arguments of a stage's console command; empty options are left out."""
    options = {**folders, **where, "config": str(config), "result": str(result)}
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value]


def read_result(file: Path) -> dict[str, float]:
    """The metrics in a stage's `--result` file; empty if there is none.

    Raises:
        SoftprefError: the stage's own error.
    """
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    if "error" in found:
        raise SoftprefError(found["error"])
    metrics: dict[str, float] = found["result"]
    return metrics


def make_on_volume(folder: Path) -> None:
    """Make a folder on a volume that several pods mount.

    Raises:
        ConfigError: this process may not write there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the shared volume is not writable ({error}); it must belong to this step's user, "
            f'{os.getuid()}: see "The shared volume" in infra/README.md'
        ) from error


def job_name(
    stage: str, values: Mapping[str, object], folders: Mapping[str, str], where: Mapping[str, str]
) -> str:
    """A DNS label for a step's job or checkpoints: the same whenever that step of that run is repeated."""
    identity = {
        "stage": stage,
        "values": dict(values),
        "name": where.get("name", ""),
        # the pipeline's run; without tracking, the output folder
        "run": run.id if (run := current_pipeline_run()) else where.get("parent_run_id") or folders["output"],
        "dataset": _stamp(Path(folders["dataset"]) / STATS_FILE),
        "reference": _stamp(Path(folders["reference"]) / METADATA_FILE) if "reference" in folders else "",
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    words = re.sub(r"[^a-z0-9]+", "-", f"{stage}-{where.get('name', '')}".lower()).strip("-")
    return f"{words[:30].rstrip('-')}-{digest[:12]}"


def _stamp(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else str(file)
