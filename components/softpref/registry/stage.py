"""Stage 5: puts an evaluated model into the MLflow registry, so that it serves as it was trained.

Trains and measures nothing. The order of events: read and check the folders, pass the gate, reach the
server, log the model, register it, set `challenger`, and `champion` where it is due. Every step finds what
an earlier, broken attempt left (by the hash of the model's files), so a retry registers nothing twice.

How a registered model answers (`mlflow models serve`, measured with MLflow 3.17 and transformers 5.19):

- It samples at temperature 1 without top-k and top-p, ends where training ended completions and after at
  most `max_completion_length` tokens. This is written into the version's model configuration because
  transformers' text pipeline otherwise fills a missing temperature with 0.7, which is another softness.
- `temperature` and `max_tokens` in a request are honoured. `temperature: 0` is refused by transformers; use
  a small one such as 0.001 for the likeliest answer. The chat form also honours `top_k` and `top_p`; the
  completions form has no such fields and drops them.
- A chat prompt is rendered by the chat template and tokenized without further special tokens; MLflow alone
  would add the start token a second time.
- `stop`, `n` and `stream` are refused with an error: MLflow looks for the stop words' tokenizer in the folder
  the model was logged from, and transformers' pipeline knows neither of the others.
- A model that comes with code of its own (registered with `trust_remote_code` alone) runs it where it is
  served: MLflow asks nobody again.
- White space before the answer is stripped. Where the tokenizer has a start token, the completions form
  counts it in `completion_tokens` and therefore calls a cut answer finished (`stop`).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from softpref.artifacts import plain
from softpref.config import write_parameters
from softpref.errors import ConfigError, DataError
from softpref.fitness import figure_text, gate_failures
from softpref.lm.loading import check_model_source, check_remote_code, load_metadata, load_tokenizer
from softpref.progress import settle_output
from softpref.registry.config import RegistryConfig
from softpref.registry.gate import Champion, challenge
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

DECISION_FILE = "registration.json"
HASH_TAG = "model_hash"
SCORES_TAG = "scores"
EVALUATED_ON_TAG = "evaluated_on"
_SERVED_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py", "README.md", "LICENSE*")
_DESCRIBED = ("win_rate", "expected_reward", "kl_sequence", "entropy_sequence", "preference_accuracy")
_SERVED_BY = ("mlflow", "torch", "transformers", "accelerate", "safetensors", "tokenizers")


def run(
    config: RegistryConfig,
    model_dir: str | Path,
    evaluation_dir: str | Path,
    output_dir: str | Path,
    comparison_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Register a model when its evaluation passes the gate.

    Args:
        model_dir: model folder of the SFT or training stage; a LoRA adapter is merged into its base first.
        evaluation_dir: folder with the model's `evaluation.json`.
        output_dir: `registration.json` goes here.
        comparison_dir: folder with the sweep's `comparison.json`; it must have chosen this model.

    Returns:
        The decision, also written as `registration.json`: `registered`, `reason` (in words), `model_name`,
        `version`, `aliases`, `champion` (whether this version is the champion now), `reused` (an earlier
        attempt had registered it), `model_uri`, `run_id`, `tracking_uri`, `model_hash`, `gate_failures`,
        `warnings`.

    Raises:
        DataError: the model does not pass the gate; `registration.json` says why all the same.
        ConfigError: a folder lacks its files, the folders are of different models, or the server does not
            answer. The model folder is never changed.
    """
    settle_output()
    model_dir, output_dir = Path(model_dir), Path(output_dir)
    evaluation = _read_json(Path(evaluation_dir) / "evaluation.json", "an evaluation folder")
    metadata = load_metadata(model_dir)
    comparison = (
        _read_json(Path(comparison_dir) / "comparison.json", "a comparison folder")
        if comparison_dir
        else None
    )
    _check_same_model(model_dir, metadata, evaluation, comparison)
    uri = resolve_tracking_uri(config.tracking_uri or None)
    decision: dict[str, Any] = {
        "registered": False,
        "reason": "",
        "model_name": config.registered_model_name,
        "version": None,
        "aliases": [],
        "champion": False,
        "reused": False,
        "model_uri": None,
        "run_id": None,
        "tracking_uri": uri,
        "model_hash": None,
        "gate_failures": gate_failures(evaluation, config.limits),
        "warnings": list(evaluation.get("warnings") or []),
    }
    if decision["gate_failures"]:
        decision["reason"] = "not registered: " + "; ".join(decision["gate_failures"])
    else:
        check_remote_code(str(model_dir), config.trust_remote_code)
        with _whole_checkpoint(model_dir, config.trust_remote_code) as checkpoint:
            if config.trust_remote_code:
                decision["warnings"] += _passed_over(checkpoint)
            _register(config, checkpoint, model_dir, metadata, evaluation, comparison, decision)
    output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(decision, indent=2, ensure_ascii=False)
    write_parameters(config, output_dir)
    (output_dir / DECISION_FILE).write_text(text + "\n", encoding="utf-8")
    if not decision["registered"]:
        raise DataError(f"{evaluation.get('name') or model_dir} is {decision['reason']}")
    return decision


