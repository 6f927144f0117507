"""Draws of the story world and the dataset of them: rankings follow Plackett-Luce, and pairs never change."""

import collections
import dataclasses
import hashlib
import itertools
import json

import datasets
import numpy as np
import pytest
from scipy.stats import chisquare
from softpref.config import build_config
from softpref.data.config import DataConfig
from softpref.data.splits import prompt_key
from softpref.data.stage import run
from softpref.data.story_world import STORIES, StoryWorld
from softpref.errors import ConfigError
from softpref.judges.outcomes import Outcomes

from tests.data.files import everything, lines

REWARDS = np.array([1.2, -0.4, 0.3, 0.0, -1.0])
WEIGHTS = np.array([0.1, 0.4, 0.2, 0.05, 0.25])


class FiveStories(StoryWorld):
    """A world of one prompt and five stories, called 0 to 4."""

    def __init__(self):
        self.prompts = ["tell\n"]

    def outcomes(self, prompt):
        return Outcomes([str(story) for story in range(5)], REWARDS, WEIGHTS)


def one_after_another(shares, order):
    """Probability of taking `order` one after another, in proportion to the `shares` of what is left."""
    left = sum(shares[i] for i in shares)
    probability = 1.0
    for story in order:
        probability *= shares[story] / left
        left -= shares[story]
    return probability


def exact_probabilities(only_best):
    """Every row that can be drawn, and its probability: draws by weight, then the expert's order."""
    found = collections.Counter()
    for drawn in itertools.permutations(range(5), 3):
        asked = one_after_another(dict(enumerate(WEIGHTS)), drawn)
        appeal = {story: np.exp(REWARDS[story]) for story in drawn}
        for order in itertools.permutations(drawn):
            best = order[0]
            row = (best, *(story for story in drawn if story != best)) if only_best else order
            found[row] += asked * one_after_another(appeal, order)
    return found


@pytest.mark.parametrize("only_best", [False, True])
def test_rows_follow_plackett_luce_and_the_writers_habits(only_best):
    count = 20_000
    draws = FiveStories().rankings(count, seed=1, size=3, only_best=only_best)
    seen = collections.Counter(tuple(map(int, row["completions"])) for row in draws)
    exact = exact_probabilities(only_best)
    assert len(exact) == 60
    assert sum(exact.values()) == pytest.approx(1)
    observed = np.array([seen[row] for row in exact])
    expected = count * np.array(list(exact.values()))
    assert chisquare(observed, expected).pvalue > 0.01
    # the test tells the two kinds of rows apart
    other = count * np.array([exact_probabilities(not only_best)[row] for row in exact])
    assert chisquare(observed, other).pvalue < 1e-6


def test_the_first_of_a_ranking_wins_as_often_as_plackett_luce_says():
    count = 20_000
    wins = collections.Counter(
        int(row["completions"][0]) for row in FiveStories().rankings(count, seed=2, size=5)
    )
    chances = np.exp(REWARDS) / np.exp(REWARDS).sum()  # all five are asked, whatever their weights
    assert chisquare([wins[story] for story in range(5)], count * chances).pvalue > 0.01


@pytest.mark.parametrize("only_best", [False, True])
def test_stories_of_a_row_are_distinct_and_belong_to_its_prompt(only_best):
    world = StoryWorld()
    for row in world.rankings(300, seed=0, size=6, only_best=only_best):
        assert len(set(row["completions"])) == 6
        assert set(row["completions"]) <= set(world.outcomes(row["prompt"]).completions)
        assert row.get("best") == (0 if only_best else None)


def test_a_row_may_hold_every_story():
    [row] = StoryWorld().rankings(1, seed=0, size=STORIES)
    assert len(set(row["completions"])) == STORIES == len(StoryWorld().outcomes(row["prompt"]).completions)


@pytest.mark.parametrize(
    ("votes", "digest"), [(1, "2f3d9c2c1fd06d1c"), (5, "71482d8fd527b623")], ids=["one vote", "five votes"]
)
def test_pairs_of_a_seed_never_change(votes, digest):
    rows = "".join(json.dumps(row) for row in StoryWorld().preferences(500, 3, votes))
    assert hashlib.sha256(rows.encode()).hexdigest()[:16] == digest


