"""The tables of the comparisons say what the runs found; what is there is not run again."""

import argparse
import json
import sys

import numpy as np
import pytest
from softpref.config import build_config
from softpref.evaluation.exact import ExactPrompt
from softpref.spo.config import SPOConfig

from tests.benchmarks import comparisons
from tests.benchmarks.comparisons import COLUMNS, Run, World, plan, result_file, table
from tests.benchmarks.measures import frontier


def planted(run, output, **figures):
    file = result_file(run, output)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"figures": figures}))


def lines(part, runs, output):
    return table(part, runs, output).splitlines()


def test_seeds_of_a_model_are_one_line_with_their_range(tmp_path):
    runs = [Run(World("story", "pairwise", seed), "spo 0", 0.5, "samples", 1.0) for seed in range(3)]
    planted(runs[0], tmp_path, expected_reward=1.5, kl=0.25, optimum_expected_reward=None)
    planted(runs[1], tmp_path, expected_reward=1.75, kl=0.25, optimum_expected_reward=None)
    first, _, head, rule, line = lines("story", runs, tmp_path)
    assert first == "2 of 3 runs."
    assert head.count("|") == rule.count("|") == line.count("|") == 6 + len(COLUMNS["story"])
    assert line == "| pairwise | spo, anchor 0 | 0.5 | samples | 1 | 1.50 to 1.75 | – | 0.25 | – | – | – |"


def test_real_models_stand_below_their_reference_with_intervals(tmp_path):
    runs = plan("real", 0)
    accuracy = {"value": 0.61, "low": 0.5, "high": 0.7}
    for run in runs[:2]:
        beside = {"reference": {"absolute": accuracy, "end": -2.0}, "the longer": {"absolute": accuracy}}
        planted(run, tmp_path, implicit=accuracy, end=-3.0, beside=beside)
    _, _, _, _, *found = lines("real", runs, tmp_path)
    loss = [line.split(" | ")[1:4] for line in found]
    assert loss == [
        ["reference", "–", "–"],
        ["the longer", "–", "–"],
        ["spo, anchor 0", "0.5", "samples"],
        ["spo, anchor 0", "0.5", "none"],
    ]
    assert "| – | 0.61 [0.50, 0.70] | – | – | -2.0 |" in found[0]
    assert "| 0.61 [0.50, 0.70] | – | – | – | -3.0 |" in found[2]


@pytest.mark.parametrize("part", list(comparisons.RECIPES))
def test_every_run_is_another_model_that_training_accepts(part, tmp_path):
    runs = plan(part, 0)
    assert len({(run.world, run.name) for run in runs}) == len(runs)
    for run in runs:
        config = build_config(SPOConfig, {"output_dir": str(tmp_path), "use_cpu": True} | run.options(0.1))
        assert config.kl_strength == (0 if run.kl_on == "none" else 0.1)
        assert (config.alpha if config.method == "spo" else config.beta) == run.softness


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch, capsys):
    made = []

    def pretend(run: Run, options: argparse.Namespace) -> None:
        made.append(run)
        planted(run, options.output, expected_reward=1.0)

    monkeypatch.setattr(comparisons, "keep", pretend)
    monkeypatch.setattr(sys, "argv", ["comparisons.py", "--parts", "story", "--output", str(tmp_path)])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path))
    before = plan("story", 0)[0]
    planted(before, tmp_path, expected_reward=2.0)
    assert comparisons.main() == 0
    assert made == plan("story", 0)[1:]
    assert comparisons.main() == 0
    assert len(made) == len(plan("story", 0)) - 1
    text = (tmp_path / "story.md").read_text()
    assert text.startswith(f"{len(made) + 1} of {len(made) + 1} runs.")
    assert text in capsys.readouterr().out


def test_no_policy_has_more_reward_at_its_kl_than_the_frontier():
    reference, rewards = np.log(np.array([0.7, 0.2, 0.1])), np.array([0.0, 1.0, 2.0])
    kls, most = frontier([ExactPrompt(rewards, reference, reference, reference, 1.0)])
    assert (kls[0], most[0]) == pytest.approx((0.0, 0.4))
    assert (kls[-1], most[-1]) == pytest.approx((np.log(10), 2.0))  # the best one alone
    for policy in np.random.default_rng(0).dirichlet(np.ones(3), 200):
        kl = float(policy @ (np.log(policy) - reference))
        assert policy @ rewards <= np.interp(kl, kls, most) + 1e-3