def outcome_lines(decision: Mapping[str, Any], tracking_uri: str = "") -> list[str]:
    """What a terminal shows of a decision: version, aliases and the reason, and the command that serves it.

    Args:
        tracking_uri: where the store is for whoever reads it, if not where the stage found it.
    """
    if not decision["registered"]:
        return [f"registry: {decision['model_name']}. {decision['reason']}"]
    aliases = "".join(f" @{alias}" for alias in decision["aliases"])
    return [
        f"registry: {decision['model_name']} version {decision['version']}{aliases}. {decision['reason']}",
        f"serve:    {serve_command({**decision, 'tracking_uri': tracking_uri or decision['tracking_uri']})}",
    ]


def serve_command(decision: Mapping[str, Any]) -> str:
    """The shell command that serves a registered version."""
    # the last alias is the champion, where it is one; a version without any is served by its number
    version = f"@{decision['aliases'][-1]}" if decision["aliases"] else f"/{decision['version']}"
    return (
        f"MLFLOW_TRACKING_URI={public_url(decision['tracking_uri'])} mlflow models serve "
        f"-m models:/{decision['model_name']}{version} --env-manager local -p 5001"
    )


def decision_markdown(decision: Mapping[str, Any]) -> str:
    """The decision on a registered model, for people to read."""
    lines = [f"# {plain(decision['model_name'])}, version {decision['version']}", ""]
    aliases = ", ".join(decision["aliases"]) or "none"
    lines += [f"Aliases: {aliases}. Champion: {plain(decision['reason'])}.", ""]
    lines += ["```", serve_command(decision).replace(" mlflow", " \\\nmlflow", 1), "```"]
    lines += [f"\nWarning: {plain(warning)}" for warning in decision["warnings"]]
    return "\n".join(lines) + "\n"


