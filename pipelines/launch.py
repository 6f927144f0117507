"""Compiles a pipeline, or runs it on this machine, in containers, or on a cluster. Knows no stage's logic.

The graph and its parameters are the same in all cases: a recipe and the command line give the parameters,
one planning function checks them before anything starts.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import inspect
import json
import os
import re
import shutil
import sys
import time
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from forks import TaskServer
from softpref.config import closest, read_mapping
from softpref.errors import ConfigError, SoftprefError
from softpref.tracking import end_run, open_parent, resolve_tracking_uri
from times import TaskTimes

_BEGAN = time.time() - time.process_time()  # of this process, which has done nothing but compute so far
_HERE = Path(__file__).resolve().parent
RECIPES, PACKAGES = _HERE / "recipes", _HERE / "packages"
_ONLY_FOR_SWEEPS = {"alphas", "baselines", "selection_rule", "max_kl"}


def main(pipeline: Any, arguments: list[str]) -> int:
    """Run the command line of one pipeline; returns the exit status."""
    options = _parse(pipeline, arguments)
    try:
        if options.command == "compile":
            print(compile_package(pipeline, PACKAGES / f"{_name(pipeline)}.yaml"))
            return 0
        given = {name: getattr(options, name) for name in _inputs(pipeline)}
        parameters = pipeline_parameters(pipeline, options.recipe, given)
        with _task_server(parameters) if options.runner == "local" else contextlib.nullcontext() as tasks:
            from softpref.preflight.stage import plan

            members = plan(parameters)
            print(
                f"{_name(pipeline)}, recipe {options.recipe}: {', '.join(member.name for member in members)}"
            )
            if options.runner == "cluster":
                return _submit(pipeline, parameters, options)
            return _run_here(pipeline, parameters, options, tasks)
    except SoftprefError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def pipeline_parameters(pipeline: Any, recipe: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of a pipeline: its defaults, then the recipe's, then those given (None is not given).

    Args:
        recipe: name of a file in `recipes/`, or the path of one. A recipe's mappings (`train_overrides:` and
            the like) become JSON; a JSON object given for one of them is laid over it, key by key.

    Raises:
        ConfigError: there is no such recipe, or it names a parameter that no pipeline has.
    """
    inputs = _inputs(pipeline)
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in RECIPES.glob("*.yaml"))
        raise ConfigError(f"there is no recipe {recipe!r}{closest(recipe, known)}")
    parameters = {name: spec.default for name, spec in inputs.items()}
    mappings = set()
    for name, value in read_mapping(path).items():
        if name in inputs:
            if isinstance(value, dict):
                mappings.add(name)
            parameters[name] = json.dumps(value) if isinstance(value, dict) else value
        elif name not in _ONLY_FOR_SWEEPS:
            raise ConfigError(f"recipe {path}: no parameter {name!r}{closest(name, inputs)}")
    for name, value in given.items():
        if value is not None:
            parameters[name] = _laid_over(parameters[name], value) if name in mappings else value
    return {name: _typed(name, value, inputs[name].annotation) for name, value in parameters.items()}


def _laid_over(recipe: str, given: str) -> str:
    """A recipe's JSON object with the keys given in place of its own; what is no object stays as given."""
    try:
        return json.dumps({**json.loads(recipe), **json.loads(given)})
    except (ValueError, TypeError):
        return given  # the empty text takes nothing of the recipe's; anything else is refused by the plan


def _typed(name: str, value: Any, annotation: Any) -> Any:
    """A value as KFP wants it: YAML's 1 is a float where the pipeline says float."""
    many = typing.get_origin(annotation) is list
    kind = typing.get_args(annotation)[0] if many else annotation
    try:
        if many and isinstance(value, list):
            return [_typed(name, element, kind) for element in value]
        if kind is str and isinstance(value, str):
            return value
        if not many and kind in (int, float) and kind(value) == float(value):
            return kind(value)
    except (TypeError, ValueError):
        pass
    expected = f"list of {kind.__name__}" if many else kind.__name__
    raise ConfigError(f"parameter {name} must be a {expected}, got {value!r}")


def compile_package(pipeline: Any, path: Path) -> Path:
    """Write the pipeline's package, the file to upload in the KFP UI."""
    from kfp import compiler

    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(pipeline, str(path))
    return path


# ---------------------------------------------------------------------- on this machine


def _task_server(parameters: Mapping[str, Any]) -> contextlib.AbstractContextManager[TaskServer | None]:
    """Begins the imports that all tasks need, while this process checks the parameters."""
    # two models are trained at a time: more threads than cores would slow both
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.platform.startswith("linux"):  # elsewhere forks of a process with these libraries may crash
        return contextlib.nullcontext()
    return TaskServer(resolve_tracking_uri(parameters["tracking_uri"] or None))


