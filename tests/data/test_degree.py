"""Rankings made of completions by removing key content: which, of what weight, and who does not see them."""

import json

import datasets
import pytest
from softpref.data.config import DataConfig
from softpref.data.stage import run
from softpref.errors import ConfigError
from softpref.judges.texts import text_rows
from softpref.key_content import texts_by_level
from softpref.records.dataset import judged_rows
from softpref.sft.stage import _load_demonstrations

WEIGHT = 0.3


@pytest.fixture(scope="module")
def rows():
    return [
        {
            "prompt": f"What of {number}?",
            "chosen": f"Bread, cheese {number}, or wine of the house.",
            "rejected": "Nothing." if number % 2 else f"Tea, cake {number} and milk.",
            "weight": 1 + number % 3,
        }
        for number in range(30)
    ]


@pytest.fixture(scope="module")
def source(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("source") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def made(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("made") / "data"
    stats = run(DataConfig(source=source, degree_ranking_weight=WEIGHT), str(folder))
    return folder, stats, datasets.load_from_disk(str(folder))


def test_each_completion_with_phrases_enough_ranks_above_what_is_left_of_it(made, rows):
    _, stats, splits = made
    train = list(splits["train"])
    people = [row for row in train if not row["degree"]]
    expected = []
    for row in people:
        for whole in row["completions"]:
            left = texts_by_level(whole, 4)
            if left:
                expected.append(
                    ([whole, *left], row["prompt"], row["weight"] * WEIGHT / 2, row["source_row"])
                )
    found = [
        (row["completions"], row["prompt"], row["weight"], row["source_row"])
        for row in train
        if row["degree"]
    ]
    assert found == expected
    assert len(people) < len(found) < 2 * len(people)  # "Nothing." has one phrase
    assert {row["kind"] for row in train if row["degree"]} == {"ranking"}
    assert not any(row["degree"] for split in ("validation", "test") for row in splits[split])
    assert stats["degree_rankings"] == len(found)
    assert stats["rows"]["train"] == len(train)
    assert stats["kinds"] == {"pairwise": 30, "ranking": len(found)}
    assert stats["labels"] == {"hard": 30, "soft": 0}


def test_the_judged_rows_are_those_of_a_dataset_without(made, source, tmp_path):
    _, stats, splits = made
    plain = run(DataConfig(source=source), str(tmp_path / "plain"))
    others = datasets.load_from_disk(str(tmp_path / "plain"))
    for split in ("train", "validation", "test"):
        assert list(judged_rows(splits[split]).remove_columns("degree")) == list(others[split])
        assert judged_rows(others[split]) is others[split]
    for same in ("characters", "longer_chosen", "confidence", "prompts", "labels", "test_hash"):
        assert stats[same] == plain[same]
    assert "degree_rankings" not in plain
    assert stats["dataset_hash"] != plain["dataset_hash"]


def test_no_judge_and_no_reference_learns_from_them(made):
    folder, _, splits = made
    assert [row["completions"] for row in text_rows(splits["train"])] == [
        row["completions"] for row in splits["train"] if not row["degree"]
    ]
    chosen = [row["completions"][0] for row in splits["train"] if not row["degree"]]
    assert list(_load_demonstrations(folder)["train"]["completion"]) == chosen


@pytest.mark.parametrize(("degree_on", "place", "levels"), [("preferred", 0, 3), ("dispreferred", -1, 2)])
def test_one_side_alone_has_all_of_the_weight(source, tmp_path, degree_on, place, levels):
    config = DataConfig(
        source=source,
        degree_ranking_weight=WEIGHT,
        degree_on=degree_on,
        degree_levels=levels,
        as_messages=True,
    )
    run(config, str(tmp_path / "data"))
    train = list(datasets.load_from_disk(str(tmp_path / "data"))["train"])
    people = {row["source_row"]: row for row in train if not row["degree"]}
    rankings = [row for row in train if row["degree"]]
    assert rankings
    for row in rankings:
        whole = people[row["source_row"]]["completions"][place]
        assert row["completions"] == [whole, *texts_by_level(whole, levels)]
        assert row["weight"] == pytest.approx(people[row["source_row"]]["weight"] * WEIGHT)


def test_a_finished_dataset_is_taken_over_with_them(made, tmp_path):
    folder, stats, splits = made
    assert (
        run(DataConfig(source=str(folder)), str(tmp_path / "again"))["dataset_hash"] == stats["dataset_hash"]
    )
    assert list(datasets.load_from_disk(str(tmp_path / "again"))["train"]) == list(splits["train"])
    with pytest.raises(ConfigError, match="degree_ranking_weight would change them"):
        run(DataConfig(source=str(folder), degree_ranking_weight=0.1), str(tmp_path / "other"))


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="degree_ranking_weight must be at least 0, got -1"):
        DataConfig(source="a.jsonl", degree_ranking_weight=-1)
    with pytest.raises(ConfigError, match="degree_levels must be at least 2, got 1"):
        DataConfig(source="a.jsonl", degree_levels=1)
    with pytest.raises(ConfigError, match="degree_language must be en, got 'de'"):
        DataConfig(source="a.jsonl", degree_language="de")
    with pytest.raises(ConfigError, match='degree_ranking_weight does not go with source "story"'):
        DataConfig(degree_ranking_weight=0.1)
