"""Checks all parameters of a pipeline within seconds and plans its members. Reads no data."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from softpref.config import COMMIT, TRUE, Config, build_config, closest, parse_overrides, without_secrets
from softpref.disk import what_is_at
from softpref.errors import ConfigError
from softpref.preflight.parameters import PLANNED, STAGES, TABLE, of_stage
from softpref.remote import Pinned, public_url

logger = logging.getLogger(__name__)

_DECIDE = ("torch", "transformers", "tokenizers", "datasets")  # packages whose versions change results
DEFAULT_BASELINE_BETA = 0.1
_ENDED_WELL = {"COMPLETE", "CACHED", "SUCCEEDED"}  # states of KFP's metadata and of its API
_OF_STORIES = ("votes", "story_kind")  # options of the data stage
ARTIFACT_SCHEME = "minio://"  # of addresses in KFP's own store


class Member(NamedTuple):
    """One model of a sweep.

    Attributes:
        options: parameters of the training stage for this model only; they win over all others.
    """

    name: str
    method: str
    alpha: float
    beta: float
    options: dict[str, str]


class Begun(NamedTuple):
    """The outputs of a pipeline's first step.

    Attributes:
        members: JSON objects, one per model.
        code_version: see the function.
        source_version: `commit SHA` of a dataset on the Hub, else a fingerprint; empty if unknown.
        base_model: with a registry's alias replaced by its version.
        base_model_version: as `source_version`.
    """

    members: list[str]
    code_version: str
    source_version: str
    base_model: str
    base_model_version: str


def begin_run(parameters: Mapping[str, Any], record_dir: str) -> Begun:
    """Check all parameters of a pipeline, open its run in MLflow and pin the versions of what it reads.

    Args:
        parameters: of the pipeline, and `run_name`.
        record_dir: folder of the tracking records, which a later step may have to deliver.
    """
    from softpref.data.sources import pin
    from softpref.lm.sources import pin_model
    from softpref.tracking import RUN_NAME, Tracker, check_server, current_pipeline_run, watch_termination

    values = {key: value for key, value in parameters.items() if key not in ("run_name", "record")}
    members = plan(values)
    where = {"experiment": values["experiment"], "tracking_uri": values["tracking_uri"] or None}
    if parameters["run_name"]:
        os.environ[RUN_NAME] = parameters["run_name"]
    watch_termination(**where)
    if check_server(**where) or current_pipeline_run():
        with Tracker(record_dir, run_name=parameters["run_name"], root=True, **where) as tracker:
            tracker.params(without_secrets(values))
            tracker.tags({"mlflow.runName": parameters["run_name"], "models": [one.name for one in members]})
    source = Pinned(values["source"], None, "")
    if not values["source"].startswith(ARTIFACT_SCHEME):  # KFP itself notices changes there
        source = pin(values["source"], parse_overrides(values["data_overrides"]).get("revision"))
    base = pin_model(
        values["base_model"],
        parse_overrides(values["sft_overrides"]).get("revision"),
        tracking_uri=values["tracking_uri"],
    )
    further = [pin(one.place, one.revision).fingerprint for one in further_sources(values["data_overrides"])]
    version = f"{COMMIT}{source.revision}" if source.revision else source.fingerprint
    return Begun(
        [json.dumps(member._asdict()) for member in members],
        code_version(),
        "; ".join([version, *further]),
        base.source,
        f"{COMMIT}{base.revision}" if base.revision else base.fingerprint,
    )


def outcome(
    state: str, task: str, api: str = "http://ml-pipeline.kubeflow:8888"
) -> Literal["FINISHED", "FAILED", "KILLED"]:
    """How the steps of this pipeline run have ended.

    KFP 2.17 tells its last step too little: a terminated run is "RUNNING" or "FAILED", and one whose loop
    ends with a cached step is "RUNNING" too. Its API knows more; where it cannot be asked (it is elsewhere,
    or needs a token), all that has not surely succeeded counts as failed.

    Args:
        state: of `PipelineTaskFinalStatus`.
        task: name of the task that holds all others.
        api: address of KFP's API inside the cluster.
    """
    from softpref.tracking import current_pipeline_run

    if state in _ENDED_WELL:
        return "FINISHED"
    run = current_pipeline_run()
    try:
        with urllib.request.urlopen(f"{api}/apis/v2beta1/runs/{run.id if run else ''}", timeout=10) as answer:
            known = json.load(answer)
    except (OSError, ValueError):
        return "FAILED"
    if any(one.get("state") in ("CANCELING", "CANCELED") for one in known.get("state_history") or []):
        return "KILLED"
    tasks = (known.get("run_details") or {}).get("task_details") or []
    states = {one.get("state") for one in tasks if one.get("display_name") == task}
    return "FINISHED" if states and states <= _ENDED_WELL else "FAILED"


class FurtherSource(NamedTuple):
    """Another source of the data stage: the parameter that names it, its place and Hub revision."""

    name: str
    place: str
    revision: str | None


def further_sources(data_overrides: str | Mapping[str, Any] | None) -> list[FurtherSource]:
    """The sources in `data_overrides` that `plan` has accepted."""
    overrides = parse_overrides(data_overrides, "data_overrides")
    from softpref.data.config import FURTHER

    names = [f"{name}_source" for name in FURTHER]
    further = [FurtherSource(name, overrides[name], None) for name in names if overrides.get(name)]
    for place, given in parse_overrides(overrides.get("mixture"), "mixture").items():
        options = given if isinstance(given, Mapping) else {}
        name = f"mixture[{public_url(place)!r}]"
        further.append(FurtherSource(name, options.get("source", place), options.get("revision")))
    return further


def code_version() -> str:
    """The package's version, and a hash of its stages and main packages.

    Part of KFP's cache key, so that a rebuilt image under an old tag does not get the old image's results.
    """
    import softpref

    digest = hashlib.sha256()
    folder = Path(softpref.__file__).parent
    files = [*folder.rglob("*.py"), *(folder / "pages").iterdir()]
    for file in sorted(file for file in files if file.is_file() and file.parent != folder / "pipelines"):
        digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    for package in _DECIDE:
        digest.update(f"{package} {importlib.metadata.version(package)}\0".encode())
    return f"{softpref.__version__}+{digest.hexdigest()[:12]}"


def plan(
    parameters: Mapping[str, Any], *, here: bool = True, checked: list[Member] | None = None
) -> list[Member]:
    """Build every stage's configuration, so that a wrong parameter fails here, and list the models to train.

    Args:
        parameters: a pipeline's parameters by name, with either `alpha` or `alphas` and `baselines`. A
            baseline is `METHOD[:BETA][,OPTION=VALUE…]`, such as `dpo:0.1` or
            `sppo:1,train_on=samples,rounds=3`; options are `name` and those of `SPOConfig`.
        here: whether the stages will see the files that this process sees.
        checked: the result of an earlier `check`, whose warnings then are not repeated.

    Raises:
        ConfigError: the first wrong parameter, with what would be right.
    """
    from softpref.sft.config import SFTConfig
    from softpref.spo.config import SPOConfig

    members = check(parameters, here=here) if checked is None else checked
    stages = _by_stage(parameters)
    _build(SFTConfig, stages["sft"])
    for member in members:
        build_config(SPOConfig, *training_layers(stages["train"], member))
    return members


def check(parameters: Mapping[str, Any], *, here: bool = True) -> list[Member]:
    """The part of `plan` that imports no training library and takes a fraction of a second."""
    from softpref.data.config import DataConfig
    from softpref.evaluation.choice import check_rule, no_scores
    from softpref.evaluation.config import EvaluationConfig
    from softpref.judges.loading import check_judge_here, gives_scores
    from softpref.preflight.early import check_early
    from softpref.registry.config import RegistryConfig
    from softpref.spo.checks import member_name

    if parameters.get("seed", 0) < 0:
        raise ConfigError(f"seed must be at least 0, got {parameters['seed']}")
    gpus = str(parameters.get("gpus", "")).strip()
    if gpus and not gpus.isdecimal():
        raise ConfigError(f"gpus must be a whole number of at least 0, got {parameters['gpus']!r}")
    if int(gpus or 0):
        for name in ("sft_overrides", "train_overrides"):
            if str(parse_overrides(parameters.get(name, "")).get("use_cpu", "")).lower() in TRUE:
                raise ConfigError(
                    f"{name} has use_cpu, and gpus is {parameters['gpus']}: the GPUs would be held without "
                    "being used; set use_cpu to false, or gpus to 0"
                )
    alphas = parameters["alphas"] if "alphas" in parameters else [parameters["alpha"]]
    beta, anchor = parameters["beta"], parameters.get("anchor", 0.0)
    anchored = {"anchor": f"{anchor:g}"} if anchor else {}
    members = [
        Member(member_name("spo", alpha, beta), "spo", float(alpha), float(beta), anchored)
        for alpha in alphas
    ]
    members += [_baseline(text, anchored) for text in parameters.get("baselines", [])]
    names = [member.name for member in members]
    if not names:
        raise ConfigError("nothing to train: give at least one alpha or baseline")
    if "reference" in names:
        raise ConfigError("no model may be named reference: the reference itself is tracked under that name")
    if len(set(names)) < len(names):
        raise ConfigError(
            f"the models of a sweep need names that differ, got {', '.join(names)}; name a baseline like "
            "dpo:0.1,learning_rate=1e-6,name=slow-dpo"
        )
    for name in TABLE:
        if name.endswith("_overrides") and "trust_remote_code" in parse_overrides(parameters.get(name), name):
            raise ConfigError(f"{name} must not hold trust_remote_code; use the pipeline's parameter")
    stages = _by_stage(parameters)
    data = _build(DataConfig, stages["data"])
    source, shown = data.source, public_url(data.source)
    if here:
        _check_local_source(source)
    stories = [name for name in _OF_STORIES if name in parse_overrides(parameters.get("data_overrides"))]
    if stories and not (data.embedded or source.startswith(ARTIFACT_SCHEME)):
        raise ConfigError(
            f"source is {shown}, and data_overrides has {' and '.join(stories)}: settings of the embedded "
            "stories do not suit your own data; use the recipe own (--recipe own, or the package "
            "spo_own.yaml), or leave them out (data_overrides {})"
        )
    for further in further_sources(parameters.get("data_overrides")):
        if further.place.startswith(ARTIFACT_SCHEME):
            raise ConfigError(
                f"{further.name}: {further.place} is in KFP's own store, which only the parameter source may "
                "name"
            )
        if here:
            _check_local_source(further.place, further.name)
    bare = [one.name for one in members if one.method == "spo" and not float(one.options.get("anchor", 0))]
    if data.source != "story" and bare:
        logger.warning(
            "%s: anchor is 0, the method as published: on natural text, whose log-probabilities differ by "
            "tens of nats, softness has no effect then; set anchor to 1",
            ", ".join(bare),
        )
    check_early("sft", *_layers(stages["sft"]))
    evaluating = _build(EvaluationConfig, stages["evaluate"])
    judges = [("", evaluating)]  # with prefixes of messages about them
    takes_unpaired = False
    for member in members:
        config = check_early("train", *training_layers(stages["train"], member))
        takes_unpaired |= config.takes_unpaired
        if config.uses_judge:
            judges.append((f"{member.name}: ", config))
        known = {*data.dimensions}
        if (data.embedded or known) and not data.mixture and (missing := {*config.dimension_order} - known):
            raise ConfigError(
                f"{member.name}: dimensions has {', '.join(sorted(missing))}, and the data will have "
                f"{', '.join(sorted(known)) or 'none'}; data_overrides says which, such as "
                """{"dimensions": {"helpful": {"best": "better_response_id"}, "harmless": {…}}}"""
            )
        if config.method == "sppo" and config.train_on == "preferences" and data.story_kind == "best_of_n":
            raise ConfigError(
                f"{member.name}: a best-of-n row tells only its best, and sppo needs to know how often each "
                "completion wins; use story_kind pairwise or ranking, or train_on=samples"
            )
    if data.unpaired_source and not takes_unpaired:
        raise ConfigError(
            "unpaired_source: only the method kto learns from unpaired completions, and only with train_on "
            "preferences; no model here does. Leave unpaired_source out, or have a model of kto (in a sweep "
            "such as baselines kto:0.1)"
        )
    experts = [prefix for prefix, config in judges if config.judge == "expert"]
    if experts and not data.embedded:
        raise ConfigError(
            f"{experts[0]}judge expert knows only embedded sources, and the source is {shown}; use judge "
            "bradley-terry, which learns from the training preferences, or auto"
        )
    for prefix, config in judges if here else ():
        try:
            check_judge_here(
                config.judge, model=config.judge_model, options=parse_overrides(config.judge_options)
            )
        except ConfigError as error:
            raise ConfigError(f"{prefix}{error}") from None
    rule = stages["compare"].get("selection_rule", "expected_reward")
    check_rule(rule, stages["compare"].get("max_kl"))
    if "alphas" in parameters and rule == "expected_reward" and not gives_scores(evaluating.judge):
        raise ConfigError(no_scores(evaluating.judge))
    _build(RegistryConfig, {"registered_model_name": "none", **stages["register"]})
    return members


def _by_stage(parameters: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each stage's part of a pipeline's parameters."""
    given = {name: value for name, value in parameters.items() if name in TABLE and TABLE[name].given(value)}
    return {stage: of_stage(stage, given) for stage in STAGES}


