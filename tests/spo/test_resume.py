"""A run that was killed and resumed ends as one that never was, bit for bit; two processes train as one."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import load_file
from softpref.lm.checkpoints import last_checkpoint

SCRIPT = '''
"""Trains the toy model as told: folder of the start, rows, runs (folder, step to be killed at, options)."""
import json, os, signal, sys
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback
from softpref.lm.loading import load_model, load_tokenizer
from softpref.lm.checkpoints import last_checkpoint
from softpref.spo import SPOConfig, SPOTrainer
from softpref.spo.lineage import EarlierRound


class Steps(TrainerCallback):
    def __init__(self, output, dies_at):
        self.output, self.dies_at = output, dies_at

    def on_step_end(self, args, state, control, **kwargs):
        Path(self.output, "steps.log").open("a").write(f"{state.global_step}\\n")
        if state.global_step == self.dies_at:
            # a checkpoint that a kill cut off: everything but the file that comes last
            Path(self.output, "checkpoint-12").mkdir()
            Path(self.output, "checkpoint-12", "model.safetensors").write_bytes(b"")
            os.kill(os.getpid(), signal.SIGKILL)


class Judge:
    def scores(self, texts):
        return np.array([text.count("a") - len(text) / 4 for text in texts])

    def probabilities(self, prompts, first, second):
        return 1 / (1 + np.exp(self.scores(second) - self.scores(first)))


def train(output, start, dies_at, rows, options):
    torch.manual_seed(0)
    config = SPOConfig(**{
        "output_dir": output, "use_cpu": True, "bf16": False, "disable_tqdm": True, "logging_steps": 1,
        "save_total_limit": 2, "lr_scheduler_type": "linear", "max_prompt_length": 16,
        "max_completion_length": 8, "beta": 0.3, "seed": 3, **options,
    })
    earlier = []
    if config.dimensions:  # a first round on another dimension, which has moved every weight
        other = load_model(start)
        with torch.no_grad():
            for weight in other.parameters():
                weight += 0.1 * torch.randn_like(weight)
        earlier = [EarlierRound(other, "dpo", beta=0.5)]
    trainer = SPOTrainer(
        load_model(start), config, train_dataset=rows, processing_class=load_tokenizer(start), judge=Judge(),
        earlier_rounds=earlier,
    )
    Path(output).mkdir(exist_ok=True, parents=True)
    if trainer.is_world_process_zero():
        trainer.add_callback(Steps(output, dies_at))
    trainer.train(resume_from_checkpoint=last_checkpoint(output))
    found = trainer.predict(rows[:5]) if trainer.ref_model is not None and not earlier else None
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(output + "/final")
        trainer.state.save_to_json(output + "/final/state.json")
        Path(output, "final/rows.json").write_text(json.dumps([row for row in trainer.train_dataset.rows]))
        if found is not None:
            np.save(output + "/final/logps.npy", found.predictions["logps"])
            Path(output, "final/predicted.json").write_text(json.dumps(found.metrics))


if __name__ == "__main__":
    start = sys.argv[1]
    rows, runs = map(json.loads, sys.argv[2:])
    if "RANK" in os.environ:
        for output, _, options in runs:
            train(output, start, None, rows, options)
    else:  # each in a process of its own, and only this one imports anything
        for output, dies_at, options in runs:
            if not os.fork():
                train(output, start, dies_at, rows, options)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.wait()[1])
            assert status == (-signal.SIGKILL if dies_at else 0), output
'''

RESUMED = {
    "learning_rate": 1e-2,
    "save_steps": 4,
    "samples_per_refresh": 10,
    "sampling_interval": 5,  # the checkpoints at 4 and 8 stand in the middle of an interval
    "per_device_train_batch_size": 4,
    "num_train_epochs": 4,
}


@pytest.fixture
def start(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def launch(tmp_path, start):
    """`launch(rows, runs, prefix) -> Popen` of the training script."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

    def popen(rows, runs, prefix=(sys.executable,)):
        command = [*prefix, str(script), str(start), json.dumps(rows), json.dumps(runs)]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )

    return popen


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]


def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(tmp_path, launch, make_rows):
    rows = make_rows(13, soft=True)  # 4 steps an epoch, the last of one row; 16 steps in all
    runs = []
    for kl_on in ("samples", "data"):
        options = {**RESUMED, "kl_on": kl_on}
        whole, killed = (str(tmp_path / kl_on / name) for name in ("whole", "killed"))
        # between the checkpoints at 8 and 12, with half of the samples drawn after step 5 consumed at step 8
        runs += [(whole, None, options), (killed, 10, options), (killed, None, options)]
    finish(launch(rows, runs))
    begun = load_file(tmp_path / "start" / "model.safetensors")
    for kl_on in ("samples", "data"):
        whole, killed = (tmp_path / kl_on / name for name in ("whole", "killed"))
        steps = (killed / "steps.log").read_text().split()
        assert steps[10:] == [str(step) for step in range(9, 17)]  # it did not start anew
        expected, resumed = (load_file(one / "final" / "model.safetensors") for one in (whole, killed))
        assert expected.keys() == resumed.keys()
        assert all(bool((expected[name] == resumed[name]).all()) for name in expected)
        assert any(float((expected[name] - begun[name]).abs().max()) > 1e-2 for name in expected)


