"""The built images: their size, whom they run as, what they say of themselves, what they must not hold."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.request
from contextlib import contextmanager

import pytest
from softpref import __version__
from softpref.images import STAGES

from tests.containers.conftest import REPOSITORY, inspect, needs_containers, podman

pytestmark = needs_containers

CONFINED = ("run", "--rm", "--read-only", "--cap-drop=all", "--network=host")
# what a stage's component imports when it runs
MODULES = {
    "data": "kfp.dsl.executor_main softpref.data.stage datasets pyarrow.parquet adlfs aiohttp gcsfs s3fs",
    "train": "kfp.dsl.executor_main softpref.preflight.stage softpref.sft.stage softpref.spo.stage "
    "softpref.judges sklearn.feature_extraction peft gguf accelerate.commands.launch kubeflow.trainer "
    "mlflow.store.tracking.rest_store mlflow.artifacts openai adlfs gcsfs s3fs",
    "evaluate": "kfp.dsl.executor_main softpref.evaluation.stage softpref.evaluation.measure "
    "softpref.evaluation.charts softpref.evaluation.compare softpref.registry.stage matplotlib.pyplot "
    "mlflow.transformers mlflow.pyfunc.scoring_server uvicorn",
    "tracking": "mlflow.server mlflow.server.auth.entities boto3 psycopg2",
}


@pytest.mark.parametrize(("stage", "limit"), [("data", 0.75e9), ("train", 2.5e9), ("evaluate", 2.7e9)])
def test_images_for_the_cpu_are_small(images, stage, limit):
    assert inspect(images[stage])["Size"] < limit


def test_the_data_image_has_no_torch(images):
    found = podman(*CONFINED, images["data"], "pip", "list").stdout
    assert "datasets" in found
    assert "torch" not in found


@pytest.mark.parametrize("user", ["", "4242:4242"])
@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_imports_loads_read_only_as_any_user(images, stage, user):
    program = (
        "import importlib, os, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(os.getuid(), os.access('/home/softpref', os.W_OK), os.access('/opt/softpref', os.W_OK))"
    )
    options = ("--user", user) if user else ()
    environment = ("--env", "_KFP_RUNTIME=true")  # as KFP's executor is started
    command = ("python", "-W", "error::UserWarning:__main__", "-c", program, *MODULES[stage].split())
    result = podman(*CONFINED, *options, *environment, images[stage], *command)
    assert result.stdout.split() == [(user or "1000").split(":")[0], "False", "False"]
    assert "not writable" not in result.stderr  # matplotlib and others say so of a cache


@pytest.mark.parametrize("stage", STAGES)
def test_images_say_what_they_are_and_run_as_nobody_special(images, stage):
    config = inspect(images[stage])["Config"]
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert labels["title"] == f"softpref-{stage}"
    assert labels["version"] == __version__
    assert labels["revision"] not in ("", "unknown")
    assert config["User"] == "1000:1000"
    assert not [entry for entry in config["Env"] if "PIP" in entry or "proxy" in entry.lower()]


@pytest.mark.parametrize("stage", ["data", "train", "evaluate"])
def test_the_default_command_explains_the_stage(images, stage):
    assert f"usage: softpref {stage}" in podman(*CONFINED, images[stage]).stdout


def test_images_share_the_layers_of_those_before_them(images):
    layers = {stage: inspect(image)["RootFS"]["Layers"] for stage, image in images.items()}
    assert layers["train"][: len(layers["data"]) - 1] == layers["data"][:-1]  # but for the code, its last
    assert layers["evaluate"][: len(layers["train"]) - 1] == layers["train"][:-1]
    assert layers["tracking"][:2] == layers["data"][:2]


MARKER = "planted-9f86d081"
ANEW = "localhost/softpref-test-anew"


def build_data(folder, repository=REPOSITORY, environment=os.environ):
    """Build a data image without a cache, from `repository`."""
    command = [sys.executable, "images/build.py", "--only", "data", "--engine=podman", "--prefix", ANEW]
    command += ["--tag", "1", "--sbom", str(folder), "--", "--no-cache"]
    return subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, timeout=1500
    )


@pytest.fixture(scope="module")
def anew(tmp_path_factory):
    """The data image built anew: its name, and the folder of its bill of materials.

    There is a marker in pip's configuration and one in the certificates.
    """
    folder = tmp_path_factory.mktemp("anew")
    bundle = (
        os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE") or "/etc/ssl/certs/ca-certificates.crt"
    )
    shutil.copy(bundle, folder / "bundle.pem")
    with (folder / "bundle.pem").open("a") as file:
        file.write(f"\n# {MARKER}\n")
    environment = {
        **os.environ,
        "PIP_CERT": str(folder / "bundle.pem"),
        "PIP_TRUSTED_HOST": f"{MARKER}.example",
    }
    name = f"{ANEW}-data:1"
    try:
        built = build_data(folder, environment=environment)
        assert built.returncode == 0, built.stdout[-3000:] + built.stderr
        yield name, folder
    finally:
        podman("image", "rm", "--force", name, check=False)


def test_what_a_build_is_told_of_pip_is_in_no_layer_and_no_history(anew, tmp_path):
    archive = tmp_path / "image.tar"
    podman("image", "save", "--format=docker-archive", "--output", str(archive), anew[0])
    searched = 0
    with tarfile.open(archive) as outer:
        for member in outer.getmembers():
            if member.isfile():
                content = outer.extractfile(member).read()
                searched += len(content)
                assert MARKER.encode() not in content, member.name
    assert searched > 3e8  # layers lie in it as plain archives


def test_an_image_that_is_built_anew_has_the_same_layers(images, anew):
    assert inspect(anew[0])["RootFS"]["Layers"] == inspect(images["data"])["RootFS"]["Layers"]


def test_compiled_modules_hold_the_hash_of_their_source_for_all_files_are_of_one_date(images):
    """With the date that the source had they would be compiled at each start, for it has another one now."""
    program = (
        "import importlib.util, pathlib, json, sys\n"
        "known = [[0, 0], [0, 0]]\n"
        "for source in pathlib.Path('/opt/softpref/lib').rglob('*.py'):\n"
        "    compiled = pathlib.Path(importlib.util.cache_from_source(str(source)))\n"
        "    known[0][source.stat().st_mtime == int(sys.argv[1])] += 1\n"
        "    if compiled.exists():\n"
        "        known[1][compiled.read_bytes()[4] == 3] += 1\n"  # checked by hash, see PEP 552
        "print(json.dumps(known))"
    )
    dates, hashes = json.loads(podman(*CONFINED, images["data"], "python", "-c", program, "315532800").stdout)
    assert dates[0] == hashes[0] == 0
    assert hashes[1] > 0.95 * dates[1] > 5000


def test_the_bill_of_materials_names_all_that_the_image_has_and_nothing_else(anew):
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    name, folder = anew
    text = (folder / "softpref-test-anew-data-1.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    assert bill["metadata"]["component"]["name"] == name
    kinds = {}
    for one in bill["components"]:
        kind = one.get("purl", "pkg:own/").split("/")[0]
        kinds.setdefault(kind, set()).add((one["name"].lower().replace("_", "-"), one["version"]))
    installed = json.loads(podman(*CONFINED, name, "pip", "list", "--format=json").stdout)
    python = {(one["name"].lower().replace("_", "-"), one["version"]) for one in installed}
    assert kinds["pkg:pypi"] | kinds["pkg:own"] == python
    debian = podman(*CONFINED, name, "dpkg-query", "--show", "--showformat=${Package} ${Version}\\n").stdout
    assert kinds["pkg:deb"] == {tuple(line.replace("_", "-").split()) for line in debian.splitlines()}


def test_a_wrong_hash_stops_the_build(tmp_path):
    """That of setuptools, the first package that is installed."""
    copy = tmp_path / "repository"
    for part in ("components", "images", "pipelines/recipes", "pipelines/clusters"):
        shutil.copytree(REPOSITORY / part, copy / part)
    for file in ("pyproject.toml", "README.md", "LICENSE", ".dockerignore"):
        shutil.copy(REPOSITORY / file, copy)
    lock = copy / "images/locks/build.txt"
    lock.write_text(re.sub("sha256:[0-9a-f]{64}", f"sha256:{64 * '0'}", lock.read_text()))
    built = build_data(tmp_path, copy)
    assert built.returncode == 1
    assert "DO NOT MATCH THE HASHES" in built.stdout
    assert "was not built" in built.stderr


@contextmanager
def server(image, *command):
    """A detached container of the tracking image, read-only but for a new volume; its id."""
    name = podman(
        *("run", "--detach", "--read-only", "--cap-drop=all", "--network=host", "--user=1000:1000"),
        *("--volume=softpref-test-mlflow:/var/lib/mlflow", "--stop-timeout=1", image, *command),
    ).stdout.strip()
    try:
        yield name
    finally:
        podman("rm", "--force", name)
        podman("volume", "rm", "softpref-test-mlflow")


def healthy(name, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if podman("healthcheck", "run", name, check=False).returncode == 0:
            return True
        time.sleep(1)
    return False


def test_the_tracking_image_serves_and_knows_when_it_is_healthy(images):
    with server(images["tracking"]) as name:
        assert healthy(name, 60), podman("logs", name).stdout
        address = "http://127.0.0.1:5000/api/2.0/mlflow/experiments/search"
        request = urllib.request.Request(
            address, json.dumps({"max_results": 1}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            assert json.loads(answer.read())["experiments"][0]["name"] == "Default"
    with server(images["tracking"], "sleep", "60") as name:
        assert not healthy(name, 3)
