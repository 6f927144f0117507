"""Models extrapolated from a policy are evaluated beside it."""

import json
import shutil

import pytest
from softpref.errors import ConfigError

from tests.evaluation.conftest import copy_policy


def test_extrapolated_models_are_evaluated_beside_their_policy(
    world, evaluating, evaluation, extrapolated, recorded, tmp_path, monkeypatch
):
    from softpref.lm import loading

    loaded = []
    load = loading.load_model
    monkeypatch.setattr(
        loading, "load_model", lambda source, **how: loaded.append(source) or load(source, **how)
    )
    result = evaluating(world, tmp_path / "out", policy=extrapolated)
    assert loaded.count(str(world.reference)) == 1
    read = {
        path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "out").rglob("evaluation.json")
    }
    assert read["out"] == result
    for figures in ("metrics", "exact", "by_prompt", "evaluation_id"):  # as if nothing lay beside it
        assert result[figures] == evaluation[figures]
    for weight in (-0.5, 0.5):
        member = read[f"extrapolated-{weight:g}"]
        assert member["name"] == f"{result['name']}-expo-{weight:g}"
        assert member["extrapolation"] == weight
        assert member["run_id"] == "run-of-training"
        assert member["model_uri"] == f"{extrapolated}/extrapolated-{weight:g}"
        assert member["evaluation_id"] == result["evaluation_id"]
        expected = member["metrics"]["reference_expected_reward"]
        assert expected == result["metrics"]["reference_expected_reward"]
        assert f"extrapolated by {weight:g}" in (
            tmp_path / "out" / f"extrapolated-{weight:g}" / "report.html"
        ).read_text(encoding="utf-8")
    assert (
        read["extrapolated--0.5"]["metrics"]["kl_sequence"]["value"]
        < result["metrics"]["kl_sequence"]["value"]
        < read["extrapolated-0.5"]["metrics"]["kl_sequence"]["value"]
    )
    assert {options["run_id"] for kind, options in recorded if kind == "open"} == {"run-of-training"}
    logged = {name: value for call in recorded if call[0] == "metrics" for name, value in call[1].items()}
    assert logged["eval/win_rate"] == result["metrics"]["win_rate"]["value"]
    for weight in ("-0.5", "0.5"):
        figure = read[f"extrapolated-{weight}"]["metrics"]["win_rate"]["value"]
        assert logged[f"eval/expo-{weight}/win_rate"] == figure

    alone = evaluating(world, tmp_path / "alone", policy=extrapolated / "extrapolated-0.5")
    assert alone == read["extrapolated-0.5"]
    last = [call[1] for call in recorded if call[0] == "metrics"][-1]
    assert all(name.startswith("eval/expo-0.5/") for name in last)


@pytest.mark.usefixtures("recorded")
def test_a_half_written_extrapolated_model_is_refused(world, evaluating, tmp_path):
    policy = copy_policy(world, tmp_path / "policy")
    shutil.copytree(world.policy, policy / "extrapolated-0.5")
    with pytest.raises(ConfigError, match=r"extrapolated-0\.5 is not a complete extrapolated model"):
        evaluating(world, tmp_path / "out", policy=policy)
