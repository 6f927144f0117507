"""Figures of held-out preferences, by log-probabilities of transformers alone."""

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from softpref.evaluation.measure import implied_preferences
from softpref.lm.loading import load_model, load_tokenizer
from softpref.lm.tokenization import stop_token_ids, tokenize_row


def test_accuracies_go_by_the_policy_by_the_reference_and_by_their_difference(world, evaluation):
    """The right values: log-probabilities by transformers' own logits, one sequence at a time."""
    rows = load_from_disk(str(world.dataset))["test"]
    tokenizer = load_tokenizer(str(world.policy))
    logps = {side: [] for side in ("policy", "reference")}
    for side, found in logps.items():
        model = load_model(str(getattr(world, side))).eval()
        stops = stop_token_ids(tokenizer, model)
        for row in rows:
            pair = []
            for one in tokenize_row(tokenizer, row["prompt"], row["completions"], stop_ids=stops):
                ids = torch.tensor([[*one.prompt, *one.completion]])
                with torch.no_grad():
                    scores = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
                pair.append(float(scores[-len(one.completion) :].sum()))
            found.append(pair)
    ours, theirs = (np.array(logps[side]) for side in ("policy", "reference"))
    shares = np.array([1.0 if share is None else share for share in rows["probability"]])
    side = np.sign(shares - 0.5)
    metrics = {name: figure["value"] for name, figure in evaluation["metrics"].items()}
    for name, scores in {"preference": ours, "relative": ours - theirs, "reference": theirs}.items():
        margins = (scores[:, 0] - scores[:, 1])[side != 0] * side[side != 0]
        assert metrics[f"{name}_accuracy"] == pytest.approx((margins > 0).mean()), name
    implied = 1 / (1 + np.exp(ours[:, 1] - ours[:, 0]))  # α = 1, anchor 0
    loss = -shares * np.log(implied) - (1 - shares) * np.log(1 - implied)
    assert metrics["implied_log_loss"] == pytest.approx(loss.mean(), rel=1e-4)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"method": "spo", "alpha": 0.5, "anchor": 1.0, "beta": 0.1}, (0.5, 1.0)),
        ({"method": "spo", "alpha": 2.0}, (2.0, 0.0)),
        ({"method": "spo", "alpha": 0.0}, None),
        ({"method": "dpo", "beta": 0.1}, (0.1, 1.0)),
        ({"method": "ipo", "beta": 0.1}, None),
        ({}, None),
    ],
)
def test_only_a_loss_that_is_a_likelihood_of_preferences_implies_any(metadata, expected):
    assert implied_preferences(metadata) == expected


@pytest.mark.usefixtures("recorded")
def test_all_held_out_rows_count_and_max_prompts_limits_the_samples_alone(world, evaluating, tmp_path):
    metrics = evaluating(world, tmp_path / "out", max_prompts=2)["metrics"]
    assert metrics["preference_accuracy"]["prompts"] == 3
    assert metrics["kl_sequence"]["prompts"] == 2
    fewer = evaluating(world, tmp_path / "fewer", max_rows=20)["metrics"]
    assert fewer["preference_accuracy"]["n"] == 20