def served_model_config(
    model_dir: Path, metadata: Mapping[str, Any], task: str, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Generation settings of the served model: the distribution that was trained, not a sharper one."""
    tokenizer = load_tokenizer(str(model_dir), trust_remote_code=trust_remote_code)
    generation = _generation_config(model_dir)
    ends = generation.get("eos_token_id")
    ends = {ends} if isinstance(ends, int) else set(ends or [])
    settings: dict[str, Any] = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "eos_token_id": sorted({*ends, tokenizer.eos_token_id}),
        "pad_token_id": tokenizer.pad_token_id,
    }
    length = metadata.get("max_completion_length") or generation.get("max_new_tokens")
    if length:
        settings["max_new_tokens"] = int(length)
    if task == "llm/v1/chat":
        settings["add_special_tokens"] = False
    return settings


def _register(
    config: RegistryConfig,
    checkpoint: Path,
    model_dir: Path,
    metadata: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    comparison: Mapping[str, Any] | None,
    decision: dict[str, Any],
) -> None:
    """Everything that needs the server; fills the decision."""
    uri = decision["tracking_uri"]
    kept = f"the model is kept in {model_dir}; register it again when the server is back"
    if not mlflow_ready(uri):
        raise ConfigError("mlflow is not installed here, and registration needs it: pip install mlflow")
    from mlflow.exceptions import MlflowException

    client = open_client(uri)
    try:
        with short_requests():
            client.search_registered_models(max_results=1)
    except Exception as error:
        raise ConfigError(f"MLflow at {uri} does not answer ({in_short(error)}); {kept}") from error

    name = config.registered_model_name
    digest = model_hash(checkpoint)
    decision["model_hash"] = digest
    with short_requests(retries=3, timeout=120):
        try:
            found = client.search_model_versions(f"name = '{_quoted(name)}' and tags.{HASH_TAG} = '{digest}'")
            tags = _version_tags(metadata, evaluation, comparison, digest)
            if found:
                version = max(found, key=lambda one: int(one.version))
                decision["reused"] = True
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
            champion = _champion(client, name, aliases.get("champion"), number)
            verdict = challenge(evaluation, champion, config)
            newer = int(aliases.get("challenger", 0)) > int(number)  # an older version is registered again
            if not newer:
                client.set_registered_model_alias(name, "challenger", number)
            moves = verdict.moves or aliases.get("champion") == number
            if verdict.moves:
                client.set_registered_model_alias(name, "champion", number)
        except MlflowException as error:
            raise ConfigError(f"MLflow at {uri}: {in_short(error)}; {kept}") from error
    reason = "this version is the champion already" if aliases.get("champion") == number else verdict.reason
    if newer:
        reason += f"; challenger stays at version {aliases['challenger']}, which is newer"
    held = {"challenger": not newer, "champion": moves}
    decision.update(
        registered=True,
        reason=reason,
        version=number,
        aliases=[alias for alias, holds in held.items() if holds],
        champion=moves,
        model_uri=f"models:/{name}/{number}",
        run_id=version.run_id or decision["run_id"],
    )


def _log_model(
    config: RegistryConfig,
    client: Any,
    uri: str,
    checkpoint: Path,
    metadata: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    digest: str,
    decision: dict[str, Any],
) -> str:
    """Log the checkpoint in the run that trained it, or find it logged; returns the logged model's URI."""
    import mlflow

    run = _training_run(client, metadata.get("run_id") or evaluation.get("run_id"), decision["warnings"])
    experiment = run.info.experiment_id if run else find_experiment(client, config.experiment, uri)
    for earlier in client.search_logged_models([experiment], filter_string=f"tags.{HASH_TAG} = '{digest}'"):
        if earlier.status == "READY" and (run is None or run.info.run_id == earlier.source_run_id):
            decision["run_id"] = earlier.source_run_id
            return f"models:/{earlier.model_id}"
    task = _task(config, checkpoint)
    settings = served_model_config(checkpoint, metadata, task, trust_remote_code=config.trust_remote_code)
    decision["warnings"] += _generation_warnings(checkpoint)
    title = evaluation.get("name") or config.registered_model_name
    own = run is None
    run = run or client.create_run(experiment, run_name=f"register {title}", tags=source_tags())
    decision["run_id"] = run_id = run.info.run_id
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
                model_card=_model_card(checkpoint, title),
                pip_requirements=_requirements(),
                run_id=run_id,
                model_id=logged.model_id,
            )
        status = "FINISHED"
    finally:
        if own:
            client.set_terminated(run_id, status)
    return info.model_uri


def model_hash(model_dir: Path) -> str:
    """Sha256 over the files that make the model: weights, configuration, tokenizer; not its metadata."""
    digest = hashlib.sha256()
    for path in sorted(path for path in model_dir.iterdir() if _is_served(path) and path.name != "README.md"):
        if path.name == "softpref.json":  # names the run, which differs between attempts
            continue
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def _whole_checkpoint(model_dir: Path, trust_remote_code: bool) -> Iterator[Path]:
    """A folder that holds what serving needs and no more: training leftovers out, adapters merged."""
    adapter = (model_dir / "adapter_config.json").is_file()
    if not adapter:
        check_model_source(f"{model_dir.absolute()}")
    with tempfile.TemporaryDirectory(prefix="softpref-register-") as temporary:
        checkpoint = Path(temporary) / "model"
        checkpoint.mkdir()
        if adapter:
            _merge_adapter(model_dir, checkpoint, trust_remote_code)
        for path in sorted(model_dir.iterdir()):
            merged = adapter and (path.name == "config.json" or path.suffix == ".safetensors")
            if _is_served(path) and not merged and path.name != "adapter_config.json":
                (checkpoint / path.name).unlink(missing_ok=True)
                (checkpoint / path.name).symlink_to(path.resolve())
        yield checkpoint


def _is_served(path: Path) -> bool:
    training = path.name.startswith(
        ("trainer_state", "tracking", "timings", "train_results", "eval_results", "all_results")
    )
    return path.is_file() and not training and any(path.match(pattern) for pattern in _SERVED_FILES)


