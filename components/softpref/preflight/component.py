"""The KFP faces of a run's first task, for a sweep and for a single run, and of its last. They hold no logic.

The first takes every parameter of its pipeline, for it is there to refuse a wrong one before anything runs.
"""

from typing import List, NamedTuple  # noqa: UP035  # kfp reads the element type from typing.List

from kfp import dsl
from kfp.dsl import Artifact, Output, PipelineTaskFinalStatus

from softpref.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def plan_sweep(
    alphas: List[float],  # noqa: UP006
    baselines: List[str],  # noqa: UP006
    anchor: float,
    beta: float,
    source: str,
    columns: dict,
    prompt_template: str,
    rows: int,
    data_overrides: dict,
    base_model: str,
    sft_learning_rate: float,
    sft_epochs: float,
    sft_overrides: dict,
    learning_rate: float,
    epochs: float,
    samples_per_refresh: int,
    sampling_interval: int,
    train_overrides: dict,
    judge: str,
    samples_per_prompt: int,
    evaluation_overrides: dict,
    registered_model_name: str,
    min_win_rate: float,
    registry_overrides: dict,
    selection_rule: str,
    max_kl: float,
    gpus: str,
    trust_remote_code: bool,
    experiment: str,
    tracking_uri: str,
    run_name: str,
    record: Output[Artifact],
) -> NamedTuple(  # type: ignore[valid-type]
    "Plan",
    [  # "Output", for KFP's local runner loops over an output of that name alone
        ("Output", List[str]),  # noqa: UP006
        ("code_version", str),
        ("source_version", str),
        ("base_model", str),
        ("base_model_version", str),
    ],
):
    """Check every parameter of a sweep within seconds and list the models to train.

    Args:
        alphas: Softness values, one model each.
        baselines: Further models on the same rows, METHOD[:BETA][,OPTION=VALUE...], such as dpo:0.1 or
            sppo:1,train_on=samples,rounds=3.
        anchor: What softness is relative to: 0, nothing, as published; 1, the reference.
        beta: Strength of the KL regulariser of the spo members.
        source, columns, prompt_template, rows, data_overrides: Parameters of the data stage.
        base_model, sft_learning_rate, sft_epochs, sft_overrides: Parameters of the SFT stage.
        learning_rate, epochs, samples_per_refresh, sampling_interval, train_overrides: Of the training stage.
        judge, samples_per_prompt, evaluation_overrides: Parameters of the evaluation stage.
        registered_model_name, min_win_rate, registry_overrides: Parameters of the registration stage.
        selection_rule, max_kl: How the comparison chooses.
        gpus: GPUs of the training stages. Empty: none.
        trust_remote_code: Run model code that comes with the base model, in every stage.
        experiment: MLflow experiment.
        tracking_uri: MLflow server. Empty: the environment's, or a local store.
        run_name: Name of the pipeline run, for its run in MLflow.
        record: What the pipeline's run in MLflow is told here; a later step delivers what MLflow missed.

    Returns:
        Output: a JSON object per model: name, method, alpha, beta, options. And what the keys of KFP's cache
        are made of, besides the parameters: the version of the code, that of the source, the base model with
        a registry's alias replaced by the version behind it, and the version of the base model.
    """
    parameters = dict(locals())

    from collections import namedtuple

    from softpref.preflight.stage import begin_run

    begun = begin_run(parameters, record.path)
    outputs = namedtuple("Plan", ["Output", *begun._fields[1:]])  # type: ignore[misc]
    return outputs(*begun)  # type: ignore[call-arg]


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def plan_run(
    alpha: float,
    anchor: float,
    beta: float,
    source: str,
    columns: dict,
    prompt_template: str,
    rows: int,
    data_overrides: dict,
    base_model: str,
    sft_learning_rate: float,
    sft_epochs: float,
    sft_overrides: dict,
    learning_rate: float,
    epochs: float,
    samples_per_refresh: int,
    sampling_interval: int,
    train_overrides: dict,
    judge: str,
    samples_per_prompt: int,
    evaluation_overrides: dict,
    registered_model_name: str,
    min_win_rate: float,
    registry_overrides: dict,
    gpus: str,
    trust_remote_code: bool,
    experiment: str,
    tracking_uri: str,
    run_name: str,
    record: Output[Artifact],
) -> NamedTuple(  # type: ignore[valid-type]
    "Plan",
    [
        ("member", str),
        ("code_version", str),
        ("source_version", str),
        ("base_model", str),
        ("base_model_version", str),
    ],
):
    """Check every parameter of a single run within seconds.

    Args:
        alpha: Softness of the model.
        anchor: What softness is relative to: 0, nothing, as published; 1, the reference.
        beta: Strength of the KL regulariser of the spo members.
        source, columns, prompt_template, rows, data_overrides: Parameters of the data stage.
        base_model, sft_learning_rate, sft_epochs, sft_overrides: Parameters of the SFT stage.
        learning_rate, epochs, samples_per_refresh, sampling_interval, train_overrides: Of the training stage.
        judge, samples_per_prompt, evaluation_overrides: Parameters of the evaluation stage.
        registered_model_name, min_win_rate, registry_overrides: Parameters of the registration stage.
        gpus: GPUs of the training stages. Empty: none.
        trust_remote_code: Run model code that comes with the base model, in every stage.
        experiment: MLflow experiment.
        tracking_uri: MLflow server. Empty: the environment's, or a local store.
        run_name: Name of the pipeline run, for its run in MLflow.
        record: What the pipeline's run in MLflow is told here; a later step delivers what MLflow missed.

    Returns:
        member: a JSON object: name, method, alpha, beta, options. The others: see plan_sweep.
    """
    parameters = dict(locals())

    from collections import namedtuple

    from softpref.preflight.stage import begin_run

    begun = begin_run(parameters, record.path)
    outputs = namedtuple("Plan", ["member", *begun._fields[1:]])  # type: ignore[misc]
    return outputs(*begun.members, *begun[1:])  # type: ignore[call-arg]


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def finish_run(status: PipelineTaskFinalStatus, run_name: str, experiment: str, tracking_uri: str):
    """End the pipeline's run in MLflow, however its steps have ended, and whatever below it they left open.

    Args:
        status: How the steps ended; KFP says it.
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