SHARED = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "save_strategy": "no",
    "samples_per_refresh": 27,  # slices of 9: the processes take turns at the odd one
    "sampling_interval": 3,
    "per_device_eval_batch_size": 2,  # of five rows, so that the last is filled up where processes are two
}
SAVING = {"save_strategy": "steps", "save_steps": 4}
RUNS = {
    "spo": {"num_train_epochs": 2, "kl_gradient": "full", "weight_exponent": 0.5, **SAVING},
    "rounds": {
        "num_train_epochs": 1,
        "rounds": 2,
        "train_on": "samples",
        "completions_per_prompt": 3,
        "refresh": "adaptive",
        "max_importance_ratio": 2.0,
        "kl_gradient": 0.7,
    },
    "on data": {"num_train_epochs": 2, "kl_on": "data", "anchor": 1.0},
    "sppo": {
        "method": "sppo",
        "num_train_epochs": 1,
        "rounds": 2,
        "learning_rate": 1e-3,
        "beta": 1.0,
        "initial_share": 0.3,
    },
    "degree": {
        "method": "dpo",
        "num_train_epochs": 1,
        "rounds": 2,
        "degree_weight": 0.1,
        "degree_levels": 2,  # for which one word is enough; "a" alone is none
        **SAVING,
    },
    "dimensions": {"method": "dpo", "num_train_epochs": 2, "dimensions": "short", "dimension_weights": "0.7"},
    "cached": {"method": "dpo", "num_train_epochs": 1},
    "cached-again": {"method": "dpo", "num_train_epochs": 1},
}


def test_two_processes_train_as_one(tmp_path, launch, make_rows, start):
    rows = make_rows(32, soft=True)
    runs = {name: {**SHARED, **options} for name, options in RUNS.items()}
    for name in ("cached", "cached-again"):
        runs[name]["reference_cache"] = str(tmp_path / "kept")
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    double = [(str(tmp_path / "two" / name), None, {**run, **cut}) for name, run in runs.items()]
    two = launch(rows, double, launcher)
    script: dict = {"__name__": "script"}
    exec(SCRIPT, script)
    for name, run in runs.items():
        options = {**run, "per_device_train_batch_size": 8}
        if "reference_cache" in run:
            options["reference_cache"] = str(tmp_path / "one-kept")
        script["train"](str(tmp_path / "one" / name), str(start), None, rows, options)
    finish(two)
    assert len(list((tmp_path / "kept").iterdir())) == 1
    assert last_checkpoint(tmp_path / "two/spo") == str(tmp_path / "two/spo/checkpoint-8")
    sealed = json.loads((tmp_path / "two/spo/checkpoint-8/manifest.json").read_text())["files"]
    for rank in range(2):
        assert {f"rng_state_{rank}.pth", f"sample_buffer_{rank}_of_2.json"} <= sealed.keys()
    for name in runs:
        ours, theirs = (tmp_path / count / name / "final" for count in ("one", "two"))
        expected, found = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
        for key, parameter in expected.items():
            assert (parameter - found[key]).abs().max().item() < 1e-5, (name, key)
        logs, rows = [], []
        for folder in (ours, theirs):
            history = json.loads((folder / "state.json").read_text())["log_history"]
            logs.append([log for log in history if "loss" in log])
            rows.append(json.loads((folder / "rows.json").read_text()))
        assert len(logs[0]) == (4 if "cached" in name else 8)
        for one, other in zip(*logs, strict=True):
            for key in one.keys() - {"epoch", "sampling/time_fraction", "sampling/tokens_per_second"}:
                assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-4), (name, key)
        if name in ("spo", "rounds", "on data"):
            np.testing.assert_allclose(
                *(np.load(folder / "logps.npy") for folder in (ours, theirs)), atol=1e-3
            )
            one, other = (json.loads((folder / "predicted.json").read_text()) for folder in (ours, theirs))
            for key in one.keys() & {f"test_{key}" for key in logs[0][0]}:
                assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-4), (name, key)
            assert "test_logps/chosen" in one
        for one, other in zip(*rows, strict=True):
            assert other["completions"] == one["completions"]
            assert ("offsets" in one) == (name == "dimensions")
            assert other.get("offsets") == pytest.approx(one.get("offsets"), abs=1e-4)
            assert other["probability"] == pytest.approx(one["probability"])
            for key in ("ref_logps", "win_probabilities"):
                assert other.get(key) == pytest.approx(one.get(key), abs=1e-4)
