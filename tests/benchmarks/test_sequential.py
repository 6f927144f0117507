"""The benchmark of dimensions one after another: what it trains, and what its table says of it."""

import pytest
from softpref.config import build_config
from softpref.spo.config import SPOConfig

from tests.benchmarks.sequential import DIMENSIONS, SHARES, WEIGHTS, Run, options, plan, table


def test_every_run_is_another_model_that_training_accepts():
    runs = plan()
    assert len({run.name for run in runs}) == len(runs) == 2 + 2 * len(WEIGHTS) + len(SHARES)
    for place, run in enumerate(runs):
        config = build_config(SPOConfig, options(run, {"learning_rate": 1e-3}))
        assert config.learning_rate == 1e-3
        assert config.dimension == ("" if run.share is not None else run.rounds[-1])
        if run.share is None and len(run.rounds) > 1:  # it begins with a model that is there by then
            assert Run(run.rounds[:1]) in runs[:place]


def measured(trait, brevity, kl, theory=0.0):
    return {
        "figures": {
            "expected_reward/trait": trait,
            "expected_reward/brevity": brevity,
            "optimum_expected_reward/trait": None if kl is None else trait + theory,
            "optimum_expected_reward/brevity": None if kl is None else brevity,
            "kl": 0.25,
            "kl_optimum_to_policy": kl,
            "least_mass_on_set": 0.99,
        }
    }


def test_the_table_says_what_is_shown_and_what_is_not():
    first, other = (Run(DIMENSIONS, weight) for weight in (0.0, 1.0))
    both = Run(DIMENSIONS, share=0.25)
    found = {
        first.name: measured(0.5, 0.25, 0.0125),
        other.name: measured(0.75, 0.125, 0.03125, theory=-0.5),
        both.name: measured(0.625, 0.5, None),
    }
    lines = table(plan(), found).splitlines()
    assert lines[2] == "| trait, then brevity | 0 | 0.50 (0.50) | 0.25 (0.25) | 0.25 | 0.013 | 0.990 |"
    assert lines[3] == "| trait, then brevity | 1 | 0.75 (0.25) | 0.12 (0.12) | 0.25 | 0.031 | 0.990 |"
    assert lines[4] == "| both at once, 25% trait | – | 0.62 | 0.50 | 0.25 | – | 0.990 |"
    said = "\n".join(lines[5:])
    assert "KL(optimum‖policy): at most 0.031, goal 0.05: yes" in said
    assert "trait first: its expected reward rises with λ, of the models (0.50, 0.75): yes" in said
    assert "trait first: its expected reward rises with λ, of theory (0.50, 0.25): no" in said
    found[other.name]["figures"]["kl_optimum_to_policy"] = 0.0625
    assert "at most 0.062, goal 0.05: no" in table(plan(), found)


@pytest.mark.parametrize("share", [0.25])
def test_rows_of_a_share_weigh_as_much(tmp_path, share):
    from datasets import load_from_disk
    from softpref.data.config import DataConfig
    from softpref.data.stage import run

    from tests.benchmarks.sequential import by_shares

    config = DataConfig(rows=60, sft_rows=20, dimensions={name: {} for name in DIMENSIONS})
    run(config, str(tmp_path / "dataset"))
    folder = by_shares(tmp_path / "dataset", share)
    for split in load_from_disk(str(folder)).values():
        for row in split:
            assert row["weight"] == (share if row["dimension"] == "trait" else 1 - share)
    assert (folder / "outcomes.jsonl").is_file()
