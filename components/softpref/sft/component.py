"""The KFP face of stage 2. Holds no logic: parameters go to `softpref.sft.stage.run`, wherever it runs."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from softpref.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def train_reference(
    dataset: Input[Dataset],
    reference: Output[Model],
    metrics: Output[Metrics],
    base_model: str = "",
    learning_rate: float = 2e-5,
    num_train_epochs: float = 1.0,
    seed: int = 0,
    gpus: str = "",
    trust_remote_code: bool = False,
    experiment: str = "softpref",
    tracking_uri: str = "",
    overrides: dict = {},  # type: ignore[type-arg]  # noqa: B006
    launcher: str = "",
    base_model_version: str = "",
) -> None:
    """Train the reference model by supervised fine-tuning on demonstrations or best completions.

    Args:
        dataset: The dataset folder of the data stage.
        reference: The model folder: safetensors, tokenizer, generation config, model card; and rows/, the
            preferences in its tokens, which trainings take instead of tokenizing each for itself.
        metrics: Final losses, in nats per completion token, and the perplexity that follows.
        base_model: Hub id, checkpoint folder or .gguf file. Empty: a model from nothing, by model_config in
            overrides.
        learning_rate: Peak learning rate.
        num_train_epochs: Passes over the demonstrations. 0: the base model itself is the reference.
        seed: Seed of initialisation and order.
        gpus: GPUs to train on; fewer than that is an error. Empty: none. Text, since KFP cannot set a limit
            from a number in a form.
        trust_remote_code: Run model code that comes with the base model.
        experiment: MLflow experiment.
        tracking_uri: MLflow server. Empty: the environment's, or a local store.
        overrides: Any other parameter of SFTConfig, which has every option of
            transformers.TrainingArguments.
        launcher: JSON object that a cluster profile writes: where the stage's processes run. Empty: on this
            machine, one for each GPU asked for. {"processes": N}: N of them here, without GPUs.
            {"trainjob": {...}}: as a Kubeflow TrainJob of several nodes, `gpus` on each.
        base_model_version: The base model's version: the commit to load of a model on the Hub; for others a
            fingerprint, so that a model that has changed is loaded again instead of taken from the cache.
    """
    from softpref.artifacts import describe, model_values
    from softpref.config import hub_revision, parse_overrides
    from softpref.distributed.launch import run_stage
    from softpref.sft.config import SFTConfig
    from softpref.sft.stage import headline, run
    from softpref.tracking import watch_termination

    watch_termination(experiment, tracking_uri or None)
    results = run_stage(
        "sft",
        SFTConfig,
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
        hub_revision(base_model_version),
        folders={"dataset": dataset.path, "output": reference.path},
        launcher=launcher,
        experiment=experiment,
        tracking_uri=tracking_uri,
    )
    values = model_values(reference.path)
    describe(reference, f"{values['name']}: model", **values)
    describe(metrics, f"{values['name']}: training", model=values["name"])
    for name, value in headline(results).items():
        metrics.log_metric(name, value)
