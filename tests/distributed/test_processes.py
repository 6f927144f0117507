"""A training face in several processes of one machine: the same trajectory, and every end of them seen."""

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from softpref.distributed.processes import Rendezvous, StageFailed, launch_command, run_watched
from softpref.errors import ConfigError, SoftprefError


@pytest.fixture
def in_the_second_process(tmp_path, monkeypatch):
    """`in_the_second_process(code)`: the second process of each launch runs this before anything else."""

    def run(code):
        (tmp_path / "fault").mkdir()
        code = "import os\nif os.environ.get('RANK') == '1':\n" + textwrap.indent(code, "    ")
        (tmp_path / "fault" / "sitecustomize.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fault"), prepend=os.pathsep)

    return run


def test_two_processes_take_the_steps_of_one_and_the_first_tokenizes_for_both(
    train, same_trajectory, capfd, in_the_second_process
):
    one, single = train("single")
    assert "training in 2 processes" not in capfd.readouterr().err
    in_the_second_process(
        "from softpref.lm import tokenizing\n"
        "def fail(*a, **k): raise RuntimeError('the second process tokenizes')\n"
        "tokenizing.tokenize_row = tokenizing.tokenize_prompt = fail\n"
    )
    two, double = train("double", {"processes": 2}, world_size=2)
    printed = capfd.readouterr()
    same_trajectory(single, double)
    assert {key for key in one if not key.startswith("train_")} == {
        k for k in two if not k.startswith("train_")
    }
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
    assert "'rewards/margins'" in printed.out  # what the processes print is passed on
    assert sorted(path.name for path in double.iterdir()) == sorted(path.name for path in single.iterdir())
    assert not list(double.rglob("*rows-*"))


def test_a_refusal_in_the_processes_is_the_faces_own(train):
    with pytest.raises(SoftprefError, match="did you mean 'kl_gradient'") as refused:
        train("policy", {"processes": 2}, world_size=2, kl_gradent="full")
    assert "ended with exit status" not in str(refused.value)


def test_a_failure_in_the_processes_is_raised_with_their_last_lines(train, tmp_path, in_the_second_process):
    in_the_second_process(
        "from softpref import cli\n"
        "def fail(*a): raise RuntimeError('the second process fails')\n"
        "cli.main = fail\n"
    )
    with pytest.raises(
        StageFailed, match="the stage train in 2 processes ended with exit status 1"
    ) as failed:
        train("policy", {"processes": 2}, world_size=2)
    assert "the second process fails" in str(failed.value)
    assert not (tmp_path / "policy" / "model.safetensors").exists()


