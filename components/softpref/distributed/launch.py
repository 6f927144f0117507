"""Runs a training stage for its face: in this process, in several, or on other nodes."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from softpref.config import TRUE, build_config
from softpref.distributed.command import Stage, job_name, make_on_volume, read_result, stage_arguments
from softpref.distributed.config import parse_launcher
from softpref.distributed.processes import (
    StageFailed,
    launch_command,
    launch_environment,
    run_watched,
)
from softpref.errors import ConfigError

logger = logging.getLogger(__name__)


def run_stage(
    stage: Stage,
    config_class: type[Any],
    run: Callable[..., dict[str, float]],
    *layers: Mapping[str, Any],
    folders: Mapping[str, str],
    launcher: str = "",
    **where: str,
) -> dict[str, float]:
    """Run a training stage where its launcher says.

    Args:
        stage: `sft`, `train` or `judge`.
        config_class, run: its configuration, and the function that runs it in this process.
        layers: parameters of the stage's configuration, later layers winning; see `build_config`.
        folders: `dataset` and `output`, and `reference` of the stage `train`.
        launcher: see `softpref.distributed.config.LauncherConfig`.
        where: further arguments of `run`: `name`, `experiment`, `parent_run_id`, `tracking_uri`.

    Returns:
        The stage's final metrics.

    Raises:
        SoftprefError: the stage's own, wherever it runs.
        StageFailed: it failed in other processes.
    """
    values = {key: value for layer in layers for key, value in layer.items()}
    config = parse_launcher(launcher)
    if job := config.job:
        from softpref.distributed.trainjob import run_trainjob

        return run_trainjob(job, stage, values, folders=folders, where=where)
    if config.checkpoints:
        checkpoints = Path(config.checkpoints) / job_name(stage, values, folders, where)
        make_on_volume(checkpoints)
        where["checkpoint_dir"] = str(checkpoints)
    gpus = _count(values.get("gpus", 0))
    if config.processes and gpus and config.processes != gpus:
        raise ConfigError(
            f"launcher.processes is {config.processes}, and gpus is {gpus}: each process trains on one GPU; "
            "leave one of them out"
        )
    processes = config.processes or max(1, gpus)
    if processes == 1:
        paths = {f"{name}_dir": path for name, path in folders.items()}
        return run(build_config(config_class, values), **paths, **where)
    from softpref.lm.arguments import require_devices
    from softpref.tracking import resolve_tracking_uri

    use_cpu = str(values.get("use_cpu", "")).lower() in TRUE
    require_devices(gpus, 1 if use_cpu else processes)
    logger.warning("training in %d processes on this machine", processes)
    if uri := where.get("tracking_uri"):  # a command line is no place for a password
        where["tracking_uri"] = resolve_tracking_uri(uri)
    with tempfile.TemporaryDirectory(prefix="softpref-") as folder:
        parameters, result = Path(folder) / "parameters.json", Path(folder) / "result.json"
        parameters.write_text(json.dumps(values), encoding="utf-8")
        arguments = stage_arguments(folders, where, config=parameters, result=result)
        try:
            run_watched(
                launch_command(stage, arguments, processes=processes),
                env=launch_environment(processes, gpus=gpus),
                what=f"the stage {stage} in {processes} processes",
            )
        except StageFailed:
            read_result(result)  # the stage's own error says more than the launcher's
            raise
        return read_result(result)


def _count(value: object) -> int:
    """`gpus` as a number; the stage itself refuses anything else."""
    try:
        return int(value) if isinstance(value, (str, int, float)) else 0
    except ValueError:
        return 0