def test_writers_know_more_prompts_than_experts_judge():
    world = StoryWorld()
    judged = collections.Counter(row["prompt"] for row in world.preferences(2000, seed=0))
    written = collections.Counter(row["prompt"] for row in world.demonstrations(4000, seed=0))
    assert {*judged} == {*world.prompts}
    assert {*written} == {*world.prompts, *world.further_prompts}
    assert len(world.further_prompts) == len(world.prompts) == 64
    assert not {*world.prompts} & {*world.further_prompts}
    assert chisquare([*written.values()]).pvalue > 0.01


def test_each_trait_has_stories_that_are_written_more_often():
    world = StoryWorld()
    prompts = [prompt for prompt in (*world.prompts, *world.further_prompts) if "fox" in prompt]
    assert len(prompts) == 8
    for one, other in itertools.combinations(prompts, 2):
        assert abs(world.outcomes(one).weights - world.outcomes(other).weights).sum() > 0.2


def test_prompts_that_nobody_judged_are_further_prompts_of_the_kl_term(tmp_path):
    stats = run(DataConfig(rows=400, sft_rows=50), str(tmp_path / "data"))
    saved = datasets.load_from_disk(str(tmp_path / "data" / "prompts"))["prompt"]
    assert [*saved] == StoryWorld().further_prompts
    assert stats["extra_prompts"] == {"train": 64, "held_out": 0, "rejected": {}}
    known = {json.loads(line)["prompt"] for line in (tmp_path / "data" / "outcomes.jsonl").open()}
    assert known == {*StoryWorld().prompts}


def test_a_source_of_further_prompts_takes_their_place(tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "Write about a fox."}\n', encoding="utf-8")
    run(DataConfig(rows=400, sft_rows=50, prompts_source=str(source)), str(tmp_path / "data"))
    saved = datasets.load_from_disk(str(tmp_path / "data" / "prompts"))["prompt"]
    assert [*saved] == ["Write about a fox."]


@pytest.mark.parametrize("kind", ["ranking", "best_of_n"])
def test_the_data_stage_saves_rows_of_the_kind_asked_for(tmp_path, kind):
    stats = run(DataConfig(rows=300, sft_rows=50, story_kind=kind, group_size=5), str(tmp_path / "data"))
    assert stats["kinds"] == {kind: 300}
    assert stats["completions_per_row"] == {"5": 300}
    assert stats["labels"] == {"hard": 300, "soft": 0}
    assert stats["rejected"] == {} == stats["left_out"]
    drawn = StoryWorld().rankings(300, seed=0, size=5, only_best=kind == "best_of_n")
    expected = {number: row["completions"] for number, row in enumerate(drawn, start=1)}
    saved = datasets.load_from_disk(str(tmp_path / "data"))
    rows = {row["source_row"]: row for split in saved.values() for row in split}
    assert {number: row["completions"] for number, row in rows.items()} == expected
    assert {(row["kind"], row["probability"]) for row in rows.values()} == {(kind, None)}
    assert (tmp_path / "data" / "outcomes.jsonl").is_file()


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """The story world's dataset, with votes of five experts."""
    folder = tmp_path_factory.mktemp("story") / "dataset"
    stats = run(DataConfig(rows=1500, sft_rows=1500, votes=5), str(folder))
    return folder, stats


def test_the_folder_has_the_documented_layout(story):
    folder, stats = story
    saved = datasets.load_from_disk(str(folder))
    assert list(saved) == ["train", "validation", "test"]
    for split in saved.values():
        assert split.column_names == ["prompt", "completions", "kind", "probability", "source_row"]
    assert {split: len(rows) for split, rows in saved.items()} == stats["rows"]
    assert sum(stats["rows"].values()) == 1500
    assert stats["prompts"] == {"train": 52, "validation": 6, "test": 6}
    assert sorted(row["source_row"] for row in everything(folder)) == list(range(1, 1501))
    assert json.loads((folder / "stats.json").read_text()) == stats
    assert lines(folder / "rejected.jsonl") == []
    assert [*datasets.load_from_disk(str(folder / "prompts"))["prompt"]] == StoryWorld().further_prompts
    assert not (folder / "work").exists()


def test_prompts_never_cross_splits(story):
    folder, _ = story
    saved = datasets.load_from_disk(str(folder))
    prompts = {split: {prompt_key(prompt) for prompt in rows["prompt"]} for split, rows in saved.items()}
    assert not prompts["train"] & prompts["validation"]
    assert not (prompts["train"] | prompts["validation"]) & prompts["test"]


