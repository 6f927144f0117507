"""Compiles a pipeline, or runs it on this machine, in containers, or on a cluster. Knows no stage's logic.

The graph and its parameters are the same in all cases: a recipe and the command line give the parameters,
one planning function checks them before anything starts.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from local_run import run_here, task_server
from softpref.config import closest, read_mapping
from softpref.errors import ConfigError, SoftprefError
from submission import submit

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
        with task_server(parameters) if options.runner == "local" else contextlib.nullcontext() as tasks:
            from softpref.preflight.stage import plan

            members = plan(parameters)
            print(
                f"{_name(pipeline)}, recipe {options.recipe}: {', '.join(member.name for member in members)}"
            )
            if options.runner == "cluster":
                return submit(pipeline, parameters, options)
            return run_here(pipeline, parameters, options, tasks)
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
