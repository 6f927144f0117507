"""A recipe's values over the pipelines' defaults, and a person's over both. Checks their types alone."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softpref.config import NULL, closest, read_mapping
from softpref.errors import ConfigError
from softpref.preflight.parameters import SWEEP

RECIPES = Path(__file__).parent / "recipes"


def names_in(folder: Path) -> list[str]:
    """The recipes, or the cluster profiles, that a folder holds."""
    return sorted(file.stem for file in folder.glob("*.yaml"))


def inputs(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a pipeline of `@dsl.pipeline`, as its function has them."""
    return inspect.signature(pipeline.pipeline_func).parameters


def pipeline_parameters(pipeline: Any, recipe: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of a pipeline: its defaults, then the recipe's, then those given (None is not given).

    Args:
        recipe: name of a file in `recipes/`, or the path of one. A mapping given for one of the recipe's
            (`train_overrides:` and the like) is laid over it, key by key; an empty one takes nothing of it.

    Raises:
        ConfigError: there is no such recipe, or it names a parameter that no pipeline has.
    """
    known = inputs(pipeline)
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        raise ConfigError(f"there is no recipe {recipe!r}{closest(recipe, names_in(RECIPES))}")
    parameters = {name: spec.default for name, spec in known.items()}
    mappings = set()
    for name, value in read_mapping(path).items():
        if name in known:
            if isinstance(value, dict):
                mappings.add(name)
            parameters[name] = value
        elif name not in SWEEP:  # recipes are for single runs, too, and for clusters that fix their GPUs
            raise ConfigError(f"recipe {path}: no parameter {name!r}{closest(name, {*known, *SWEEP})}")
    for name, value in given.items():
        if value is not None:
            parameters[name] = {**parameters[name], **value} if name in mappings and value else value
    return {name: typed(name, value, known[name].annotation) for name, value in parameters.items()}


def typed(name: str, value: Any, annotation: Any) -> Any:
    """A value as KFP wants it: YAML's 1 is a float where the pipeline says float."""
    many = typing.get_origin(annotation) is list
    kind = typing.get_args(annotation)[0] if many else annotation
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
    """KFP's structs on this machine bear no null: a text stands for it, which `parse_overrides` undoes."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    return NULL if value is None else value
