"""Several sources in one dataset: exact shares, splits by prompt across all, and what is refused by name."""

import collections
import csv
import fractions
import json
import shutil

import datasets
import pytest
from softpref.cli import main
from softpref.config import build_config, parse_overrides
from softpref.data.component import prepare_data
from softpref.data.config import DataConfig, parts_of
from softpref.data.mixture import divide_rows
from softpref.data.stage import run
from softpref.errors import ConfigError, DataError

from tests.data.files import everything, lines, splits, write

QUESTION = {"prompt": "question", "chosen": "better", "rejected": "worse"}


def pairs(count, name, first=0):
    return [
        {"prompt": f"Question {i}?", "chosen": f"{name} good {i}", "rejected": f"{name} bad {i}"}
        for i in range(first, first + count)
    ]


def counts(folder):
    return dict(collections.Counter(row["source"] for row in everything(folder)))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in with two sources, of 100 rows and of 60 other ones of the same prompts."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", pairs(100, "a"))
    write(tmp_path / "b.jsonl", pairs(60, "b"))
    return tmp_path


# Shares


def test_json_lines_parquet_and_csv_mix_with_columns_of_their_own(here, caplog):
    others = [{"question": f"Q{i}?", "better": f"fine {i}", "worse": f"poor {i}"} for i in range(50)]
    datasets.Dataset.from_list(others).to_parquet("b.parquet")
    with open("c.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["instruction", "response_a", "response_b", "winner"])
        table.writerows([f"C{i}?", f"one {i}", f"two {i}", "left" if i % 2 else "right"] for i in range(30))
    mixture = {
        "b.parquet": {"share": 0.3, "columns": QUESTION},
        "c.csv": {"share": 0.2, "preference_values": {"left": "a", "right": "b"}},
    }
    stats = run(DataConfig(source="a.jsonl", mixture=mixture), "out")
    # of c.csv's 30 rows a fifth of the dataset is made: 150 rows, 75 + 45 + 30
    assert counts("out") == {"a.jsonl": 75, "b.parquet": 45, "c.csv": 30}
    rows = {(row["source"], row["source_row"]): row for row in everything("out")}
    assert len(rows) == 150
    for (source, number), row in rows.items():
        i = number - 1
        expected = {
            "a.jsonl": (f"Question {i}?", [f"a good {i}", f"a bad {i}"]),
            "b.parquet": (f"Q{i}?", [f"fine {i}", f"poor {i}"]),
            "c.csv": (f"C{i}?", [f"one {i}", f"two {i}"][:: 1 if i % 2 else -1]),
        }[source]
        assert (row["prompt"], row["completions"]) == expected
    told = [
        {key: one[key] for key in ("name", "share", "rows_read", "usable", "rows", "not_sampled", "binding")}
        for one in stats["mixture"]
    ]
    assert told == [
        {
            **{"name": "a.jsonl", "share": 0.5, "rows_read": 100, "usable": 100, "rows": 75},
            **{"not_sampled": 25, "binding": False},
        },
        {
            **{"name": "b.parquet", "share": 0.3, "rows_read": 50, "usable": 50, "rows": 45},
            **{"not_sampled": 5, "binding": False},
        },
        {
            **{"name": "c.csv", "share": 0.2, "rows_read": 30, "usable": 30, "rows": 30},
            **{"not_sampled": 0, "binding": True},
        },
    ]
    assert (stats["rows_read"], stats["not_sampled"]) == (180, 30)
    assert (
        "a.jsonl 75 of 100, share 0.5; b.parquet 45 of 50, share 0.3; c.csv 30 of 30, share 0.2, which b"
        in (caplog.text)
    )
    page = (here / "out" / "page.html").read_text(encoding="utf-8")
    for said in ("a.jsonl + b.parquet + c.csv", "c.csv</code><small", "bounds the dataset", "not sampled"):
        assert said in page
    assert "Columns of b.parquet</caption>" in page
    assert "columns</th><td><code>prompt ← question, chosen ← better" in page
    assert " of a.jsonl · hard label" in page


@pytest.mark.parametrize(
    ("shares", "available", "rows", "expected"),
    [
        (["0.3"], [70, 30], None, [70, 30]),
        (["0.3"], [1000, 30], None, [70, 30]),
        (["0.3"], [69, 30], None, [69, 30]),  # 99 rows: 69.3 and 29.7; 100 would need 70 and 30
        (["0.3"], [100, 244], None, [100, 43]),  # 143 rows: 100.1 and 42.9; 144 would need 100.8, so 101
        (["0.25"], [3, 3], None, [3, 1]),
        (["0.1", "0.2"], [7000, 1000, 2000], None, [7000, 1000, 2000]),
        (["0.333", "0.333"], [10, 10, 10], 10, [4, 3, 3]),
        (["0.5"], [10, 10], 7, [4, 3]),
        (["0.3"], [1000, 1000], 100, [70, 30]),
    ],
)
def test_shares_are_exact_up_to_one_row_and_the_dataset_is_the_largest(shares, available, rows, expected):
    mixture = {f"{i}.jsonl": float(share) for i, share in enumerate(shares)}
    parts = parts_of(DataConfig(source="a.jsonl", mixture=mixture))
    assert [str(part.share) for part in parts[1:]] == [str(fractions.Fraction(share)) for share in shares]
    assert divide_rows(parts, [part.share for part in parts], available, rows).counts == expected
    total = sum(expected)
    for part, count in zip(parts, expected, strict=True):
        assert abs(part.share * total - count) < 1
    if rows is None:  # one row more needs more than some source has
        assert any(part.share * (total + 1) > has for part, has in zip(parts, available, strict=True))


def test_a_number_of_rows_keeps_the_shares(here):
    stats = run(DataConfig(source="a.jsonl", mixture={"b.jsonl": 0.25}, rows=41), "out")
    assert counts("out") == {"a.jsonl": 31, "b.jsonl": 10}  # 30.75 and 10.25
    assert [one["binding"] for one in stats["mixture"]] == [False, False]
    assert "41 rows were asked for" in (here / "out" / "page.html").read_text(encoding="utf-8")


def test_the_seed_alone_decides_which_rows_are_taken(here):
    config = {"source": "a.jsonl", "mixture": {"b.jsonl": 0.5}, "rows": 60}
    first, again, other = (run(DataConfig(**config, seed=seed), f"out-{seed}") for seed in (3, 3, 4))
    assert first == again
    assert other["dataset_hash"] != first["dataset_hash"]
    taken = [{(row["source"], row["source_row"]) for row in everything(f"out-{seed}")} for seed in (3, 4)]
    assert taken[0] != taken[1]
    assert counts("out-3") == counts("out-4") == {"a.jsonl": 30, "b.jsonl": 30}


# Prompts, duplicates, contradictions


def test_a_prompt_in_two_sources_lies_in_one_split(here):
    run(DataConfig(source="a.jsonl", mixture={"b.jsonl": 0.4}, test_fraction=0.3), "out")
    by_split = {split: {row["prompt"] for row in rows} for split, rows in splits("out").items()}
    assert not by_split["train"] & (by_split["validation"] | by_split["test"])
    assert not by_split["validation"] & by_split["test"]
    for rows in splits("out").values():  # and each split has rows of both
        assert {row["source"] for row in rows} == {"a.jsonl", "b.jsonl"}


def test_duplicates_and_contradictions_count_across_sources(here):
    first = pairs(40, "a")
    turned = {**first[7], "chosen": first[7]["rejected"], "rejected": first[7]["chosen"]}
    write(here / "a.jsonl", first)
    write(here / "b.jsonl", [first[4], turned, *pairs(38, "b")])
    stats = run(DataConfig(source="a.jsonl", mixture={"b.jsonl": 0.49}, contradictions="drop"), "out")
    assert (stats["duplicates"], stats["contradictions"]) == (1, {"sets": 1, "rows": 2})
    assert [
        (line["from"], line["source_row"], line["reason"]) for line in lines(here / "out/rejected.jsonl")
    ] == [
        ("b.jsonl", 1, "duplicate: of row 5 of a.jsonl"),
        ("a.jsonl", 8, "contradiction: another row of these completions has another winner"),
        ("b.jsonl", 2, "contradiction: another row of these completions has another winner"),
    ]
    assert [one["left_out"] for one in stats["mixture"]] == [
        {"contradiction": 1},
        {"duplicate": 1, "contradiction": 1},
    ]
    assert [one["usable"] for one in stats["mixture"]] == [39, 38]
    kept = run(DataConfig(source="a.jsonl", mixture={"b.jsonl": 0.49}, duplicates="keep"), "kept")
    assert [one["usable"] for one in kept["mixture"]] == [40, 40]


def test_a_source_of_nothing_but_contradictions_is_named(here):
    turned = [
        {"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]}
        for row in pairs(9, "a")
    ]
    write(here / "b.jsonl", turned)
    with pytest.raises(DataError, match=r"every row of b\.jsonl contradicts another"):
        run(DataConfig(source="a.jsonl", mixture={"b.jsonl": 0.1}, contradictions="drop"), "out")


def test_the_same_row_number_in_two_sources_is_no_duplicate_of_itself(here):
    write(here / "b.jsonl", pairs(60, "a"))  # row for row as in a.jsonl
    with pytest.raises(DataError, match=r"none of the 60 rows of b\.jsonl can be used: duplicate \(60\)"):
        run(DataConfig(source="a.jsonl", mixture={"b.jsonl": 0.4}), "out")


def test_refused_rows_are_listed_with_their_source(here):
    rows = pairs(60, "b")
    rows[6]["chosen"] = True
    write(here / "b.jsonl", rows)
    with (here / "a.jsonl").open("a") as file:
        file.write("{broken\n")
    stats = run(DataConfig(source="a.jsonl", mixture={"b.jsonl": 0.3}), "out")
    listed = lines(here / "out" / "rejected.jsonl")
    assert [(line["from"], line["source_row"], line["place"]) for line in listed] == [
        ("a.jsonl", 101, "a.jsonl:101"),
        ("b.jsonl", 7, "b.jsonl:7"),
    ]
    assert [one["rejected"] for one in stats["mixture"]] == [
        {"row cannot be read": 1},
        {"completion is not text": 1},
    ]
    assert sum(stats["rejected"].values()) == 2


def test_a_source_that_loses_too_many_rows_is_named(here):
    write(here / "b.jsonl", [{**row, "chosen": 3} if i < 40 else row for i, row in enumerate(pairs(60, "b"))])
    with pytest.raises(DataError, match=r"40 of the 60 rows of b\.jsonl were refused, more than"):
        run(DataConfig(source="a.jsonl", mixture={"b.jsonl": 0.1}), "out")
    assert {line["from"] for line in lines(here / "out.rejected.jsonl")} == {"b.jsonl"}
    assert not (here / "out").exists()


# What a source says of itself


def test_a_further_source_is_read_like_source_where_it_says_nothing_else(here):
    votes = [
        {"topic": f"t{i}", "x": f"one {i}", "y": f"two {i}", "vx": 3, "vy": 1, "vx2": 1, "vy2": 9}
        for i in range(40)
    ]
    write(here / "a.jsonl", votes)
    write(here / "b.jsonl", [{**row, "topic": f"u{i}"} for i, row in enumerate(votes)])
    columns = {"completion_a": "x", "completion_b": "y", "votes_a": "vx", "votes_b": "vy"}
    config = DataConfig(
        source="a.jsonl",
        columns=columns,
        prompt_template="About {topic}:\\n",
        mixture={
            "b.jsonl": {
                "share": 0.5,
                "columns": {**columns, "votes_a": "vx2", "votes_b": "vy2"},
                "prompt_template": "Of {topic}:\\n",
                "labels": "hard",
            }
        },
    )
    run(config, "out")
    for row in everything("out"):
        i, second = row["source_row"] - 1, row["source"] == "b.jsonl"
        assert row["prompt"] == (f"Of u{i}:\n" if second else f"About t{i}:\n")
        assert row["completions"] == [f"two {i}", f"one {i}"][:: 1 if second else -1]
        assert row["probability"] == (None if second else 0.75)


def test_format_and_split_are_of_one_source_and_not_taken_over(here):
    datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list(pairs(9, "x")),
            "judged": datasets.Dataset.from_list(pairs(30, "s")),
        }
    ).save_to_disk("saved")
    shutil.copy("b.jsonl", "b.txt")
    config = DataConfig(
        source="saved",
        split="judged",
        mixture={"a.jsonl": 0.4, "b.txt": {"share": 0.2, "format": "jsonl", "max_source_rows": 20}},
    )
    stats = run(config, "out")
    assert [one["rows_read"] for one in stats["mixture"]] == [30, 100, 20]
    assert {row["completions"][0][0] for row in everything("out") if row["source"] == "saved"} == {"s"}


