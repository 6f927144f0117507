"""What a training stage does around its trainer, whatever that trains."""

import json
from types import SimpleNamespace

import pytest
from softpref.errors import ConfigError, DataError
from softpref.lm.checkpoints import seal_checkpoint
from softpref.lm.course import Course, dataset_stats
from softpref.sft.config import SFTConfig


class Trainer:
    """Trains and evaluates nothing, and notes when."""

    eval_dataset = None

    def __init__(self, config):
        self.args, self.state, self.done = config, SimpleNamespace(global_step=3), []

    def is_world_process_zero(self):
        return True

    def add_callback(self, callback): ...

    def train(self, resume_from_checkpoint):
        self.done.append(("train", resume_from_checkpoint))
        return SimpleNamespace(metrics={"train_loss": 0.5})

    def evaluate(self):
        self.done.append("evaluate")
        return {"eval_loss": 0.25}

    def whole_model(self):
        return "the model"


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """`begin(**options) -> (course, trainer)` of a run that writes to `model`, its checkpoints to `kept`."""
    monkeypatch.setattr("softpref.tracking.tracker.mlflow_ready", lambda uri: False)
    monkeypatch.setattr("softpref.tracking.syncing.mlflow_ready", lambda uri: False)

    def make(**options):
        config = SFTConfig(
            model_config={"model_type": "llama"}, use_cpu=True, bf16=False, disable_tqdm=True, **options
        )
        where = {"experiment": "", "parent_run_id": "", "tracking_uri": ""}
        course = Course(
            "sft", config, str(tmp_path / "model"), name="one", checkpoint_dir=str(tmp_path / "kept"), **where
        )
        return course, Trainer(config)

    return make


def checkpoint(folder):
    folder.mkdir(parents=True)
    (folder / "training_loss.json").write_text('{"summed_loss": 1.0}')
    seal_checkpoint(folder)


def claimed(begin, identity, **options):
    course, trainer = begin(**options)
    assert course.finished(identity) is None
    course.claim()
    return course, trainer


COUNTS = {"train": {"given": 7, "left_out": 1}}


def test_a_run_gives_its_metrics_and_leaves_its_timings_and_no_checkpoint(begin, tmp_path):
    course, trainer = claimed(begin, {"seed": 1})
    trainer.eval_dataset = ["rows"]
    with course.trained(trainer, {}, COUNTS, parameters=9) as trained:
        checkpoint(tmp_path / "kept" / "checkpoint-3")
        assert trained.model == "the model"
    expected = {"train_loss": 0.5, "rows/given": 7.0, "rows/left_out": 1.0, "eval_loss": 0.25}
    assert trained.metrics == expected
    assert trainer.done == [("train", None), "evaluate"]
    assert not (tmp_path / "kept").exists()
    assert {"loading", "training", "saving"} <= json.loads(
        (tmp_path / "model/timings.json").read_text()
    ).keys()
    tracked = [json.loads(line) for line in (tmp_path / "model/tracking.jsonl").read_text().splitlines()]
    [parameters] = [line["values"] for line in tracked if line["kind"] == "params"]
    assert {name: str(value) for name, value in parameters.items()} == {
        "stage": "sft",
        "parameters": "9",
        "seed": "1",
    }


def test_a_run_whose_model_could_not_be_saved_keeps_its_checkpoints_and_goes_on_from_them(begin, tmp_path):
    course, trainer = claimed(begin, {"seed": 1})

    def run():
        with course.trained(trainer, {}, COUNTS):
            checkpoint(tmp_path / "kept" / "checkpoint-2")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        run()
    assert not (tmp_path / "model/timings.json").exists()
    course, trainer = claimed(begin, {"seed": 1})
    with course.trained(trainer, {}, COUNTS):
        pass
    assert trainer.done == [("train", str(tmp_path / "kept" / "checkpoint-2"))]


def test_another_run_does_not_go_on_from_them(begin, tmp_path):
    claimed(begin, {"seed": 1})
    checkpoint(tmp_path / "kept" / "checkpoint-2")
    with pytest.raises(ConfigError, match="seed: 1 there, 2 here"):
        claimed(begin, {"seed": 2})


def test_without_epochs_and_steps_nothing_is_trained(begin):
    course, trainer = claimed(begin, {}, num_train_epochs=0)
    with course.trained(trainer, {}, COUNTS) as trained:
        assert trained.metrics == {"rows/given": 7.0, "rows/left_out": 1.0}
    assert trainer.done == []


def test_what_is_no_dataset_folder_is_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"is not a dataset folder of the data stage: it holds no stats\.json"
    ):
        dataset_stats(tmp_path)
