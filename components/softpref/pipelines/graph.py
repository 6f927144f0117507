"""The graph of both pipelines: plan → data → reference → [train → evaluate] → compare → register.

A sweep goes through the brackets once for each model, and compares them; a single run has one model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from kfp import dsl
from kfp.dsl import Artifact, Input

from softpref.data.component import prepare_data
from softpref.evaluation.component import compare_models, evaluate_model
from softpref.pipelines.placement import (
    Part,
    ended,
    launcher,
    models_at_once,
    place,
    run_name,
    source_artifact,
)
from softpref.preflight.component import plan_run, plan_sweep
from softpref.preflight.parameters import SINGLE, SWEEP, declared, of_stage
from softpref.registry.component import register_model
from softpref.sft.component import train_reference
from softpref.spo.component import train_policy

Values = Mapping[str, Any]  # of a pipeline's parameters, by name


def pipeline(name: str, description: str, *, sweep: bool) -> Any:
    """One of the two pipelines."""

    @declared(description, (SWEEP if sweep else SINGLE).values())
    def graph(values: Values) -> None:
        with ended(**of_stage("finish", values)):
            _steps(values, sweep)

    return dsl.pipeline(graph, name=name, description=description)


def _steps(values: Values, sweep: bool) -> None:
    step = partial(_step, values)
    plan = (plan_sweep if sweep else plan_run)(**values, run_name=run_name())
    plan.set_display_name("Check, plan the sweep" if sweep else "Check every parameter")
    place(plan, "plan", cache=False)  # it opens the run's own in MLflow
    planned = plan.outputs
    data = step(
        prepare_data,
        "data",
        "Prepare preferences",
        source_version=planned["source_version"],
        code_version=planned["code_version"],
        **source_artifact(),
    )
    reference = step(
        train_reference,
        "sft",
        "Train the reference",
        dataset=data["dataset"],
        base_model=planned["base_model"],
        base_model_version=planned["base_model_version"],
        launcher=launcher(),
    )
    given = {"dataset": data["dataset"], "reference": reference["reference"]}
    models = (
        dsl.ParallelFor(planned["Output"], name="models", parallelism=models_at_once())
        if sweep
        else contextlib.nullcontext(planned["member"])
    )
    with models as member:
        policy = step(train_policy, "train", "Align the policy", **given, member=member, launcher=launcher())
        evaluated = step(evaluate_model, "evaluate", "Evaluate", **given, policy=policy["policy"])
    if sweep:
        comparison = step(
            compare_models,
            "compare",
            "Compare and choose",
            cache=False,  # this run's tree in MLflow gets it
            evaluations=dsl.Collected(evaluated["evaluation"]),
            record=planned["record"],
        )
    with dsl.If(values["registered_model_name"] != "", name="registration"):
        if sweep:
            register_chosen(
                **{name: values[name] for name in _AT_REGISTRATION},
                model_uri=comparison["model_uri"],
                evaluation=comparison["chosen"],
                comparison=comparison["comparison"],
                record=planned["record"],
            ).set_display_name("Register chosen")
        else:
            _register(
                values,
                model=policy["policy"],
                evaluation=evaluated["evaluation"],
                record=planned["record"],
            )


def _step(values: Values, face: Any, stage: str, shown: str, *, cache: bool = True, **inputs: Any) -> Any:
    """The outputs of a task, which gets the parameters that reach its stage."""
    task = face(**{**of_stage(stage, values), **inputs})
    task.set_display_name(shown)
    place(task, stage, gpus=values.get("gpus", 0), cache=cache)
    return task.outputs


def _register(values: Values, **inputs: Any) -> None:
    # what the registry holds decides, not the inputs: not from the cache
    _step(values, register_model, "register", "Register", cache=False, **inputs)


_AT_REGISTRATION = {name: one for name, one in SWEEP.items() if one.key("register")}


@Part
@declared(
    "Register the model that a comparison chose.",
    _AT_REGISTRATION.values(),
    required=True,
    model_uri=str,
    evaluation=Input[Artifact],
    comparison=Input[Artifact],
    record=Input[Artifact],
)
def register_chosen(values: Values) -> None:
    # A part of its own, for KFP's importer starts with the pipeline that it belongs to, and knows its inputs
    # alone. A model from the cache lies outside of the run, where no output of a task may point.
    inputs = {name: values[name] for name in ("evaluation", "comparison", "record")}
    # KFP looks `artifact_uri` up by this very name
    model = dsl.importer(artifact_uri=values["model_uri"], artifact_class=dsl.Model)
    _register(values, model=model.output, **inputs)


spo_sweep = pipeline(
    "spo-sweep", "Align a language model to preferences at several softness values.", sweep=True
)
spo_pipeline = pipeline("spo-pipeline", "Align a language model to preferences at one softness.", sweep=False)