def test_two_splits_of_one_source_mix_under_a_name(here):
    datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list(pairs(30, "t")),
            "more": datasets.Dataset.from_list(pairs(30, "m")),
        }
    ).save_to_disk("saved")
    config = DataConfig(
        source="saved", mixture={"second": {"source": "saved", "split": "more", "share": 0.5}}
    )
    stats = run(config, "out")
    assert counts("out") == {"saved": 30, "second": 30}
    assert {row["completions"][0][0] for row in everything("out") if row["source"] == "second"} == {"m"}
    assert stats["mixture"][1]["source"] == "saved"


def test_rankings_and_single_candidates_mix_with_pairs(here):
    write(
        here / "b.jsonl",
        [
            {"prompt": f"Q{p}?", "completion": f"text {p} {i}", "score": i}
            for p in range(20)
            for i in range(3)
        ],
    )
    stats = run(DataConfig(source="a.jsonl", mixture={"b.jsonl": {"share": 0.2, "columns": {}}}), "out")
    assert stats["kinds"] == {"pairwise": 80, "ranking": 20}


def test_rows_of_a_source_without_weights_weigh_one_among_those_with_them(here):
    write(here / "b.jsonl", [{**row, "weight": 0.25 * (i % 4)} for i, row in enumerate(pairs(60, "b"))])
    stats = run(DataConfig(source="a.jsonl", mixture={"b.jsonl": 0.4}), "out")
    for row in everything("out"):
        i = row["source_row"] - 1
        assert row["weight"] == (1.0 if row["source"] == "a.jsonl" else 0.25 * (i % 4))
    again = run(DataConfig(source="out"), "again")  # a finished dataset, taken over as it is
    assert again["dataset_hash"] == stats["dataset_hash"]
    assert everything("again") == everything("out")
    assert "a.jsonl + b.jsonl" in (here / "again" / "page.html").read_text(encoding="utf-8")


