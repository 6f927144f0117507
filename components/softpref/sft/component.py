"""The KFP face of stage 2. Holds no logic: parameters go to `softpref.sft.stage.run`, wherever it runs."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from softpref.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False)
def train_reference(
    dataset: Input[Dataset],
    reference: Output[Model],
    metrics: Output[Metrics],
    base_model: str = "",
    learning_rate: float = 2e-5,
    num_train_epochs: float = 1.0,
    seed: int = 0,
    gpus: int = 0,
    experiment: str = "softpref",
    parent_run_id: str = "",
    tracking_uri: str = "",
    overrides: str = "",
    launcher: str = "",
):
    """Train the reference model by supervised fine-tuning on demonstrations or best completions.

    Args:
        dataset: The dataset folder of the data stage.
        reference: The model folder: safetensors, tokenizer, generation config, model card.
        metrics: Final losses, in nats per completion token, and the perplexity that follows.
        base_model: Hub id, checkpoint folder or .gguf file. Empty: a model from nothing, by model_config in
            overrides.
        learning_rate: Peak learning rate.
        num_train_epochs: Passes over the demonstrations. 0: the base model itself is the reference.
        seed: Seed of initialisation and order.
        gpus: GPUs to train on; fewer than that is an error. 0: none are asked for.
        experiment: MLflow experiment.
        parent_run_id: MLflow run under which this stage's run is put. Empty: none.
        tracking_uri: MLflow server. Empty: the environment's, or a local store.
        overrides: JSON object with any other parameter of SFTConfig, which has every option of
            transformers.TrainingArguments.
        launcher: JSON object that a cluster profile writes: where the stage's processes run. Empty: on this
            machine, one for each GPU asked for. {"processes": N}: N of them here, without GPUs.
            {"trainjob": {...}}: as a Kubeflow TrainJob of several nodes, `gpus` on each.
    """
    from softpref.artifacts import describe, model_values
    from softpref.config import parse_overrides
    from softpref.distributed.launch import run_stage
    from softpref.sft.stage import headline

    results = run_stage(
        "sft",
        {
            "base_model": base_model,
            "learning_rate": learning_rate,
            "num_train_epochs": num_train_epochs,
            "seed": seed,
            "gpus": gpus,
        },
        parse_overrides(overrides),
        folders={"dataset": dataset.path, "output": reference.path},
        launcher=launcher,
        experiment=experiment,
        parent_run_id=parent_run_id,
        tracking_uri=tracking_uri,
    )
    values = model_values(reference.path)
    describe(reference, f"{values['name']}: model", **values)
    describe(metrics, f"{values['name']}: training", model=values["name"])
    for name, value in headline(results).items():
        metrics.log_metric(name, value)
