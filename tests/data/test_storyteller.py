"""The storyteller writes as it says, and its reward is what anybody computes from the text."""

import json
import re

import numpy as np
import pytest
from datasets import load_from_disk
from softpref.data.config import DataConfig
from softpref.data.stage import run
from softpref.data.storyteller import DIMENSIONS, REWARD, Storyteller
from softpref.errors import DataError
from softpref.judges.loading import load_judge
from softpref.rewards import TextReward, read_rewards, write_rewards


def test_reward_by_hand():
    reward = TextReward({"kind": 1.0, "sad": -0.5}, ease=0.2, grade=1.0)
    # 8 words, 27 letters, 2 sentences
    text = " The KIND old bear sang. A kind song!"
    assert sum(map(len, re.findall("[A-Za-z]+", text))) == 27
    index = 4.71 * 27 / 8 + 0.5 * 8 / 2 - 21.43
    assert reward(text) == pytest.approx(1.0 + 0.2 * (1.0 - index))
    assert reward("Incomprehensibilities") == pytest.approx(-0.2 * 5.0)  # no text is bad without bounds
    assert reward("") == reward("… 12 !") == 0.0
    short = TextReward({}, brevity=0.25, usual=10)
    assert short(text) == pytest.approx(0.25 * 2)
    assert short("one " * 13) == pytest.approx(-0.25 * 3)
    assert short("one " * 99) == pytest.approx(-0.25 * 10)  # nor without bounds


def test_reward_file_is_read_back_or_refused(tmp_path):
    for rewards in ({"": REWARD}, DIMENSIONS):
        write_rewards(tmp_path / "reward.json", rewards)
        assert read_rewards(tmp_path / "reward.json") == rewards
    for text in (
        "{",
        "[]",
        '{"ease": 1}',
        '{"warmth": {"a": "b"}}',
        '{"warmth": {"a": NaN}}',
        '{"warmth": {}, "x": 1}',
        '{"warmth": {}, "usual": Infinity}',
        '{"dimensions": {"warmth": {}}}',
    ):
        (tmp_path / "reward.json").write_text(text)
        with pytest.raises(DataError, match=r"reward\.json"):
            read_rewards(tmp_path / "reward.json")


def test_stories_are_natural_text_of_many_lengths():
    world, random = Storyteller(), np.random.default_rng(0)
    stories = [world.story(world.prompts[i % len(world.prompts)], random) for i in range(3000)]
    assert len(set(stories)) > 2950  # too many to enumerate
    lengths = [len(story.split()) for story in stories]
    assert np.percentile(lengths, 5) < 16
    assert np.percentile(lengths, 95) > 38
    for story in stories:
        assert re.fullmatch(r"( (\"[A-Z][^{}\"]*,\" said [^{}\"]+\.|[A-Z][^{}\".]*\.))+", story), story
    rewards = np.array([REWARD(story) for story in stories])
    assert 1.0 < rewards.std() < 2.0
    assert abs(np.corrcoef(rewards, lengths)[0, 1]) < 0.2  # length alone is no good judge


def test_preferences_follow_bradley_terry():
    rows = list(Storyteller().preferences(4000, seed=1, votes=5))
    margins = np.array([REWARD(row["completion_a"]) - REWARD(row["completion_b"]) for row in rows])
    shares = np.array([row["votes_a"] / 5 for row in rows])
    expected = 1 / (1 + np.exp(-margins))
    for low, high in ((-4, -1.5), (-1.5, -0.5), (-0.5, 0.5), (0.5, 1.5), (1.5, 4)):
        among = (margins > low) & (margins <= high)
        error = np.sqrt((expected * (1 - expected))[among].mean() / 5 / among.sum())
        assert abs((shares - expected)[among].mean()) < 4 * error
    exact = next(Storyteller().preferences(1, seed=1, votes=0))
    margin = REWARD(exact["completion_a"]) - REWARD(exact["completion_b"])
    assert exact["probability"] == pytest.approx(1 / (1 + np.exp(-margin)))


def test_rankings_follow_plackett_luce():
    rows = list(Storyteller().rankings(3000, seed=2, size=3))
    rewards = np.array([[REWARD(story) for story in row["completions"]] for row in rows])
    chosen = np.exp(rewards[:, 0]) / np.exp(rewards).sum(1)  # Σ over rows of P(first | set) ≥ chance
    random = np.random.default_rng(0)
    drawn = np.array([random.choice(3, p=np.exp(r) / np.exp(r).sum()) for r in rewards])
    simulated = np.exp(rewards[np.arange(3000), drawn]) / np.exp(rewards).sum(1)
    assert abs(chosen.mean() - simulated.mean()) < 0.02
    best = next(Storyteller().rankings(1, seed=2, size=3, only_best=True))
    assert best["best"] == 0
    assert best["completions"][0] == rows[0]["completions"][0]


def test_dataset_folder_knows_its_reward(tmp_path):
    config = DataConfig("storyteller", rows=300, sft_rows=200, votes=0)
    stats = run(config, str(tmp_path / "data"))
    assert sum(stats["rows"].values()) == 300
    assert stats["labels"]["soft"] > 250
    judge = load_judge("auto", tmp_path / "data")
    assert judge.name == "expert"
    assert "reward" in judge.description
    texts = [" She hugged the sad mouse.", " It broke."]
    assert judge.scores(["any", "prompt"], texts).tolist() == [REWARD(text) for text in texts]
    assert json.loads((tmp_path / "data" / "reward.json").read_text())["warmth"]["hugged"] == 1.2
    again = run(config, str(tmp_path / "again"))
    assert again["dataset_hash"] == stats["dataset_hash"]


def test_dimensions_judge_the_same_stories_and_conflict_in_part(tmp_path):
    config = DataConfig(
        "storyteller", rows=400, sft_rows=50, votes=0, dimensions={"warmth": {}, "brevity": {}}
    )
    stats = run(config, str(tmp_path / "data"))
    assert stats["dimensions"] == {"brevity": 400, "warmth": 400}
    judge = load_judge("auto", tmp_path / "data")
    seen, agree = {}, []
    for split in load_from_disk(str(tmp_path / "data")).values():
        for row in split:
            first, second = (DIMENSIONS[row["dimension"]](text) for text in row["completions"])
            told = judge.dimensions[row["dimension"]].scores(["any"] * 2, row["completions"])
            assert told.tolist() == [first, second]
            expected = 1 / (1 + np.exp(second - first))
            assert (row["probability"] or 1.0) == pytest.approx(expected)
            other = seen.setdefault(row["source_row"], row["completions"])
            assert {*other} == {*row["completions"]}
            if other is not row["completions"]:
                agree.append(other == row["completions"])
    assert len(agree) == 400
    assert 0.3 < np.mean(agree) < 0.7
    texts = [" She hugged the sad mouse.", " It broke."]
    assert judge.scores(["any"] * 2, texts) == pytest.approx(
        [sum(reward(text) for reward in DIMENSIONS.values()) for text in texts]
    )
    rewards = [
        DIMENSIONS["brevity"](text)
        for row in load_from_disk(str(tmp_path / "data"))["train"]
        for text in row["completions"]
    ]
    assert 0.7 < np.std(rewards) < 2.0
