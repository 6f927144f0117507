"""A folder is divided as `datasets` divides it, by its card or by names, and read row by row all the same."""

import json
import os
from pathlib import Path

import datasets
import pytest
from softpref.data.sources import open_source
from softpref.errors import ConfigError, DataError

pytestmark = pytest.mark.fast


def write_rows(folder, **files):
    """JSON Lines or Parquet files by their names."""
    for name, rows in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            datasets.Dataset.from_list(rows).to_parquet(str(path))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def names(*arguments, **options):
    return [row.record["prompt"] for row in open_source(*map(str, arguments), **options)]


def of(name, count=1):
    return [{"prompt": name}] * count


CARD = """---
license: mit
configs:
- config_name: votes
  data_files:
  - split: train
    path: votes/part-*.jsonl
  - split: heldout
    path: [votes/last.jsonl, votes/last.parquet]
- config_name: texts
  data_files: texts/*
{default}---
# Preferences
"""


@pytest.fixture
def downloaded(tmp_path):
    """A folder as it comes from the Hub, with what its download leaves there."""
    files = {
        "data/train-00000-of-00002.parquet": of("train 0"),
        "data/train-00001-of-00002.parquet": of("train 1"),
        "data/test-00000-of-00001.parquet": of("test"),
        "dataset_infos.json": [{}],
        ".cache/huggingface/download/data/train-00000-of-00002.jsonl": of("no data either"),
    }
    write_rows(tmp_path / "hub", **files)
    (tmp_path / "hub" / "README.md").write_text("# Preferences\nWithout a word on splits.\n")
    return tmp_path / "hub"


def test_a_folder_of_the_hub_is_read_by_its_splits(downloaded):
    assert names(downloaded) == ["train 0", "train 1"] == names(downloaded, split="train")
    assert names(downloaded, split="test") == ["test"]
    loaded = datasets.load_dataset(str(downloaded), split="test")
    assert loaded["prompt"] == ["test"]
    with pytest.raises(ConfigError, match="no split 'validation'; it has train, test"):
        open_source(str(downloaded), split="validation")
    with pytest.raises(ConfigError, match="no subset 'en'; its dataset card names none"):
        open_source(str(downloaded), subset="en")
    (row, _) = open_source(str(downloaded))
    assert (row.number, row.place) == (1, "data/train-00000-of-00002.parquet:1")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.jsonl", "test.jsonl"),
        ("train/a.jsonl", "test/a.parquet"),
        ("rows-training.jsonl", "rows-eval.jsonl"),
        ("[1]/train_0.jsonl", "[1]/dev.jsonl"),
    ],
)
def test_names_tell_splits_also_of_mixed_formats(tmp_path, train, test):
    write_rows(tmp_path, **{train: of("first"), test: of("second")})
    assert names(tmp_path) == ["first"]
    assert names(tmp_path, split="validation" if "dev" in test else "test") == ["second"]


def test_a_dataset_card_says_subsets_and_splits(tmp_path):
    files = {
        "votes/part-1.jsonl": of("one"),
        "votes/part-2.jsonl": of("two"),
        "votes/last.jsonl": of("last"),
        "votes/last.parquet": of("very last"),
        "texts/a.jsonl": of("text"),
        "further.jsonl": of("in no subset"),
    }
    write_rows(tmp_path, **files)
    (tmp_path / "README.md").write_text(CARD.format(default=""))
    assert names(tmp_path, subset="votes") == ["one", "two"]
    assert names(tmp_path, subset="votes", split="heldout") == ["last", "very last"]
    assert names(tmp_path, subset="texts") == ["text"]
    for options, says in (
        ({}, "several subsets; set subset to one of votes, texts"),
        ({"subset": "other"}, "no subset 'other'; set subset to one of votes, texts"),
        ({"subset": "votes", "split": "test"}, "no split 'test'; it has train, heldout"),
    ):
        with pytest.raises(ConfigError, match=says):
            open_source(str(tmp_path), **options)
    card = CARD.format(default="  default: true\n").replace(", votes/last.parquet", "")
    (tmp_path / "README.md").write_text(card)  # datasets reads no split of two formats
    assert names(tmp_path) == ["text"] == datasets.load_dataset(str(tmp_path), split="train")["prompt"]


