"""What a TrainJob asks of the place where its nodes run, and what it learns of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol


class State(NamedTuple):
    """What is known of a job.

    Attributes:
        status: `waiting` until all nodes have run, `running`, `complete`, `failed`, or `gone` if somebody
            has removed it.
        nodes: the state of each node that there is, by its name, in the words of the backend.
    """

    status: str
    nodes: dict[str, str]


class Nodes(Protocol):
    """Where a job's nodes run: a cluster, or for a try containers or processes of this machine."""

    def folder(self, name: str) -> Path:
        """The job's folder on the shared volume, as this step sees it."""

    def node_folder(self, name: str) -> str:
        """The same folder as the nodes see it."""

    def submit(self, name: str, env: Mapping[str, str]) -> None:
        """Start the job's nodes; each runs `softpref.distributed.node` with `env` in its environment."""

    def state(self, name: str) -> State:
        """How the job stands; raises OSError while that cannot be found out."""

    def output(self, name: str) -> Iterator[str]:
        """What the first node prints, from its beginning, as it comes, until it ends or the stream breaks."""

    def failure(self, name: str) -> list[str]:
        """Last lines of the nodes that failed, and what the backend says about them."""

    def delete(self, name: str) -> None:
        """Remove the job and its nodes, if they are there; returns when they are gone."""
