"""Where a model comes from: a folder or file here, a URL, MLflow's registry or the Hub. Loads no weights."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from softpref import remote
from softpref.disk import DAMAGED, what_is_at
from softpref.errors import ConfigError
from softpref.remote import NotReached, Pinned, is_url, public_url

logger = logging.getLogger(__name__)

_REGISTERED = re.compile(r"models:/(?P<name>[^/:@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/:@]+))")
# of a checkpoint folder: weights that are never loaded (unpickling can run code), and what lies deeper
_LEFT = re.compile(r"\.(bin|pt|pth|pkl|ckpt|h5|msgpack|onnx|npz|tflite|gguf)$|/", re.IGNORECASE)


class _Version(NamedTuple):
    """A version in the MLflow registry of `uri`."""

    uri: str
    name: str
    number: str
    created: int

    @property
    def source(self) -> str:
        return f"models:/{self.name}/{self.number}"


def is_registered(source: str) -> bool:
    """Whether a source names a model of the MLflow registry."""
    return source.startswith("models:")


def check_model_source(source: str) -> None:
    """Refuse a model source that cannot be loaded, in milliseconds and before anything costly runs.

    It must be a local path, a URL, a registered model or a Hub id (`name` or `owner/name`); whether a remote
    one exists is known only when it is asked for.

    Raises:
        ConfigError: says what is missing and what would be right.
    """
    if is_url(source):
        remote.check_url(source, "base model")
        return
    if is_registered(source):
        _parse(source)
        return
    path = Path(source)
    if source.endswith(".gguf"):
        if not os.path.isfile(path):
            raise ConfigError(f"model {source} {what_is_at(path)}; give a GGUF file")
    elif path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise ConfigError(
                f"model {source}: the folder holds no config.json and no adapter_config.json; "
                "is it a checkpoint?"
            )
        if not any(path.glob("*.safetensors")):
            raise ConfigError(
                f"model {source}: the folder holds no *.safetensors; "
                "convert other weights first, they are not loaded because unpickling can run code"
            )
    elif os.path.lexists(path):
        raise ConfigError(f"model {source} {what_is_at(path)}; give a checkpoint folder, or a .gguf file")
    elif path.is_absolute() or source.startswith(("./", "../", "~")) or source.count("/") > 1 or not source:
        raise ConfigError(
            f"model {source!r} {what_is_at(source)}; give a checkpoint folder, a .gguf file, a URL of one, "
            "models:/NAME@ALIAS of the MLflow registry, or a Hub id like owner/name"
        )


def check_remote_code(source: str, trusted: bool) -> None:
    """Refuse a model folder that needs code of its own, unless the user allowed running it.

    Of an adapter, its base model counts. Remote models are refused when they are loaded.

    Args:
        trusted: the user's `trust_remote_code`.

    Raises:
        ConfigError: names the folder and the files.
    """
    path = Path(source)
    if trusted or not path.is_dir():
        return
    base = _json(path / "adapter_config.json").get("base_model_name_or_path")
    if isinstance(base, str) and base != source:
        check_remote_code(base, trusted)
    config = _json(path / "config.json")
    brought = config.get("auto_map")
    if not brought:
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config.get("model_type") in CONFIG_MAPPING:  # its own classes serve as well
        return
    files = sorted(
        {
            f"{name.rpartition('--')[2].partition('.')[0]}.py"
            for named in dict(brought).values()
            for name in ([named] if isinstance(named, str) else named)  # tokenizers name two, or one and null
            if name
        }
    )
    raise ConfigError(
        f"model {source} is of the type {config.get('model_type')!r}, which transformers does not have, "
        f"and brings code of its own ({', '.join(files)}); read that code, and if you trust it set "
        "trust_remote_code to true"
    )


def local_source(source: str, *, tracking_uri: str = "") -> str:
    """What to load a model from on this machine: a URL or a registered model is downloaded, once.

    Folders, files and Hub ids are returned as they are.

    Args:
        tracking_uri: MLflow server of a registered model; empty takes `MLFLOW_TRACKING_URI`, or the local
            store.

    Raises:
        ConfigError: it does not exist, cannot be downloaded, or cannot be loaded as a model.
    """
    if is_url(source):
        return _fetched(source)
    if is_registered(source):
        return _downloaded(_version(source, tracking_uri))
    return source


def source_name(source: str, *, tracking_uri: str = "") -> str:
    """What to record of a model's source: a registered model's version, a URL without secrets."""
    return _version(source, tracking_uri).source if is_registered(source) else public_url(source)


def pin_model(source: str, revision: str | None = None, *, tracking_uri: str = "") -> Pinned:
    """The present version of a model's source, without loading it: see `softpref.data.sources.pin`.

    An alias of the MLflow registry becomes the version that it stands for.

    Args:
        source: as in `local_source`; empty stays empty.
        revision: branch, tag or commit of a Hub model.

    Raises:
        ConfigError: the source certainly does not exist.
    """
    if is_url(source):
        return Pinned(source, revision, remote.fingerprint(source, "base model"))
    if is_registered(source):
        try:
            version = _ask_version(source, tracking_uri, retries=0)
        except NotReached as error:
            logger.warning("%s. That it changes will not be noticed", error)
            return Pinned(source, revision, "")
        return Pinned(version.source, revision, f"{version.source} {version.created}")
    path = Path(source)
    if source and path.exists():
        return Pinned(source, revision, remote.fingerprint_of_path(path))
    if not source or source.endswith(".gguf") or source.startswith(("/", ".", "~")):
        return Pinned(source, revision, "")
    check_model_source(source)
    return remote.pin_repository("model", source, revision, "base model")


@functools.cache
def _fetched(url: str) -> str:
    def of_a_checkpoint(names: Iterable[str]) -> list[str]:
        return [name for name in names if not _LEFT.search(name)]

    path = remote.fetch(url, "base model", choose=of_a_checkpoint)
    _check_copy(path, public_url(url))
    return str(path)


def _json(path: Path) -> dict[str, Any]:
    """A JSON object's values; none of an absent file or of other content, which loading refuses."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except DAMAGED:
        return {}
    return values if isinstance(values, dict) else {}


