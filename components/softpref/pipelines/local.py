"""Runs a pipeline on this machine, its tasks as processes or in containers, and reports the result."""

from __future__ import annotations

import argparse
import builtins
import contextlib
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from softpref.errors import ConfigError
from softpref.evaluation.reference_cache import REFERENCE_CACHE
from softpref.interruption import Interrupted
from softpref.pipelines.containers import Containers
from softpref.pipelines.run_folder import claimed
from softpref.pipelines.screen import log_and_screen
from softpref.pipelines.tasks import TaskServer
from softpref.records.files import TIMINGS_FILE
from softpref.remote import public_url
from softpref.tracking import (
    RUN_ID,
    RUN_NAME,
    check_server,
    finish_pipeline_run,
    resolve_tracking_uri,
    sync_below,
    where_to_look,
)

if TYPE_CHECKING:
    from kfp.dsl.graph_component import GraphComponent

    from softpref.pipelines.results import Results

_BEGAN = time.time() - time.process_time()  # this process has only computed so far


def task_server(parameters: Mapping[str, Any]) -> contextlib.AbstractContextManager[TaskServer | None]:
    """Starts the imports that all tasks need, while this process checks the parameters."""
    share_cores()
    if not sys.platform.startswith("linux"):  # elsewhere such forks may crash
        return contextlib.nullcontext()
    return TaskServer(resolve_tracking_uri(parameters["tracking_uri"] or None))


def require_gpus(count: str) -> None:
    """Refuse the parameter `gpus` on a Linux machine that has no device of a GPU; a stage counts them.

    Raises:
        ConfigError: says what would be right.
    """
    # of NVIDIA, its Jetson boards, AMD, either in WSL; torch, whose import takes seconds, knows no others
    devices = ("/dev/nvidia*", "/dev/nvhost*", "/dev/kfd", "/dev/dxg")
    if count.strip() not in ("", "0") and sys.platform == "linux" and not any(map(glob, devices)):
        raise ConfigError(
            f"gpus is {count}, and this machine has none: leave it out to train on the CPU, or give "
            "--runner cluster"
        )


def share_cores() -> None:
    """Two models are trained at a time: more threads than cores would slow both."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def run_here(
    pipeline: GraphComponent,
    parameters: dict[str, Any],
    options: argparse.Namespace,
    tasks: TaskServer | None,
) -> int:
    """Run a pipeline on this machine and print its results; returns the exit status."""
    name = f"{Path(options.recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    output = Path(options.output or Path("runs") / name)
    uri = resolve_tracking_uri(parameters["tracking_uri"] or None)
    parameters["tracking_uri"] = uri
    in_containers = Containers(_images(pipeline)) if options.runner == "docker" else contextlib.nullcontext()
    with in_containers as containers, claimed(output, name, parameters) as run:
        os.environ["MLFLOW_TRACKING_URI"] = uri
        os.environ[RUN_ID], os.environ[RUN_NAME] = run.id, run.name
        kept_elsewhere = os.environ.get(REFERENCE_CACHE, "")
        os.environ[REFERENCE_CACHE] = str(Path(kept_elsewhere or output / "reference-cache").absolute())
        if options.no_cache:
            shutil.rmtree(output / "reference-cache", ignore_errors=True)
        root = check_server(parameters["experiment"], uri)
        print(f"output {output}, tracking {public_url(uri)}")
        results = _results(output, anew=options.no_cache)
        if run.goes_on:
            print(
                f"{output} goes on: what is done there is used again, unless what it was made of has changed"
            )
        status: Literal["FINISHED", "FAILED", "KILLED"] = "KILLED"
        try:
            with log_and_screen(output / "pipeline.log") as screen:
                if containers:
                    share_cores()
                    parameters["tracking_uri"] = containers.open(output, parameters)
                if tasks:
                    tasks.lock = run.lock
                failure = _execute(pipeline, parameters, results, containers, tasks)
                status = "FAILED" if failure else "FINISHED"
        except KeyboardInterrupt as error:
            print(
                f"\nerror: the pipeline was interrupted; the same command with --output {output} goes on",
                file=sys.stderr,
            )
            return error.status if isinstance(error, Interrupted) else 130
        finally:
            if not uri.startswith("sqlite:"):
                sync_below(output / "pipeline", uri)  # the server may have been away
            finish_pipeline_run(
                status,
                name=run.name,
                tags={"softpref.recipe": options.recipe},
                experiment=parameters["experiment"],
                tracking_uri=uri,
            )
            del os.environ[RUN_ID], os.environ[RUN_NAME]
            os.environ[REFERENCE_CACHE] = kept_elsewhere
    refusal = _refusal(results.folders) if failure else ""
    if failure and not refusal:
        print(screen.last_lines(40), file=sys.stderr)
        print(
            f"error: the pipeline failed: {failure}{screen.reason()}\n"
            f"error: everything it printed is in {output / 'pipeline.log'}; once the cause is mended, "
            f"the same command with --output {output} goes on",
            file=sys.stderr,
        )
        return 1
    _summarise(results.folders, output, uri, root)
    print(_times(results.done))
    if refusal:
        print(f"error: no model was registered: {refusal}", file=sys.stderr)
        return 1
    return 0


def _images(pipeline: GraphComponent) -> set[str]:
    """The images of a pipeline's tasks."""
    executors = dict(pipeline.pipeline_spec.deployment_spec)["executors"]
    return {executor["container"]["image"] for executor in executors.values() if "container" in executor}


