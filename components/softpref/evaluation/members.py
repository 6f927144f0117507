"""Which models an evaluation of a policy measures: it, and those in its folder. Loads none."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from softpref.errors import ConfigError
from softpref.lm.extrapolation import extrapolated_folders
from softpref.records.model import METADATA_FILE, ModelMetadata, earlier_folders, load_metadata


class Member(NamedTuple):
    """A model to evaluate: the policy, or one in a `subfolder` of its folder."""

    folder: str
    uri: str
    metadata: ModelMetadata
    subfolder: str = ""

    @property
    def name(self) -> str:
        return self.metadata.get("name") or Path(self.folder).name

    @property
    def prefix(self) -> str:
        """What the names of its metrics begin with."""
        weight = self.metadata.get("extrapolation")
        if weight:
            return f"eval/expo-{weight:g}/"
        return f"eval/{self.subfolder}/" if self.subfolder else "eval/"


def members_of(folder: str, uri: str) -> list[Member]:
    """The models of earlier rounds in a policy's folder, those that were extrapolated from it, and it, last.

    Raises:
        ConfigError: one is incomplete.
    """
    policy = Member(folder, uri, load_metadata(folder))
    return [
        *_within(policy, earlier_folders(folder), "model of a round", "lineage"),
        *_within(policy, extrapolated_folders(folder), "extrapolated model", "extrapolation"),
        policy,
    ]


def _within(
    policy: Member, folders: Iterable[Path], what: str, key: Literal["lineage", "extrapolation"]
) -> list[Member]:
    """The models in these folders of the policy's, each of which its metadata say to be one by `key`."""
    members = []
    for folder in folders:
        metadata = load_metadata(folder)
        if not metadata.get(key):
            raise ConfigError(
                f"{folder} is not a complete {what}: it has no {METADATA_FILE} with its {key}; "
                "train again, or remove it"
            )
        uri = f"{policy.uri.rstrip('/')}/{folder.name}"
        members.append(Member(str(folder), uri, metadata, folder.name))
    return members
