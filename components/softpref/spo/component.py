"""The KFP face of stage 3. Holds no logic: parameters go to `softpref.spo.stage.run`, wherever it runs."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from softpref.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def train_policy(
    dataset: Input[Dataset],
    reference: Input[Model],
    policy: Output[Model],
    metrics: Output[Metrics],
    member: str,
    learning_rate: float = 1e-6,
    num_train_epochs: float = 1.0,
    samples_per_refresh: int = 64,
    sampling_interval: int = 8,
    seed: int = 0,
    gpus: str = "",
    trust_remote_code: bool = False,
    experiment: str = "softpref",
    tracking_uri: str = "",
    overrides: dict = {},  # type: ignore[type-arg]  # noqa: B006
    launcher: str = "",
) -> None:
    """Align the reference to preferences: soft preference optimization, or a baseline on the same rows.

    Args:
        dataset: The dataset folder of the data stage.
        reference: The model to start from, which is also the frozen reference of the KL term.
        policy: The aligned model's folder: safetensors, tokenizer, generation config, model card.
        metrics: Alpha, beta and the final training and validation metrics that people compare.
        member: JSON object written by the planning task: name, method, alpha, beta, options (parameters of
            SPOConfig for this model alone).
        learning_rate: Peak learning rate.
        num_train_epochs: Passes over the preferences.
        samples_per_refresh: Completions drawn from the policy at each refresh, for the KL term.
        sampling_interval: Optimizer steps between refreshes.
        seed: Seed of order and sampling.
        gpus: GPUs to train on; fewer than that is an error. Empty: none. Text, since KFP cannot set a limit
            from a number in a form.
        trust_remote_code: Run model code that comes with the reference.
        experiment: MLflow experiment.
        tracking_uri: MLflow server. Empty: the environment's, or a local store.
        overrides: Any other parameter of SPOConfig, which has every option of
            transformers.TrainingArguments.
        launcher: JSON object that a cluster profile writes: where the stage's processes run. Empty: on this
            machine, one for each GPU asked for. {"processes": N}: N of them here, without GPUs.
            {"trainjob": {...}}: as a Kubeflow TrainJob of several nodes, `gpus` on each.
    """
    import json

    from softpref.artifacts import describe, model_values
    from softpref.config import parse_overrides
    from softpref.distributed.launch import run_stage
    from softpref.spo.config import SPOConfig
    from softpref.spo.stage import headline, run
    from softpref.tracking import watch_termination

    watch_termination(experiment, tracking_uri or None)
    plan = json.loads(member)
    results = run_stage(
        "train",
        SPOConfig,
        run,
        {
            "learning_rate": learning_rate,
            "num_train_epochs": num_train_epochs,
            "samples_per_refresh": samples_per_refresh,
            "sampling_interval": sampling_interval,
            "seed": seed,
            "gpus": gpus or 0,
            "trust_remote_code": trust_remote_code,
        },
        parse_overrides(overrides),
        {key: plan[key] for key in ("method", "alpha", "beta")},
        plan.get("options", {}),
        folders={"dataset": dataset.path, "reference": reference.path, "output": policy.path},
        launcher=launcher,
        name=plan["name"],
        experiment=experiment,
        tracking_uri=tracking_uri,
    )
    values = model_values(policy.path)
    describe(policy, f"{plan['name']}: policy", **values)
    describe(metrics, f"{plan['name']}: training", model=plan["name"])
    for name, value in headline(values, results).items():
        metrics.log_metric(name, value)