def _parse(source: str) -> re.Match[str]:
    match = _REGISTERED.fullmatch(source)
    if match is None:
        raise ConfigError(
            f"model {source!r} names no model of the MLflow registry; write models:/NAME/VERSION or "
            "models:/NAME@ALIAS"
        )
    return match


def _ask_version(source: str, tracking_uri: str, retries: int = 2) -> _Version:
    """The present version of a registered model's source.

    Raises:
        ConfigError: there is no such model, version or alias.
        NotReached: the registry does not answer.
    """
    from softpref.tracking import in_short, mlflow_ready, open_client, resolve_tracking_uri, short_requests

    match = _parse(source)
    uri = resolve_tracking_uri(tracking_uri or None)
    if not mlflow_ready(uri):
        raise NotReached(
            f"model {source}: MLflow at {public_url(uri)} cannot be asked: mlflow is not installed"
        )
    try:
        with short_requests(retries):
            client = open_client(uri)
            if match["alias"]:
                found = client.get_model_version_by_alias(match["name"], match["alias"])
            else:
                found = client.get_model_version(match["name"], match["version"])
    except Exception as error:  # also those of sqlalchemy and requests
        why = f"model {source}: MLflow at {public_url(uri)}: {in_short(error)}"
        if getattr(error, "error_code", None) in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise ConfigError(why) from error
        raise NotReached(f"{why}; MLFLOW_TRACKING_URI says where the registry is") from error
    return _Version(uri, found.name, str(found.version), found.creation_timestamp)


_version = functools.cache(_ask_version)  # a stage must not load one version and record another


@functools.cache
def _downloaded(version: _Version) -> str:
    """The folder of a registered model's checkpoint and tokenizer, which MLflow may keep apart."""
    import mlflow.artifacts

    from softpref.tracking import in_short, open_client

    def download(partial: Path) -> None:
        try:
            root = open_client(version.uri).get_model_version_download_uri(version.name, version.number)
            logged = Path(
                mlflow.artifacts.download_artifacts(
                    artifact_uri=root, dst_path=str(partial / "logged"), tracking_uri=version.uri
                )
            )
        except Exception as error:  # also ImportError, where the server gives no files itself
            raise NotReached(
                f"model {version.source}: MLflow at {public_url(version.uri)} does not provide its files "
                f"({in_short(error)})"
            ) from error
        checkpoint = logged / "model"
        if not checkpoint.is_dir():
            raise ConfigError(
                f"model {version.source} holds no checkpoint in model/; only models that "
                "mlflow.transformers logged with their weights can be loaded"
            )
        for part in (logged / "components").glob("tokenizer/*"):
            if not (checkpoint / part.name).exists():
                part.replace(checkpoint / part.name)
        checkpoint.replace(partial / "model")
        shutil.rmtree(partial / "logged")

    folder = remote.kept(["registered model", *version], download) / "model"
    _check_copy(folder, version.source)
    return str(folder)


def _check_copy(path: Path, source: str) -> None:
    try:
        check_model_source(str(path))
    except ConfigError as error:
        raise ConfigError(str(error).replace(str(path), source)) from error
