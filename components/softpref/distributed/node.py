"""One node of a TrainJob: reads what to train from the shared volume, and starts this node's processes.

Run as `python -m softpref.distributed.node FOLDER` in every node. The runtime's variables (`PET_NNODES` and
others, as Kubeflow Trainer's torch policy sets them) say which node this is.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from softpref.disk import write_private
from softpref.distributed.command import stage_arguments
from softpref.distributed.processes import (
    Rendezvous,
    StageFailed,
    launch_command,
    launch_environment,
    run_watched,
)
from softpref.errors import ConfigError, SoftprefError

JOB_FILE, PARAMETERS_FILE, RESULT_FILE = "job.json", "parameters.json", "result.json"
CHECKPOINTS, OUTPUT = "checkpoints", "output"
SECRETS_VARIABLE = "SOFTPREF_SECRET_FILES"
"""JSON object of environment variable → file with its value, for secrets that are mounted, not set. A file
whose name ends with `?` here may be absent."""

_NAMED_WITHIN = 300.0


@dataclass
class NodeTask:
    """What every node of a job reads, `job.json` in the job's folder; paths are relative to that folder.

    Args:
        folders: `dataset`, `output`, `checkpoint_dir`, and `reference` of the stage `train`.
        where: those given of `name`, `experiment`, `parent_run_id`, `tracking_uri`.
        processes, gpus: of each node.
    """

    stage: Literal["sft", "train", "judge"]
    folders: dict[str, str]
    where: dict[str, str]
    processes: int
    gpus: int

    def write(self, folder: Path) -> None:
        write_private(folder / JOB_FILE, json.dumps(asdict(self), indent=2))

    @classmethod
    def read(cls, folder: Path) -> NodeTask:
        file = folder / JOB_FILE
        if not file.is_file():
            raise ConfigError(
                f"{file} does not exist; mount the shared volume here where the step that submits has it"
            )
        return cls(**json.loads(file.read_text(encoding="utf-8")))


def rendezvous(env: Mapping[str, str]) -> Rendezvous:
    """Where the nodes meet, from what the runtime's torch policy sets.

    Raises:
        ConfigError: a variable is absent: the runtime is not for torch.
    """
    names = ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")
    if missing := [name for name in names if not env.get(name)]:
        raise ConfigError(
            f"{', '.join(missing)} not set in this node; take a training runtime with a torch policy "
            "(spec.mlPolicy.torch), whose job and container are called node"
        )
    nodes, rank, address, port = (env[name] for name in names)
    return Rendezvous(int(nodes), int(rank), address, int(port))


def run_node(folder: Path) -> int:
    """Run this node's part of the job; returns the exit status."""
    task = NodeTask.read(folder)
    result = folder / RESULT_FILE
    if finished(result):  # a node that is started again after the end
        return 0
    paths = {name: str(folder / path) for name, path in task.folders.items()}
    arguments = stage_arguments(paths, task.where, config=folder / PARAMETERS_FILE, result=result)
    if task.gpus:
        from softpref.lm.arguments import require_devices

        require_devices(task.gpus, task.processes)
    meet = rendezvous(os.environ)
    if meet.nodes > 1:
        _await_name(meet.address)
    print(f"node {meet.rank} of {meet.nodes}: {task.processes} processes", flush=True)
    run_watched(
        launch_command(task.stage, arguments, processes=task.processes, rendezvous=meet),
        env=launch_environment(task.processes, gpus=task.gpus),
        what=f"node {meet.rank}",
    )
    return 0


def _await_name(address: str) -> None:
    """Wait until the first node has an address: nodes start in any order, and an address comes with a pod.

    Raises:
        ConfigError: it has none after `_NAMED_WITHIN` seconds.
    """
    until = time.monotonic() + _NAMED_WITHIN
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except OSError as error:
            if time.monotonic() > until:
                raise ConfigError(
                    f"the first node, {address}, has no address after {_NAMED_WITHIN:g} s ({error}); look at "
                    "its pod, and whether the job's headless service and the cluster's DNS are reachable"
                ) from error
        time.sleep(1)


def read_secrets(env: Mapping[str, str]) -> dict[str, str]:
    """Environment variables whose values are in mounted files.

    Raises:
        ConfigError: a file is absent.
    """
    found = {}
    for name, file in json.loads(env.get(SECRETS_VARIABLE, "{}")).items():
        try:
            found[name] = Path(file.removesuffix("?")).read_text(encoding="utf-8").rstrip("\n")
        except OSError as error:
            if file.endswith("?"):
                continue
            raise ConfigError(f"the secret for {name} cannot be read: {error}") from error
    return found


def finished(result: Path) -> bool:
    """Whether the stage finished, other than by a refusal."""
    return result.is_file() and "result" in json.loads(result.read_text(encoding="utf-8"))


def main(arguments: list[str]) -> int:
    """Run the node of a job folder; 0, 2 for an error that the user can correct, 1 for any other failure."""
    if len(arguments) != 1:
        print("usage: python -m softpref.distributed.node FOLDER", file=sys.stderr)
        return 2
    try:
        os.environ.update(read_secrets(os.environ))
        return run_node(Path(arguments[0]))
    except SoftprefError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StageFailed as error:
        print(str(error).splitlines()[0], file=sys.stderr)  # its lines have been printed already
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
