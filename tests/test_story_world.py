"""What theory promises, on the story world, with the settings of the embedded recipe, without KFP.

A training takes a minute, so that each setting is trained once, and no longer than what is asked of it needs.
"""

import itertools
from pathlib import Path

import pytest
import yaml
from softpref.config import build_config
from softpref.data.config import DataConfig
from softpref.evaluation.config import EvaluationConfig
from softpref.fitness import ailments
from softpref.records.evaluation import Evaluation
from softpref.sft.config import SFTConfig
from softpref.spo.config import SPOConfig

RECIPE = yaml.safe_load(
    (Path(__file__).parents[1] / "pipelines/recipes/embedded.yaml").read_text(encoding="utf-8")
)
# passes over the preferences, of which the recipe has 1.5; the sharper optimum is further from the reference
PASSES = {0.5: 1.5, 1.0: 1, 2.0: 1}


def make_dataset(folder, **changes):
    from softpref.data import stage as data

    shared = {"source": "story", "rows": RECIPE["rows"]}
    data.run(build_config(DataConfig, shared, RECIPE["data_overrides"], changes), str(folder))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder with the recipe's dataset and the reference."""
    from softpref.sft import stage as sft

    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        make_dataset(folder / "dataset")
        config = build_config(
            SFTConfig,
            {key: RECIPE[f"sft_{key}"] for key in ("learning_rate", "num_train_epochs")},
            RECIPE["sft_overrides"],
            {"disable_tqdm": True},
        )
        sft.run(config, dataset_dir=str(folder / "dataset"), output_dir=str(folder / "reference"))
        yield folder


@pytest.fixture(scope="module")
def evaluated(world):
    """Train as the recipe does, with one setting changed, and evaluate the result. Each once."""
    from softpref.evaluation import stage as evaluation
    from softpref.spo import stage as spo

    known = {}

    def train(
        alpha: float,
        beta: float = RECIPE["beta"],
        dataset: str = "dataset",
        adam_epsilon: float = RECIPE["train_overrides"]["adam_epsilon"],
    ) -> Evaluation:
        if (setting := (alpha, beta, dataset, adam_epsilon)) not in known:
            name, passes = "-".join(map(str, setting)), PASSES[alpha]
            changes = {"alpha": alpha, "beta": beta, "adam_epsilon": adam_epsilon, "num_train_epochs": passes}
            config = build_config(
                SPOConfig,
                {key: RECIPE[key] for key in ("learning_rate", "samples_per_refresh", "sampling_interval")},
                RECIPE["train_overrides"],
                {**changes, "disable_tqdm": True},
            )
            folders = {"dataset_dir": str(world / dataset), "reference_dir": str(world / "reference")}
            spo.run(config, **folders, output_dir=str(world / name))
            settings = {"samples_per_prompt": 4, "exact_prompts": 4, "bootstrap_samples": 100}
            evaluation.run(
                build_config(EvaluationConfig, settings),
                **folders,
                policy_dir=str(world / name),
                output_dir=str(world / f"{name}-evaluation"),
            )
            known[setting] = Evaluation.read(world / f"{name}-evaluation")
        return known[setting]

    return train


@pytest.fixture(scope="module")
def exact_figures(evaluated):
    return lambda *setting, **more: {key: one.value for key, one in evaluated(*setting, **more).exact.items()}


def test_entropy_rises_and_reward_falls_with_softness_and_both_follow_the_exact_optimum(exact_figures):
    sharp, soft = exact_figures(0.5), exact_figures(2.0)
    assert sharp["entropy"] < soft["entropy"]
    assert sharp["expected_reward"] > soft["expected_reward"]
    for figures, what in itertools.product((sharp, soft), ("entropy", "expected_reward")):
        assert abs(figures[what] - figures[f"optimum_{what}"]) < 0.15


def test_no_softness_is_taken_for_a_breakage(evaluated):
    assert [ailments(evaluated(alpha)) for alpha in (0.5, 2.0)] == [[], []]


@pytest.mark.slow
def test_at_softness_one_the_experts_distribution_is_learned(evaluated, exact_figures):
    figures = exact_figures(1.0)
    assert figures["kl_optimum_to_policy"] <= 0.06
    assert figures["mass_on_set"] >= 0.97
    assert exact_figures(0.5)["entropy"] < figures["entropy"] < exact_figures(2.0)["entropy"]
    assert ailments(evaluated(1.0)) == []


@pytest.mark.slow
def test_without_the_regulariser_probability_leaks_off_the_set_and_is_taken_for_a_breakage(
    evaluated, exact_figures
):
    free = {"beta": 0.0, "adam_epsilon": 1e-8}  # the recipe's epsilon keeps most of it
    assert exact_figures(1.0, **free)["mass_on_set"] < exact_figures(1.0)["mass_on_set"] - 0.1
    assert any("on the known set" in ailment for ailment in ailments(evaluated(1.0, **free)))


@pytest.mark.slow
def test_rankings_teach_the_same_distribution(world, exact_figures):
    make_dataset(world / "rankings", story_kind="ranking", votes=1)
    # a ranking of four is three comparisons, against which the regulariser must hold its own
    figures = exact_figures(1.0, beta=2 * RECIPE["beta"], dataset="rankings")
    assert figures["kl_optimum_to_policy"] <= 0.06
    assert figures["mass_on_set"] >= 0.97
    assert abs(figures["entropy"] - figures["optimum_entropy"]) < 0.15
