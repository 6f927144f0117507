"""A finished dataset as a source keeps its rows, its splits and its hashes; sources may be anywhere."""

import json
import shutil

import datasets
import pytest
from softpref.data.config import DataConfig
from softpref.data.stage import run
from softpref.errors import ConfigError, DataError

from tests.data.files import lines, splits

SAME = ("rows", "prompts", "kinds", "labels", "dataset_hash", "test_hash", "rejected", "left_out", "mapping")


def jsonl(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def pairs(prompts=20, conversational=False):
    def text(role, content):
        return [{"role": role, "content": content}] if conversational else content

    return [
        {
            "prompt": text("user", f"Prompt {p}?"),
            "chosen": text("assistant", f"good {p} {i}"),
            "rejected": text("assistant", f"bad {p} {i}"),
        }
        for i in range(3)
        for p in range(prompts)
    ]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    folder = tmp_path_factory.mktemp("story") / "dataset"
    run(DataConfig(rows=300, sft_rows=200, votes=5), str(folder))
    return folder


def test_rows_splits_and_all_that_lies_beside_them_are_taken_over(story, tmp_path, caplog):
    config = DataConfig(source=str(story), seed=7, validation_fraction=0.3, test_fraction=0.3)
    stats = run(config, str(tmp_path / "data"))
    before = json.loads((story / "stats.json").read_text())
    assert {key: stats[key] for key in SAME} == {key: before[key] for key in SAME}
    assert stats["config"] == before["config"]  # the dataset's own, which says how its labels came to be
    assert stats["taken_over"] == str(story)
    assert splits(tmp_path / "data") == splits(story)
    assert splits(tmp_path / "data" / "sft") == splits(story / "sft")
    assert (tmp_path / "data" / "outcomes.jsonl").read_text() == (story / "outcomes.jsonl").read_text()
    assert f"taken over, finished, from <code>{story}" in (tmp_path / "data" / "page.html").read_text()
    assert f"{story} is a finished dataset: its 300 rows and their splits are taken over" in caplog.text


def test_it_may_lie_behind_a_url_or_be_an_artifact_of_another_pipeline(story, tmp_path, memory, cache):
    memory.put(str(story), "/datasets/story", recursive=True)
    shutil.copytree(story, tmp_path / "executor" / "dataset")
    expected = splits(story)
    for number, source in enumerate(("memory://datasets/story", str(tmp_path / "executor" / "dataset"))):
        stats = run(DataConfig(source=source), str(tmp_path / f"data-{number}"))
        assert stats["taken_over"] == source
        assert splits(tmp_path / f"data-{number}") == expected


def test_conversations_keep_their_hash(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(jsonl(pairs(conversational=True)))
    first = run(DataConfig(source=str(tmp_path / "rows.jsonl")), str(tmp_path / "first"))
    second = run(DataConfig(source=str(tmp_path / "first")), str(tmp_path / "second"))
    assert second["dataset_hash"] == first["dataset_hash"]
    assert second["conversational"]


def test_one_split_is_read_and_divided_anew_when_it_is_asked_for(story, tmp_path):
    stats = run(DataConfig(source=str(story), split="train"), str(tmp_path / "data"))
    assert "taken_over" not in stats
    assert stats["rows_read"] == len(splits(story)["train"])
    assert stats["rows"]["test"] > 0


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"rows": 10}, "rows"),
        ({"columns": {"completions": "completions"}}, "columns"),
        ({"labels": "hard"}, "labels"),
        ({"as_messages": True}, "as_messages"),
        ({"max_source_rows": 5}, "max_source_rows"),
    ],
)
def test_what_would_change_its_rows_is_refused(story, tmp_path, asked, name):
    with pytest.raises(ConfigError, match=rf"finished dataset, .* {name} would change them; .*give split"):
        run(DataConfig(source=str(story), **asked), str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_a_sample_of_more_rows_than_it_has_changes_nothing(story, tmp_path):
    assert run(DataConfig(source=str(story), rows=4000), str(tmp_path / "data"))["rows"]["train"] > 200


def test_rows_that_were_changed_afterwards_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(jsonl(pairs()))
    run(DataConfig(source=str(tmp_path / "rows.jsonl")), str(tmp_path / "first"))
    saved = datasets.load_from_disk(str(tmp_path / "first"))
    saved["test"] = saved["train"].select(range(3))
    saved.save_to_disk(str(tmp_path / "other"))
    shutil.copy(tmp_path / "first" / "stats.json", tmp_path / "other")
    with pytest.raises(DataError, match="were changed after it was made"):
        run(DataConfig(source=str(tmp_path / "other")), str(tmp_path / "second"))


def test_demonstrations_and_prompts_may_come_from_elsewhere_and_keep_clear_of_its_test_prompts(
    tmp_path, memory, cache
):
    memory.pipe("/rows.jsonl", jsonl(pairs()))
    asked = [*(f"Prompt {p}?" for p in range(20)), "A new one?"]
    memory.pipe("/sft.jsonl", jsonl({"prompt": prompt, "completion": "an answer"} for prompt in asked))
    memory.pipe("/prompts.jsonl", jsonl([*({"prompt": prompt} for prompt in asked), {"prompt": 3}]))
    run(DataConfig(source="memory://rows.jsonl"), str(tmp_path / "first"))
    further = {"sft_source": "memory://sft.jsonl", "prompts_source": "memory://prompts.jsonl"}
    stats = run(DataConfig(source=str(tmp_path / "first"), **further), str(tmp_path / "second"))
    held_out = {row["prompt"] for row in splits(tmp_path / "first")["test"]}
    assert held_out
    demonstrations = splits(tmp_path / "second" / "sft")
    assert {row["prompt"] for rows in demonstrations.values() for row in rows} == {*asked} - held_out
    assert not held_out & {*datasets.load_from_disk(str(tmp_path / "second" / "prompts"))["prompt"]}
    assert sum(stats["extra_prompts"]["rejected"].values()) == 1
    assert [line["source"] for line in lines(tmp_path / "second" / "rejected.jsonl")] == ["prompts"]


def test_every_refused_row_of_an_s3_folder_is_listed_by_file_and_row(tmp_path, bucket):
    bucket.put_object(Bucket="team", Key="votes/a.jsonl", Body=jsonl(pairs()) + b"{broken\n")
    bucket.put_object(Bucket="team", Key="votes/deep/b.jsonl", Body=jsonl([*pairs(2), {"prompt": "q"}]))
    stats = run(DataConfig(source="s3://team/votes", duplicates="keep"), str(tmp_path / "data"))
    refused = lines(tmp_path / "data" / "rejected.jsonl")
    assert [(line["source_row"], line["place"]) for line in refused] == [
        (61, "a.jsonl:61"),
        (68, "deep/b.jsonl:7"),
    ]
    assert stats["rows_read"] == 68
    assert stats["source"] == "s3://team/votes"


def test_an_absent_further_source_is_refused_before_the_first_is_read(tmp_path, memory, cache, monkeypatch):
    memory.pipe("/rows.jsonl", jsonl(pairs()))
    monkeypatch.setattr("softpref.data.intake.Intake.take", lambda *_: pytest.fail("read"))
    with pytest.raises(ConfigError, match=r"prompts_source: .*memory://absent\.jsonl does not exist"):
        run(
            DataConfig(source="memory://rows.jsonl", prompts_source="memory://absent.jsonl"),
            str(tmp_path / "data"),
        )


def test_no_secret_of_a_url_is_written_down_or_said(tmp_path, bucket, capfd, caplog, monkeypatch, s3_server):
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", float("inf"))  # it knows no signed URLs
    bucket.put_object(Bucket="team", Key="rows.jsonl", Body=jsonl([*pairs(), {"prompt": "q"}]))
    options = {"Bucket": "team", "Key": "rows.jsonl"}
    url = bucket.generate_presigned_url("get_object", Params=options)
    secret = url.partition("?")[2]
    assert "Signature" in secret
    config = DataConfig(source=url, sft_source=url, sft_columns={"completion": "chosen"}, prompts_source=url)
    stats = run(config, str(tmp_path / "data"))
    assert stats["source"] == f"{s3_server[0]}/team/rows.jsonl"
    with pytest.raises(DataError) as refusal:
        run(DataConfig(source=url, max_rejected_fraction=0.0), str(tmp_path / "other"))
    told = [record.getMessage() for record in caplog.records if record.name != "werkzeug"]  # the store itself
    said = [str(refusal.value), *capfd.readouterr(), *told]
    written = [path.read_bytes().decode(errors="replace") for path in tmp_path.rglob("*") if path.is_file()]
    for text in (*said, *written):
        for part in secret.split("&"):
            assert part not in text


def test_a_file_url_of_the_output_is_not_read_from(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(jsonl(pairs()))
    run(DataConfig(source=f"file://{tmp_path}/rows.jsonl"), str(tmp_path / "data"))
    with pytest.raises(ConfigError, match="lies in the output"):
        run(DataConfig(source=f"file://{tmp_path}/data"), str(tmp_path / "data"))
