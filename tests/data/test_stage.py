"""The dataset folder: what is in it, what is refused, and that it is whole or absent."""

import collections
import html
import json
import os
import re
import subprocess
import sys
import textwrap

import datasets
import numpy as np
import pytest
from softpref.config import build_config
from softpref.data.config import DataConfig
from softpref.data.stage import run
from softpref.errors import ConfigError, DataError

from tests.data.files import everything, lines, write


def pairs(prompts=20, per_prompt=3):
    return [
        {"prompt": f"Prompt {p}?", "chosen": f"good {p} {i}", "rejected": f"bad {p} {i}"}
        for i in range(per_prompt)
        for p in range(prompts)
    ]


def test_what_is_recognised_assumed_and_unused_is_said(tmp_path, caplog):
    rows = [{"prompt": f"Q{i}?", "responses": [f"a {i}", f"b {i}", f"c {i}"], "id": i} for i in range(20)]
    stats = run(DataConfig(source=write(tmp_path / "rows.jsonl", rows)), str(tmp_path / "data"))
    assert stats["mapping"]["unused"] == ["id"]
    page = (tmp_path / "data" / "page.html").read_text(encoding="utf-8")
    for said in ("completions ← responses", "assumed to stand best first"):
        assert said in "".join(stats["mapping"]["notes"])
        assert said in page
        assert said in caplog.text
    assert "columns without use: id" in caplog.text
    assert "the split test has only 2 of 20 prompts, and intervals take 10" in caplog.text
    assert "columns without use</th><td><code>id<" in page


# Local sources


def test_duplicates_are_dropped_and_contradictions_counted(tmp_path):
    rows = pairs()
    rows.append({**rows[0]})
    rows.append({**rows[1], "prompt": "  PROMPT 1? "})
    rows.append({"prompt": "Prompt 2?", "chosen": rows[2]["rejected"], "rejected": rows[2]["chosen"]})
    source = write(tmp_path / "rows.jsonl", rows)
    stats = run(DataConfig(source=source), str(tmp_path / "kept"))
    assert stats["duplicates"] == 2
    assert stats["left_out"] == {"duplicate": 2}
    assert stats["contradictions"] == {"sets": 1, "rows": 2}
    assert sum(stats["rows"].values()) == 61
    assert stats["mapping"]["guessed"]
    assert [entry["reason"] for entry in lines(tmp_path / "kept" / "rejected.jsonl")] == [
        "duplicate: of row 1",
        "duplicate: of row 2",
    ]

    stats = run(DataConfig(source=source, contradictions="drop"), str(tmp_path / "dropped"))
    assert sum(stats["rows"].values()) == 59
    assert stats["left_out"] == {"duplicate": 2, "contradiction": 2}
    assert {3, 63} <= {entry["source_row"] for entry in lines(tmp_path / "dropped" / "rejected.jsonl")}


def test_every_refused_row_is_listed_with_its_number_and_reason(tmp_path):
    rows = pairs()
    rows[4]["chosen"] = True
    rows[7]["rejected"] = ""
    del rows[9]["prompt"]
    source = tmp_path / "rows.jsonl"
    write(source, rows)
    with source.open("a") as file:
        file.write('{"prompt": "cut off\n')
    stats = run(DataConfig(source=str(source)), str(tmp_path / "data"))
    listed = {entry["source_row"]: entry["reason"] for entry in lines(tmp_path / "data" / "rejected.jsonl")}
    assert set(listed) == {5, 8, 10, 61}
    assert listed[5] == "completion is not text: chosen ('chosen') is the boolean true"
    assert listed[10] == "field is missing: 'prompt'"
    assert listed[61].startswith("row cannot be read: not valid JSON")
    assert sum(stats["rejected"].values()) == 4
    assert sum(stats["rows"].values()) == 57