def _merge_adapter(model_dir: Path, checkpoint: Path, trust_remote_code: bool) -> None:
    """Write the base model with the adapter merged in, so that serving needs neither peft nor the base."""
    try:
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(
            str(model_dir), dtype="auto", trust_remote_code=trust_remote_code
        )
    except (ImportError, OSError, ValueError) as error:
        raise ConfigError(
            f"{model_dir} holds an adapter whose base model cannot be loaded ({in_short(error)}); make the "
            "base named in its adapter_config.json available, install peft, or give the merged model"
        ) from error
    merged = model.merge_and_unload()
    merged.save_pretrained(checkpoint)


def _passed_over(checkpoint: Path) -> list[str]:
    """A warning where MLflow passes over the model's own code: it takes transformers' class of the same name.

    Else it runs the code that lies in the checkpoint by itself.

    Raises:
        ConfigError: transformers' class is of another architecture.
    """
    import transformers

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    (name, *_) = config.get("architectures") or [""]
    own = (config.get("auto_map") or {}).get("AutoModelForCausalLM", "")
    if not own.endswith(f".{name}") or not hasattr(transformers, name):
        return []
    if config.get("model_type") in transformers.CONFIG_MAPPING:
        return [
            f"MLflow serves transformers' own {name}, and not the code that the checkpoint brings ({own})"
        ]
    raise ConfigError(
        f"the model's own class {own} bears the name of one of transformers, which MLflow would serve in its "
        "place; rename it in the model's code and in config.json (architectures, auto_map)"
    )


def _check_same_model(
    model_dir: Path,
    metadata: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    comparison: Mapping[str, Any] | None,
) -> None:
    missing = [key for key in ("metrics", "evaluation_id") if not evaluation.get(key)]
    if missing:
        raise ConfigError(f"evaluation.json lacks {' and '.join(missing)}; evaluate {model_dir} again")
    name, evaluated = metadata.get("name"), evaluation.get("name")
    if name and evaluated and name != evaluated:
        raise ConfigError(f"the model in {model_dir} is {name!r}, but the evaluation is of {evaluated!r}")
    trained, measured = metadata.get("run_id"), evaluation.get("run_id")
    if trained and measured and trained != measured:
        raise ConfigError(
            f"the model in {model_dir} is of run {trained}, but the evaluation is of a model of run "
            f"{measured} with the same name; evaluate {model_dir}"
        )
    ours, theirs = metadata.get("extrapolation") or 0.0, evaluation.get("extrapolation") or 0.0
    if ours != theirs:
        raise ConfigError(
            f"the model in {model_dir} is extrapolated by {ours:g}, but the evaluation is of a model "
            f"extrapolated by {theirs:g} (0 is the aligned model itself); evaluate {model_dir}"
        )
    if comparison is not None and comparison.get("chosen") != evaluated:
        raise ConfigError(
            f"the comparison chose {comparison.get('chosen')!r}, but the evaluation is of {evaluated!r}; "
            "register the chosen model, or leave the comparison out"
        )


def _version_tags(
    metadata: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    comparison: Mapping[str, Any] | None,
    digest: str,
) -> dict[str, str]:
    """What a version says of itself: origin, hyperparameters, and every figure with its interval."""
    known: dict[str, Any] = {HASH_TAG: digest, "evaluation_id": evaluation["evaluation_id"]}
    for key in ("name", "method", "alpha", "anchor", "beta", "extrapolation", "dataset_hash"):
        known[key] = metadata.get(key) if metadata.get(key) is not None else evaluation.get(key)
    for key in ("base_model", "code_version"):
        known[key] = metadata.get(key)
    known["judge"] = (evaluation.get("judge") or {}).get("name")
    if comparison is not None:
        known["chosen_by"] = comparison.get("rule")
        known["chosen_because"] = comparison.get("reason")
    known[SCORES_TAG] = json.dumps(evaluation["metrics"])
    if evaluation.get("evaluated_on"):
        known[EVALUATED_ON_TAG] = json.dumps(evaluation["evaluated_on"])
    groups = {"": evaluation["metrics"], "exact.": evaluation.get("exact") or {}}
    for group, figures in groups.items():
        for name, figure in figures.items():
            if figure and figure.get("value") is not None:
                known[group + name] = figure_text(figure)
    return {key: str(value) for key, value in known.items() if value is not None and value != ""}


