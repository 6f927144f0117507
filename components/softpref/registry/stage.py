"""Stage 5: puts an evaluated model into the MLflow registry, so that it serves as it was trained.

In this order: read and check the folders, pass the gate, reach the server, log the model, register it, set
`challenger`, and `champion` where it is due. Every step finds what an earlier, failed attempt left, by the
hash of the model's files, so a retry registers nothing twice.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softpref.artifacts import plain
from softpref.config import write_parameters
from softpref.disk import disk_trouble, says_disk_trouble
from softpref.errors import ConfigError, DataError
from softpref.fitness import gate_failures
from softpref.lm.sources import check_remote_code
from softpref.progress import settle_output
from softpref.records.comparison import Comparison
from softpref.records.evaluation import Evaluation
from softpref.records.model import ModelMetadata, load_metadata
from softpref.records.registration import Registration
from softpref.registry.config import RegistryConfig
from softpref.registry.gate import challenge
from softpref.registry.served import (
    generation_warnings,
    model_card,
    model_hash,
    passed_over,
    request_example,
    requirements,
    served_model_config,
    serving_task,
    whole_checkpoint,
)
from softpref.registry.version import HASH_TAG, find_champion, version_description, version_tags
from softpref.remote import public_url
from softpref.tracking import (
    find_experiment,
    in_short,
    mlflow_ready,
    open_client,
    resolve_tracking_uri,
    short_requests,
    source_tags,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


@says_disk_trouble
def run(
    config: RegistryConfig,
    model_dir: str | Path,
    evaluation_dir: str | Path,
    output_dir: str | Path,
    comparison_dir: str | Path | None = None,
) -> Registration:
    """Register a model when its evaluation passes the gate.

    Args:
        model_dir: model folder of the SFT or training stage; a LoRA adapter is merged into its base first.
        evaluation_dir: folder with the model's `evaluation.json`.
        output_dir: `registration.json` goes here.
        comparison_dir: folder with the sweep's `comparison.json`; it must have chosen this model.

    Returns:
        The decision, also written as `registration.json`.

    Raises:
        DataError: the model does not pass the gate; `registration.json` says why.
        ConfigError: a folder lacks its files, the folders belong to different models, or the server does not
            answer. The model folder is never changed.
    """
    settle_output()
    model_dir, output_dir = Path(model_dir), Path(output_dir)
    evaluation = Evaluation.read(evaluation_dir)
    metadata = load_metadata(model_dir)
    comparison = Comparison.read(comparison_dir) if comparison_dir else None
    _check_same_model(model_dir, metadata, evaluation, comparison)
    decision = Registration(
        model_name=config.registered_model_name,
        tracking_uri=public_url(resolve_tracking_uri(config.tracking_uri or None)),
        gate_failures=gate_failures(evaluation, config.limits),
        warnings=list(evaluation.warnings),
    )
    if decision.gate_failures:
        decision.reason = "not registered: " + "; ".join(decision.gate_failures)
    else:
        check_remote_code(str(model_dir), config.trust_remote_code)
        with whole_checkpoint(model_dir, config.trust_remote_code) as checkpoint:
            if config.trust_remote_code:
                decision.warnings += passed_over(checkpoint)
            _register(config, checkpoint, model_dir, metadata, evaluation, comparison, decision)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_parameters(config, output_dir)
    decision.write(output_dir)
    if not decision.registered:
        raise DataError(f"{evaluation.name} is {decision.reason}")
    return decision


def outcome_lines(decision: Registration, tracking_uri: str = "") -> list[str]:
    """What a terminal shows of a decision: version, aliases and the reason, and the command that serves it.

    Args:
        tracking_uri: the store's address for the reader, if it differs from the stage's.
    """
    if not decision.registered:
        return [f"registry: {decision.model_name}. {decision.reason}"]
    aliases = "".join(f" @{alias}" for alias in decision.aliases)
    return [
        f"registry: {decision.model_name} version {decision.version}{aliases}. {decision.reason}",
        f"serve:    {serve_command(decision, tracking_uri)}",
    ]


def serve_command(decision: Registration, tracking_uri: str = "") -> str:
    """The shell command that serves a registered version; `tracking_uri` as in `outcome_lines`."""
    # the champion's alias comes last; a version without aliases is served by its number
    version = f"@{decision.aliases[-1]}" if decision.aliases else f"/{decision.version}"
    return (
        f"MLFLOW_TRACKING_URI={public_url(tracking_uri or decision.tracking_uri)} mlflow models serve "
        f"-m models:/{decision.model_name}{version} --env-manager local -p 5001"
    )


def decision_markdown(decision: Registration) -> str:
    """The decision on a registered model, for people to read."""
    lines = [f"# {plain(decision.model_name)}, version {decision.version}", ""]
    aliases = ", ".join(decision.aliases) or "none"
    lines += [f"Aliases: {aliases}. Champion: {plain(decision.reason)}.", ""]
    lines += ["```", serve_command(decision).replace(" mlflow", " \\\nmlflow", 1), "```"]
    lines += [f"\nWarning: {plain(warning)}" for warning in decision.warnings]
    return "\n".join(lines) + "\n"


def _register(
    config: RegistryConfig,
    checkpoint: Path,
    model_dir: Path,
    metadata: ModelMetadata,
    evaluation: Evaluation,
    comparison: Comparison | None,
    decision: Registration,
) -> None:
    """Everything that needs the server; fills the decision."""
    uri = resolve_tracking_uri(config.tracking_uri or None)
    kept = f"the model is still in {model_dir}; register it again when the server is back"
    if not mlflow_ready(uri):
        raise ConfigError("mlflow is not installed here, and registration needs it: pip install mlflow")
    from mlflow.exceptions import MlflowException

    try:
        with short_requests():
            client = open_client(uri)
            client.search_registered_models(max_results=1)
    except Exception as error:
        if disk_trouble(error):
            raise
        raise ConfigError(
            f"MLflow at {public_url(uri)} does not answer ({in_short(error)}); {kept}"
        ) from error

    name = config.registered_model_name
    digest = model_hash(checkpoint)
    decision.model_hash = digest
    with short_requests(retries=3, timeout=120):
        try:
            found = client.search_model_versions(f"name = '{_quoted(name)}' and tags.{HASH_TAG} = '{digest}'")
            tags = version_tags(metadata, evaluation, comparison, digest)
            if found:
                version = max(found, key=lambda one: int(one.version))
                decision.reused = True
                for key, value in tags.items():
                    client.set_model_version_tag(name, version.version, key, value)
            else:
                logged = _log_model(config, client, uri, checkpoint, metadata, evaluation, digest, decision)
                with _global_tracking_uri(uri):
                    import mlflow

                    version = mlflow.register_model(
                        logged, name, await_registration_for=config.await_seconds, tags=tags
                    )
            number = str(version.version)
            client.update_model_version(name, number, version_description(metadata, evaluation, comparison))
            aliases = {alias: str(at) for alias, at in client.get_registered_model(name).aliases.items()}
            champion = find_champion(client, name, aliases.get("champion"), number)
            verdict = challenge(evaluation, champion, config)
            newer = int(aliases.get("challenger", 0)) > int(number)  # an older version is registered again
            if not newer:
                client.set_registered_model_alias(name, "challenger", number)
            moves = verdict.moves or aliases.get("champion") == number
            if verdict.moves:
                client.set_registered_model_alias(name, "champion", number)
        except MlflowException as error:
            if disk_trouble(error):  # of a store on this machine
                raise
            raise ConfigError(f"MLflow at {public_url(uri)}: {in_short(error)}; {kept}") from error
    reason = "this version is the champion already" if aliases.get("champion") == number else verdict.reason
    if newer:
        reason += f"; challenger stays at version {aliases['challenger']}, which is newer"
    held = {"challenger": not newer, "champion": moves}
    decision.registered, decision.reason, decision.version, decision.champion = True, reason, number, moves
    decision.aliases = [alias for alias, holds in held.items() if holds]
    decision.model_uri = f"models:/{name}/{number}"
    decision.run_id = version.run_id or decision.run_id


def _log_model(
    config: RegistryConfig,
    client: MlflowClient,
    uri: str,
    checkpoint: Path,
    metadata: ModelMetadata,
    evaluation: Evaluation,
    digest: str,
    decision: Registration,
) -> str:
    """Log the checkpoint in the run that trained it, or find it logged; returns the logged model's URI."""
    import mlflow

    run = _training_run(client, metadata.get("run_id") or evaluation.run_id, decision.warnings)
    experiment = run.info.experiment_id if run else find_experiment(client, config.experiment, uri)
    for earlier in client.search_logged_models([experiment], filter_string=f"tags.{HASH_TAG} = '{digest}'"):
        if earlier.status == "READY" and (run is None or run.info.run_id == earlier.source_run_id):
            decision.run_id = earlier.source_run_id
            return f"models:/{earlier.model_id}"
    task = serving_task(config, checkpoint)
    settings = served_model_config(checkpoint, metadata, task, trust_remote_code=config.trust_remote_code)
    decision.warnings += generation_warnings(checkpoint)
    title = evaluation.name
    own = run is None
    run = run or client.create_run(experiment, run_name=f"register {title}", tags=source_tags())
    decision.run_id = run_id = run.info.run_id
    status = "FAILED"
    try:
        logged = client.create_logged_model(
            experiment_id=experiment,
            name="model",
            source_run_id=run_id,
            tags={HASH_TAG: digest},
            params={key: str(value) for key, value in metadata.items() if value is not None},
        )
        with _global_tracking_uri(uri), _tokenizers_trusted(config.trust_remote_code):
            info = mlflow.transformers.log_model(
                transformers_model=str(checkpoint),
                name="model",
                task=task,
                model_config=settings,
                model_card=model_card(checkpoint, title),
                input_example=request_example(task, evaluation.example),
                pip_requirements=requirements(),
                run_id=run_id,
                model_id=logged.model_id,
            )
        status = "FINISHED"
    finally:
        if own:
            client.set_terminated(run_id, status)
    return str(info.model_uri)