@pytest.fixture(scope="module")
def trained(in_two_processes, tmp_path_factory):
    """Folder of a reference and of two policies whose loss is not finite in the second process."""
    folder = tmp_path_factory.mktemp("trained")
    runs = {
        name: {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 4 // rows}
        for name, rows in BATCHES.items()
    }
    reference = {"stage": "sft", "keep_reference_logps": True}
    in_two_processes(folder, {"reference": reference, **runs}, "nan_in_the_second_process")
    return folder


BATCHES = {"accumulated": 2, "one batch a step": 4}  # rows of a process's step: 4


@pytest.mark.parametrize(("name", "rows"), BATCHES.items())
def test_a_loss_that_is_not_finite_in_one_process_stops_all_and_loses_nothing(trained, name, rows):
    refused = json.loads((trained / f"{name}.json").read_text())["error"]
    assert "gradient norm became nan at optimizer step 3" in refused
    checkpoints = trained / name / "checkpoints"
    kept = load_file(checkpoints / "checkpoint-2" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in kept.values())
    assert len(load_file(checkpoints / "nonfinite_batch-1.safetensors")["group_sizes"]) == rows


def test_the_reference_is_the_same_in_two_processes(trained, train_reference, same_reference):
    one, single = train_reference("single", keep_reference_logps=True)
    same_reference(one, single, trained / "reference")


def test_the_face_of_the_reference_launches_processes_too(train_reference, monkeypatch):
    started = []

    def start(command, **options):
        started.append(command)
        raise StageFailed("that is enough")

    monkeypatch.setattr("softpref.distributed.launch.run_watched", start)
    with pytest.raises(StageFailed, match="that is enough"):
        train_reference("reference", 2)
    (command,) = started
    assert command[command.index("--num_processes") + 1] == "2"
    assert "softpref.sft" in command


def test_devices_are_asked_for_before_processes_start(train, monkeypatch):
    monkeypatch.setattr("softpref.distributed.launch.run_watched", lambda *a, **k: pytest.fail("started"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"2 GPU.s. were asked for, but 1"):
        train("a", gpus=2)
    with pytest.raises(ConfigError, match="3 processes need a GPU each, and 1"):
        train("b", {"processes": 3}, use_cpu=False)
    with pytest.raises(ConfigError, match=r"launcher\.processes is 3, and gpus is 2"):
        train("c", {"processes": 3}, gpus=2)


def test_a_process_without_a_device_of_its_own_says_so(monkeypatch, folders, tmp_path, capsys):
    from softpref.cli import main

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    arguments = ["--dataset", folders.dataset, "--reference", folders.reference, "--output", str(tmp_path)]
    assert main(["train", *arguments, "--bf16", "false"]) == 2
    assert "2 processes need a GPU each, and 1 can be seen" in capsys.readouterr().err


def test_a_step_that_is_run_again_continues_from_its_checkpoints_elsewhere(
    train, same_trajectory, tmp_path, monkeypatch
):
    import shutil

    from transformers import Trainer

    _, whole = train("whole", save_strategy="steps", save_steps=2)
    volume = tmp_path / "volume"
    step = Trainer.training_step

    def evicted(self, *args, **options):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return step(self, *args, **options)

    options = {"save_strategy": "steps", "save_steps": 2}
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "training_step", evicted)
        with pytest.raises(KeyboardInterrupt):
            train("pod", {"checkpoints": str(volume)}, **options)
    shutil.move(tmp_path / "pod" / "tracking.jsonl", tmp_path / "tracked.jsonl")
    shutil.rmtree(tmp_path / "pod")  # gone with its pod
    (kept,) = volume.iterdir()
    assert (kept / "checkpoint-4").is_dir()
    _, resumed = train("pod", {"checkpoints": str(volume)}, **options)
    before = (tmp_path / "tracked.jsonl").read_text().splitlines(keepends=True)
    after = (resumed / "tracking.jsonl").read_text()
    (resumed / "tracking.jsonl").write_text("".join(before) + after)
    same_trajectory(whole, resumed, resumed=True)
    assert not list(volume.iterdir())


def test_nodes_meet_where_the_first_is():
    command = launch_command("sft", ["--x=1"], processes=4, rendezvous=Rendezvous(3, 2, "host-0", 29400))
    options = dict(itertools.pairwise(command))
    assert options["--num_processes"] == "12"
    assert options["--num_machines"] == "3"
    assert options["--machine_rank"] == "2"
    assert options["--main_process_ip"] == "host-0"
    assert options["--main_process_port"] == "29400"
    assert command[-3:] == ["-m", "softpref.sft", "--x=1"]
    assert launch_command("train", [], processes=1) == [sys.executable, "-m", "softpref.spo"]


def test_output_comes_as_it_is_made_and_its_end_is_kept(capfd):
    script = (
        "import sys\nfor i in range(100): print('line', i)\nsys.stdout.write('10%\\r99%\\r'); sys.exit(3)"
    )
    with pytest.raises(StageFailed) as failed:
        run_watched([sys.executable, "-c", script], what="the command")
    lines = str(failed.value).splitlines()
    assert lines[0] == "the command ended with exit status 3; its last lines:"
    assert lines[-2:] == ["line 99", "99%"]
    assert len(lines) == 61
    assert capfd.readouterr().out.startswith("line 0\nline 1\n")


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_signal_ends_all_processes_and_then_this_one(tmp_path, stubborn):
    own = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if stubborn else ""
    child = f"{own}import os, subprocess, sys, time\n" + (
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(os.getpid(), other.pid, flush=True)\ntime.sleep(60)"
    )
    outer = (
        "import sys\nfrom softpref.distributed import processes\nprocesses._GRACE = 1.0\n"
        f"processes.run_watched([sys.executable, '-c', {child!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True)
    pids = [int(number) for number in process.stdout.readline().split()]
    assert len(pids) == 2
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == -signal.SIGTERM
    deadline = time.monotonic() + 5
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
