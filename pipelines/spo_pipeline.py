"""The pipeline for one softness value: check → data → reference → train → evaluate → register.

python pipelines/spo_pipeline.py                         # the embedded story world, on this machine
python pipelines/spo_pipeline.py --recipe NAME --alpha 0.5
python pipelines/spo_pipeline.py compile                 # writes pipelines/packages/spo_pipeline.yaml
"""

import sys

from clusters import ended, launcher, place, run_name, source_artifact
from kfp import dsl
from launch import main
from softpref.data.component import prepare_data
from softpref.evaluation.component import evaluate_model
from softpref.preflight.component import plan_run
from softpref.registry.component import register_model
from softpref.sft.component import train_reference
from softpref.spo.component import train_policy


@dsl.pipeline(name="spo-pipeline", description="Align a language model to preferences at one softness.")
def spo_pipeline(
    source: str = "story",
    columns: dict = {},  # noqa: B006
    prompt_template: str = "",
    rows: int = 0,
    data_overrides: dict = {},  # noqa: B006
    base_model: str = "",
    sft_learning_rate: float = 2e-5,
    sft_epochs: float = 1.0,
    sft_overrides: dict = {},  # noqa: B006
    alpha: float = 1.0,
    anchor: float = 0.0,
    beta: float = 0.05,
    learning_rate: float = 1e-6,
    epochs: float = 1.0,
    samples_per_refresh: int = 64,
    sampling_interval: int = 8,
    train_overrides: dict = {},  # noqa: B006
    judge: str = "auto",
    samples_per_prompt: int = 32,
    evaluation_overrides: dict = {},  # noqa: B006
    registered_model_name: str = "softpref",
    min_win_rate: float = 0.5,
    registry_overrides: dict = {},  # noqa: B006
    gpus: str = "",
    trust_remote_code: bool = False,
    seed: int = 0,
    experiment: str = "softpref",
    tracking_uri: str = "",
):
    """Align a language model to preferences at one softness.

    Args:
        source: "story" or "storyteller" (embedded, no download), a Hub dataset id, a URL (s3://, gs://,
            https://), the address of a KFP artifact (minio://) or a path (JSONL, CSV, Parquet).
        columns: From role to column of the source; empty uses columns named like the roles.
        prompt_template: Builds the prompt from columns, such as "Debate: {debate}\\nArgument:".
        rows: Preference rows to draw or to sample; 0 takes the default or all.
        data_overrides: Any other parameter of the data stage.
        base_model: Hub id, URL, registered model (models:/NAME@champion), checkpoint folder or .gguf file;
            empty trains a model from nothing.
        sft_learning_rate: Peak learning rate of the reference.
        sft_epochs: Passes over the demonstrations; 0 takes the base model as the reference.
        sft_overrides: Any other parameter of the SFT stage.
        alpha: Softness. 1 is the experts' own distribution, towards 0 their favourite.
        anchor: What softness is relative to: 0, nothing, as published; 1, the reference, which natural text
            needs. The optimum is reference^anchor * exp(reward / alpha).
        beta: Strength of the KL regulariser over the whole output distribution.
        learning_rate: Peak learning rate of SPO training.
        epochs: Passes over the preferences.
        samples_per_refresh: Completions drawn from the policy at each refresh.
        sampling_interval: Optimizer steps between refreshes.
        train_overrides: Any other parameter of the training stage.
        judge: "auto", "expert" (known reward) or "bradley-terry" (learned from the training preferences).
        samples_per_prompt: Completions drawn per held-out prompt, from policy and reference.
        evaluation_overrides: Any other parameter of the evaluation stage.
        registered_model_name: Name in the MLflow model registry; empty registers nothing.
        min_win_rate: Gate: the low end of the win rate's interval must be above this, or the run fails; above
            0.5, the model is better than its reference. 0 asks for no win rate.
        registry_overrides: Any other parameter of the registration stage.
        gpus: GPUs of the training stages; empty trains on the CPU.
        trust_remote_code: Run model code that comes with the base model, in every stage, and wherever the
            registered model is served.
        seed: Seed of data, training and sampling.
        experiment: MLflow experiment.
        tracking_uri: MLflow server; empty takes the environment's.
    """
    with ended(experiment=experiment, tracking_uri=tracking_uri):
        check = plan_run(
            alpha=alpha,
            anchor=anchor,
            beta=beta,
            source=source,
            columns=columns,
            prompt_template=prompt_template,
            rows=rows,
            data_overrides=data_overrides,
            base_model=base_model,
            sft_learning_rate=sft_learning_rate,
            sft_epochs=sft_epochs,
            sft_overrides=sft_overrides,
            learning_rate=learning_rate,
            epochs=epochs,
            samples_per_refresh=samples_per_refresh,
            sampling_interval=sampling_interval,
            train_overrides=train_overrides,
            judge=judge,
            samples_per_prompt=samples_per_prompt,
            evaluation_overrides=evaluation_overrides,
            registered_model_name=registered_model_name,
            min_win_rate=min_win_rate,
            registry_overrides=registry_overrides,
            gpus=gpus,
            trust_remote_code=trust_remote_code,
            experiment=experiment,
            tracking_uri=tracking_uri,
            run_name=run_name(),
        )
        check.set_display_name("Check every parameter")
        place(check, "plan", cache=False)  # it opens the run's own in MLflow

        data = prepare_data(
            source=source,
            columns=columns,
            prompt_template=prompt_template,
            rows=rows,
            seed=seed,
            overrides=data_overrides,
            experiment=experiment,
            tracking_uri=tracking_uri,
            source_version=check.outputs["source_version"],
            code_version=check.outputs["code_version"],
            **source_artifact(),
        )
        data.set_display_name("Prepare preferences")
        place(data, "data")

        reference = train_reference(
            dataset=data.outputs["dataset"],
            base_model=check.outputs["base_model"],
            learning_rate=sft_learning_rate,
            num_train_epochs=sft_epochs,
            seed=seed,
            gpus=gpus,
            trust_remote_code=trust_remote_code,
            experiment=experiment,
            tracking_uri=tracking_uri,
            overrides=sft_overrides,
            launcher=launcher(),
            base_model_version=check.outputs["base_model_version"],
        )
        reference.set_display_name("Train the reference")
        place(reference, "sft", gpus=gpus)

        policy = train_policy(
            dataset=data.outputs["dataset"],
            reference=reference.outputs["reference"],
            member=check.outputs["member"],
            learning_rate=learning_rate,
            num_train_epochs=epochs,
            samples_per_refresh=samples_per_refresh,
            sampling_interval=sampling_interval,
            seed=seed,
            gpus=gpus,
            trust_remote_code=trust_remote_code,
            experiment=experiment,
            tracking_uri=tracking_uri,
            overrides=train_overrides,
            launcher=launcher(),
        )
        policy.set_display_name("Align the policy")
        place(policy, "train", gpus=gpus)

        evaluation = evaluate_model(
            dataset=data.outputs["dataset"],
            reference=reference.outputs["reference"],
            policy=policy.outputs["policy"],
            judge=judge,
            samples_per_prompt=samples_per_prompt,
            seed=seed,
            trust_remote_code=trust_remote_code,
            experiment=experiment,
            tracking_uri=tracking_uri,
            overrides=evaluation_overrides,
        )
        evaluation.set_display_name("Evaluate")
        place(evaluation, "evaluate")

        with dsl.If(registered_model_name != "", name="registration"):
            registered = register_model(
                model=policy.outputs["policy"],
                evaluation=evaluation.outputs["evaluation"],
                registered_model_name=registered_model_name,
                min_win_rate=min_win_rate,
                trust_remote_code=trust_remote_code,
                experiment=experiment,
                tracking_uri=tracking_uri,
                overrides=registry_overrides,
                record=check.outputs["record"],
            )
            registered.set_display_name("Register")
            place(registered, "register", cache=False)  # what the registry holds decides, not the inputs


if __name__ == "__main__":
    sys.exit(main(spo_pipeline, sys.argv[1:]))
