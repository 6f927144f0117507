"""The graph of both pipelines: plan → data → reference → [train → evaluate] → compare → register.

A sweep runs the part in brackets once for each model and compares them; a single run has one model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from kfp import dsl
from kfp.dsl import Artifact, Input
from kfp.dsl.base_component import BaseComponent
from kfp.dsl.graph_component import GraphComponent
from kfp.dsl.pipeline_channel import PipelineChannel

from softpref.data.component import prepare_data
from softpref.evaluation.component import compare_models, evaluate_model
from softpref.pipelines.placement import (
    applied,
    ended,
    launcher,
    models_at_once,
    place,
    run_name,
    source_artifact,
)
from softpref.pipelines.profiles import Profile, check_names
from softpref.preflight.component import plan_run, plan_sweep
from softpref.preflight.parameters import SINGLE, SWEEP, Parameter, declared, of_stage
from softpref.registry.component import register_model
from softpref.sft.component import train_reference
from softpref.spo.component import train_policy

Values = Mapping[str, Any]  # of a pipeline's parameters, by name


def pipeline(
    name: str, profile: Profile | None = None, defaults: Mapping[str, Any] | None = None
) -> GraphComponent:
    """One of the two pipelines, without the parameter `gpus` where the profile fixes their number.

    Args:
        name: spo-sweep or spo-pipeline.
        profile: of the cluster that it is for; None: for this machine.
        defaults: defaults of the parameters; they win over the profile's.

    Raises:
        ConfigError: the profile sets a parameter that the pipeline does not have.
    """
    sweep = name == "spo-sweep"
    summary, parameters = (_SWEEP, SWEEP) if sweep else (_SINGLE, SINGLE)
    description, fixed = summary, {}
    shown = {one.name: one.default for one in parameters.values()}
    if profile:
        check_names(profile.parameters, parameters, "parameter")
        shown |= profile.parameters
        description = _explained(name, summary, parameters)
        fixed = {} if profile.fixed_gpus is None else {"gpus": str(profile.fixed_gpus or "")}
    shown |= defaults or {}
    form = [
        # a profile writes `gpus` as a number, the parameter is text
        replace(one, default=str(shown[one.name]) if one.type is str else shown[one.name])
        for one in parameters.values()
        if one.name not in fixed
    ]
    with applied(profile, str(shown["source"])):
        register_chosen = _register_chosen() if sweep else None

        @declared(summary, form)
        def graph(given: Values) -> None:
            values = {**given, **fixed}
            with ended(**of_stage("finish", values)):
                _steps(values, register_chosen)

        return dsl.pipeline(graph, name=name, description=description)


_SWEEP = "Align a language model to preferences at several softness values."
_SINGLE = "Align a language model to preferences at one softness."


def _explained(name: str, summary: str, parameters: Mapping[str, Parameter]) -> str:
    """The pipeline's description with the most important fields: KFP's form shows no texts."""
    fields = [f"- {one.name}: {one.text}" for one in parameters.values() if one.shown]
    script = f"`python pipelines/{name.replace('-', '_')}.py --help`"
    return "\n".join(
        [summary, "The most important fields of the form:", *fields, f"{script} explains all fields."]
    )


def _steps(values: Values, register_chosen: GraphComponent | None) -> None:
    """The steps of a sweep; without `register_chosen`, those of a single run."""
    sweep, step = register_chosen is not None, partial(_step, values)
    plan = (plan_sweep if sweep else plan_run)(**values, run_name=run_name())
    plan.set_display_name("Check, plan the sweep" if sweep else "Check every parameter")
    place(plan, "plan", cache=False)  # it opens the pipeline's run in MLflow
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
            cache=False,  # it writes to this run's tree in MLflow
            evaluations=dsl.Collected(evaluated["evaluation"]),
            record=planned["record"],
        )
    with dsl.If(values["registered_model_name"] != "", name="registration"):
        if register_chosen:
            register_chosen(
                **{name: values[name] for name in _AT_REGISTRATION},
                model_uri=comparison["model_uri"],
                evaluation=comparison["chosen"],
                comparison=comparison["comparison"],
                record=planned["record"],
            ).set_display_name("Register chosen")
        else:
            evaluation = evaluated["evaluation"]
            _register(values, model=policy["policy"], evaluation=evaluation, record=planned["record"])


def _step(
    values: Values, face: BaseComponent, stage: str, shown: str, *, cache: bool = True, **inputs: object
) -> Mapping[str, PipelineChannel]:
    """The outputs of a task, which gets the parameters that reach its stage."""
    task = face(**{**of_stage(stage, values), **inputs})
    task.set_display_name(shown)
    place(task, stage, gpus=values.get("gpus", 0), cache=cache)
    outputs: Mapping[str, PipelineChannel] = task.outputs
    return outputs


def _register(values: Values, **inputs: object) -> None:
    # not from the cache: the registry's content decides, not only the inputs
    _step(values, register_model, "register", "Register", cache=False, **inputs)


_AT_REGISTRATION = {name: one for name, one in SWEEP.items() if one.key("register")}


def _register_chosen() -> GraphComponent:
    """A graph of its own, because KFP's importer starts with its graph and sees only that graph's inputs.

    A model from the cache needs the importer: it is outside the run, where no task's output may point.
    """

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
        inputs = {name: values[name] for name in ("evaluation", "comparison", "record")}
        # KFP looks up `artifact_uri` by this very name
        model = dsl.importer(artifact_uri=values["model_uri"], artifact_class=dsl.Model)
        _register(values, model=model.output, **inputs)

    return dsl.pipeline(register_chosen, name="register-chosen")


spo_sweep, spo_pipeline = pipeline("spo-sweep"), pipeline("spo-pipeline")
