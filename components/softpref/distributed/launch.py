"""The one function that the training faces call: a stage in this process, in several, or on other nodes."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from softpref.config import build_config
from softpref.distributed.command import Stage, job_name, make_on_volume, read_result, stage_arguments
from softpref.distributed.config import LauncherConfig, parse_launcher
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
        stage: `sft` or `train`.
        config_class, run: its configuration, and what runs it in this process.
        layers: parameters of the stage's configuration, later layers winning; see `build_config`.
        folders: `dataset` and `output`, and `reference` of the stage `train`.
        launcher: see `softpref.distributed.config.LauncherConfig`.
        where: what the stage's `run` takes besides: `name`, `experiment`, `parent_run_id`, `tracking_uri`.

    Returns:
        The stage's final metrics.

    Raises:
        SoftprefError: what the stage refuses, wherever it runs.
        StageFailed: it ran in other processes, and failed there.
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
    processes = _processes(config, _count(values.get("gpus", 0)))
    if processes == 1:
        paths = {f"{name}_dir": path for name, path in folders.items()}
        return run(build_config(config_class, values), **paths, **where)
    from softpref.lm.arguments import require_devices

    gpus = _count(values.get("gpus", 0))
    use_cpu = str(values.get("use_cpu", "")).lower() in ("true", "1", "yes", "on")
    require_devices(gpus, 1 if use_cpu else processes)
    logger.warning("training in %d processes on this machine", processes)
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
            read_result(result)  # a refusal says more than the launcher's account of its processes
            raise
        return read_result(result)


def _processes(config: LauncherConfig, gpus: int) -> int:
    if config.processes and gpus and config.processes != gpus:
        raise ConfigError(
            f"launcher.processes is {config.processes}, and gpus is {gpus}: each process trains on one GPU; "
            "leave one of them out"
        )
    return config.processes or max(1, gpus)


def _count(value: Any) -> int:
    """`gpus` as a number; what is none is refused by the stage itself."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return 0
