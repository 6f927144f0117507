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
SMALLEST = "--size tiny --scale 0.1 --batch 2 --steps 1 --rounds 1 --threads 1"
# Libraries take seconds to import: here all scripts run in one process, and of the figures that should have
# their own process only the first does.
ALL_IN_ONE = """
import contextlib, io, json, runpy, sys
import harness
own = harness.in_own_process
def here(script, *words):
    if own_ones.append(script) or len(own_ones) == 1:
        return own(script, *words)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run(script, *words)
    return json.loads(printed.getvalue().splitlines()[-1])
def run(script, *words):
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")
own_ones, harness.in_own_process = [], here
_, folder, scripts, options = sys.argv
for script in scripts.split():
    run(f"bench_{script}.py", *options.split(), "--json", f"{folder}/{script}.json")
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-c", ALL_IN_ONE, str(folder), " ".join(SCRIPTS), SMALLEST]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_smallest_setting_gives_figures(results, script):
    for section in json.loads((results / f"{script}.json").read_text()):
        assert section["comparisons"] or section["notes"], section["title"]
        for comparison in section["comparisons"]:
            assert min(comparison["ours"] + comparison["peer"]) > 0, comparison["what"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "nowhere.gguf"), "--model: model nowhere.gguf does not exist; give a GGUF file"),
        (("--output", "nowhere/results.md"), "--output: there is no folder nowhere"),
        (("--rounds", "0"), "--rounds must be at least 1"),
        (("--device", "gpu"), "invalid choice: 'gpu'"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_measured(tmp_path, options, message):
    command = [sys.executable, str(HERE / "run.py"), "--output", str(tmp_path / "results.md"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
    assert "==" not in done.stderr  # the line of a part that begins
    assert not list(tmp_path.iterdir())
