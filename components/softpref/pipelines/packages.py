"""Compiles a pipeline to the package that is uploaded in the KFP UI, and the stages to components."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softpref.config import parse_overrides
from softpref.pipelines import graph
from softpref.pipelines.profiles import STAGES, Profile
from softpref.pipelines.recipes import RECIPES


def packages_folder() -> Path:
    """Where packages go unless it is said: `pipelines/packages` of a checkout, else `packages` here."""
    folder = RECIPES.resolve().parent / "packages"
    return folder if folder.is_dir() else Path("packages")


def compile_package(
    pipeline: Any, path: Path, profile: Profile, parameters: Mapping[str, Any] | None = None
) -> Path:
    """Write the pipeline's package, the file to upload in the KFP UI.

    Args:
        parameters: what the form shows before anybody fills it.
    """
    from kfp import compiler

    path.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(graph.pipeline(pipeline.name, profile, parameters), str(path))
    text = path.read_text(encoding="utf-8")
    path.write_text(_DEFAULT.sub(_in_order, text), encoding="utf-8")
    return path


_DEFAULT = re.compile(r"^(#.*\[Default: )(\{.*\})(?=\])", re.MULTILINE)


def _in_order(match: re.Match[str]) -> str:
    """KFP's comment on a mapping has its keys in another order each time."""
    values = parse_overrides(ast.literal_eval(match[2]))
    return match[1] + json.dumps(values, sort_keys=True)


def compile_components(folder: Path, profile: Profile) -> list[Path]:
    """Write each stage as a component of its own, to be loaded into other people's pipelines.

    Args:
        profile: names the images. What else a stage gets of a cluster is up to the pipeline that loads it.
    """
    from kfp import compiler, dsl

    from softpref.data.component import prepare_data
    from softpref.evaluation.component import compare_models, evaluate_model
    from softpref.registry.component import register_model
    from softpref.sft.component import train_reference
    from softpref.spo.component import train_policy

    faces = {
        "data": prepare_data,
        "sft": train_reference,
        "train": train_policy,
        "evaluate": evaluate_model,
        "compare": compare_models,
        "register": register_model,
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for stage, face in faces.items():
        image = profile.images[STAGES[stage]]
        component = dsl.component(face.python_func, base_image=image, install_kfp_package=False)
        texts = _argument_texts(face.python_func)  # KFP takes those of inputs alone
        for name, output in component.component_spec.outputs.items():
            output.description = texts.get(name, output.description)
        written.append(folder / f"{face.python_func.__name__}.yaml")
        compiler.Compiler().compile(component, str(written[-1]))
    return written


def _argument_texts(function: Any) -> dict[str, str]:
    """What the docstring of a component says of each argument."""
    import docstring_parser

    parsed = docstring_parser.parse(inspect.getdoc(function) or "")
    return {entry.arg_name: " ".join((entry.description or "").split()) for entry in parsed.params}