def training_layers(shared: Mapping[str, Any], member: Member) -> list[Mapping[str, Any]]:
    """The training stage's parameters for one member, as layers of `build_config`.

    Args:
        shared: the parameters of all members, with `overrides` (JSON).

    Raises:
        ConfigError: the overrides set what distinguishes the members.
    """
    values, overrides = _layers(shared)
    for name, parameters in PLANNED.items():
        if name in overrides:
            raise ConfigError(
                f"train_overrides must not hold {name}; use the parameter {' or '.join(parameters)}"
            )
    own = {"method": member.method, "alpha": member.alpha, "beta": member.beta}
    return [values, overrides, own, member.options]


def _baseline(text: str, anchored: Mapping[str, str]) -> Member:
    """A further model; one of `spo` has the `anchored` options unless it sets its own."""
    from softpref.spo.checks import METHODS, member_name

    head, *settings = [part.strip() for part in text.split(",")]
    method, _, beta_text = head.partition(":")
    if method not in METHODS:
        near = closest(method.partition("=")[0], METHODS)
        raise ConfigError(f"baseline {text!r} is unknown: write METHOD:BETA, such as dpo:0.1{near}")
    try:
        beta = float(beta_text) if beta_text else DEFAULT_BASELINE_BETA
    except ValueError as error:
        raise ConfigError(f"baseline {text!r}: BETA must be a number, as in {method}:0.1") from error
    options: dict[str, str] = dict(anchored) if method == "spo" else {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise ConfigError(f"baseline {text!r}: {setting!r} must be OPTION=VALUE, like learning_rate=1e-6")
        options[key.strip()] = value.strip()
    try:
        alpha = float(options.pop("alpha", 1.0))
    except ValueError as error:
        raise ConfigError(f"baseline {text!r}: alpha must be a number") from error
    name = options.pop("name", "") or member_name(method, alpha, beta)
    for key in ("method", "beta"):
        if key in options:
            raise ConfigError(f"baseline {text!r}: {key} comes first, as in {method}:0.1")
    if "trust_remote_code" in options:
        raise ConfigError(f"baseline {text!r}: trust_remote_code is a parameter of the pipeline")
    return Member(name, method, alpha, beta, options)


def _build(cls: type[Config], values: Mapping[str, Any]) -> Config:
    return build_config(cls, *_layers(values))


def _layers(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A stage's parameters, and the overrides in them, which win."""
    values = dict(values)
    overrides = parse_overrides(values.pop("overrides", ""))
    return values, overrides


def _check_local_source(source: str, name: str = "source") -> None:
    """Refuse a source that can only be a path, and is no file or folder; a Hub id is checked when read."""
    suffixes = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".gz")
    looks_local = "://" not in source and (
        source.startswith(("/", "./", "../", "~")) or Path(source).suffix.lower() in suffixes
    )
    is_there = os.path.isfile(source) or os.path.isdir(source)
    if not is_there and (looks_local or os.path.lexists(source)):
        raise ConfigError(
            f"{name} {source} {what_is_at(source)}; give a file, a folder, a Hub id like owner/name"
            + (", or story" if name == "source" else "")
        )