def version_description(
    metadata: Mapping[str, Any], evaluation: Mapping[str, Any], comparison: Mapping[str, Any] | None
) -> str:
    """What a version is, for its page in the registry: method, softness, why it was chosen, its figures."""
    known = {key: metadata.get(key, evaluation.get(key)) for key in ("alpha", "anchor", "beta", "base_model")}
    told = [
        f"{key.replace('_', ' ')} {plain(str(value))}"
        for key, value in known.items()
        if value not in (None, "")
    ]
    method = plain(metadata.get("method") or evaluation.get("method") or "")
    lines = [f"**{plain(evaluation.get('name') or '')}**: {', '.join(filter(None, [method, *told]))}", ""]
    if comparison is not None and comparison.get("reason"):
        lines += [plain(comparison["reason"]), ""]
    metrics = evaluation["metrics"]
    shown = [name for name in _DESCRIBED if (metrics.get(name) or {}).get("value") is not None]
    lines += ["| figure | value [95% interval] |", "| :-- | :-- |"]
    lines += [f"| {name} ({metrics[name].get('unit')}) | {figure_text(metrics[name])} |" for name in shown]
    return "\n".join(lines) + "\n"


def _champion(client: Any, name: str, version: str | None, candidate: str) -> Champion | None:
    if version is None or version == candidate:
        return None
    tags = client.get_model_version(name, version).tags
    parts = []
    for tag in (SCORES_TAG, EVALUATED_ON_TAG):
        try:
            parts.append(json.loads(tags.get(tag, "{}")))
        except json.JSONDecodeError:
            parts.append({})
    metrics, evaluated_on = parts
    return Champion(str(version), tags.get("evaluation_id"), metrics, evaluated_on or None)


def _training_run(client: Any, run_id: str | None, warnings: list[str]) -> Any:
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
        warnings.append(
            f"the training run {run_id} is not on this server; the model is logged in a run of its own"
        )
        return None
    return run


def _task(config: RegistryConfig, checkpoint: Path) -> str:
    tokenizer = load_tokenizer(str(checkpoint), trust_remote_code=config.trust_remote_code)
    has_template = bool(tokenizer.chat_template)
    if config.task == "chat" and not has_template:
        raise ConfigError("RegistryConfig.task is chat, but the model's tokenizer has no chat template")
    chat = has_template if config.task == "auto" else config.task == "chat"
    return "llm/v1/chat" if chat else "llm/v1/completions"


def _generation_config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "generation_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _generation_warnings(model_dir: Path) -> list[str]:
    """Other servers read the checkpoint's generation config; say where it departs from the training."""
    generation = _generation_config(model_dir)
    trained = {"do_sample": (True,), "temperature": (1.0,), "top_k": (0, None), "top_p": (1.0, None)}
    departs = [
        f"{key} = {generation.get(key)}"
        for key, right in trained.items()
        if generation.get(key, {"do_sample": False, "top_k": 50}.get(key, right[0])) not in right
    ]
    if not departs:
        return []
    return [
        f"generation_config.json says {', '.join(departs)}; MLflow serves the trained softness all the same, "
        "another server may not"
    ]


def _model_card(checkpoint: Path, title: str) -> Any:
    """The checkpoint's own card, or a bare one: without any, MLflow would ask the Hub for it."""
    from huggingface_hub import ModelCard

    path = checkpoint / "README.md"
    text = (
        path.read_text(encoding="utf-8")
        if path.is_file()
        else f"---\nlibrary_name: transformers\n---\n# {title}\n"
    )
    return ModelCard(text, ignore_metadata_errors=True)


def _requirements() -> list[str]:
    """The installed versions of what serving imports, pinned; a local build's suffix (`+cpu`) left out."""
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in _SERVED_BY]


def _read_json(path: Path, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give {what}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error


def _quoted(name: str) -> str:
    return name.replace("'", "''")


@contextmanager
def _tokenizers_trusted(trust_remote_code: bool) -> Iterator[None]:
    """`log_model` loads the tokenizer without saying whether code may run, which is asked at the terminal."""
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
    """`log_model` and `register_model` know the server only as a setting of the whole process."""
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