def test_a_part_of_a_dataset_can_be_here_alone(tmp_path):
    write_rows(tmp_path, **{"votes/part-1.jsonl": of("one")})
    (tmp_path / "README.md").write_text(CARD.format(default=""))
    assert names(tmp_path, subset="votes") == ["one"]
    with pytest.raises(ConfigError, match=r"split heldout of source folder .* holds no data file"):
        open_source(str(tmp_path), subset="votes", split="heldout")


@pytest.mark.parametrize(
    ("card", "says"),
    [
        ("---\nconfigs: [\n---\n", r"dataset card .*README\.md, which .* cannot be read"),
        ("---\nconfigs: votes\n---\n", r"dataset card .*README\.md, which .* cannot be read"),
        ("---\n- configs\n---\n", r"dataset card .*README\.md, which .* cannot be read"),
        ("---\nconfigs: [3]\n---\n", r"dataset card .*README\.md, which .* cannot be read"),
        ("---\nconfigs: [{config_name: a, data_files: 'https://x.example/a.csv'}]\n---\n", "lies elsewhere"),
        ("---\nconfigs: [{config_name: a, data_dir: absent}]\n---\n", "split train .* holds no data file"),
        ("---\nconfigs: [{config_name: 1, data_files: x}, {config_name: 2}]\n---\n", "one of 1, 2"),
    ],
)
def test_a_dataset_card_that_cannot_be_followed_is_named(tmp_path, card, says):
    write_rows(tmp_path, **{"a.jsonl": of("a")})
    (tmp_path / "README.md").write_text(card)
    with pytest.raises(ConfigError, match=says):
        open_source(str(tmp_path))


def test_bad_rows_of_a_split_are_listed_one_by_one(tmp_path):
    write_rows(tmp_path, **{"train.jsonl": of("good"), "test.jsonl": of("other")})
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("{broken\n" + json.dumps({"prompt": "good too"}) + "\n")
    rows = list(open_source(str(tmp_path)))
    assert [row.fault[:14] for row in rows] == ["", "not valid JSON", ""]


def test_files_that_belong_to_no_split_are_named(tmp_path, caplog):
    write_rows(tmp_path, **{"train.jsonl": of("a"), "test.jsonl": of("b"), "more/rows.jsonl": of("c")})
    assert names(tmp_path) == ["a"]
    assert "more/rows.jsonl belong to no split" in caplog.text


def test_what_is_not_divided_is_read_whole_and_has_no_other_split(tmp_path):
    write_rows(tmp_path, **{"a.jsonl": of("a"), "b/latest.jsonl": of("b")})
    assert names(tmp_path) == ["a", "b"] == names(tmp_path, split="train")
    with pytest.raises(ConfigError, match="no split 'test': neither a dataset card nor the names"):
        open_source(str(tmp_path), split="test")
    with pytest.raises(ConfigError, match="is one file, without splits and subsets"):
        open_source(str(tmp_path / "a.jsonl"), split="test")


def test_a_folder_of_the_hub_behind_a_url_keeps_its_card(tmp_path, memory, cache):
    files = {"votes/part-1.jsonl": of("one"), "votes/last.jsonl": of("last"), "README.md": []}
    write_rows(tmp_path / "hub", **files)
    (tmp_path / "hub" / "README.md").write_text(CARD.format(default=""))
    for name in files:
        memory.pipe(f"/hub/{name}", (tmp_path / "hub" / name).read_bytes())
    assert names("memory://hub", subset="votes", split="heldout") == ["last"]
    with pytest.raises(ConfigError, match="memory://hub has several subsets"):
        open_source("memory://hub")


def test_a_file_whose_name_is_no_utf8_is_read_and_named_in_words(tmp_path):
    for name in (b"r\xe4ws.jsonl", b"r\xe4ws.csv", b"r\xe4ws.parquet", b"r\xe4ws.json"):
        path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
        if path.suffix == ".parquet":
            with path.open("wb") as file:
                datasets.Dataset.from_list(of("a")).to_parquet(file)
        elif path.suffix == ".csv":
            path.write_text("prompt\na\n")
        else:
            path.write_text(json.dumps(of("a")) if path.suffix == ".json" else '{"prompt": "a"}\n')
    rows = list(open_source(str(tmp_path)))
    assert [row.record for row in rows] == of("a", 4)
    assert {row.place for row in rows} == {f"r�ws.{end}:1" for end in ("jsonl", "csv", "parquet", "json")}
    Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"r\xe4ws.json"))).write_text("[1, 2")
    with pytest.raises(DataError) as caught:
        list(open_source(str(tmp_path)))
    assert str(caught.value).encode()
