"""The KFP faces of a run's first task, for a sweep and for a single run, and of its last.

The first takes every parameter of its pipeline, and refuses wrong ones before anything runs.
"""

import linecache
from collections.abc import Mapping
from typing import Any, List, NamedTuple  # noqa: F401, UP035  # what the first task's source needs, too

from kfp import dsl
from kfp.dsl import Artifact, Output, PipelineTaskFinalStatus  # noqa: F401
from kfp.dsl.python_component import PythonComponent

from softpref.images import TRAIN_IMAGE
from softpref.preflight.parameters import SINGLE, SWEEP, Parameter, docstring, signature

_SOURCE = """\
def {name}(
    {arguments},
    run_name: str,
    record: Output[Artifact],
) -> NamedTuple(
    "Plan",
    [
        ("{models}", {kind}),
        ("code_version", str),
        ("source_version", str),
        ("base_model", str),
        ("base_model_version", str),
    ],
):
    parameters = dict(locals())

    from softpref.preflight.stage import begin_run

    begun = begin_run(parameters, record.path)
    return {planned}, *begun[1:]
"""
_FURTHER = """
    run_name: Name of the pipeline run, for its run in MLflow.
    record: The tracking records of this step; a later step sends what MLflow missed.

Returns:
    {models}: A JSON object per model: name, method, alpha, beta, options.
    code_version: Version of the code. Like the outputs below, part of KFP's cache key.
    source_version: Version of the source.
    base_model: The base model, with a registry's alias replaced by its version.
    base_model_version: Version of the base model.
"""


def _plan(name: str, summary: str, parameters: Mapping[str, Parameter], **outputs: str) -> PythonComponent:
    """The task that checks `parameters`, each an argument of its own.

    KFP ships a component as the source of a function, so this builds source. (One mapping of all would be
    simpler, but KFP's local runner breaks it at the first quote in a text.)
    """
    arguments = str(signature(parameters.values(), required=True))[1:-1]
    source, file = _SOURCE.format(name=name, arguments=arguments, **outputs), f"<{name}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # for `inspect`
    scope = dict(globals())
    exec(compile(source, file, "exec"), scope)
    scope[name].__doc__ = docstring(summary, parameters.values()) + _FURTHER.format(**outputs)
    return dsl.component(scope[name], base_image=TRAIN_IMAGE, install_kfp_package=False)


plan_sweep = _plan(
    "plan_sweep",
    "Check every parameter of a sweep within seconds and list the models to train.",
    SWEEP,
    models="Output",  # KFP's local runner loops only over an output of that name
    kind="List[str]",
    planned="begun.members",
)
plan_run = _plan(
    "plan_run",
    "Check every parameter of a single run within seconds.",
    SINGLE,
    models="member",
    kind="str",
    planned="begun.members[0]",
)


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def finish_run(status: PipelineTaskFinalStatus, run_name: str, experiment: str, tracking_uri: str) -> None:
    """End the pipeline's run in MLflow, however its steps ended, and all runs below it that are still open.

    Args:
        status: How the steps ended, filled in by KFP.
        run_name: Name of the pipeline run.
        experiment: MLflow experiment.
        tracking_uri: MLflow server. Empty: the environment's, or a local store.
    """
    from softpref.preflight.stage import outcome
    from softpref.tracking import finish_pipeline_run

    finish_pipeline_run(
        outcome(status.state, status.pipeline_task_name),
        name=run_name,
        experiment=experiment,
        tracking_uri=tracking_uri or None,
        patience=480,  # the step itself has ten minutes
    )
