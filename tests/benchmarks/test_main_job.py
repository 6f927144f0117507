"""The table of the main job says what the runs found, and which failed."""

import json
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.main_job import LEAST_MASS, MOST_KL, ROOT, Setting, main, read, run, table

EXACT = {
    "kl_optimum_to_policy": 0.03,
    "mass_on_set": 0.995,
    "least_mass_on_set": 0.9,
    "expected_reward": 1.25,
    "optimum_expected_reward": 1.5,
}


def line(kl, mass, status=0):
    model = {"name": "spo-alpha-1", "method": "spo", "alpha": 1.0}
    return {
        "status": status,
        "models": [model | EXACT | {"kl_optimum_to_policy": kl, "least_mass_on_set": mass}],
    }


def test_the_worst_of_all_runs_counts():
    text = table([line(0.01, 0.99), line(0.03, 0.90, status=1), {"status": 2, "models": []}])
    assert text.startswith("3 runs; 1 ended well, with a model registered.")
    assert (
        "| spo-alpha-1 | 2 | 0.010 to 0.030 | 0.04 | 0.900 to 0.990 | 0.98 | 1.25 to 1.25 | 1.50 to 1.50 |"
        in text
    )


def test_a_run_has_its_seed_threads_and_instruction_set(tmp_path, monkeypatch):
    started = []

    def pretend(command, env, **_):
        started.append((command, env))
        folder = Path(command[command.index("--output") + 1]) / "comparison"
        folder.mkdir(parents=True)
        exact = {name: {"value": value} for name, value in EXACT.items()}
        member = {"name": "spo-alpha-1", "method": "spo", "alpha": 1.0, "exact": exact, "metrics": {}}
        (folder / "comparison.json").write_text(json.dumps({"members": [member]}))
        return subprocess.CompletedProcess(command, 3, "", "error: it broke")

    monkeypatch.setattr("tests.benchmarks.main_job.subprocess.run", pretend)
    found = run(Setting(7, 2, "avx2"), tmp_path, ["--rows", "10"])
    (command, environment), *_ = started
    assert command[:4] == [sys.executable, str(ROOT / "pipelines" / "spo_sweep.py"), "--seed", "7"]
    assert command[-2:] == ["--rows", "10"]
    assert (environment["OMP_NUM_THREADS"], environment["ATEN_CPU_CAPABILITY"]) == ("2", "avx2")
    assert found["status"] == 3
    assert found["models"] == [{"name": "spo-alpha-1", "method": "spo", "alpha": 1.0, **EXACT}]
    assert "it broke" in (tmp_path / "seed-7-threads-2-avx2.log").read_text()

    asked = ["main_job.py", "--seeds", "1", "--threads", "2", "--instructions", "avx2", "default"]
    asked += ["--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results.jsonl")]
    monkeypatch.setattr(sys, "argv", asked)
    assert main() == 0
    assert len(started) == 3
    assert len(read(tmp_path / "results.jsonl")) == 2
    assert main() == 0
    assert len(started) == 3  # what has a line is not run again


def test_results_quote_what_is_on_record():
    """Every run registered a model; what fell short of a goal is quoted too, and named."""
    lines = read(Path(__file__).with_name("main-job.jsonl"))
    assert len({tuple(line["setting"].values()) for line in lines}) == len(lines)
    assert {line["status"] for line in lines} == {0}
    results = (ROOT / "pipelines/recipes/RESULTS.md").read_text(encoding="utf-8")
    rows = [row for row in table(lines).splitlines() if row.startswith("| spo-")]
    assert rows
    for row in rows:
        assert row in results
    short = [
        (line["setting"]["seed"], model["alpha"])
        for line in lines
        for model in line["models"]
        if model["method"] == "spo"
        if model["kl_optimum_to_policy"] > MOST_KL[model["alpha"]] or model["least_mass_on_set"] < LEAST_MASS
    ]
    for seed, alpha in short:
        assert f"the model of α = {alpha:g} with seed {seed} " in results