def conversation(row):
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }


def test_plain_text_and_conversations_are_refused_unless_made_alike(here):
    write(here / "b.jsonl", map(conversation, pairs(60, "b")))
    with pytest.raises(ConfigError, match=r"a\.jsonl holds plain text and b\.jsonl conv.* as_messages=true"):
        run(DataConfig(source="a.jsonl", mixture={"b.jsonl": 0.4}), "out")
    assert sorted(path.name for path in here.iterdir()) == ["a.jsonl", "b.jsonl"]
    for config in (
        DataConfig(source="a.jsonl", mixture={"b.jsonl": 0.4}, as_messages=True),
        DataConfig(source="b.jsonl", mixture={"a.jsonl": {"share": 0.6, "as_messages": True}}),
    ):
        assert run(config, "out")["conversational"]
        assert counts("out") == {"a.jsonl": 90, "b.jsonl": 60}
        assert {row["prompt"][0]["role"] for row in everything("out")} == {"user"}


def test_escapes_of_a_template_are_read_once(here):
    write(here / "a.jsonl", [{"t": f"t{i}", "chosen": f"g {i}", "rejected": f"b {i}"} for i in range(20)])
    shutil.copy("a.jsonl", "b.jsonl")
    config = DataConfig(
        source="a.jsonl", prompt_template="{t}\\\\n", mixture={"b.jsonl": 0.5}, duplicates="keep"
    )
    run(config, "out")
    assert {row["prompt"] for row in everything("out")} == {f"t{i}\\n" for i in range(20)}


