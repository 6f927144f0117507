"""Rows judged by several dimensions: how their labels are read, and what the dataset holds of them."""

import json
import math

import datasets
import numpy as np
import pytest
from scipy.stats import binomtest
from softpref.config import build_config
from softpref.data.config import DataConfig
from softpref.data.splits import prompt_key
from softpref.data.stage import run
from softpref.data.story_world import StoryWorld
from softpref.errors import ConfigError, DataError
from softpref.judges.outcomes import read_outcomes

from tests.data.files import write

OBJECTS = {"completion_a": "A", "completion_b": "B"}


def prepared(tmp_path, records, **options):
    """The rows of the dataset made of `records`: of each source row, by dimension, what it holds."""
    source = write(tmp_path / "rows.jsonl", records)
    stats = run(DataConfig(source=source, **options), str(tmp_path / "data"))
    found = {}
    for split in datasets.load_from_disk(str(tmp_path / "data")).values():
        for row in split:
            found.setdefault(row["source_row"], {})[row["dimension"]] = (
                [text.split()[0] for text in row["completions"]],
                row["probability"],
            )
    return found, stats


def rejected(tmp_path):
    lines = (tmp_path / "data" / "rejected.jsonl").read_text().splitlines()
    return [(line["place"], line["reason"], line["kind"]) for line in map(json.loads, lines)]


def safe(number, better, safer):
    """A row as PKU-SafeRLHF has it."""
    return {
        "prompt": f"Question {number}?",
        "response_0": f"zero {number}",
        "response_1": f"one {number}",
        "better_response_id": better,
        "safer_response_id": safer,
    }


def test_two_labels_of_a_pair_become_two_rows(tmp_path):
    rows = [safe(number, number % 2, 1) for number in range(20)]
    found, stats = prepared(tmp_path, rows)
    for number in range(20):
        order = ["one", "zero"] if number % 2 else ["zero", "one"]
        assert found[number + 1] == {"helpful": (order, None), "harmless": (["one", "zero"], None)}
    assert stats["dimensions"] == {"harmless": 20, "helpful": 20}
    assert stats["contradictions"] == {"sets": 0, "rows": 0}  # dimensions may disagree
    assert any("helpful, harmless" in note for note in stats["mapping"]["notes"])
    page = (tmp_path / "data" / "page.html").read_text()
    assert "dimension harmless" in page
    assert "best ← safer_response_id" in page


def test_the_rows_of_a_prompt_share_a_split_whatever_their_dimension(tmp_path):
    prepared(tmp_path, [safe(number, 0, 1) for number in range(40)])
    saved = datasets.load_from_disk(str(tmp_path / "data"))
    splits = {}
    for name, split in saved.items():
        for prompt in split["prompt"]:
            splits.setdefault(prompt_key(prompt), set()).add(name)
    assert {len(names) for names in splits.values()} == {1}
    assert len(splits) == 40


def test_columns_of_other_names_are_named_by_dimension(tmp_path):
    rows = [
        {"q": f"Question {i}?", "x": f"first {i}", "y": f"second {i}", "help": "b", "safe": 0.9}
        for i in range(20)
    ]
    found, _ = prepared(
        tmp_path,
        rows,
        columns={"prompt": "q", "completion_a": "x", "completion_b": "y"},
        dimensions={"helpful": {"preference": "help"}, "harmless": {"probability": "safe"}},
    )
    assert found[1] == {"helpful": (["second", "first"], None), "harmless": (["first", "second"], 0.9)}


def test_a_probability_may_be_an_object(tmp_path):
    rows = [
        {
            "prompt": f"Question {i}?",
            "chosen": f"first {i}",
            "rejected": f"second {i}",
            "probability": {"helpful": 0.8, "harmless": 0.3},
        }
        for i in range(20)
    ]
    rows[4]["probability"] = {"helpful": 0.8, "harmless": None}
    rows[5]["probability"] = {"helpful": 1.8, "harmless": 0.3}
    found, stats = prepared(tmp_path, rows)
    one = {"helpful": (["first", "second"], 0.8), "harmless": (["second", "first"], pytest.approx(0.7))}
    assert found[1] == one
    assert found[5] == {"helpful": one["helpful"]}
    assert found[6] == {"harmless": one["harmless"]}
    assert stats["left_out"] == {"dimension without a label": 1}
    assert stats["rejected"] == {"probability is outside 0 to 1": 1}
    assert rejected(tmp_path) == [
        ("rows.jsonl:5", "dimension without a label: harmless", "left out"),
        ("rows.jsonl:6", "probability is outside 0 to 1: dimension helpful, 1.8", "refused"),
    ]
    only, _ = prepared(tmp_path, rows, dimensions={"harmless": {}})
    assert only[1] == {"harmless": one["harmless"]}


