"""What is asked of the reference alone is asked once, and no figure changes by it."""

import json
import logging
import shutil

import pytest
from safetensors.torch import load_file

from tests.evaluation.conftest import copy_policy, save_model

pytestmark = pytest.mark.usefixtures("recorded")


@pytest.fixture
def asked(monkeypatch, world):
    """How often each model was asked for samples or log-probabilities: a list of folders' names."""
    import softpref.lm.sampling as sampling
    import softpref.lm.scoring as scoring
    from softpref.lm.fingerprint import model_fingerprint
    from softpref.lm.loading import load_model

    names = {
        model_fingerprint(load_model(str(folder))): folder.name for folder in (world.policy, world.reference)
    }
    calls = []

    def spied(original):
        def spy(model, *of, **how):
            calls.append(names.get(model_fingerprint(model), "another"))
            return original(model, *of, **how)

        return spy

    monkeypatch.setattr(sampling, "sample_completions", spied(sampling.sample_completions))
    monkeypatch.setattr(scoring, "score_sequences", spied(scoring.score_sequences))
    return calls


def figures(evaluation):
    return {name: evaluation[name] for name in ("metrics", "exact", "theory", "evaluation_id")}


@pytest.mark.parametrize("outcomes", [True, False])
def test_a_second_model_does_not_ask_the_reference_again_and_has_the_same_figures(
    world, evaluating, tmp_path, asked, outcomes
):
    options = {"judge": "expert"} if outcomes else {"judge": "bradley-terry"}
    options["dataset"] = world.dataset if outcomes else world.plain
    plain = evaluating(world, tmp_path / "plain", **options)
    without = asked.count("reference")
    kept = options | {"reference_cache": str(tmp_path / "kept")}
    first = evaluating(world, tmp_path / "first", **kept)
    assert asked.count("reference") == 2 * without > 0
    policies = asked.count("policy")
    second = evaluating(world, tmp_path / "second", **kept)
    assert asked.count("reference") == 2 * without
    assert asked.count("policy") == policies * 3 // 2
    assert figures(plain) == figures(first) == figures(second)
    same = [(tmp_path / name / "samples.jsonl").read_text() for name in ("plain", "first", "second")]
    assert same[0] == same[1] == same[2]


def test_of_a_reward_of_any_text_the_samples_for_theory_are_kept_too(world, evaluating, tmp_path, asked):
    dataset = shutil.copytree(world.plain, tmp_path / "dataset")
    reward = {"warmth": {"runs": 1.0, "eats": -1.0}, "ease": 0.0, "grade": 1.0}
    (dataset / "reward.json").write_text(json.dumps(reward))
    found = []
    for name in ("first", "second"):
        options = {"theory_samples": 16, "exact_prompts": 2, "reference_cache": str(tmp_path / "kept")}
        found.append(evaluating(world, tmp_path / name, dataset=dataset, judge="expert", **options))
        found[-1] = figures(found[-1]), asked.count("reference")
    assert found[0] == found[1]
    assert found[0][0]["theory"]["effective_sample_size"]["value"] > 0


def test_nothing_of_another_reference_seed_or_precision_is_taken(world, evaluating, tmp_path):
    other = save_model(tmp_path / "other", seed=3)
    settings = [{}, {"seed": 1}, {"reference": other}, {"dtype": "bfloat16"}, {"samples_per_prompt": 5}]
    for number, options in enumerate(settings):
        plain = evaluating(world, tmp_path / f"plain-{number}", **options)
        kept = evaluating(
            world, tmp_path / f"kept-{number}", reference_cache=str(tmp_path / "kept"), **options
        )
        assert figures(plain) == figures(kept), options


def test_a_damaged_file_is_made_anew_and_a_folder_that_cannot_be_written_costs_no_figure(
    world, evaluating, tmp_path, caplog
):
    kept = tmp_path / "kept"
    first = evaluating(world, tmp_path / "first", reference_cache=str(kept))
    files = sorted(kept.iterdir())
    for file in files:
        file.write_bytes(file.read_bytes()[:20])
    with caplog.at_level(logging.WARNING):
        second = evaluating(world, tmp_path / "second", reference_cache=str(kept))
    assert caplog.text.count("cannot be read and is made anew") == len(files) > 1
    assert all(load_file(file) for file in files)

    (tmp_path / "occupied").write_text("a file")
    with caplog.at_level(logging.WARNING):
        third = evaluating(world, tmp_path / "third", reference_cache=str(tmp_path / "occupied"))
    assert "cannot be written" in caplog.text
    assert figures(first) == figures(second) == figures(third)


def test_the_folder_may_be_named_by_the_environment(world, evaluating, tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTPREF_REFERENCE_CACHE", str(tmp_path / "kept"))
    policy = copy_policy(world, tmp_path / "another", name="another")
    evaluating(world, tmp_path / "evaluation", policy=policy)
    assert {file.suffix for file in (tmp_path / "kept").iterdir()} == {".safetensors"}