# Places


def test_sources_may_lie_behind_urls_and_no_secret_of_them_is_written(
    here, bucket, monkeypatch, capfd, caplog
):
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", float("inf"))  # it knows no signed URLs
    for name in ("a.jsonl", "b.jsonl"):
        bucket.upload_file(name, "team", name)
    signed = bucket.generate_presigned_url("get_object", Params={"Bucket": "team", "Key": "b.jsonl"})
    public, _, secret = signed.partition("?")
    assert "Signature" in secret
    for mixture in ({signed: 0.4}, {"b": {"source": signed, "share": 0.4}}):
        stats = run(DataConfig(source="s3://team/a.jsonl", mixture=mixture), "out")
        assert [one["source"] for one in stats["mixture"]] == ["s3://team/a.jsonl", public]
        name = stats["mixture"][1]["name"]
        assert counts("out") == {"s3://team/a.jsonl": 90, name: 60}
        assert list(stats["config"]["mixture"]) == [name]
        with pytest.raises(DataError) as refusal:
            run(DataConfig(source="s3://team/a.jsonl", mixture=mixture, rows=500), "other")
        with pytest.raises(ConfigError) as wrong:
            DataConfig(source="a.jsonl", mixture={signed: {"share": 0.4, "colums": {}}})
        told = [record.getMessage() for record in caplog.records if record.name != "werkzeug"]  # the store's
        said = [str(refusal.value), str(wrong.value), *capfd.readouterr(), *told]
        said += [path.read_bytes().decode(errors="replace") for path in (here / "out").rglob("*.*")]
        for part in secret.split("&"):
            assert not [text for text in said if part in text]


