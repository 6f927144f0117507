"""Stages that are killed at the worst places, and called again: nothing is lost, or told twice."""

import json
import os
import random
import subprocess
import sys
from collections import Counter

import pytest

SCRIPT = '''
"""Calls stages as told, each in a fork: where it is killed, its arguments, where its output goes."""
import json, os, signal, sys
from pathlib import Path

import softpref.evaluation.measure
import softpref.evaluation.report
import softpref.evaluation.stage
import softpref.lm.course
import softpref.lm.watching
import softpref.spo.stage
import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto
import transformers.models.llama.modeling_llama
from softpref.cli import main
from softpref.tracking import mlflow_ready

mlflow_ready("sqlite:///mlflow.db")


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def dies_in_a_checkpoint():
    import softpref.lm.training as module

    real, calls = module.seal_checkpoint, []

    def seal(folder):
        calls.append(folder)
        die() if len(calls) == 2 else real(folder)

    module.seal_checkpoint = seal


def dies_after_a_step():
    from softpref.lm.watching import TrackingCallback

    real = TrackingCallback.on_log

    def on_log(self, args, state, control, logs=None, **more):
        real(self, args, state, control, logs, **more)
        if state.global_step == 5:
            self.tracker.flush(60)
            die()

    TrackingCallback.on_log = on_log


def dies_with_half_a_model():
    def write_result(folder, *_):
        os.truncate(folder / "model.safetensors", 1000)
        die()

    softpref.lm.course.write_result = write_result


def dies_instead_of(module, name):
    setattr(module, name, die)


PLACES = {
    "checkpoint": dies_in_a_checkpoint,
    "step": dies_after_a_step,
    "half a model": dies_with_half_a_model,
    "end": lambda: dies_instead_of(softpref.lm.course, "remove_checkpoints"),
    "report": lambda: dies_instead_of(softpref.evaluation.report, "write_report"),
    "tracking": lambda: dies_instead_of(softpref.evaluation.stage, "_track"),
}

for place, arguments, output in json.load(open("calls.json")):
    if not (child := os.fork()):
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if place:
            PLACES[place]()
        status = main(arguments)
        sys.stdout.flush()
        os._exit(status)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended == (-signal.SIGKILL if place else 0), (place, arguments, open(output).read())
'''
OF_TIME = ("seconds/", "sampling/t", "train_runtime", "train_s", "eval_runtime", "eval_s", "total_flos")
TRAINED = {"whole": [""], "killed": ["checkpoint", "step", "half a model", "end", "", ""]}
EVALUATED = {"whole": [""], "killed": ["report", "tracking", "", ""]}


@pytest.fixture(scope="module")
def killed(tmp_path_factory, make_model, make_tokenizer):
    """The folder in which the stages were called: what each wrote, and its output in `KIND-NAME.txt`."""
    from datasets import Dataset, DatasetDict

    folder = tmp_path_factory.mktemp("killed")
    (folder / "script.py").write_text(SCRIPT)
    tokenizer = make_tokenizer("abcdefgh")
    make_model(tokenizer).save_pretrained(folder / "reference")
    tokenizer.save_pretrained(folder / "reference")
    drawn = random.Random(0)

    def row():
        prompt, *completions = ("".join(drawn.choices("abcdefgh", k=6)) for _ in range(3))
        return {"prompt": prompt, "completions": completions, "kind": "pairwise", "probability": None}

    splits = {name: Dataset.from_list([row() for _ in range(24)]) for name in ("train", "validation", "test")}
    DatasetDict(splits).save_to_disk(str(folder / "dataset"))
    (folder / "dataset/stats.json").write_text('{"dataset_hash": "abc"}')
    inputs = ["--dataset", "dataset", "--reference", "reference"]
    train = ["train", *inputs, "--use_cpu", "--bf16", "false", "--disable_tqdm", "true", "--name", "one"]
    train += ["--max_steps", "6", "--per_device_train_batch_size", "8", "--learning_rate", "1e-3"]
    train += ["--samples_per_refresh", "12", "--sampling_interval", "3", "--max_completion_length", "8"]
    train += ["--logging_steps", "1", "--save_strategy", "steps", "--save_steps", "2"]
    evaluate = ["evaluate", *inputs, "--policy", "train-whole", "--bootstrap_samples", "100"]
    evaluate += ["--max_prompts", "3", "--samples_per_prompt", "4", "--exact_prompts", "0"]
    calls = [
        (place, [*arguments, "--output", f"{kind}-{name}"], f"{kind}-{name}.txt")
        for kind, arguments, names in (("train", train, TRAINED), ("evaluate", evaluate, EVALUATED))
        for name, places in names.items()
        for place in places
    ]
    (folder / "calls.json").write_text(json.dumps(calls))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["MLFLOW_TRACKING_URI"] = "sqlite:///mlflow.db"
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for output in folder.glob("*.txt"):
        assert "Traceback" not in output.read_text(), output
    return folder