@pytest.mark.parametrize(
    ("bad", "message"), [(60, "none of the 60 rows"), (40, "40 of the 60 rows .* 0.5 allows")]
)
def test_too_many_refused_rows_leave_no_dataset_but_a_listing(tmp_path, bad, message):
    rows = pairs()
    for row in rows[:bad]:
        row["chosen"] = True
    source = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=message) as caught:
        run(DataConfig(source=source), str(tmp_path / "data"))
    assert f"completion is not text ({bad})" in str(caught.value)
    listing = tmp_path / "data.rejected.jsonl"
    assert str(listing) in str(caught.value)
    assert len(lines(listing)) == bad
    assert sorted(os.listdir(tmp_path)) == ["data.rejected.jsonl", "rows.jsonl"]
    run(DataConfig(source=write(tmp_path / "rows.jsonl", pairs())), str(tmp_path / "data"))
    assert not listing.exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"columns": {"chosen": "chosen", "rejected": "rejectd"}}, "did you mean 'rejected'"),
        ({"prompt_template": "{question}"}, "no column 'question'.* it has 'prompt', 'chosen', 'rejected'"),
    ],
)
def test_an_absent_column_is_refused_before_anything_is_written(tmp_path, config, message):
    source = write(tmp_path / "rows.jsonl", pairs())
    with pytest.raises(ConfigError, match=message):
        run(DataConfig(source=source, **config), str(tmp_path / "data"))
    assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("name", ["sft", "prompts", "unpaired"])
def test_an_empty_further_source_is_named_by_its_parameter(tmp_path, name):
    empty, source = write(tmp_path / "empty.jsonl", []), write(tmp_path / "rows.jsonl", pairs())
    with pytest.raises(DataError, match=f"{name}_source .*empty.jsonl holds no rows"):
        run(build_config(DataConfig, {"source": source, f"{name}_source": empty}), str(tmp_path / "data"))


def test_an_empty_source_and_too_few_prompts_are_errors(tmp_path):
    empty = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match="holds no rows"):
        run(DataConfig(source=empty), str(tmp_path / "data"))
    few = write(tmp_path / "few.jsonl", pairs(prompts=2))
    with pytest.raises(DataError, match="at least 3"):
        run(DataConfig(source=few), str(tmp_path / "data"))
    stats = run(DataConfig(source=few, validation_fraction=0, test_fraction=0), str(tmp_path / "data"))
    assert stats["rows"] == {"train": 6, "validation": 0, "test": 0}
    assert len(datasets.load_from_disk(str(tmp_path / "data"))["test"]) == 0


def test_nothing_but_a_dataset_is_replaced_and_not_its_own_source(tmp_path):
    source = write(tmp_path / "rows.jsonl", pairs())
    folder = tmp_path / "data"
    run(DataConfig(source=source), str(folder))
    run(DataConfig(source=source), str(folder))
    inside = write(folder / "rows.jsonl", pairs())
    with pytest.raises(ConfigError, match=r"it also holds rows\.jsonl"):
        run(DataConfig(source=source), str(folder))
    (folder / "rows.jsonl").rename(folder / "sft")
    for taken in (str(folder), str(folder / "sft")):
        with pytest.raises(ConfigError, match="lies in the output"):
            run(DataConfig(source=taken), str(folder))
    with pytest.raises(ConfigError, match=r"sft_source .* lies in the output"):
        run(DataConfig(source=source, sft_source=str(folder / "sft")), str(folder))
    assert inside
    assert (folder / "dataset_dict.json").is_file()


def test_a_folder_of_someone_else_is_never_overwritten(tmp_path):
    source = write(tmp_path / "rows.jsonl", pairs())
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is not a dataset of this stage"):
        run(DataConfig(source=source), str(tmp_path / "thesis"))
    assert os.listdir(tmp_path / "thesis") == ["chapter.txt"]
    (tmp_path / "data").mkdir()
    run(DataConfig(source=source), str(tmp_path / "data"))
    replaced = run(DataConfig(source=source, seed=1), str(tmp_path / "data"))
    assert json.loads((tmp_path / "data" / "stats.json").read_text()) == replaced
    assert sorted(os.listdir(tmp_path)) == ["data", "rows.jsonl", "thesis"]


