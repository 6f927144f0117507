"""The benchmark of dimensions one after another: what it trains, and what its table says of it."""

import pytest
from softpref.config import build_config
from softpref.evaluation.theory import TRUSTED
from softpref.spo.config import SPOConfig

from tests.benchmarks.sequential import (
    SHARES,
    STORY,
    STORYTELLER,
    WEIGHTS,
    Run,
    options,
    plan,
    table,
)

DIMENSIONS = STORY.dimensions


@pytest.mark.parametrize("world", [STORY, STORYTELLER])
def test_every_run_is_another_model_that_training_accepts(world):
    runs = plan(world)
    assert len({run.name for run in runs}) == len(runs) == 2 + 2 * len(WEIGHTS) + len(SHARES)
    for place, run in enumerate(runs):
        config = build_config(SPOConfig, options(world, run, {"learning_rate": 1e-3}))
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
    lines = table(STORY, plan(STORY), found).splitlines()
    assert lines[2] == "| trait, then brevity | 0 | 0.50 (0.50) | 0.25 (0.25) | 0.25 | 0.013 | 0.990 |"
    assert lines[3] == "| trait, then brevity | 1 | 0.75 (0.25) | 0.12 (0.12) | 0.25 | 0.031 | 0.990 |"
    assert lines[4] == "| both at once, 25% trait | – | 0.62 | 0.50 | 0.25 | – | 0.990 |"
    said = "\n".join(lines[5:])
    assert "KL(optimum‖policy): at most 0.031, goal 0.05: yes" in said
    assert "trait first: its expected reward rises with λ, of the models (0.50, 0.75): yes" in said
    assert "trait first: its expected reward rises with λ, of theory (0.50, 0.25): no" in said
    found[other.name]["figures"]["kl_optimum_to_policy"] = 0.0625
    assert "at most 0.062, goal 0.05: no" in table(STORY, plan(STORY), found)


def test_without_enumeration_only_what_enough_samples_carry_is_compared_with_theory():
    warm, brief = STORYTELLER.dimensions
    runs = [Run((warm, brief), weight) for weight in (0.0, 2.0)]

    def sampled(kl, share):
        return {
            "figures": {
                f"expected_reward/{warm}": 2.0,
                f"expected_reward/{brief}": 0.0,
                f"optimum_expected_reward/{warm}": 2.25,
                f"optimum_expected_reward/{brief}": 0.5,
                "kl": 0.5,
                "optimum_kl": 0.625,
                "kl_optimum_to_policy": kl,
                "effective_sample_size": share,
                "truncated_fraction": 0.0,
            }
        }

    found = {runs[0].name: sampled(0.03125, 0.5), runs[1].name: sampled(0.0625, TRUSTED)}
    text = table(STORYTELLER, runs, found)
    assert (
        "| warmth, then brevity | 0 | 2.00 (2.25) | 0.00 (0.50) | 0.50 (0.62) | 0.031 | 0.50 | 0.000 |"
        in text
    )
    assert "KL(optimum‖policy): at most 0.062, goal 0.05: no" in text
    found[runs[1].name] = sampled(0.0625, TRUSTED / 2)
    text = table(STORYTELLER, runs, found)
    assert "KL(optimum‖policy): 1 of 2 models, at most 0.031, goal 0.05: yes" in text


def test_a_model_is_measured_beside_theory_in_both_dimensions(tmp_path, monkeypatch):
    """From data to figures, with a model that is the reference still."""
    from softpref.data import stage as data
    from softpref.data.config import DataConfig
    from softpref.sft import stage as sft
    from softpref.sft.config import SFTConfig
    from softpref.spo import stage as spo

    from tests.benchmarks.measures import beside_theory

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    dataset, reference, policy = (tmp_path / name for name in ("dataset", "reference", "policy"))
    rows = {"rows": 60, "sft_rows": 60, "dimensions": {name: {} for name in STORYTELLER.dimensions}}
    data.run(build_config(DataConfig, {"source": "storyteller", **rows}), str(dataset))
    recipe = STORYTELLER.settings
    small = {"max_steps": 1, "logging_steps": 1, "disable_tqdm": True}
    sft.run(
        build_config(SFTConfig, recipe["sft_overrides"], small),
        dataset_dir=str(dataset),
        output_dir=str(reference),
    )
    asked = options(
        STORYTELLER, Run(("warmth",)), {"learning_rate": 1e-12, "samples_per_refresh": 8, **small}
    )
    spo.run(
        build_config(SPOConfig, asked),
        dataset_dir=str(dataset),
        reference_dir=str(reference),
        output_dir=str(policy),
    )
    found = beside_theory(policy, reference, dataset, prompts=2)
    assert found["kl"] == pytest.approx(0, abs=1e-3)
    assert found["kl_optimum_to_policy"] == pytest.approx(found["optimum_kl"], rel=1e-2)
    for name in STORYTELLER.dimensions:
        ours, theirs = (found[f"{whose}expected_reward/{name}"] for whose in ("", "reference_"))
        assert ours == pytest.approx(theirs, abs=1.0)  # of 64 samples each
    # of one dimension the optimum is a tilt, which raises its reward and has some KL
    assert found["optimum_kl"] > 0
    assert found["optimum_expected_reward/warmth"] > found["reference_expected_reward/warmth"]


@pytest.mark.parametrize("share", [0.25])
def test_rows_of_a_share_weigh_as_much(tmp_path, share):
    from softpref.data.config import DataConfig
    from softpref.data.stage import run
    from softpref.records.dataset import read_dataset

    from tests.benchmarks.sequential import by_shares

    config = DataConfig(rows=60, sft_rows=20, dimensions={name: {} for name in DIMENSIONS})
    run(config, str(tmp_path / "dataset"))
    folder = by_shares(STORY, tmp_path / "dataset", share)
    for split in read_dataset(folder).values():
        for row in split:
            assert row["weight"] == (share if row["dimension"] == "trait" else 1 - share)
    assert (folder / "outcomes.jsonl").is_file()
