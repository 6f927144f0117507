"""What artifacts say of themselves in KFP's UI, and what they must never say."""

import json
import math
from types import SimpleNamespace

import pytest
from softpref.artifacts import describe, model_values, plain, readable
from softpref.records.model import save_metadata

pytestmark = pytest.mark.fast


@pytest.fixture
def artifact():
    return SimpleNamespace(name="7", metadata={"before": 1})


def test_an_artifact_gets_a_name_for_people_and_keeps_its_own(artifact):
    describe(artifact, "spo-alpha-0.5: policy", name="spo-alpha-0.5", alpha=0.5, rows=0)
    assert artifact.name == "7"
    assert artifact.metadata == {
        "before": 1,
        "display_name": "spo-alpha-0.5: policy",
        "name": "spo-alpha-0.5",
        "alpha": 0.5,
        "rows": 0,
    }


@pytest.mark.parametrize("value", [None, "", math.nan, math.inf])
def test_what_kfp_cannot_store_is_left_out(artifact, value):
    describe(artifact, "model", alpha=value)
    assert "alpha" not in artifact.metadata
    assert readable({"alpha": value, "beta": 0.1}) == {"beta": 0.1}


@pytest.mark.parametrize(
    ("method", "values"), [("spo", {"alpha": 0.5, "beta": 0.1}), ("dpo", {"alpha": None, "beta": 0.1})]
)
def test_only_spo_has_a_softness(tmp_path, method, values):
    save_metadata(tmp_path, {"name": "one", "method": method, "alpha": 0.5, "beta": 0.1, "run_id": "r"})
    found = model_values(tmp_path)
    assert {key: found[key] for key in values} == values
    assert (found["mlflow_run_id"], found["framework"]) == ("r", "transformers")


@pytest.mark.parametrize(
    ("metadata", "base_model"),
    [({"base_model": ""}, "from nothing"), ({"base_model": "owner/name"}, "owner/name"), ({}, None)],
)
def test_a_model_says_what_it_began_as(tmp_path, metadata, base_model):
    (tmp_path / "softpref.json").write_text(json.dumps(metadata))
    assert model_values(tmp_path)["base_model"] == base_model


def test_figures_are_told_to_six_digits_and_counts_as_they_are():
    assert readable({"win_rate": 0.6857142857142857, "tiny": 1.00492705e-46, "rows": 12345678}) == {
        "win_rate": 0.685714,
        "tiny": 1.00493e-46,
        "rows": 12345678,
    }


def test_plain_text_keeps_its_signs_in_markdown():
    assert plain("win_rate [0.4, 0.5] is under min_win_rate") == (
        r"win\_rate [0.4, 0.5] is under min\_win\_rate"
    )
    assert plain("a*b|c`d<e") == r"a\*b\|c\`d\<e"