def test_rows_of_mixed_form_are_refused(tmp_path):
    rows = pairs()
    rows[3] = {
        "prompt": [{"role": "user", "content": "hi"}],
        "chosen": [{"role": "assistant", "content": "x"}],
        "rejected": [{"role": "assistant", "content": "y"}],
    }
    stats = run(DataConfig(source=write(tmp_path / "rows.jsonl", rows)), str(tmp_path / "data"))
    assert stats["rejected"] == {"plain text and conversations are mixed": 1}


def test_conversations_are_saved_as_messages(tmp_path):
    source = write(tmp_path / "rows.jsonl", pairs())
    stats = run(DataConfig(source=source, as_messages=True), str(tmp_path / "data"))
    assert stats["conversational"]
    row = datasets.load_from_disk(str(tmp_path / "data"))["train"][0]
    assert [message["role"] for message in row["prompt"]] == ["user"]
    assert [[message["role"] for message in completion] for completion in row["completions"]] == [
        ["assistant"]
    ] * 2


def test_one_candidate_per_row_is_grouped_into_rankings_that_follow_the_scores(tmp_path):
    rows = [
        {"topic": f"t{p}", "text": f"text {p} {i}", "score": (i * 7 + p) % 11}
        for i in range(11)
        for p in range(12)
    ]
    config = DataConfig(
        source=write(tmp_path / "rows.jsonl", rows),
        columns={"completion": "text", "score": "score"},
        prompt_template="Topic: {topic}\n",
        group_size=4,
    )
    stats = run(config, str(tmp_path / "data"))
    assert stats["completions_per_row"] == {"3": 12, "4": 24}
    scores = {row["text"]: row["score"] for row in rows}
    topics = {row["text"]: f"Topic: {row['topic']}\n" for row in rows}
    seen = collections.Counter()
    for row in everything(tmp_path / "data"):
        values = [scores[text] for text in row["completions"]]
        assert values == sorted(values, reverse=True)
        assert {topics[text] for text in row["completions"]} == {row["prompt"]}
        assert row["kind"] == "ranking"
        seen.update(row["completions"])
    assert set(seen.values()) == {1}
    assert len(seen) == len(rows)


def test_a_sample_has_the_asked_size_and_is_drawn_from_the_whole_source(tmp_path):
    source = write(tmp_path / "rows.jsonl", pairs(prompts=100))
    stats = run(DataConfig(source=source, rows=90), str(tmp_path / "data"))
    numbers = [row["source_row"] for row in everything(tmp_path / "data")]
    assert len(numbers) == 90
    assert stats["not_sampled"] == 210
    assert 120 < np.mean(numbers) < 180
    first = run(DataConfig(source=source, max_source_rows=90), str(tmp_path / "first"))
    assert first["rows_read"] == 90


def test_further_demonstrations_and_prompts_keep_clear_of_the_test_prompts(tmp_path):
    source = write(tmp_path / "rows.jsonl", pairs())
    asked = [*(f"prompt {p}?" for p in range(20)), "A new one?", "a NEW one?"]
    sft = write(tmp_path / "sft.jsonl", [{"q": q, "completion": "an answer"} for q in asked] + [{"q": 3}])
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": q} for q in asked])
    config = DataConfig(source=source, sft_source=sft, sft_columns={"prompt": "q"}, prompts_source=prompts)
    stats = run(config, str(tmp_path / "data"))
    saved = datasets.load_from_disk(str(tmp_path / "data"))
    held_out = {split: {prompt.casefold() for prompt in saved[split]["prompt"]} for split in saved}
    demonstrations = datasets.load_from_disk(str(tmp_path / "data" / "sft"))
    assert set(demonstrations["validation"]["prompt"]) == held_out["validation"]
    assert not held_out["test"] & {prompt.casefold() for prompt in demonstrations["train"]["prompt"]}
    further = datasets.load_from_disk(str(tmp_path / "data" / "prompts"))["prompt"]
    assert {prompt.casefold() for prompt in further} == {"a new one?"} | held_out["train"]
    assert stats["sft"]["rejected"] == {"field is missing": 1}
    assert stats["sft"]["held_out"] == 2
    assert len(further) == 17


