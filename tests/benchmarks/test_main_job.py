"""The table of the main job says what the runs found, and which failed."""

import json
import subprocess
import sys

from tests.benchmarks.main_job import ROOT, Setting, run, table


def planted(folder, kl, mass, status=0):
    member = {
        "name": "spo-alpha-1",
        "method": "spo",
        "alpha": 1.0,
        "exact": {"kl_optimum_to_policy": {"value": kl}, "least_mass_on_set": {"value": mass}},
        "metrics": {"expected_reward": {"value": 1 + kl}},
    }
    (folder / "comparison").mkdir(parents=True)
    (folder / "comparison" / "comparison.json").write_text(json.dumps({"members": [member]}))
    (folder / "ended.json").write_text(json.dumps({"status": status, "output": ""}))


def test_the_worst_of_all_runs_counts(tmp_path):
    settings = [Setting(seed, 1, "default") for seed in range(3)]
    planted(tmp_path / settings[0].name, 0.01, 0.99)
    planted(tmp_path / settings[1].name, 0.03, 0.90, status=1)
    text = table(settings, tmp_path)
    assert text.startswith("2 of 3 runs; 1 ended well, with a model registered.")
    assert "| spo-alpha-1 | 2 | 0.030 | 0.04 | 0.900 | 0.98 | 1.01 to 1.03 |" in text


def test_a_run_has_its_seed_threads_and_instruction_set(tmp_path, monkeypatch):
    started = []

    def pretend(command, env, **_):
        started.append((command, env))
        return subprocess.CompletedProcess(command, 3, "", "error: it broke")

    monkeypatch.setattr("tests.benchmarks.main_job.subprocess.run", pretend)
    run(Setting(7, 2, "avx2"), tmp_path, ["--rows", "10"])
    (command, environment), *_ = started
    assert command[:4] == [sys.executable, str(ROOT / "pipelines" / "spo_sweep.py"), "--seed", "7"]
    assert command[-2:] == ["--rows", "10"]
    assert (environment["OMP_NUM_THREADS"], environment["ATEN_CPU_CAPABILITY"]) == ("2", "avx2")
    ended = json.loads((tmp_path / "seed-7-threads-2-avx2" / "ended.json").read_text())
    assert ended["status"] == 3
    run(Setting(7, 2, "avx2"), tmp_path, [])
    assert len(started) == 1  # what has ended is not run again
