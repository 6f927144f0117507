"""The KFP face of stage 5. Holds no logic: it calls `softpref.registry.stage.run`."""

from kfp import dsl
from kfp.dsl import Artifact, Input, Markdown, Metrics, Model, Output

from softpref.images import REGISTER_IMAGE


@dsl.component(base_image=REGISTER_IMAGE, install_kfp_package=False)  # type: ignore[untyped-decorator]
def register_model(
    model: Input[Model],
    evaluation: Input[Artifact],
    decision: Output[Markdown],
    registered: Output[Artifact],
    metrics: Output[Metrics],
    registered_model_name: str,
    comparison: Input[Artifact] = None,
    min_win_rate: float = 0.5,
    trust_remote_code: bool = False,
    experiment: str = "softpref",
    tracking_uri: str = "",
    overrides: dict = {},  # type: ignore[type-arg]  # noqa: B006
    record: Input[Artifact] = None,
) -> None:
    """Put a model that passes the gate into the MLflow registry; make it champion when it beats the champion.

    The step fails for a model that does not pass.

    Args:
        model: The model folder of the training stage.
        evaluation: The evaluation folder of this model.
        decision: What was decided and why, and how to serve the model.
        registered: The decision as a file, registration.json; its metadata name the version.
        metrics: Whether the model became champion (1 or 0), and its version.
        registered_model_name: Name in the MLflow model registry, without "/" and ":".
        comparison: The comparison folder of a sweep, which must have chosen this model.
        min_win_rate: The low end of the win rate's interval must be above this; 0 asks for no win rate.
        trust_remote_code: Register a model that comes with code of its own, which runs where it is served.
        tracking_uri: The MLflow server. Empty: the environment's, or a local store.
        experiment: MLflow experiment, when the model names no run.
        overrides: Any other parameter of RegistryConfig, such as {"beyond_noise": true}.
        record: What the plan logged to MLflow; delivered here if MLflow was unreachable then.
    """
    from pathlib import Path

    from softpref.artifacts import describe, say_outcome
    from softpref.config import build_config, parse_overrides
    from softpref.registry.config import RegistryConfig
    from softpref.registry.stage import decision_markdown, outcome_lines, run
    from softpref.tracking import deliver_missed, watch_termination

    watch_termination(experiment, tracking_uri or None)
    earlier = [one.path for one in (record, evaluation, comparison) if one]
    deliver_missed(model.path, *earlier)
    config = build_config(
        RegistryConfig,
        {
            "registered_model_name": registered_model_name,
            "min_win_rate": min_win_rate,
            "trust_remote_code": trust_remote_code,
            "experiment": experiment,
            "tracking_uri": tracking_uri,
        },
        parse_overrides(overrides),
    )
    outcome = run(
        config, model.path, evaluation.path, registered.path, comparison.path if comparison else None
    )
    Path(decision.path).parent.mkdir(parents=True, exist_ok=True)
    Path(decision.path).write_text(decision_markdown(outcome), encoding="utf-8")
    metrics.log_metric("champion", int(outcome.champion))
    metrics.log_metric("version", int(outcome.version or 0))
    title = f"{registered_model_name}, version {outcome.version}"
    describe(
        registered,
        f"registration: {title}",
        model_uri=outcome.model_uri,
        model_name=registered_model_name,
        version=outcome.version,
        aliases=", ".join(outcome.aliases),
        mlflow_run_id=outcome.run_id,
    )
    describe(decision, f"decision: {title}", title=title)
    describe(metrics, f"registration: {title}")
    say_outcome(outcome_lines(outcome))
