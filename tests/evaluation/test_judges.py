"""Judges: what they score, and how far a trained one can be trusted."""

import json

import numpy as np
import pytest
from softpref.errors import ConfigError, DataError
from softpref.evaluation.judges import (
    BradleyTerryJudge,
    ExpertJudge,
    Outcomes,
    preference_pairs,
    read_outcomes,
)

ADJECTIVES = {"kind": 1.5, "warm": 1.0, "plain": 0.0, "rude": -1.0, "cruel": -1.5}
NOUNS = ["stone", "river", "song", "road", "tree", "lamp"]


def planted_pairs(prompts, count, seed, soft=False):
    """Pairs whose reward is that of the adjective they hold."""
    random = np.random.default_rng(seed)
    for number in range(count):
        words = [
            f"a {random.choice(list(ADJECTIVES))} {random.choice(NOUNS)} by the {random.choice(NOUNS)}"
            for _ in range(2)
        ]
        rewards = [ADJECTIVES[text.split()[1]] for text in words]
        share = 1 / (1 + np.exp(rewards[1] - rewards[0]))
        if not soft:
            share = float(random.random() < share)
        if share < 0.5:
            words, share = words[::-1], 1 - share
        yield prompts[number % len(prompts)], words[0], words[1], share


@pytest.mark.parametrize("soft", [False, True])
def test_trained_judge_learns_a_planted_preference_in_nats(soft):
    judge = BradleyTerryJudge(planted_pairs(["p", "q", "r"], 1500, 0, soft))
    texts = [f"a {adjective} {noun} by the road" for adjective in ADJECTIVES for noun in NOUNS]
    scores = judge.scores(["new prompt"] * len(texts), texts).reshape(len(ADJECTIVES), -1).mean(1)
    truth = np.array(list(ADJECTIVES.values()))
    assert np.corrcoef(scores, truth)[0, 1] > 0.97
    slope = np.polyfit(truth - truth.mean(), scores - scores.mean(), 1)[0]
    assert 0.7 < slope < 1.2  # calibrated: a nat is a nat


def test_trained_judge_is_deterministic_by_seed():
    first, second = (BradleyTerryJudge(planted_pairs(["p", "q"], 300, 0), seed=4) for _ in range(2))
    texts = ["a kind lamp by the tree", "a rude song by the road"]
    assert np.array_equal(first.scores(["p"] * 2, texts), second.scores(["p"] * 2, texts))
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != BradleyTerryJudge(planted_pairs(["p", "q"], 300, 1), seed=4).fingerprint


def test_trained_judge_takes_no_more_pairs_than_asked():
    assert "100 pairs" in BradleyTerryJudge(planted_pairs(["p"], 300, 0), max_rows=100).description


@pytest.mark.parametrize("pairs", [[], [("p", "x", "y", 0.5), ("q", "x", "y", 0.5)]])
def test_trained_judge_needs_preferences(pairs):
    with pytest.raises(ConfigError, match="needs"):
        BradleyTerryJudge(pairs)


def test_expert_scores_known_texts_and_puts_strangers_below_the_worst():
    judge = ExpertJudge({"p": Outcomes(["good", "bad"], np.array([2.0, -1.0]), np.array([0.5, 0.5]))})
    assert judge.scores(["p"] * 3, ["bad", " good\n", "else"]).tolist() == [-1.0, 2.0, -2.0]
    assert judge.outside(["p"] * 3, ["bad", " good\n", "else"]).tolist() == [False, False, True]
    with pytest.raises(DataError, match="no prompt 'q'"):
        judge.scores(["q"], ["good"])


def test_damaged_outcomes_are_refused_by_line(tmp_path):
    path = tmp_path / "outcomes.jsonl"
    good = {"prompt": "p", "completions": ["a"], "rewards": [1.0], "weights": [1.0]}
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | {"rewards": [1.0, 2.0]}) + "\n")
    with pytest.raises(DataError, match=r"line 2.*differ in length"):
        read_outcomes(path)


def test_rankings_give_all_ordered_pairs_and_best_of_n_only_the_best():
    row = {"prompt": "p", "completions": ["a", "b", "c"], "probability": None}
    ranked = list(preference_pairs([row | {"kind": "ranking"}]))
    assert [pair[1:3] for pair in ranked] == [("a", "b"), ("a", "c"), ("b", "c")]
    best = list(preference_pairs([row | {"kind": "best_of_n"}]))
    assert [pair[1:3] for pair in best] == [("a", "b"), ("a", "c")]
    soft = {"prompt": "p", "completions": ["a", "b"], "probability": 0.75, "kind": "pairwise"}
    assert list(preference_pairs([soft])) == [("p", "a", "b", 0.75)]
