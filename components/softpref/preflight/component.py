"""The KFP faces of the planning task, for a sweep and for a single run. They hold no logic.

Each takes every parameter of its pipeline, because its purpose is to refuse a wrong one before anything runs.
"""

from typing import List  # noqa: UP035  # kfp reads the element type from typing.List

from kfp import dsl

from softpref.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def plan_sweep(
    alphas: List[float],  # noqa: UP006
    baselines: List[str],  # noqa: UP006
    beta: float,
    source: str,
    columns: str,
    prompt_template: str,
    rows: int,
    data_overrides: str,
    base_model: str,
    sft_learning_rate: float,
    sft_epochs: float,
    sft_overrides: str,
    learning_rate: float,
    epochs: float,
    samples_per_refresh: int,
    sampling_interval: int,
    train_overrides: str,
    judge: str,
    samples_per_prompt: int,
    evaluation_overrides: str,
    registered_model_name: str,
    min_win_rate: float,
    registry_overrides: str,
    selection_rule: str,
    max_kl: float,
    experiment: str,
    tracking_uri: str,
    parent_run_id: str = "",
) -> List[str]:  # noqa: UP006
    """Check every parameter of a sweep within seconds and list the models to train.

    Args:
        alphas: Softness values, one model each.
        baselines: Further models on the same rows, METHOD[:BETA][,OPTION=VALUE...], such as dpo:0.1 or
            sppo:1,train_on=samples,rounds=3.
        beta: Strength of the KL regulariser of the spo members.
        source, columns, prompt_template, rows, data_overrides: Parameters of the data stage.
        base_model, sft_learning_rate, sft_epochs, sft_overrides: Parameters of the SFT stage.
        learning_rate, epochs, samples_per_refresh, sampling_interval, train_overrides: Of the training stage.
        judge, samples_per_prompt, evaluation_overrides: Parameters of the evaluation stage.
        registered_model_name, min_win_rate, registry_overrides: Parameters of the registration stage.
        selection_rule, max_kl: How the comparison chooses.
        experiment: MLflow experiment.
        tracking_uri: MLflow server. Empty: the environment's, or a local store.
        parent_run_id: MLflow run of the whole pipeline. Empty: one is opened, or the inherited one is taken.

    Returns:
        A JSON object per model: name, method, alpha, beta, options, parent_run_id.
    """
    parameters = dict(locals())

    import json

    from softpref.preflight.stage import plan
    from softpref.tracking import open_parent

    members = plan(parameters)
    if not parent_run_id:
        parent_run_id = open_parent(experiment, "sweep", tracking_uri=tracking_uri or None) or ""
    plans = [json.dumps({**member._asdict(), "parent_run_id": parent_run_id}) for member in members]
    return plans


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def plan_run(
    alpha: float,
    beta: float,
    source: str,
    columns: str,
    prompt_template: str,
    rows: int,
    data_overrides: str,
    base_model: str,
    sft_learning_rate: float,
    sft_epochs: float,
    sft_overrides: str,
    learning_rate: float,
    epochs: float,
    samples_per_refresh: int,
    sampling_interval: int,
    train_overrides: str,
    judge: str,
    samples_per_prompt: int,
    evaluation_overrides: str,
    registered_model_name: str,
    min_win_rate: float,
    registry_overrides: str,
    experiment: str,
    tracking_uri: str,
    parent_run_id: str = "",
) -> str:
    """Check every parameter of a single run within seconds.

    Args:
        alpha: Softness of the model.
        beta: Strength of the KL regulariser of the spo members.
        source, columns, prompt_template, rows, data_overrides: Parameters of the data stage.
        base_model, sft_learning_rate, sft_epochs, sft_overrides: Parameters of the SFT stage.
        learning_rate, epochs, samples_per_refresh, sampling_interval, train_overrides: Of the training stage.
        judge, samples_per_prompt, evaluation_overrides: Parameters of the evaluation stage.
        registered_model_name, min_win_rate, registry_overrides: Parameters of the registration stage.
        experiment: MLflow experiment.
        tracking_uri: MLflow server. Empty: the environment's, or a local store.
        parent_run_id: MLflow run of the whole pipeline. Empty: one is opened, or the inherited one is taken.

    Returns:
        A JSON object: name, method, alpha, beta, options, parent_run_id.
    """
    parameters = dict(locals())

    import json

    from softpref.preflight.stage import plan
    from softpref.tracking import open_parent

    members = plan(parameters)
    if not parent_run_id:
        parent_run_id = open_parent(experiment, "run", tracking_uri=tracking_uri or None) or ""
    plans = [json.dumps({**member._asdict(), "parent_run_id": parent_run_id}) for member in members]
    return plans[0]
