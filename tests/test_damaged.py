"""Files that stages left for one another, damaged: each is refused by its name, before it is used."""

import json

import pytest
from softpref.errors import ConfigError, DataError
from softpref.finished import differences, finished_result
from softpref.records.comparison import Comparison
from softpref.records.dataset import hashes_in, read_dataset, read_stats
from softpref.records.evaluation import Evaluation, read_samples
from softpref.records.model import load_metadata
from softpref.records.registration import Registration

from tests.evaluations import evaluation

pytestmark = pytest.mark.fast

CONTENTS = {
    "empty": b"",
    "cut": b'{"name": "a',
    "zeros": bytes(40),
    "not UTF-8": b'{"name": "\xff\xfe"}',
    "a list": b"[1, 2]",
    "a number": b"7",
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "thousands of digits": b'{"alpha": ' + b"9" * 10_000 + b"}",
    "a lone surrogate": b'{"name": "\\ud800"}',
}
READERS = {
    "stats.json": read_stats,
    "softpref.json": load_metadata,
    "evaluation.json": Evaluation.read,
    "comparison.json": Comparison.read,
    "registration.json": Registration.read,
    "samples.jsonl": lambda folder: read_samples(folder, 10),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", CONTENTS)
def test_what_is_no_record_is_refused_by_the_files_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(CONTENTS[content])
    if (name, content) == ("samples.jsonl", "empty"):  # lines, of which there may be none
        assert READERS[name](tmp_path) == []
        return
    with pytest.raises(DataError) as refused:
        READERS[name](tmp_path)
    said = str(refused.value)
    assert said.startswith(f"{tmp_path / name} cannot be read: ")
    assert len(said) < 600
    assert "\n" not in said


@pytest.mark.parametrize("name", READERS)
def test_a_folder_in_the_place_of_a_record_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(
        (ConfigError, DataError), match=f"{name} (is a folder|cannot be read: Is a directory)"
    ):
        READERS[name](tmp_path)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("judge", ["bradley-terry"]),
        ("judge", {"unknown": 1}),
        ("metrics", [1, 2]),
        ("metrics", {"kl_sequence": 7}),
        ("reliability", [{"other": 1}]),
    ],
)
def test_an_evaluation_whose_parts_are_something_else_is_refused(tmp_path, part, value):
    written = {**evaluation().as_dict(), part: value}
    (tmp_path / "evaluation.json").write_text(json.dumps(written))
    with pytest.raises(DataError, match=r"evaluation\.json cannot be read"):
        Evaluation.read(tmp_path)


@pytest.mark.parametrize("content", CONTENTS.values())
def test_a_damaged_result_is_that_of_something_unknown(tmp_path, content):
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(ValueError, match="holds an evaluation already; name another folder or remove it"):
        finished_result(tmp_path, {"alpha": 1}, "an evaluation")


def test_many_and_long_differences_are_said_in_short():
    own = {f"option {number:02}": number for number in range(40)}
    said = differences(dict.fromkeys(own, 10**400), own)
    assert said.startswith("option 00: 1000")
    assert ", option 04: " in said
    assert said.endswith(" there, 4 here, and 35 more")
    assert len(said) < 800
    assert differences({"beta": "x" * 9_000}, {"beta": "y"}).endswith("x' there, 'y' here")


@pytest.fixture
def dataset(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"prompt": ["a prompt"] * 40, "completions": [["the one", "the other"]] * 40})
    DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "data"))
    return tmp_path / "data"


ROWS = "train/data-00000-of-00001.arrow"
MANGLINGS = {
    "absent": None,
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "ones in the middle": lambda content: content[:800] + b"\xff" * 800 + content[1600:],
    "foreign": lambda content: b'{"foreign": 1}',
    "deep": lambda content: b"[" * 100_000,
}


@pytest.mark.parametrize("file", [ROWS, "train/state.json", "train/dataset_info.json", "dataset_dict.json"])
@pytest.mark.parametrize("mangling", MANGLINGS)
def test_a_damaged_dataset_is_refused_by_its_name(dataset, file, mangling):
    path, mangle = dataset / file, MANGLINGS[mangling]
    whole = read_dataset(dataset)["train"].to_list()
    if mangle is None:
        path.unlink()
    else:
        path.write_bytes(mangle(path.read_bytes()))
    if (file, mangling) == ("train/dataset_info.json", "foreign"):  # the rows say themselves what they are
        assert read_dataset(dataset)["train"].to_list() == whole
        return
    with pytest.raises(DataError) as refused:
        read_dataset(dataset)
    said = str(refused.value)
    assert f"the dataset {dataset} cannot be read: " in said
    assert "make it anew with softpref data" in said
    assert "\n" not in said


def test_rows_that_are_not_what_was_written_are_refused_though_they_can_be_read(dataset):
    from datasets import Dataset

    (dataset / "stats.json").write_text(json.dumps({"files": hashes_in(dataset)}))
    assert len(read_dataset(dataset)["train"]) == len(read_dataset(dataset / "train")) == 40
    others = Dataset.from_dict({"prompt": ["a pr\0mpt"] * 40, "completions": [["the one", "the other"]] * 40})
    others.save_to_disk(str(dataset / "train"))
    for folder in (dataset, dataset / "train"):
        with pytest.raises(DataError, match=r"cannot be read: its \S*data-\S+ is not what was written"):
            read_dataset(folder)
    assert len(read_dataset(dataset / "test")) == 40