def test_broken_demonstrations_are_an_error_with_a_listing(tmp_path):
    source = write(tmp_path / "rows.jsonl", pairs())
    sft = write(tmp_path / "sft.jsonl", [{"prompt": "q", "completion": bad} for bad in (True, "", 3, "fine")])
    with pytest.raises(DataError, match=r"3 of the 4 rows of .*sft.jsonl .* in .*data.rejected.jsonl"):
        run(DataConfig(source=source, sft_source=sft), str(tmp_path / "data"))
    assert [entry["source"] for entry in lines(tmp_path / "data.rejected.jsonl")] == ["sft"] * 3
    assert not (tmp_path / "data").exists()


# The page


def test_the_page_escapes_its_examples_and_loads_nothing(tmp_path):
    rows = [{**row, "chosen": f"<script>alert({i})</script> & co"} for i, row in enumerate(pairs())]
    page = tmp_path / "elsewhere" / "page.html"
    run(DataConfig(source=write(tmp_path / "rows.jsonl", rows)), str(tmp_path / "data"), str(page))
    text = page.read_text(encoding="utf-8")
    assert text == (tmp_path / "data" / "page.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(" in text
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])
    assert policy.startswith("default-src 'none'")
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)
    assert [one for one in scripts if "alert" in one] == []
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", text)
    assert text.count('class="bars"') == 2  # the hard labels have no confidence to draw


# Size and sudden ends


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the process's memory from /proc")
def test_a_hundred_thousand_rows_pass_in_bounded_memory(tmp_path):
    """100,000 rows of 2 KB (200 MB of text) cost less than 110 MB beyond the libraries."""
    script = textwrap.dedent(
        """
        import json, sys, threading, time
        import datasets, numpy, pyarrow.parquet, datasets.arrow_writer
        from softpref.data.config import DataConfig
        from softpref.data.stage import run

        def anonymous():  # what the process itself holds, without pages of files it maps
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

        folder = sys.argv[1]
        filler = "lorem ipsum dolor sit amet " * 36
        with open(f"{folder}/rows.jsonl", "w") as file:
            for i in range(100_000):
                row = {"prompt": f"question {i % 20_000}", "chosen": f"{i} {filler}"}
                row["rejected"] = f"-{i} {filler}"
                file.write(json.dumps(row) + "\\n")
        peak, start, done = [0.0], anonymous(), threading.Event()

        def watch():
            while not done.wait(0.05):
                peak[0] = max(peak[0], anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        stats = run(DataConfig(source=f"{folder}/rows.jsonl"), f"{folder}/data")
        done.set()
        watcher.join()
        print(json.dumps({"rows": sum(stats["rows"].values()), "growth": peak[0] - start}))
        """
    )
    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    result = json.loads(out.splitlines()[-1])
    assert result["rows"] == 100_000
    assert result["growth"] < 110


def test_a_run_that_dies_leaves_no_half_dataset(tmp_path):
    source = write(tmp_path / "rows.jsonl", pairs())
    script = textwrap.dedent(
        """
        import os, signal, sys
        import softpref.data.stage as stage
        from softpref.data.config import DataConfig
        stage.render_page = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        stage.run(DataConfig(source=sys.argv[1]), sys.argv[2])
        """
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, source, str(tmp_path / "data")], capture_output=True
    )
    assert killed.returncode == -9
    assert not (tmp_path / "data").exists()
    run(DataConfig(source=source), str(tmp_path / "data"))
    assert sorted(os.listdir(tmp_path)) == ["data", "rows.jsonl"]


