"""The KFP face of a judge's training. Holds no logic: parameters go to `softpref.reward_model.stage.run`."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from softpref.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def train_judge(
    dataset: Input[Dataset],
    judge: Output[Model],
    metrics: Output[Metrics],
    base_model: str,
    learning_rate: float = 1e-5,
    num_train_epochs: float = 1.0,
    seed: int = 0,
    gpus: str = "",
    trust_remote_code: bool = False,
    experiment: str = "softpref",
    tracking_uri: str = "",
    overrides: dict = {},  # type: ignore[type-arg]  # noqa: B006
    launcher: str = "",
) -> None:
    """Train a reward model on preferences that the policy never sees, to judge policies by.

    Args:
        dataset: The dataset folder of the data stage, made with judge_fraction.
        judge: The model folder: a sequence-classification checkpoint with a label for each reward head.
            Evaluation takes its address as judge_model.
        metrics: Final losses in nats, and the agreement with held-out preferences beside length alone.
        base_model: Hub id, URL, registered model, checkpoint folder or .gguf file that gets reward heads.
        learning_rate: Peak learning rate.
        num_train_epochs: Passes over the judge's preferences.
        seed: Seed of the heads' prompts and of the order.
        gpus: GPUs to train on; fewer than that is an error. Empty: none. Text, since KFP cannot set a limit
            from a number in a form.
        trust_remote_code: Run model code that comes with the base model.
        experiment: MLflow experiment.
        tracking_uri: MLflow server. Empty: the environment's, or a local store.
        overrides: Any other parameter of RewardModelConfig, which has every option of
            transformers.TrainingArguments.
        launcher: JSON object that a cluster profile writes: where the stage's processes run. Empty: on this
            machine, one for each GPU asked for. {"processes": N}: N of them here, without GPUs.
            {"trainjob": {...}}: as a Kubeflow TrainJob of several nodes, `gpus` on each.
    """
    from softpref.artifacts import describe, model_values
    from softpref.config import parse_overrides
    from softpref.distributed.launch import run_stage
    from softpref.reward_model.config import RewardModelConfig
    from softpref.reward_model.stage import headline, run
    from softpref.tracking import watch_termination

    watch_termination(experiment, tracking_uri or None)
    results = run_stage(
        "judge",
        RewardModelConfig,
        run,
        {
            "base_model": base_model,
            "learning_rate": learning_rate,
            "num_train_epochs": num_train_epochs,
            "seed": seed,
            "gpus": gpus or 0,
            "trust_remote_code": trust_remote_code,
        },
        parse_overrides(overrides),
        folders={"dataset": dataset.path, "output": judge.path},
        launcher=launcher,
        experiment=experiment,
        tracking_uri=tracking_uri,
    )
    values = model_values(judge.path)
    describe(judge, f"{values['name']}: reward model", **values)
    describe(metrics, f"{values['name']}: training", model=values["name"])
    for name, value in headline(results).items():
        metrics.log_metric(name, value)