def test_a_signed_url_may_be_longer_than_a_files_name(here, monkeypatch):
    fetched = {f"https://host/{name}.jsonl?key={'x' * 600}": here / f"{name}.jsonl" for name in "ab"}
    monkeypatch.setattr("softpref.data.stage.fetch", lambda url, format: fetched[url])
    first, second = fetched
    run(DataConfig(source=first, mixture={second: 0.4}), "out")
    assert counts("out") == {"https://host/a.jsonl": 90, "https://host/b.jsonl": 60}


def test_an_absent_source_is_refused_before_any_is_read(here, monkeypatch):
    monkeypatch.setattr("softpref.data.stage.Source", lambda *_: pytest.fail("read"))
    with pytest.raises(ConfigError, match=r"'absent\.jsonl' does not exist"):
        run(DataConfig(source="a.jsonl", mixture={"absent.jsonl": 0.1}), "out")


def test_columns_that_do_not_fit_are_refused_with_the_source_before_any_row_is_taken(here, monkeypatch):
    monkeypatch.setattr("softpref.data.intake.Intake.take", lambda *_: pytest.fail("read"))
    write(here / "b.jsonl", [{"q": f"{i}?", "x": "x", "y": "y"} for i in range(30)])
    with pytest.raises(
        ConfigError, match=r"^b\.jsonl: cannot tell which columns.* the source has 'q', 'x', 'y'"
    ):
        run(DataConfig(source="a.jsonl", mixture={"b.jsonl": 0.1}), "out")
    mixture = {"b.jsonl": {"share": 0.1, "columns": QUESTION | {"prompt": "q"}}}
    with pytest.raises(ConfigError, match=r"b\.jsonl has no column 'better'"):
        run(DataConfig(source="a.jsonl", mixture=mixture), "out")
    assert not (here / "out").exists()


def test_a_source_inside_of_the_output_is_refused(here):
    run(DataConfig(source="a.jsonl"), "out")
    (here / "out" / "train" / "b.jsonl").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"mixture\['out/train/b.jsonl'\] out/train/b.jsonl lies in the output"
    ):
        run(DataConfig(source="a.jsonl", mixture={"out/train/b.jsonl": 0.5}), "out")


