"""The benchmarks still run: each script's smallest setting, one step. What they measure is not looked at.

Where TRL is not installed (it comes with the extra `bench`), the scripts leave their peers out.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SCRIPTS = ["training", "memory", "sampling", "products", "precision"]
SMALLEST = [
    "--size",
    "tiny",
    "--scale",
    "0.1",
    "--batch",
    "2",
    "--steps",
    "1",
    "--rounds",
    "1",
    "--threads",
    "1",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_smallest_setting_gives_figures(script, tmp_path):
    result = tmp_path / "result.json"
    command = [sys.executable, str(HERE / f"bench_{script}.py"), *SMALLEST, "--json", str(result)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for section in json.loads(result.read_text()):
        assert section["comparisons"] or section["notes"], section["title"]
        for comparison in section["comparisons"]:
            assert min(comparison["ours"] + comparison["peer"]) > 0, comparison["what"]


def test_a_model_that_is_not_there_is_refused_before_anything_is_measured(tmp_path):
    output = tmp_path / "results.md"
    command = [sys.executable, str(HERE / "run.py"), "--model", "nowhere.gguf", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--model: base model nowhere.gguf: there is no such GGUF file" in done.stderr
    assert "==" not in done.stderr  # the line of a part that begins
    assert not output.exists()
