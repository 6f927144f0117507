"""Compiles a pipeline to a package for the KFP UI, and the stages to components."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softpref.config import parse_overrides
from softpref.pipelines import graph
from softpref.pipelines.profiles import Profile
from softpref.pipelines.recipes import RECIPES

if TYPE_CHECKING:
    from kfp.dsl.graph_component import GraphComponent


def packages_folder() -> Path:
    """The default folder for packages: `pipelines/packages` of a checkout, else `packages` here."""
    folder = RECIPES.resolve().parent / "packages"
    return folder if folder.is_dir() else Path("packages")


def compile_package(
    pipeline: GraphComponent, path: Path, profile: Profile, parameters: Mapping[str, Any] | None = None
) -> Path:
    """Write the pipeline's package, whose form shows `parameters` as defaults; returns its path."""
    from kfp import compiler

    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(graph.pipeline(pipeline.name, profile, parameters), str(path))
    text = path.read_text(encoding="utf-8")
    path.write_text(_DEFAULT.sub(_in_order, text), encoding="utf-8")
    return path


def read_package(path: Path) -> dict[str, Any]:
    """The specification of the pipeline in a package."""
    import yaml

    specification: dict[str, Any] = next(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    return specification


_DEFAULT = re.compile(r"^(#.*\[Default: )(\{.*\})(?=\])", re.MULTILINE)


def _in_order(match: re.Match[str]) -> str:
    """A mapping in KFP's comments with sorted keys; KFP's order changes each time."""
    return match[1] + json.dumps(parse_overrides(ast.literal_eval(match[2])), sort_keys=True)


def compile_components(folder: Path, profile: Profile) -> list[Path]:
    """Write each stage as a component for other pipelines; of the profile, only the images go into it."""
    import docstring_parser
    from kfp import compiler, dsl

    from softpref.data.component import prepare_data
    from softpref.evaluation.component import compare_models, evaluate_model
    from softpref.registry.component import register_model
    from softpref.reward_model.component import train_judge
    from softpref.sft.component import train_reference
    from softpref.spo.component import train_policy

    faces = {
        "data": [prepare_data],
        "train": [train_reference, train_policy, train_judge],
        "evaluate": [evaluate_model, compare_models, register_model],
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for image, function in ((image, face.python_func) for image, own in faces.items() for face in own):
        component = dsl.component(function, base_image=profile.images[image], install_kfp_package=False)
        for entry in docstring_parser.parse(inspect.getdoc(function) or "").params:
            if output := component.component_spec.outputs.get(entry.arg_name):  # KFP describes inputs only
                output.description = " ".join((entry.description or "").split())
        written.append(folder / f"{function.__name__}.yaml")
        compiler.Compiler().compile(component, str(written[-1]))
    return written