def _run_here(
    pipeline: Any, parameters: dict[str, Any], options: argparse.Namespace, tasks: TaskServer | None
) -> int:
    name = f"{Path(options.recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    output = Path(options.output or Path("runs") / name)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(
            f"--output {output} is a file or not empty; name a new folder, nothing is overwritten"
        )
    uri = resolve_tracking_uri(parameters["tracking_uri"] or None)
    if options.runner == "docker" and uri.startswith("sqlite:"):
        raise ConfigError(
            "containers cannot share a SQLite file; start a server (mlflow server --host 0.0.0.0) and give "
            "its URL as --tracking-uri"
        )
    output.mkdir(parents=True, exist_ok=True)
    os.environ["MLFLOW_TRACKING_URI"] = parameters["tracking_uri"] = uri
    parent = parameters["parent_run_id"] or open_parent(
        parameters["experiment"], name, tags={"softpref.recipe": options.recipe}, tracking_uri=uri
    )
    parameters["parent_run_id"] = parent or ""
    print(f"output {output}, tracking {uri}")
    times = TaskTimes(_BEGAN)
    succeeded = False
    try:
        with _console(output / "pipeline.log") as console:
            succeeded = _execute(pipeline, parameters, options.runner, output / "pipeline", tasks, times)
    finally:
        end_run(parent, "FINISHED" if succeeded else "FAILED", tracking_uri=uri)
    if not succeeded:
        print(console.last_lines(40), file=sys.stderr)
        print(
            f"error: the pipeline failed; everything it printed is in {output / 'pipeline.log'}",
            file=sys.stderr,
        )
        return 1
    _summarise(output, uri)
    print(times.in_words(time.time()))
    return 0


def _execute(
    pipeline: Any,
    parameters: dict[str, Any],
    runner: str,
    root: Path,
    tasks: TaskServer | None,
    times: TaskTimes,
) -> bool:
    import warnings

    from kfp import local
    from kfp.local import docker_task_handler, subprocess_task_handler

    start = tasks.run if tasks else subprocess_task_handler.run_local_subprocess

    def run_task(full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
        with times.task(full_command):
            return start(full_command, env_vars)

    def run_container(
        client: Any, image: str, command: list[str], volumes: dict[str, Any], **more: Any
    ) -> int:
        with times.task(command):
            return _run_container(client, image, command, volumes, **more)

    subprocess_task_handler.run_local_subprocess = run_task
    docker_task_handler.run_docker_container = run_container
    warnings.filterwarnings("ignore", module="kfp")
    if runner == "docker":
        environment = {"MLFLOW_TRACKING_URI": parameters["tracking_uri"]}
        # as the user who runs it, who owns the output folder that the containers write to
        user = f"{os.getuid()}:{os.getgid()}"
        chosen: Any = local.DockerRunner(environment=environment, network_mode="host", user=user)
    else:
        chosen = local.SubprocessRunner(use_venv=False)
    local.init(runner=chosen, pipeline_root=str(root.resolve()), raise_on_error=True)
    original_print = builtins.print
    try:
        pipeline(**parameters)
    except RuntimeError as error:
        print(f"ERROR - {error}")
        return False
    finally:
        builtins.print = original_print  # KFP indents it, and tasks side by side leave it so
    return True


def _run_container(
    client: Any, image: str, command: list[str], volumes: dict[str, Any], **options: Any
) -> int:
    """Run one task in a container and return its exit status.

    KFP's own function removes the container before it asks for the status and then takes a failure for a
    success (kubeflow/pipelines 13332).
    """
    container = client.containers.run(image=image, command=command, detach=True, volumes=volumes, **options)
    try:
        for line in container.logs(stream=True, follow=True):
            print(line.decode(errors="replace"), end="")
        return container.wait()["StatusCode"]
    finally:
        container.remove(force=True)


class _Console:
    """What a local run prints: everything goes to a log file, the course of events to the screen."""

    _EVENT = re.compile(r"^([\d:]+)\.\d+ - INFO - (Executing task|Task|Pipeline) '(.*?)'(.*)")
    _TROUBLE = re.compile(r"Traceback|Error\b|ERROR|WARNING|warning: ")
    _COLOUR = re.compile(r"\x1b\[\d+m")
    _PROGRESS = re.compile(r"^(.*?)\s*(\d+%)\|.*?\| *(\S+/\S+) \[([^\]]*)\]")
    _SECONDS_BETWEEN_PROGRESS = 10.0

    def __init__(self, screen: TextIO, log: TextIO) -> None:
        self._screen, self._log = screen, log
        self._rest, self._last_progress = "", 0.0
        self._recent: list[str] = []

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).replace("\r", "\n").split("\n")
        for line in lines:
            self._log.write(line + "\n")
            if line.strip():
                line = self._COLOUR.sub("", line)
                self._recent = [*self._recent[-200:], line]
                self._show(line.strip())
        return len(text)

    def flush(self) -> None:
        self._log.flush()
        self._screen.flush()

    def isatty(self) -> bool:
        return False

    def last_lines(self, count: int) -> str:
        """What was printed last, without progress bars."""
        return "\n".join([line for line in self._recent if not self._PROGRESS.search(line)][-count:])

    def _show(self, line: str) -> None:
        progress, event = self._PROGRESS.search(line), self._EVENT.search(line)
        if progress:
            title, share, count, times = progress.groups()
            momentary = times.startswith(("00:00", "00:01"))  # bars of a second say nothing
            if (
                not title
                or momentary
                or time.monotonic() - self._last_progress < self._SECONDS_BETWEEN_PROGRESS
            ):
                return
            self._last_progress = time.monotonic()
            line = f"          {title.rstrip(':')} {share} {count} [{times}]"
        elif event:
            clock, what, name, rest = event.groups()
            if what != "Executing task" and "finished" not in rest:
                return
            rest = (
                rest.replace("finished with status ", "").lower() if what != "Executing task" else " started"
            )
            line = f"{clock}  {name}{rest}"
        elif not self._TROUBLE.search(line):
            return
        self._screen.write(line + "\n")
        self._screen.flush()


