"""The split `judge`: preferences from which a judge learns, and which no policy sees."""

import json

import datasets
import pytest
from softpref.data.config import DataConfig
from softpref.data.splits import prompt_key
from softpref.data.stage import run
from softpref.errors import ConfigError
from softpref.judges.bradley_terry import BradleyTerryJudge
from softpref.judges.loading import load_judge
from softpref.judges.texts import preference_pairs, text_rows

SHARES = {"validation_fraction": 0.1, "test_fraction": 0.2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A source of 40 prompts as a dataset without and with a split `judge`; demonstrations of all prompts."""
    folder = tmp_path_factory.mktemp("judge-split")
    rows = [
        {"prompt": f"Prompt {p}?", "chosen": f"good {p} {i}", "rejected": f"bad, long {p} {i}"}
        for i in range(3)
        for p in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    (folder / "shown.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shown))
    given = {"source": str(folder / "rows.jsonl"), "sft_source": str(folder / "shown.jsonl"), **SHARES}
    run(DataConfig(**given), str(folder / "without"))
    run(DataConfig(**given, judge_fraction=0.25), str(folder / "with"))
    run(DataConfig(source=str(folder / "with")), str(folder / "taken"))
    return folder


def prompts(folder):
    return {
        split: {prompt_key(row["prompt"]) for row in rows}
        for split, rows in datasets.load_from_disk(str(folder)).items()
    }


def test_no_prompt_is_in_two_splits_and_the_rest_stays_where_it_was(folders):
    before, after = prompts(folders / "without"), prompts(folders / "with")
    assert {split: len(keys) for split, keys in after.items()} == {
        **{"train": 21, "validation": 4, "test": 8},
        "judge": 7,
    }
    assert len(set().union(*after.values())) == 40
    assert "judge" not in before
    assert after["train"] | after["judge"] == before["train"]
    assert all(after[split] == before[split] for split in ("validation", "test"))
    stats = json.loads((folders / "with" / "stats.json").read_text())
    assert stats["rows"]["judge"] == 21
    assert "judge 17.5%" in (folders / "with" / "page.html").read_text()


def test_the_reference_learns_nothing_of_the_judges_prompts(folders):
    shown = prompts(folders / "with" / "sft")
    assert not set().union(*shown.values()) & prompts(folders / "with")["judge"]


def test_a_finished_dataset_brings_its_split_with_it(folders):
    assert prompts(folders / "taken") == prompts(folders / "with")
    hashes = [
        json.loads((folders / name / "stats.json").read_text()) for name in ("with", "taken", "without")
    ]
    assert hashes[0]["dataset_hash"] == hashes[1]["dataset_hash"] != hashes[2]["dataset_hash"]


def test_the_learned_judge_takes_the_split_where_it_exists(folders):
    for name, split in (("with", "judge"), ("without", "train")):
        rows = datasets.load_from_disk(str(folders / name))[split]
        judge = load_judge("bradley-terry", folders / name)
        assert judge.fingerprint == BradleyTerryJudge(preference_pairs(text_rows(rows))).fingerprint
        assert f"{len(rows)} pairs of the split {split}" in judge.description


def test_a_judge_that_takes_all_prompts_is_refused():
    with pytest.raises(ConfigError, match="judge_fraction 1 leaves nothing to train on"):
        DataConfig(judge_fraction=1.0)