def test_a_finished_dataset_is_mixed_by_one_of_its_splits_alone(here):
    run(DataConfig(rows=300, sft_rows=20), "finished")
    for config in (
        DataConfig(source="a.jsonl", mixture={"finished": 0.3}),
        DataConfig(source="finished", mixture={"a.jsonl": 0.3}),
    ):
        with pytest.raises(ConfigError, match=r"finished is a finished dataset, .* give split, to read"):
            run(config, "out")
    run(DataConfig(source="a.jsonl", mixture={"finished": {"share": 0.3, "split": "train"}}), "out")
    assert counts("out") == {"a.jsonl": 100, "finished": 43}


@pytest.mark.parametrize("story_kind", ["pairwise", "best_of_n", "ranking"])
def test_rows_that_this_stage_wrote_keep_their_labels_when_they_are_mixed(here, story_kind):
    votes = 5 if story_kind == "pairwise" else 1
    run(DataConfig(rows=300, sft_rows=20, votes=votes, story_kind=story_kind), "finished")
    written = splits("finished")["train"]
    run(DataConfig(source="a.jsonl", mixture={"finished": {"share": 0.3, "split": "train"}}), "out")
    mixed = [row for row in everything("out") if row["source"] == "finished"]
    assert len(mixed) == 43
    for row in mixed:
        before = written[row["source_row"] - 1]
        assert [row[name] for name in ("prompt", "completions", "kind")] == [
            before[name] for name in ("prompt", "completions", "kind")
        ]
        assert row["probability"] == before["probability"]


# Refusals


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"b.jsonl": 1}, r"mixture\['b.jsonl'\] needs its share .* between 0 and 1, as in 0.3 .*got 1$"),
        ({"b.jsonl": 0}, "got 0$"),
        ({"b.jsonl": -0.1}, "got -0.1$"),
        ({"b.jsonl": True}, "got True$"),
        ({"b.jsonl": "half"}, "got 'half'$"),
        ({"b.jsonl": float("nan")}, "got nan$"),
        ({"b.jsonl": 0.3, "c.jsonl": {"split": "train"}}, r"c.jsonl.* as others have one; got none$"),
        ({"b.jsonl": [0.3]}, "needs its share"),
        (
            {"b.jsonl": 0.5, "c.jsonl": 0.5},
            "add up to 1; their sum must stay below 1, since source has the rest",
        ),
        ({"a.jsonl": 0.5}, "a.jsonl and a.jsonl are one source; give each once"),
        ({"./a.jsonl": 0.5}, "./a.jsonl and a.jsonl are one source"),
        ({"b.jsonl": 0.2, "file://{here}/b.jsonl": 0.2}, "are one source"),
        ({"again": {"source": "a.jsonl", "share": 0.2}}, "again and a.jsonl are one source"),
        ({"a.jsonl": {"source": "b.jsonl", "share": 0.2}}, "a.jsonl and a.jsonl are one source"),
        ({"https://x.org/f?n=1": 0.2, "https://x.org/f?n=2": 0.2}, "are one source"),
        ({"b.jsonl": {"share": 0.2, "colums": {}}}, "no option 'colums'; did you mean 'columns'?"),
        ({"b.jsonl": {"share": 0.2, "duplicates": "keep"}}, "no option 'duplicates'; known: as_messages, "),
        ({"b.jsonl": {"share": 0.2, "columns": {"chosn": "x"}}}, "no role 'chosn'"),
        ({"b.jsonl": {"share": 0.2, "labels": "firm"}}, "labels must be 'soft' | 'hard'"),
        ({"b.jsonl": {"share": 0.2, "min_votes": 0}}, "min_votes must be at least 1"),
        ({"b.jsonl": {"share": 0.2, "prompt_template": "{q}"}}, "either a prompt column or prompt_template"),
        ({"": 0.2}, "source is empty"),
        ({"story": 0.2}, "story and storyteller cannot be mixed"),
        ({"s": {"source": "story", "share": 0.2}}, "story and storyteller cannot be mixed"),
    ],
)
def test_a_wrong_mixture_is_refused_at_once(here, mixture, message):
    mixture = {key.replace("{here}", str(here)): value for key, value in mixture.items()}
    with pytest.raises(ConfigError, match=message):
        build_config(DataConfig, {"source": "a.jsonl", "columns": {**QUESTION}, "mixture": mixture})