def _check_same_model(
    model_dir: Path,
    metadata: ModelMetadata,
    evaluation: Evaluation,
    comparison: Comparison | None,
) -> None:
    name, evaluated = metadata.get("name"), evaluation.name
    if name and evaluated and name != evaluated:
        raise ConfigError(f"the model in {model_dir} is {name!r}, but the evaluation is of {evaluated!r}")
    trained, measured = metadata.get("run_id"), evaluation.run_id
    if trained and measured and trained != measured:
        raise ConfigError(
            f"the model in {model_dir} is of run {trained}, but the evaluation is of a model of run "
            f"{measured} with the same name; evaluate {model_dir}"
        )
    ours, theirs = metadata.get("extrapolation") or 0.0, evaluation.extrapolation
    if ours != theirs:
        raise ConfigError(
            f"the model in {model_dir} is extrapolated by {ours:g}, but the evaluation is of a model "
            f"extrapolated by {theirs:g} (0 is the aligned model itself); evaluate {model_dir}"
        )
    if comparison is not None and comparison.chosen != evaluated:
        raise ConfigError(
            f"the comparison chose {comparison.chosen!r}, but the evaluation is of {evaluated!r}; "
            "register the chosen model, or leave the comparison out"
        )


def _training_run(client: MlflowClient, run_id: str | None, warnings: list[str]) -> Run | None:
    """The run that trained the model, or None when this server does not know it."""
    from mlflow.exceptions import MlflowException

    if not run_id:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        run = None
    if run is None or run.info.lifecycle_stage == "deleted":
        warnings.append(f"the training run {run_id} is not on this server; the model gets a run of its own")
        return None
    return run


def _quoted(name: str) -> str:
    return name.replace("'", "''")


@contextmanager
def _tokenizers_trusted(trust_remote_code: bool) -> Iterator[None]:
    """`log_model` loads the tokenizer without `trust_remote_code`, and would ask at the terminal."""
    from transformers import AutoTokenizer

    auto: Any = AutoTokenizer
    original = auto.__dict__["from_pretrained"]
    if trust_remote_code:
        auto.from_pretrained = functools.partial(auto.from_pretrained, trust_remote_code=True)
    try:
        yield
    finally:
        auto.from_pretrained = original


@contextmanager
def _global_tracking_uri(uri: str) -> Iterator[None]:
    """`log_model` and `register_model` take the server only from a process-wide setting."""
    import mlflow

    before, variable = mlflow.get_tracking_uri(), os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
        if variable is None:
            os.environ.pop("MLFLOW_TRACKING_URI", None)
        else:
            os.environ["MLFLOW_TRACKING_URI"] = variable
