"""Runs the tasks of a pipeline in containers, through the API that Docker and Podman share."""

from __future__ import annotations

import os
from typing import Any


def docker_runner(environment: dict[str, str]) -> Any:
    """KFP's runner of containers: on this machine's network, as the user who starts it."""
    from kfp import local

    # as the user who owns the output folder that the containers write to
    user = f"{os.getuid()}:{os.getgid()}"
    return local.DockerRunner(environment=environment, network_mode="host", user=user)


def run_container(
    client: Any, image: str, command: list[str], volumes: dict[str, Any], **options: Any
) -> int:
    """Run one task in a container and return its exit status.

    KFP's own function removes the container before it asks for the status and then takes a failure for a
    success (kubeflow/pipelines 13332).
    """
    container = client.containers.run(image=image, command=command, detach=True, volumes=volumes, **options)
    try:
        for line in container.logs(stream=True, follow=True):
            print(line.decode(errors="replace"), end="")
        return container.wait()["StatusCode"]
    finally:
        container.remove(force=True)