def test_ratings_of_the_responses_of_a_prompt_become_pairs_and_ties_are_dropped(tmp_path):
    ratings = [((4, 2), (1, 1)), ((0, 3), (2, 4))]  # (helpfulness, verbosity) of two responses
    rows = [
        {
            "prompt": f"Question {number}?",
            "response": f"{word} {number}",
            "helpfulness": helpful,
            "correctness": 3,
            "coherence": 3,
            "complexity": 1,
            "verbosity": verbose,
        }
        for number in range(20)
        for word, helpful, verbose in zip(("first", "second"), *ratings[number % 2], strict=True)
    ]
    found, stats = prepared(tmp_path, rows, ties="drop")
    assert stats["dimensions"] == {"helpfulness": 20, "verbosity": 10}
    assert found[1] == {"helpfulness": (["first", "second"], None)}
    assert found[3] == {"helpfulness": (["second", "first"], None), "verbosity": (["second", "first"], None)}
    assert stats["left_out"] == {"tie": 2 * (20 * 3 + 10)}


def test_a_file_for_each_dimension(tmp_path):
    def pairs(word, count):
        return [
            {"prompt": f"Question {i}?", "chosen": f"{word} {i}", "rejected": f"other {i}"}
            for i in range(count)
        ]

    other = write(tmp_path / "harmless.jsonl", pairs("harmless", 8))
    found, stats = prepared(
        tmp_path,
        pairs("helpful", 20),
        dimensions={"helpful": {}},
        mixture={other: {"dimensions": {"harmless": {}}}},
    )
    assert stats["dimensions"] == {"harmless": 8, "helpful": 20}
    assert found[1] == {"helpful": (["helpful", "other"], None), "harmless": (["harmless", "other"], None)}
    assert [one["rows"] for one in stats["mixture"]] == [20, 8]
    assert [one["share"] for one in stats["mixture"]] == pytest.approx([20 / 28, 8 / 28])


def test_rows_that_name_their_dimension_and_datasets_read_again(tmp_path):
    rows = [
        {"prompt": f"Question {i}?", "chosen": f"good {i}", "rejected": f"bad {i}", "dimension": name}
        for i in range(20)
        for name in ("helpful", "harmless")
    ]
    rows[3]["dimension"] = ["harmless"]
    _, stats = prepared(tmp_path, rows)
    assert stats["dimensions"] == {"harmless": 19, "helpful": 20}
    assert stats["duplicates"] == 0
    assert stats["rejected"] == {"dimension is not a name of up to 40 letters and digits": 1}
    taken = run(DataConfig(source=str(tmp_path / "data")), str(tmp_path / "taken"))
    assert taken["dataset_hash"] == stats["dataset_hash"]
    split = run(DataConfig(source=str(tmp_path / "data"), split="train"), str(tmp_path / "split"))
    kept = datasets.load_from_disk(str(tmp_path / "data"))["train"]["dimension"]
    assert split["dimensions"] == {name: list(kept).count(name) for name in ("harmless", "helpful")}


def test_the_dimension_is_part_of_what_a_dataset_is(tmp_path):
    hashes = set()
    for name in ("helpful", "harmless", None):
        rows = [
            {"prompt": f"Q {i}?", "chosen": f"good {i}", "rejected": f"bad {i}", "dimension": name}
            for i in range(20)
        ]
        source = write(tmp_path / "rows.jsonl", rows)
        hashes.add(run(DataConfig(source=source), str(tmp_path / "data"))["dataset_hash"])
    del rows[0]["dimension"]
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimensions": {"help/ful": {}}}, "names of up to 40 letters and digits"),
        ({"dimensions": {"helpful": "better"}}, r"got 'helpful': 'better'"),
        ({"dimensions": {"helpful": {"best": "x"}}}, "so columns must name prompt and completions"),
        (
            {"columns": {"chosen": "a", "rejected": "b"}, "dimensions": {"helpful": {"bets": "x"}}},
            "did you mean 'best'",
        ),
        ({"source": "story", "dimensions": {"size": {}}}, "has the dimensions trait, brevity"),
        ({"source": "story", "dimensions": {"trait": {"best": "x"}}}, "each without roles"),
    ],
)
def test_wrong_dimensions_are_refused_at_once(options, message):
    with pytest.raises(ConfigError, match=message):
        build_config(DataConfig, {"source": "rows.jsonl", **options})


