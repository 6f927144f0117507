"""The KFP face runs as a plain function and under the local runner, on real artifacts."""

import datasets
import pytest
from kfp import local
from kfp.dsl import HTML, Dataset, Metrics
from softpref.data.component import prepare_data
from softpref.data.stage import headline
from softpref.errors import ConfigError


def artifacts(folder):
    return {
        "dataset": Dataset(name="dataset", uri=str(folder / "dataset")),
        "page": HTML(name="page", uri=str(folder / "page.html")),
        "metrics": Metrics(name="metrics", uri=str(folder / "metrics")),
    }


def test_the_component_fills_its_artifacts(tmp_path):
    outputs = artifacts(tmp_path)
    prepare_data.python_func(**outputs, rows=300, overrides={"votes": 0, "sft_rows": 50})
    saved = datasets.load_from_disk(outputs["dataset"].path)
    assert sum(map(len, saved.values())) == 300
    assert all(row["probability"] is not None for row in saved["test"])
    assert "Preference dataset" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert outputs["metrics"].metadata["train_rows"] == len(saved["train"])
    assert outputs["metrics"].metadata["soft_label_share"] == 1.0
    said = outputs["dataset"].metadata
    assert [len(said[name]) for name in ("dataset_hash", "test_hash")] == [64, 64]
    assert (said["source"], said["kinds"], said["train_rows"]) == (
        "story",
        "300 pairwise",
        len(saved["train"]),
    )
    assert said["prompts"] == len({prompt for rows in saved.values() for prompt in rows["prompt"]})
    assert "revision" not in said  # the story world has none
    assert outputs["page"].metadata["title"] == "What the preferences of story hold"


def test_the_component_maps_columns_of_a_file(tmp_path):
    source = tmp_path / "rows.csv"
    rows = "".join(f"topic {i},good {i},bad {i}\n" for i in range(30))
    source.write_text("topic,better,worse\n" + rows)
    outputs = artifacts(tmp_path)
    prepare_data.python_func(
        **outputs,
        source=str(source),
        columns='{"chosen": "better", "rejected": "worse"}',
        prompt_template="About {topic}:",
        test_fraction=0.2,
    )
    assert outputs["metrics"].metadata["test_rows"] == 6
    assert datasets.load_from_disk(outputs["dataset"].path)["test"][0]["prompt"].startswith("About topic")


def test_the_headline_counts_rows_and_says_how_many_labels_are_soft():
    stats = {
        "rows": {"train": 8, "validation": 1, "test": 1},
        "rejected": {"empty": 2, "no winner": 1},
        "left_out": {"duplicate": 4},
        "labels": {"hard": 7, "soft": 3},
    }
    assert headline(stats) == {
        "train_rows": 8,
        "validation_rows": 1,
        "test_rows": 1,
        "refused_rows": 3,
        "left_out_rows": 4,
        "soft_label_share": 0.3,
    }


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"overrides": '{"vote": 1}'}, "did you mean 'votes'"),
        ({"overrides": "votes=1"}, "not JSON"),
        ({"columns": "[1]"}, "columns must be dict"),
        ({"source": "absent.jsonl"}, "does not exist"),
    ],
)
def test_the_component_refuses_wrong_parameters(tmp_path, parameters, message):
    with pytest.raises(ConfigError, match=message):
        prepare_data.python_func(**artifacts(tmp_path), **parameters)
    assert list(tmp_path.iterdir()) == []


def test_the_component_runs_under_the_local_runner(tmp_path):
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path), raise_on_error=True)
    task = prepare_data(rows=200, overrides={"sft_rows": 50})
    saved = datasets.load_from_disk(task.outputs["dataset"].path)
    assert sum(map(len, saved.values())) == 200