def test_the_story_world_takes_no_mixture():
    with pytest.raises(ConfigError, match=r"story and storyteller cannot be mixed"):
        DataConfig(mixture={"b.jsonl": 0.5})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"mixture": {"b.jsonl": 0.5}, "rows": 121},
            r"rows = 121 .* more than 60 usable rows of b\.jsonl, .* at most 120 have these shares",
        ),
        ({"mixture": {"b.jsonl": 0.001}}, r"b\.jsonl has a share of 0\.001, and of 100 rows, .* is not one"),
        (
            {"mixture": {"b.jsonl": 0.01}, "rows": 10},
            r"b\.jsonl has a share of 0\.01, and of 10 rows that is",
        ),
    ],
)
def test_too_few_rows_for_a_share_are_refused_and_leave_nothing(here, config, message):
    with pytest.raises(DataError, match=message):
        run(DataConfig(source="a.jsonl", **config), "out")
    assert not (here / "out").exists()


# Entry points


@pytest.mark.parametrize("way", ["console", "yaml", "component"])
def test_the_console_a_file_and_the_component_take_a_mixture(here, way, capsys):
    mixture = {"b.jsonl": {"share": 0.25, "group_size": 3}}
    if way == "console":
        arguments = ["--source", "a.jsonl", "--mixture", json.dumps(mixture)]
    else:
        (here / "data.yaml").write_text(
            "source: a.jsonl\nmixture:\n  b.jsonl:\n    share: 25e-2  # to YAML a text\n    group_size: 3\n"
        )
        arguments = ["--config", "data.yaml"]
    if way == "component":
        from kfp.dsl import HTML, Dataset, Metrics

        outputs = {
            "dataset": Dataset(name="dataset", uri=str(here / "out")),
            "page": HTML(name="page", uri=str(here / "page.html")),
            "metrics": Metrics(name="metrics", uri=str(here / "metrics")),
        }
        given = {"b.jsonl": {"share": 0.25, "group_size": 3.0}}  # as KFP hands numbers over
        prepare_data.python_func(**outputs, source="a.jsonl", overrides={"mixture": given})
    else:
        assert main(["data", "--output", "out", *arguments]) == 0
    assert counts("out") == {"a.jsonl": 100, "b.jsonl": 33}  # 133 rows: 99.75 and 33.25


def test_the_console_refuses_a_wrong_one_with_a_sentence(here, capsys):
    assert main(["data", "--output", "out", "--source", "a.jsonl", "--mixture", '{"b.jsonl": 30}']) == 2
    assert "error: mixture['b.jsonl'] needs its share" in capsys.readouterr().err


def test_a_source_named_twice_in_text_is_refused(here, capsys):
    twice = '{"b.jsonl": 0.2, "b.jsonl": 0.3}'
    assert main(["data", "--output", "out", "--source", "a.jsonl", "--mixture", twice]) == 2
    (here / "data.yaml").write_text("source: a.jsonl\nmixture:\n  b.jsonl: 0.2\n  b.jsonl: 0.3\n")
    assert main(["data", "--output", "out", "--config", "data.yaml"]) == 2
    with pytest.raises(ConfigError, match=r"it names 'b\.jsonl' twice"):
        parse_overrides(f'{{"mixture": {twice}}}')
    assert capsys.readouterr().err.count("it names 'b.jsonl' twice") == 2


def test_addresses_that_differ_in_their_query_are_two_sources_under_names():
    mixture = {
        "one": {"source": "https://x.org/f?n=1", "share": 0.2},
        "two": {"source": "https://x.org/f?n=2", "share": 0.2},
    }
    parts = parts_of(DataConfig("a.jsonl", mixture=mixture))
    assert [part.name for part in parts] == ["a.jsonl", "one", "two"]
