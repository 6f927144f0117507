"""Merges a pipeline's defaults, a recipe and the values given. Checks only their types."""

from __future__ import annotations

import inspect
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softpref.config import NULL, closest, read_mapping
from softpref.disk import what_is_at
from softpref.errors import ConfigError
from softpref.preflight.parameters import SWEEP

if TYPE_CHECKING:
    from kfp.dsl.graph_component import GraphComponent

RECIPES = Path(__file__).parent / "recipes"


def names_in(folder: Path) -> list[str]:
    """The recipes or cluster profiles in a folder."""
    return sorted(file.stem for file in folder.glob("*.yaml"))


def find_file(name: str, folder: Path, what: str) -> Path:
    """The YAML file of a name in a folder, or of a path.

    Raises:
        ConfigError: there is no such file.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not os.path.isfile(path):
        if os.path.lexists(path):
            raise ConfigError(f"{what} {name!r} {what_is_at(path)}; give a YAML file")
        raise ConfigError(f"there is no {what} {name!r}{closest(name, names_in(folder))}")
    return path


def inputs(pipeline: GraphComponent) -> Mapping[str, inspect.Parameter]:
    """The parameters of a pipeline's function."""
    return inspect.signature(pipeline.pipeline_func).parameters


def pipeline_parameters(pipeline: GraphComponent, recipe: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of a pipeline: its defaults, then the recipe's, then those given (None is not given).

    Args:
        recipe: name of a file in `recipes/`, or the path of one. A mapping given for one of the recipe's
            (such as `train_overrides`) is merged into it by key; an empty one replaces it.

    Raises:
        ConfigError: there is no such recipe, or it names a parameter that no pipeline has.
    """
    known, path = inputs(pipeline), find_file(recipe, RECIPES, "recipe")
    parameters = {name: spec.default for name, spec in known.items()}
    mappings = set()
    for name, value in read_mapping(path).items():
        if name in known:
            if isinstance(value, dict):
                mappings.add(name)
            parameters[name] = value
        elif name not in SWEEP:  # a recipe also serves single runs, and clusters with a fixed number of GPUs
            raise ConfigError(f"recipe {path}: no parameter {name!r}{closest(name, {*known, *SWEEP})}")
    for name, value in given.items():
        if value is not None:
            parameters[name] = {**parameters[name], **value} if name in mappings and value else value
    return {name: typed(name, value, known[name].annotation) for name, value in parameters.items()}


def element_type(annotation: Any) -> tuple[type, bool]:
    """The type of a parameter, or of the elements of a list, and whether it is a list."""
    many = typing.get_origin(annotation) is list
    return typing.get_args(annotation)[0] if many else annotation, many


def typed(name: str, value: Any, annotation: Any) -> Any:
    """A value of the type that KFP expects: YAML's 1 becomes a float for a float parameter."""
    kind, many = element_type(annotation)
    try:
        if many and isinstance(value, list):
            return [typed(name, element, kind) for element in value]
        if kind is dict and isinstance(value, dict):
            return _without_nulls(value)
        if kind is bool and isinstance(value, bool):
            return value
        if kind is str and isinstance(value, (str, int)):
            return str(value)
        if not many and kind in (int, float) and kind(value) == float(value):
            return kind(value)
    except (TypeError, ValueError):
        pass
    expected = f"list of {kind.__name__}" if many else kind.__name__
    raise ConfigError(f"parameter {name} must be a {expected}, got {value!r}")


def _without_nulls(value: Any) -> Any:
    """KFP's local runner allows no null in a struct: `NULL` replaces it until `parse_overrides`."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    return NULL if value is None else value
