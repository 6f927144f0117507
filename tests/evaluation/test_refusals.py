"""What cannot be evaluated is refused before anything costly."""

import shutil
import subprocess
import sys

import pytest
from softpref.config import build_config
from softpref.errors import ConfigError, DataError
from softpref.evaluation.config import EvaluationConfig


@pytest.mark.usefixtures("recorded")
def test_completions_that_outgrow_the_model_are_refused_before_any_is_drawn(
    world, evaluating, tmp_path, monkeypatch
):
    monkeypatch.setattr("softpref.evaluation.measure.draw", lambda *a, **k: pytest.fail("drew samples"))
    with pytest.raises(ConfigError, match=r"up to 4 tokens .* up to 61 .* 64 positions; lower max_new"):
        evaluating(world, tmp_path / "out", max_new_tokens=61)


@pytest.mark.usefixtures("recorded")
def test_a_reference_of_another_vocabulary_is_refused_before_any_is_drawn(
    world, evaluating, tmp_path, monkeypatch
):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("softpref.evaluation.measure.draw", lambda *a, **k: pytest.fail("drew samples"))
    reference = shutil.copytree(world.reference, tmp_path / "reference")
    model = AutoModelForCausalLM.from_pretrained(reference)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    model.save_pretrained(reference)
    with pytest.raises(ConfigError, match="give the reference that the policy was trained from"):
        evaluating(world, tmp_path / "out", reference=reference)


def test_what_is_wrong_is_refused_before_a_model_is_loaded(
    world, evaluating, evaluated, tmp_path, monkeypatch
):
    monkeypatch.setattr("softpref.lm.loading.load_model", lambda *a, **k: pytest.fail("loaded a model"))
    with pytest.raises(ConfigError, match="holds an evaluation already, of something else"):
        evaluating(world, evaluated, seed=7)
    with pytest.raises(ConfigError, match="holds no config"):
        evaluating(world, tmp_path / "a", policy=tmp_path)
    with pytest.raises(ConfigError, match="not a dataset folder"):
        evaluating(world, tmp_path / "b", dataset=tmp_path)
    with pytest.raises(DataError, match="no split 'tets'; it has train"):
        evaluating(world, tmp_path / "c", split="tets")
    with pytest.raises(ConfigError, match="set max_new_tokens"):
        evaluating(world, tmp_path / "d", policy=world.reference)
    with pytest.raises(ConfigError, match="there is no such folder"):
        evaluating(world, tmp_path / "e", policy="nowhere")


def test_a_judge_that_cannot_be_had_is_refused_before_anything_is_imported(world, tmp_path):
    code = (
        "import sys; from softpref.cli import main; status = main(sys.argv[1:]); "
        "print(status, *{'datasets', 'torch', 'transformers', 'mlflow'} & set(sys.modules))"
    )
    folders = ["--dataset", world.plain, "--reference", world.reference, "--policy", world.policy]
    arguments = ["evaluate", *folders, "--output", tmp_path / "out", "--judge", "expert"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stdout.split() == ["2"]
    assert "the judge 'expert' needs the dataset's outcomes.jsonl" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples_per_prompt": 0}, "at least 1"),
        ({"confidence": 95}, "between 0 and 1"),
        ({"judge": "gpt"}, "bradley-terry"),
        ({"top_p": 0.9}, "no parameter 'top_p'"),
        ({"sample_per_prompt": 4}, "did you mean 'samples_per_prompt'"),
    ],
)
def test_wrong_parameters_are_refused_with_what_is_right(values, message):
    with pytest.raises(ConfigError, match=message):
        build_config(EvaluationConfig, values)
