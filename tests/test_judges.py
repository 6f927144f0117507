"""Judges: what they score, and how far a trained one can be trusted."""

import json
import subprocess
import sys

import numpy as np
import pytest
from softpref.errors import ConfigError, DataError
from softpref.judges.bradley_terry import BradleyTerryJudge
from softpref.judges.expert import ExpertJudge
from softpref.judges.loading import check_judge, load_judge
from softpref.judges.outcomes import Outcomes, read_outcomes
from softpref.judges.texts import preference_pairs

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
    for damaged in (
        b'{"prompt": "\xff"}',
        b"[" * 100_000,
        b"7",
        json.dumps(good | {"weights": 1.0}).encode(),
    ):
        path.write_bytes(json.dumps(good).encode() + b"\n" + damaged + b"\n")
        with pytest.raises(DataError, match=r"outcomes\.jsonl, line 2: expected prompt"):
            read_outcomes(path)


def test_rankings_give_all_ordered_pairs_and_best_of_n_only_the_best():
    row = {"prompt": "p", "completions": ["a", "b", "c"], "probability": None}
    ranked = list(preference_pairs([row | {"kind": "ranking"}]))
    assert [pair[1:3] for pair in ranked] == [("a", "b"), ("a", "c"), ("b", "c")]
    best = list(preference_pairs([row | {"kind": "best_of_n"}]))
    assert [pair[1:3] for pair in best] == [("a", "b"), ("a", "c")]
    soft = {"prompt": "p", "completions": ["a", "b"], "probability": 0.75, "kind": "pairwise"}
    assert list(preference_pairs([soft])) == [("p", "a", "b", 0.75)]


def test_probabilities_follow_from_scores_by_bradley_terry():
    judge = ExpertJudge({"p": Outcomes(["good", "bad"], np.array([2.0, -1.0]), np.array([0.5, 0.5]))})
    chances = judge.probabilities(["p"] * 3, ["good", "bad", "good"], ["bad", "good", "good"])
    assert chances == pytest.approx([1 / (1 + np.exp(-3)), 1 / (1 + np.exp(3)), 0.5])
    assert judge.probabilities([], [], []).shape == (0,)


def test_a_judge_is_loaded_by_name_from_a_dataset_folder(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "completions": [[{"role": "assistant", "content": text}] for text in (better, worse)],
            "kind": "pairwise",
            "probability": share,
        }
        for prompt, better, worse, share in planted_pairs(["p", "q", "r"], 60, 0)
    ]
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(str(tmp_path))
    trained = load_judge("auto", tmp_path, seed=3, max_rows=50)
    assert trained.name == "bradley-terry"
    assert "50 pairs" in trained.description
    texts = [("user: " + prompt, *rest) for prompt, *rest in planted_pairs(["p", "q", "r"], 60, 0)]
    assert trained.fingerprint == BradleyTerryJudge(texts, seed=3, max_rows=50).fingerprint
    with pytest.raises(ConfigError, match=r"'expert' needs.*outcomes\.jsonl or reward\.json"):
        check_judge("expert", tmp_path)
    with pytest.raises(ConfigError, match="expert, bradley-terry, reward-model, llm, got 'experts'"):
        load_judge("experts", tmp_path)

    known = {"prompt": "p", "completions": ["a", "b"], "rewards": [1.0, 0.0], "weights": [0.5, 0.5]}
    (tmp_path / "outcomes.jsonl").write_text(json.dumps(known) + "\n")
    check_judge("expert", tmp_path)
    expert = load_judge("auto", tmp_path)
    assert expert.name == "expert"
    assert expert.scores(["p"], ["a"]).tolist() == [1.0]
    assert load_judge("bradley-terry", tmp_path).name == "bradley-terry"
    given = {"p": Outcomes(["a"], np.array([5.0]), np.array([1.0]))}
    assert load_judge("expert", tmp_path, outcomes=given).scores(["p"], ["a"]).tolist() == [5.0]


def test_judges_can_be_imported_without_the_libraries_they_may_need():
    code = (
        "import sys, softpref.judges; "
        "print(*{'sklearn', 'scipy', 'datasets', 'mlflow', 'torch'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not out.strip()
