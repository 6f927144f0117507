"""Where an evaluation is found: a folder, a run of MLflow, a version of its registry, or all versions of a
model. Compares nothing."""

from __future__ import annotations

import dataclasses
import logging
import re
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from softpref.errors import ConfigError
from softpref.lm.extrapolation import extrapolated_folders
from softpref.records.evaluation import EVALUATION_FILE, Evaluation
from softpref.records.model import earlier_folders
from softpref.remote import public_url
from softpref.tracking import in_short, mlflow_ready, open_client, resolve_tracking_uri, short_requests

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger(__name__)

_RUN = re.compile(r"runs:/(?P<run>[^/]+)")
_MODEL = re.compile(r"models:/(?P<name>[^/:@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/:@]+))?")


class Found(NamedTuple):
    """An evaluation and its folder, which also holds its samples."""

    evaluation: Evaluation
    folder: Path


def find_evaluations(
    addresses: Sequence[str], kept: str | Path, tracking_uri: str | None = None
) -> list[Found]:
    """The evaluations at these addresses, each followed by those of models extrapolated from its policy.

    A version's evaluation is called `NAME version N`; one of a run by the model's own name, with the run's id
    where another has this name.

    Args:
        addresses: evaluation folders, `runs:/ID`, `models:/NAME/VERSION`, `models:/NAME@ALIAS`, or
            `models:/NAME` for all versions.
        kept: folder into which evaluations are downloaded.
        tracking_uri: MLflow's server; by default `MLFLOW_TRACKING_URI`, or the local store.

    Raises:
        ConfigError: an address has no evaluation, or MLflow does not provide it.
    """
    found: dict[Path, Found] = {}
    store: _Store | None = None
    for address in addresses:
        if not address.startswith(("runs:", "models:")):
            for folder in evaluation_folders([address]):
                found.setdefault(folder, Found(Evaluation.read(folder), folder))
            continue
        store = store or _Store(resolve_tracking_uri(tracking_uri), Path(kept))
        for one in store.evaluations(address):
            found.setdefault(one.folder, one)
    names = [one.evaluation.name for one in found.values()]
    return [
        _renamed(one, f"{one.evaluation.name} ({one.evaluation.run_id[:8]})")
        if names.count(one.evaluation.name) > 1 and one.evaluation.run_id and store
        else one
        for one in found.values()
    ]


def evaluation_folders(folders: Iterable[str | Path]) -> list[Path]:
    """These evaluation folders, each followed by those of the models in its policy's folder."""
    found = ((Path(folder), *earlier_folders(folder), *extrapolated_folders(folder)) for folder in folders)
    return list(dict.fromkeys(folder for group in found for folder in group))


def _renamed(found: Found, name: str) -> Found:
    return found._replace(evaluation=dataclasses.replace(found.evaluation, name=name))


class _Store:
    """MLflow's runs and registry, asked for evaluations."""

    def __init__(self, uri: str, kept: Path) -> None:
        if not mlflow_ready(uri):
            raise ConfigError("mlflow is not installed here; give folders of evaluations")
        self._uri, self._kept = uri, kept

    @cached_property
    def _client(self) -> MlflowClient:
        return open_client(self._uri)

    def evaluations(self, address: str) -> list[Found]:
        try:
            with short_requests(retries=2):
                if run := _RUN.fullmatch(address):
                    folder = self._downloaded(run["run"])
                    return [Found(Evaluation.read(one), one) for one in evaluation_folders([folder])]
                if model := _MODEL.fullmatch(address):
                    versions = self._versions(model)
                    if model["version"] or model["alias"]:
                        return [self._of_version(version) for version in versions]
                    return self._comparable(versions)
        except ConfigError as error:
            raise ConfigError(f"{address}: {error}") from error
        except Exception as error:  # MLflow's, and those of requests and sqlalchemy
            raise ConfigError(f"{address}: MLflow at {public_url(self._uri)}: {in_short(error)}") from error
        raise ConfigError(
            f"{address!r} is no address of an evaluation; write runs:/ID, models:/NAME, "
            "models:/NAME/VERSION or models:/NAME@ALIAS"
        )

    def _versions(self, model: re.Match[str]) -> list[ModelVersion]:
        """Those that the address means, the oldest first."""
        name = model["name"]
        if model["alias"]:
            return [self._client.get_model_version_by_alias(name, model["alias"])]
        if model["version"]:
            return [self._client.get_model_version(name, model["version"])]
        quoted = name.replace("'", "''")
        versions = list(self._client.search_model_versions(f"name = '{quoted}'"))
        if not versions:
            raise ConfigError("the registry has no such model")
        return sorted(versions, key=lambda version: int(version.version))

    def _comparable(self, versions: Sequence[ModelVersion]) -> list[Found]:
        """The evaluations of the newest version and of all that were evaluated in the same way."""
        newest = self._of_version(versions[-1])
        found, others = [], []
        for version in versions[:-1]:
            if version.tags.get("evaluation_id") == newest.evaluation.evaluation_id:
                found.append(self._of_version(version))
            else:
                others.append(version.version)
        if others:
            logger.warning(
                "%s: versions evaluated on other data, judge, reference or settings than the newest are left "
                "out: %s; evaluate them in the same way, and give those folders",
                versions[-1].name,
                ", ".join(map(str, others)),
            )
        return [*found, newest]

    def _of_version(self, version: ModelVersion) -> Found:
        """The evaluation that the version was registered by, in the run that trained it."""
        if not version.run_id:
            raise ConfigError(f"version {version.version} names no run, so its evaluation is not known")
        folder = self._downloaded(version.run_id)
        name, identity = (version.tags.get(tag) for tag in ("name", "evaluation_id"))
        for one in evaluation_folders([folder]):
            evaluation = Evaluation.read(one)
            if evaluation.name == name and evaluation.evaluation_id == identity:
                return _renamed(Found(evaluation, one), f"{version.name} version {version.version}")
        raise ConfigError(
            f"run {version.run_id} no longer holds the evaluation that version {version.version} was "
            "registered by; evaluate the version again, and give that folder"
        )

    def _downloaded(self, run_id: str) -> Path:
        """The run's evaluation folder."""
        import mlflow.artifacts

        folder = self._kept / run_id
        if not (folder / "evaluation" / EVALUATION_FILE).is_file():
            if not any(one.path == "evaluation" for one in self._client.list_artifacts(run_id)):
                raise ConfigError(f"run {run_id} holds no evaluation")
            partial = self._kept / f".{run_id}.partial"  # what is there under its name is whole
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            mlflow.artifacts.download_artifacts(
                run_id=run_id, artifact_path="evaluation", dst_path=str(partial), tracking_uri=self._uri
            )
            partial.replace(folder)
        return folder / "evaluation"