def test_one_odd_row_does_not_decide_for_the_others(tmp_path):
    rows = [{"prompt": f"p{number}", "chosen": "good", "rejected": "bad"} for number in range(20)]
    rows[0] = {
        "prompt": [{"role": "user", "content": "p"}],
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
    }
    rows[1]["probability"] = 0.9
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    stats = run(DataConfig(source=str(path)), tmp_path / "out")
    assert not stats["conversational"]
    (line,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["source_row"] == 1


@pytest.mark.parametrize("odd", [-1, "70 kg", 2.5])
def test_weights_are_a_column_of_the_dataset_and_a_bad_one_costs_its_row(tmp_path, odd):
    rows = [{**row, "weight": index % 3} for index, row in enumerate(pairs(20, 1))]
    rows[4]["weight"] = odd
    stats = run(DataConfig(source=write(tmp_path / "rows.jsonl", rows)), str(tmp_path / "data"))
    written = {row["source_row"]: row["weight"] for row in everything(tmp_path / "data")}
    good = odd == 2.5
    expected = {index + 1: row["weight"] for index, row in enumerate(rows) if index != 4 or good}
    assert written == expected
    assert sum(stats["rejected"].values()) == (not good)
    again = run(DataConfig(source=str(tmp_path / "data")), str(tmp_path / "again"))
    assert again["dataset_hash"] == stats["dataset_hash"]


def test_a_column_weight_that_holds_no_numbers_has_no_use(tmp_path):
    rows = [{**row, "weight": "70 kg"} for row in pairs(20, 1)]
    stats = run(DataConfig(source=write(tmp_path / "rows.jsonl", rows)), str(tmp_path / "data"))
    assert "weight" in stats["mapping"]["unused"]
    assert "weight" not in everything(tmp_path / "data")[0]
    assert sum(stats["rows"].values()) == 20


@pytest.mark.parametrize("system", ["Online-A", {"name": "A"}, 7])
def test_a_column_system_that_holds_no_instruction_has_no_use(tmp_path, system):
    """In data of machine translation, say, it names the system that wrote the text."""
    rows = [{**row, "system": system} for row in pairs(20, 1)]
    stats = run(DataConfig(source=write(tmp_path / "rows.jsonl", rows)), str(tmp_path / "data"))
    assert "system" in stats["mapping"]["unused"]
    assert {row["prompt"] for row in everything(tmp_path / "data")} == {row["prompt"] for row in rows}


def test_thumbs_and_verdicts_become_pairs_and_what_has_no_partner_is_listed(tmp_path):
    thumbs = [
        {"prompt": f"Q{p}?", "completion": f"answer {p} {i}", "label": i == 0}
        for p in range(20)
        for i in range(3 if p else 1)
    ]
    stats = run(DataConfig(source=write(tmp_path / "rows.jsonl", thumbs)), str(tmp_path / "data"))
    assert sorted(tuple(row["completions"]) for row in everything(tmp_path / "data")) == sorted(
        (f"answer {p} 0", f"answer {p} {i}") for p in range(1, 20) for i in (1, 2)
    )
    assert stats["left_out"] == {"prompt with one label only": 1}
    wins = [[0, 3, 0], [1, 0, 2], [0, 2, 0]]
    lists = [
        {"prompt": f"Q{p}?", "completions": [f"{x} {p}" for x in "ABC"], "verdicts": wins} for p in range(20)
    ]
    source = write(tmp_path / "lists.jsonl", lists)
    stats = run(DataConfig(source=source, ties="drop"), str(tmp_path / "lists"))
    rows = {
        (row["source_row"], *row["completions"], row["probability"]) for row in everything(tmp_path / "lists")
    }
    assert rows == {(p + 1, f"A {p}", f"B {p}", 0.75) for p in range(20)}
    assert stats["left_out"] == {"tie": 20}
