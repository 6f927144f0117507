"""What is installed elsewhere: the wheel brings the pipelines with their recipes and cluster profiles."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml

from tests.pipelines.conftest import REPOSITORY


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources, without a network."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("components", "pipelines"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run([*command, "-w", built, source], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = built.glob("softpref-*.whl")
    return path


def test_it_holds_every_module_recipe_and_profile_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith("-info")}
    package = REPOSITORY / "components"
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    data = {
        f"softpref/pipelines/{path.relative_to(REPOSITORY / 'pipelines')}"
        for folder in ("recipes", "clusters")
        for path in (REPOSITORY / "pipelines" / folder).glob("*.yaml")
    }
    pages = {
        str(path.relative_to(package))
        for path in (package / "softpref/pages").iterdir()
        if path.suffix in (".html", ".css", ".js")
    }
    worlds = {f"softpref/data/{world}.yaml" for world in ("story_world", "storyteller")}
    assert names == modules | data | pages | worlds | {"softpref/py.typed"}
    recipe = zipfile.ZipFile(wheel).read("softpref/pipelines/recipes/own.yaml")
    assert recipe == (REPOSITORY / "pipelines/recipes/own.yaml").read_bytes()


def test_it_runs_compares_and_compiles_pipelines(wheel, tmp_path):
    """Away from the checkout, in which `pipelines/` would be found."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "COLUMNS": "200"}

    def softpref(*arguments):
        command = [sys.executable, "-m", "softpref", *arguments]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return result.returncode, result.stdout + result.stderr

    status, printed = softpref("sweep", "--recipe", "own", "--help")
    assert status == 0
    assert "--alphas" in printed
    assert "(recipe own: 5e-05)" in printed
    assert softpref("compare", "none", "--output", "x")[0] == 2
    assert softpref("compile", "run", "--recipe", "own") == (0, "packages/spo_pipeline.yaml\n")
    (tmp_path / "packages").rename(tmp_path / "of_the_wheel")
    spec = next(yaml.safe_load_all((tmp_path / "of_the_wheel/spo_pipeline.yaml").read_text()))
    assert spec["root"]["inputDefinitions"]["parameters"]["source"]["defaultValue"] == ""