def test_the_reference_never_sees_a_test_prompt(story):
    folder, stats = story
    saved, demonstrations = datasets.load_from_disk(str(folder)), datasets.load_from_disk(str(folder / "sft"))
    known = {*saved["train"]["prompt"], *StoryWorld().further_prompts}
    assert {*demonstrations["train"]["prompt"]} == known
    assert set(demonstrations["validation"]["prompt"]) == set(saved["validation"]["prompt"])
    assert demonstrations["train"].column_names == ["prompt", "completion"]
    assert stats["sft"]["train"] + stats["sft"]["validation"] + stats["sft"]["held_out"] == 1500


def _binomial(n, p):
    import math

    return [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]


def test_story_preferences_follow_the_rewards_in_outcomes(story):
    folder, _ = story
    rewards, listed = {}, lines(folder / "outcomes.jsonl")
    for outcome in listed:
        assert len(set(outcome["completions"])) == len(outcome["rewards"]) == len(outcome["weights"])
        assert np.sum(outcome["weights"]) == pytest.approx(1)
        for completion, reward in zip(outcome["completions"], outcome["rewards"], strict=True):
            rewards[outcome["prompt"], completion] = reward
    shares, expected = [], []
    for row in everything(folder):
        first, second = (rewards[row["prompt"], completion] for completion in row["completions"])
        shares.append(row["probability"])
        # The better of five votes comes first: E[max(K, 5 − K)] / 5 for K ~ Binomial(5, p).
        p = 1 / (1 + np.exp(second - first))
        chances = [np.math.comb(5, k) * p**k * (1 - p) ** (5 - k) for k in range(6)] if False else None
        expected.append(sum(max(k, 5 - k) / 5 * c for k, c in enumerate(_binomial(5, p))))
        assert chances is None
    assert np.mean(shares) == pytest.approx(np.mean(expected), abs=0.01)


def test_exact_probabilities_are_the_bradley_terry_ones(tmp_path):
    run(DataConfig(rows=300, sft_rows=50, votes=0), str(tmp_path / "data"))
    rewards = {
        (outcome["prompt"], completion): reward
        for outcome in lines(tmp_path / "data" / "outcomes.jsonl")
        for completion, reward in zip(outcome["completions"], outcome["rewards"], strict=True)
    }
    for row in everything(tmp_path / "data"):
        first, second = (rewards[row["prompt"], completion] for completion in row["completions"])
        assert row["probability"] == pytest.approx(1 / (1 + np.exp(second - first)))
        assert first >= second - 1e-9


def test_a_single_vote_is_a_hard_label(tmp_path):
    stats = run(DataConfig(rows=300, sft_rows=50), str(tmp_path / "data"))
    assert stats["labels"] == {"hard": 300, "soft": 0}
    assert {row["probability"] for row in everything(tmp_path / "data")} == {None}


def test_the_same_configuration_gives_the_same_rows_and_another_seed_others(tmp_path):
    config = DataConfig(rows=300, sft_rows=50)
    first, again = (run(config, str(tmp_path / name)) for name in ("first", "again"))
    assert first == again
    assert everything(tmp_path / "first") == everything(tmp_path / "again")
    other = run(dataclasses.replace(config, seed=1), str(tmp_path / "other"))
    assert other["dataset_hash"] != first["dataset_hash"]
    assert other["test_hash"] != first["test_hash"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"votes": 5}, "one expert gives it"),
        ({"votes": 0}, "goes with votes 1, got 0"),
        ({"group_size": 2}, "for two, take story_kind 'pairwise'"),
        ({"group_size": STORIES + 1}, "3 to 1,296 stories"),
        ({"source": "rows.jsonl"}, "list_kind says how its lists are read"),
        ({"list_kind": "best_of_n"}, "take story_kind 'best_of_n'"),
        ({"story_kind": "rankings"}, "'pairwise' | 'best_of_n' | 'ranking'"),
    ],
)
def test_what_does_not_go_with_lists_is_refused(values, message):
    with pytest.raises(ConfigError) as caught:
        build_config(DataConfig, {"story_kind": "ranking"} | values)
    assert message in str(caught.value)
