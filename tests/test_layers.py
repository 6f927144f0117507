"""Imports run one way: the contracts of pyproject.toml hold, and would notice what breaks them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

REPOSITORY = Path(__file__).parents[1]


def lint(source: Path) -> subprocess.CompletedProcess:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(source), "COLUMNS": "200"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_no_import_climbs_no_stage_imports_another_and_there_is_no_circle():
    result = lint(REPOSITORY / "components")
    assert result.returncode == 0, result.stdout + result.stderr


def test_imports_that_climb_or_close_a_circle_are_found(tmp_path):
    shutil.copytree(REPOSITORY / "components", tmp_path / "components")
    added = {
        "lm/head.py": "from softpref.cli import main",
        "lm/padding.py": "from softpref.lm.head import try_out",
        "spo/buffer.py": "from softpref.sft import stage",
        "data/texts.py": "from softpref.pipelines import recipes",
    }
    for file, line in added.items():
        with (tmp_path / "components/softpref" / file).open("a") as module:
            module.write(f"\n{line}\n")
    result = lint(tmp_path / "components")
    assert result.returncode == 1
    assert "softpref.lm is not allowed to import softpref.cli" in result.stdout
    assert "No cycles are allowed in softpref.lm" in result.stdout
    assert "softpref.spo is not allowed to import softpref.sft" in result.stdout
    assert "softpref.data is not allowed to import softpref.pipelines" in result.stdout
