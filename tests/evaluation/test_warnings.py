"""What an evaluation warns of."""

import shutil

import pytest
import torch
from softpref.fitness import ailments
from softpref.lm.loading import load_model
from softpref.records.evaluation import Evaluation
from softpref.records.model import save_metadata

from tests.evaluation.conftest import copy_policy


def test_few_prompts_and_strange_samples_are_warned_of(evaluation):
    text = " ".join(evaluation["warnings"])
    assert "Only 3 held-out prompts" in text
    assert "outside the set" in text


@pytest.mark.usefixtures("recorded")
def test_a_policy_of_other_data_is_warned_of(world, evaluating, tmp_path):
    policy = copy_policy(world, tmp_path / "policy", dataset_hash="xyz")
    evaluation = evaluating(world, tmp_path / "out", policy=policy, exact_prompts=0)
    assert any("another dataset" in text for text in evaluation["warnings"])
    assert evaluation["exact"] is None


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    ("anchor", "remedy"),
    [(0.0, "set anchor to 1 (softness relative to the reference)"), (1.0, "lower alpha")],
)
def test_saturation_in_training_is_said_in_the_report(world, evaluating, tmp_path, anchor, remedy):
    policy = copy_policy(world, tmp_path / "policy", saturated=0.93, anchor=anchor)
    evaluation = evaluating(world, tmp_path / "out", policy=policy, exact_prompts=0)
    [said] = [text for text in evaluation["warnings"] if "softness has no effect" in text]
    assert said.startswith("In training 93% of the pairs have a margin beyond 5 nats")
    assert said.endswith(f"{remedy}.")
    assert evaluation["anchor"] == anchor
    page = (tmp_path / "out" / "report.html").read_text()
    assert ("Softness α = 1, relative to the reference" in page) is bool(anchor)


@pytest.mark.usefixtures("recorded")
def test_what_training_left_out_or_cut_is_said_in_the_report(world, evaluating, tmp_path):
    counts = {"given": 9, "left_out": 2, "cut_completion": 2, "cut_prompt": 3}
    policy = copy_policy(
        world, tmp_path / "policy", row_counts={"train": counts}, cut_rows="leave_out", max_prompt_length=2
    )
    evaluation = evaluating(world, tmp_path / "out", policy=policy, exact_prompts=0)
    said = [
        "2 of 9 training rows have a completion longer than max_completion_length, and were left out.",
        "3 of 9 training rows have a prompt longer than max_prompt_length, which lost its beginning.",
        "60 of 60 held-out rows have a prompt longer than max_prompt_length, which lost its beginning.",
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    for text in said:
        assert text in evaluation["warnings"]
        assert text in page


def test_models_that_were_broken_on_purpose_are_told_from_sharper_and_softer_ones(
    world, evaluating, tmp_path, recorded
):
    """From weights to choice: one sentence over and over, and random tokens; scaled logits are no fault."""
    from softpref.evaluation import compare

    def save(name, change, metadata=None):
        folder = tmp_path / name
        shutil.copytree(world.policy, folder)
        model = load_model(str(world.reference))
        with torch.no_grad():
            model.lm_head.weight.mul_(2.5)  # fewer likely continuations than random weights have
            change(model)
        model.save_pretrained(folder)
        save_metadata(
            folder, {"name": name, "method": "spo", "max_completion_length": 24, **(metadata or {})}
        )
        return folder

    def sentence(model):
        """Each token is followed by one other, in a circle."""
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        circle = [6, 10, 13, 7, 16]
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[1:] = torch.eye(16)
        model.lm_head.weight.zero_()
        for token in range(1, 17):
            after = circle[(circle.index(token) + 1) % 5] if token in circle else circle[0]
            model.lm_head.weight[after, token - 1] = 10.0

    reference = save("reference", lambda model: None)
    members = {
        "sharper": (lambda model: model.lm_head.weight.mul_(1.4), 0.5),
        "softer": (lambda model: model.lm_head.weight.mul_(0.8), 2.0),
        "repeating": (sentence, 4.0),
        "random": (lambda model: model.lm_head.weight.zero_(), 8.0),
    }
    found = {}
    for name, (change, alpha) in members.items():
        policy = save(name, change, {"alpha": alpha, "beta": 0.1})
        found[name] = evaluating(
            world, tmp_path / f"{name}-evaluation", policy=policy, reference=reference, samples_per_prompt=40
        )
    metrics = {name: evaluation["metrics"] for name, evaluation in found.items()}
    assert (
        metrics["random"]["cross_entropy"]["value"]
        > 2 + metrics["random"]["reference_cross_entropy"]["value"]
    )
    assert metrics["repeating"]["repetition"]["value"] > 0.7
    assert metrics["sharper"]["kl_token"]["value"] == pytest.approx(
        metrics["sharper"]["kl_sequence"]["value"] / metrics["sharper"]["completion_length"]["value"]
    )
    result = compare.run([str(tmp_path / f"{name}-evaluation") for name in members], str(tmp_path / "out"))
    assert result.chosen in ("sharper", "softer")
    assert [name for name, evaluation in found.items() if ailments(Evaluation.of(evaluation))] == [
        "repeating",
        "random",
    ]
    assert "repeats itself: " in found["repeating"]["warnings"][-1]
    assert "writes what its reference would not: " in found["random"]["warnings"][-1]
    for name in ("repeating", "random"):
        assert f"{name} " in result.reason.partition("Never chosen: ")[2]