def _execute(
    pipeline: GraphComponent,
    parameters: dict[str, Any],
    results: Results,
    containers: Containers | None,
    tasks: TaskServer | None,
) -> str | None:
    """Run the pipeline's tasks in containers or as processes; returns KFP's error, if any."""
    import warnings

    from kfp import local
    from kfp.local import docker_task_handler, subprocess_task_handler

    if tasks:
        subprocess_task_handler.run_local_subprocess = tasks.run
    if containers:
        docker_task_handler.run_docker_container = containers.run
    warnings.filterwarnings("ignore", module="kfp")
    runner = containers.runner() if containers else local.SubprocessRunner(use_venv=False)
    local.init(runner=runner, pipeline_root=str(results.root), raise_on_error=True)
    interruptible, original_print = containers or tasks, builtins.print
    try:
        with interruptible.interruptible() if interruptible else contextlib.nullcontext(), results.in_use():
            pipeline(**parameters)
    except RuntimeError as error:
        print(f"ERROR - {error}")
        return re.sub(r"\x1b\[\d+m", "", str(error))
    finally:
        builtins.print = original_print  # KFP replaces it to indent lines, and parallel tasks leave it so
    return None


def _refusal(folders: Sequence[Path]) -> str:
    """Why no model was registered although all steps succeeded; empty if one was."""
    for name, decided in (("registration.json", "registered"), ("comparison.json", "chosen")):
        for file in _below(folders, name):
            decision = json.loads(file.read_text(encoding="utf-8"))
            return "" if decision[decided] else decision["reason"].removeprefix("not registered: ")
    return ""


def _below(folders: Sequence[Path], name: str) -> list[Path]:
    return [file for folder in folders for file in sorted(folder.rglob(name))]


def _times(folders: Sequence[Path]) -> str:
    """One line: the whole time, and the phases of the tasks' processes of half a second or more."""
    seconds: Counter[str] = Counter()
    for file in _below(folders, TIMINGS_FILE):
        seconds.update(json.loads(file.read_text(encoding="utf-8")))
    spent = ", ".join(f"{phase} {value:.0f} s" for phase, value in seconds.most_common() if value >= 0.5)
    return f"took {time.time() - _BEGAN:.0f} s; seconds of its processes: {spent}"


def _results(output: Path, *, anew: bool) -> Results:
    from softpref.pipelines.results import Results

    return Results((output / "pipeline").resolve(), anew=anew)


def _summarise(folders: Sequence[Path], output: Path, tracking_uri: str, run_id: str | None = None) -> None:
    """Copy the results to the top of the output folder, and print what they are and where.

    Args:
        folders: of the run's tasks.
    """
    from softpref.evaluation.addresses import evaluation_folders
    from softpref.evaluation.compare import outcome_lines, warning_lines
    from softpref.evaluation.tables import format_table
    from softpref.records.comparison import Comparison
    from softpref.records.evaluation import Evaluation
    from softpref.records.registration import Registration
    from softpref.registry import stage as registry

    found = [file.parent for file in _below(folders, "evaluation.json") if file.parent.name == "evaluation"]
    evaluations = [Evaluation.read(folder) for folder in evaluation_folders(sorted(found))]
    lines = [f"\n{format_table(evaluations)}\n"]
    comparison = next(iter(_below(folders, "comparison.json")), None)
    if comparison:
        shutil.rmtree(output / "comparison", ignore_errors=True)
        shutil.copytree(comparison.parent, output / "comparison")
        lines += outcome_lines(Comparison.read(comparison.parent))
    else:
        lines += [f"model:    {evaluation.model_uri}" for evaluation in evaluations]
        lines += warning_lines(evaluations)
    registration = next(iter(_below(folders, "registration.json")), None)
    if registration:
        shutil.copy(registration, output / "registration.json")
        lines += registry.outcome_lines(Registration.read(registration.parent), tracking_uri)
    reports = [output / "comparison" / "report.html"] if comparison else _below(folders, "report.html")
    lines += [f"report:   {report}" for report in reports]
    print("\n".join([*lines, f"tracking: {where_to_look(tracking_uri, run_id)}"]))
