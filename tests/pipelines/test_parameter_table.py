"""The table of parameters: pipelines, steps, command line and documentation say what it says."""

import inspect
import json

import pytest
from softpref.data.component import prepare_data
from softpref.evaluation.component import compare_models, evaluate_model
from softpref.pipelines.recipes import pipeline_parameters
from softpref.preflight.component import plan_run, plan_sweep
from softpref.preflight.parameters import SINGLE, STAGES, SWEEP, TABLE, reference
from softpref.registry.component import register_model
from softpref.sft.component import train_reference
from softpref.spo.component import train_policy

from tests.pipelines.conftest import REPOSITORY

FACES = (prepare_data, train_reference, train_policy, evaluate_model, compare_models, register_model)


def test_both_pipelines_and_their_plans_take_its_parameters_with_type_default_and_text(sweep, single):
    for pipeline, plan, parameters in ((sweep, plan_sweep, SWEEP), (single, plan_run, SINGLE)):
        inputs = pipeline.component_spec.inputs
        planned = {**plan.component_spec.inputs}
        assert planned.pop("run_name").description
        assert list(inputs) == list(planned) == list(parameters)
        for name, one in parameters.items():
            assert (inputs[name].default, inputs[name].description) == (one.default, one.text)
            assert (planned[name].type, planned[name].description) == (inputs[name].type, one.text)
    assert [str(inspect.signature(sweep.pipeline_func).parameters[name]) for name in ("alphas", "gpus")] == [
        "alphas: List[float] = [0.5, 1.0, 2.0]",
        "gpus: str = ''",
    ]


@pytest.mark.parametrize(("stage", "face"), zip(STAGES, FACES, strict=True))
def test_every_step_takes_what_reaches_its_stage_as_the_pipelines_have_it(sweep, single, stage, face):
    pipelines = {**sweep.component_spec.inputs, **single.component_spec.inputs}
    reaching = {one.key(stage): name for name, one in TABLE.items() if one.key(stage)}
    for key, name in reaching.items():
        taken, given = face.component_spec.inputs[key], pipelines[name]
        assert taken.type == given.type, name
        if name != "registered_model_name":  # which a step must be told
            assert taken.default == given.default, name
    assert "experiment" in reaching


def test_the_page_of_parameters_is_current():
    page = (REPOSITORY / "docs" / "parameters.md").read_text(encoding="utf-8")
    assert page == reference(), "docs/parameters.md is out of date: run make packages"


def test_a_plan_takes_texts_with_quotes_from_kfps_runner(sweep, tmp_path):
    from kfp import local

    source = tmp_path / """it's "mine".jsonl"""
    source.touch()  # the plan looks for it
    text = """Say "it's {topic}":\n\\d"""
    given = {"source": str(source), "judge": "bradley-terry", "prompt_template": text}
    values = pipeline_parameters(sweep, "embedded", given)
    values["data_overrides"] = {"system_prompt": text, "as_messages": True}  # a struct of KFP
    local.init(
        local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "out"), raise_on_error=True
    )
    outputs = plan_sweep(**values, run_name="").outputs
    assert [json.loads(one)["name"] for one in outputs["Output"]][-1] == "dpo-beta-1"
    assert outputs["source_version"]