@pytest.mark.parametrize(
    ("dimensions", "message"),
    [
        ({"helpful": {"best": "better"}, "harmless": {"best": "safer"}}, "has no column 'safer'"),
        ({"helpful": {"best": "better"}, "harmless": {"best": "better"}}, "have the same label"),
    ],
)
def test_columns_of_dimensions_are_looked_up_before_rows_are_read(tmp_path, dimensions, message):
    rows = [{"prompt": f"Q {i}?", "x": "a", "y": "b", "better": 0} for i in range(5)]
    columns = {"prompt": "prompt", "completions": ["x", "y"]}
    with pytest.raises(ConfigError, match=message):
        prepared(tmp_path, rows, columns=columns, dimensions=dimensions)


def test_a_dimension_that_no_row_has_is_an_error(tmp_path):
    rows = [
        {"prompt": f"Q {i}?", "chosen": "a", "rejected": "b", "probability": {"helpful": None}}
        for i in range(5)
    ]
    with pytest.raises(DataError, match=r"none of the 5 rows .* dimension without a label"):
        prepared(tmp_path, rows, dimensions={"helpful": {}})


# The story world


def test_the_dimensions_of_the_story_world_conflict_in_part():
    world = StoryWorld(["trait", "brevity"])
    for prompt in world.prompts[::16]:
        outcomes = world.outcomes(prompt)
        trait, brevity = (outcomes.dimensions[name] for name in ("trait", "brevity"))
        assert np.array_equal(outcomes.rewards, trait + brevity)
        assert np.array_equal(trait, StoryWorld().outcomes(prompt).rewards)
        assert np.array_equal(outcomes.weights, StoryWorld().outcomes(prompt).weights)
        lengths = np.array([len(text) for text in outcomes.completions])
        assert np.allclose(brevity - brevity[0], 0.15 * (lengths[0] - lengths))
        disagree = np.sign(np.subtract.outer(trait, trait)) * np.sign(np.subtract.outer(brevity, brevity)) < 0
        assert 0.35 < disagree.mean() < 0.6
        best = [int(np.argmax(reward)) for reward in (trait, brevity)]
        assert best[0] != best[1]


def test_experts_judge_the_same_pair_by_each_dimension(tmp_path):
    config = DataConfig(rows=400, votes=0, sft_rows=50, dimensions={"trait": {}, "brevity": {}})
    stats = run(config, str(tmp_path / "data"))
    assert stats["dimensions"] == {"brevity": 400, "trait": 400}
    outcomes = read_outcomes(tmp_path / "data" / "outcomes.jsonl")
    plain = {row["prompt"] + row["completion_a"] for row in StoryWorld().preferences(400, 0, 0)}
    seen = set()
    for split in datasets.load_from_disk(str(tmp_path / "data")).values():
        for row in split:
            known = outcomes[row["prompt"]]
            places = [known.completions.index(text) for text in row["completions"]]
            first, second = known.dimensions[row["dimension"]][places]
            assert row["probability"] == pytest.approx(1 / (1 + math.exp(second - first)))
            seen.add(row["prompt"] + row["completions"][0])
            seen.add(row["prompt"] + row["completions"][1])
    assert plain <= seen  # the pairs are those of the world without dimensions


@pytest.mark.parametrize("kind", ["ranking", "best_of_n"])
def test_rankings_go_by_each_dimension(tmp_path, kind):
    config = DataConfig(
        rows=300, story_kind=kind, group_size=3, sft_rows=50, dimensions={"trait": {}, "brevity": {}}
    )
    stats = run(config, str(tmp_path / "data"))
    assert stats["kinds"] == {kind: 600}
    outcomes = read_outcomes(tmp_path / "data" / "outcomes.jsonl")
    wins, chances = {"trait": 0, "brevity": 0}, {"trait": [], "brevity": []}
    for split in datasets.load_from_disk(str(tmp_path / "data")).values():
        for row in split:
            known = outcomes[row["prompt"]]
            places = sorted(known.completions.index(text) for text in row["completions"])
            appeal = np.exp(known.dimensions[row["dimension"]][places])
            chances[row["dimension"]].append(appeal[0] / appeal.sum())
            wins[row["dimension"]] += row["completions"][0] == known.completions[places[0]]
    for name, won in wins.items():  # the first wins as often as Plackett-Luce says
        assert binomtest(won, 300, float(np.mean(chances[name]))).pvalue > 0.01
