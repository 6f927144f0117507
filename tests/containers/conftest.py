"""Real images and containers. `make test-containers` builds what these tests look at, and asks for them."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from softpref.images import STAGES, image_name

from tests.pipelines.conftest import quick_recipe  # noqa: F401

REPOSITORY = Path(__file__).resolve().parents[2]

# they need images of two gigabytes and run whole sweeps: none of it belongs into the ordinary tests
needs_containers = pytest.mark.skipif(
    "SOFTPREF_CONTAINERS" not in os.environ, reason="`make test-containers` builds the images and runs these"
)


def podman(*arguments: str, check: bool = True, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["podman", *arguments], check=check, capture_output=True, text=True, timeout=300, **options
    )


def inspect(name: str) -> dict:
    return json.loads(podman("image", "inspect", name).stdout)[0]


@pytest.fixture(scope="session")
def images() -> dict[str, str]:
    """The names of the built images, by stage."""
    assert shutil.which("podman"), "make test-containers needs podman"
    names = {stage: image_name(stage) for stage in STAGES}
    missing = [name for name in names.values() if podman("image", "exists", name, check=False).returncode]
    assert not missing, f"{missing} are not built: make images"
    return names