@contextlib.contextmanager
def _console(log_file: Path) -> Iterator[_Console]:
    with log_file.open("w", encoding="utf-8") as log:
        console = _Console(sys.stdout, log)
        with contextlib.redirect_stdout(console):  # type: ignore[type-var]
            yield console


def _summarise(output: Path, tracking_uri: str) -> None:
    """Bring the results to the top of the output folder and say what they are and where."""
    from softpref.evaluation.compare import evaluation_folders, format_table

    tasks = output / "pipeline"
    found = sorted(path.parent for path in tasks.rglob("evaluation/evaluation.json"))
    evaluations = [
        json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        for folder in evaluation_folders(found)
    ]
    print(f"\n{format_table(evaluations)}\n")
    comparison = next(tasks.rglob("comparison.json"), None)
    if comparison:
        shutil.copytree(comparison.parent, output / "comparison", dirs_exist_ok=True)
        choice = json.loads(comparison.read_text(encoding="utf-8"))
        print(f"chosen:   {choice['chosen']}. {choice['reason']}")
    registration = next(tasks.rglob("registration.json"), None)
    if registration:
        shutil.copy(registration, output / "registration.json")
        decision = json.loads(registration.read_text(encoding="utf-8"))
        aliases = "".join(f" @{alias}" for alias in decision["aliases"])
        version = f" version {decision['version']}{aliases}" if decision["registered"] else ""
        print(f"registry: {decision['model_name']}{version}. {decision['reason']}")
    for report in [output / "comparison" / "report.html"] if comparison else tasks.rglob("report.html"):
        print(f"report:   {report}")
    print(f"tracking: {tracking_uri}; look at it with: mlflow ui --backend-store-uri {tracking_uri}")


# ---------------------------------------------------------------------- on a cluster


def _submit(pipeline: Any, parameters: dict[str, Any], options: argparse.Namespace) -> int:
    import kfp

    if not options.endpoint:
        raise ConfigError("--runner cluster needs --endpoint, the URL of the Kubeflow Pipelines API")
    client = kfp.Client(
        host=options.endpoint,
        namespace=options.namespace,
        existing_token=os.environ.get("KFP_TOKEN"),
    )
    run = client.create_run_from_pipeline_func(
        pipeline,
        arguments=parameters,
        run_name=f"{_name(pipeline)}-{Path(options.recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}",
        experiment_name=parameters["experiment"],
        namespace=options.namespace,
    )
    print(f"submitted run {run.run_id} to {options.endpoint}")
    return 0


# ---------------------------------------------------------------------- the command line


def _parse(pipeline: Any, arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"{_name(pipeline)}.py",
        description=pipeline.component_spec.description,
    )
    parser.add_argument("command", nargs="?", choices=("run", "compile"), default="run")
    parser.add_argument(
        "--recipe", default="embedded", help="name in pipelines/recipes, or a YAML file (default: embedded)"
    )
    parser.add_argument("--output", help="new folder for the results (default: runs/RECIPE-TIME)")
    parser.add_argument("--runner", choices=("local", "docker", "cluster"), default="local")
    parser.add_argument("--endpoint", help="URL of the Kubeflow Pipelines API, for --runner cluster")
    parser.add_argument("--namespace", default="kubeflow", help="namespace of the run, for --runner cluster")
    group = parser.add_argument_group("pipeline parameters (they win over the recipe)")
    texts = _parameter_texts(pipeline)
    for name, parameter in _inputs(pipeline).items():
        many = typing.get_origin(parameter.annotation) is list
        group.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            type=typing.get_args(parameter.annotation)[0] if many else parameter.annotation,
            nargs="*" if many else None,
            metavar=name.split("_")[-1].upper(),
            help=texts[name].replace("%", "%%"),
        )
    return parser.parse_args(arguments)


def _inputs(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(pipeline.pipeline_func).parameters


def _parameter_texts(pipeline: Any) -> dict[str, str]:
    """What the pipeline's docstring, which the KFP UI shows, says of each parameter."""
    import docstring_parser

    parsed = docstring_parser.parse(inspect.getdoc(pipeline.pipeline_func) or "")
    return {entry.arg_name: entry.description or "" for entry in parsed.params}


def _name(pipeline: Any) -> str:
    return pipeline.name.replace("-", "_")
