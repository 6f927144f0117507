"""The pipelines as a user imports them, and a recipe of the story world that takes seconds."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = REPOSITORY / "pipelines" / "packages"


@pytest.fixture(autouse=True, scope="session")
def _quick_compiling():
    """KFP asks the whole stack for a method's name at each setting of a task, and has every file of it read.

    Below a test, with all libraries loaded, that made five seconds of each compilation.
    """
    from kfp.dsl import pipeline_task

    def stack():
        return [None, (None, None, None, sys._getframe(2).f_code.co_name)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_task, "inspect", SimpleNamespace(stack=stack))
        yield


@pytest.fixture
def quick_recipe(tmp_path):
    """The embedded recipe with little data and a tiny model; a function writes it with changes on top."""

    def write(**changes) -> str:
        recipe = yaml.safe_load((REPOSITORY / "pipelines/recipes/embedded.yaml").read_text(encoding="utf-8"))
        recipe |= {"rows": 400, "samples_per_refresh": 32, "samples_per_prompt": 4}
        recipe |= {"sft_num_train_epochs": 1, "num_train_epochs": 1}
        recipe["data_overrides"] |= {"sft_rows": 400}
        recipe["sft_overrides"]["model_config"] |= {"hidden_size": 32, "num_hidden_layers": 1}
        recipe["train_overrides"] |= {"per_device_train_batch_size": 32, "logging_steps": 2}
        recipe["evaluation_overrides"] = {"exact_prompts": 1, "bootstrap_samples": 100}
        recipe |= {"alphas": [0.5], "baselines": ["dpo:1"], "min_win_rate": 0.0, **changes}
        path = tmp_path / "quick.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def sweep():
    from softpref.pipelines.graph import spo_sweep

    return spo_sweep


@pytest.fixture(scope="session")
def single():
    from softpref.pipelines.graph import spo_pipeline

    return spo_pipeline