def results_in(output):
    """The metrics that a stage printed at the end of each call that had one."""
    found = [json.loads("{" + text.partition("}")[0] + "}") for text in output.read_text().split("\n{\n")[1:]]
    return [{name: value for name, value in one.items() if not name.startswith(OF_TIME)} for one in found]


def points(folder):
    """How often the mirror has each point, and the points that tell of no time."""
    lines = map(json.loads, (folder / "tracking.jsonl").read_text().splitlines())
    found = [
        (key, line["step"], value)
        for line in lines
        if line["kind"] == "metrics"
        for key, value in line["values"].items()
    ]
    return Counter(point[:2] for point in found), {
        (key, step): value for key, step, value in found if not key.startswith(OF_TIME)
    }


@pytest.fixture(scope="module")
def client(killed):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{killed / 'mlflow.db'}")


def test_a_training_ends_as_one_that_was_never_killed(killed):
    whole, found = killed / "train-whole", killed / "train-killed"
    assert (found / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (found / "checkpoints").exists()
    [expected] = results_in(killed / "train-whole.txt")
    assert expected["train_loss"] > 0
    first, second = results_in(killed / "train-killed.txt")
    assert first == second == pytest.approx(expected)


@pytest.mark.parametrize(
    "said",
    [
        "checkpoint-4 is passed over: it has no manifest.json, its last file",
        "continuing from train-killed/checkpoints/checkpoint-2",
        "continuing from train-killed/checkpoints/checkpoint-4",
        "continuing from train-killed/checkpoints/checkpoint-6",
        "train-killed holds this very model, finished: there is nothing to train",
    ],
)
def test_a_training_that_goes_on_says_so(killed, said):
    assert said in (killed / "train-killed.txt").read_text()


def test_every_point_of_a_training_is_there_once_and_its_run_is_finished(killed, client):
    counts, values = points(killed / "train-killed")
    _, expected = points(killed / "train-whole")
    assert len(expected) > 60
    assert set(counts.values()) == {1}
    assert values == pytest.approx(expected)
    run = client.get_run(json.loads((killed / "train-killed/softpref.json").read_text())["run_id"])
    for key in run.data.metrics:
        history = client.get_metric_history(run.info.run_id, key)
        assert len({point.step for point in history}) == len(history), key
        for point in history:
            if not key.startswith(OF_TIME):
                assert point.value == pytest.approx(expected[key, point.step]), key


def test_each_training_has_one_run_and_none_is_left_running(client):
    experiment = client.get_experiment_by_name("softpref")
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * len(TRAINED)


def test_an_evaluation_that_was_killed_has_the_figures_of_one_that_was_not(killed):
    whole, found = (
        json.loads((killed / f"evaluate-{name}/evaluation.json").read_text()) for name in EVALUATED
    )
    assert found == whole
    assert "holds this very evaluation, finished" in (killed / "evaluate-killed.txt").read_text()
    figures = {f"eval/{name}" for name, one in whole["metrics"].items() if one["value"] is not None}
    for name in EVALUATED:
        counts, _ = points(killed / f"evaluate-{name}")
        assert figures <= {key for key, _ in counts}
        assert set(counts.values()) == {1}
