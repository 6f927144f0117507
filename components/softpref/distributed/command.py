"""A training stage as a command of another process: its arguments, its result, its name. Starts nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from softpref.errors import ConfigError, SoftprefError
from softpref.records import METADATA_FILE, STATS_FILE
from softpref.tracking.pipeline_run import current_pipeline_run

Stage = Literal["sft", "train"]


def stage_arguments(
    folders: Mapping[str, str], where: Mapping[str, str], *, config: Path, result: Path
) -> list[str]:
    """What the console command of a stage takes, for folders, place and files; options may be left empty."""
    options = {**folders, **where, "config": str(config), "result": str(result)}
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value]


def read_result(file: Path) -> dict[str, float]:
    """The metrics that a stage left in its `--result`; empty if it left nothing.

    Raises:
        SoftprefError: the stage refused, and this is why.
    """
    if not file.is_file():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    if "error" in found:
        raise SoftprefError(found["error"])
    return found["result"]


def make_on_volume(folder: Path) -> None:
    """Make a folder on a volume that several pods mount.

    Raises:
        ConfigError: this process may not write there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the shared volume cannot be written ({error}); it must belong to this step's user, "
            f'{os.getuid()}: see "The shared volume" in infra/README.md'
        ) from error


def job_name(
    stage: str, values: Mapping[str, Any], folders: Mapping[str, str], where: Mapping[str, str]
) -> str:
    """A DNS label for the job or checkpoints of a step, which the same step of the same run finds again."""
    identity = {
        "stage": stage,
        "values": dict(values),
        "name": where.get("name", ""),
        # one run of a pipeline, or without tracking the one place that the model goes to
        "run": run.id if (run := current_pipeline_run()) else where.get("parent_run_id") or folders["output"],
        "dataset": _stamp(Path(folders["dataset"]) / STATS_FILE),
        "reference": _stamp(Path(folders["reference"]) / METADATA_FILE) if "reference" in folders else "",
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    words = re.sub(r"[^a-z0-9]+", "-", f"{stage}-{where.get('name', '')}".lower()).strip("-")
    return f"{words[:30].rstrip('-')}-{digest[:12]}"


def _stamp(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else str(file)
