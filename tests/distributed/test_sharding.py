"""Weights in shards on two processes (FSDP2): the trajectory of one process, and whole models on disk.

accelerate shards on accelerators alone. Here a start file has it take two CPUs for such; everything else is
its own, and PyTorch's: FSDP2 over gloo.
"""

import os

import pytest
import torch
from safetensors.torch import load_file
from softpref.distributed.processes import StageFailed
from softpref.errors import ConfigError
from softpref.lm.row_files import read_rows

ON_CPU = """
import os
if os.environ.get("RANK"):
    import torch
    from accelerate import state
    from accelerate.utils import DistributedType
    prepare = state.PartialState._prepare_backend
    def as_accelerators(self, *args, **options):
        backend, kind = prepare(self, *args, **options)
        if kind == DistributedType.MULTI_CPU and not torch.distributed.is_initialized():
            torch.distributed.init_process_group(backend)
        return backend, DistributedType.MULTI_XPU if kind == DistributedType.MULTI_CPU else kind
    state.PartialState._prepare_backend = as_accelerators

    import transformers
    from torch.distributed.fsdp import FSDPModule
    step = transformers.Trainer.training_step
    seen = []
    def watched(self, model, *args, **options):
        if not seen:
            with open(os.path.join(os.path.dirname(__file__), "rank-" + os.environ["RANK"]), "w") as file:
                file.write("in shards" if isinstance(model, FSDPModule) else "whole")
        seen.append(1)
        if os.environ.get("DIES_AT_STEP") == str(self.state.global_step + 1):
            os._exit(9)
        return step(self, model, *args, **options)
    transformers.Trainer.training_step = watched
"""


@pytest.fixture
def on_cpu(monkeypatch, tmp_path):
    """What each process found of its weights, by rank: a file each, as lines on one stream may be mixed."""
    folder = tmp_path / "start"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(ON_CPU)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    return lambda: [path.read_text() for path in sorted(folder.glob("rank-*"))]


def test_sharded_weights_take_the_steps_of_one_process(train, same_trajectory, on_cpu):
    _, whole = train("whole")
    _, sharded = train("sharded", {"processes": 2}, world_size=2, fsdp=True)
    same_trajectory(whole, sharded)
    assert on_cpu() == ["in shards"] * 2


@pytest.mark.parametrize(
    "options",
    [
        {"kl_gradient": "full", "weight_exponent": 0.5, "weight_scores": "token"},
        {"use_peft": True, "lora_r": 4, "merge_adapter": True},
        {"kl_on": "data"},
        {"kl_on": "data", "use_peft": True, "lora_r": 4, "merge_adapter": True},
        {"plain_forward": True},
        {"rounds": 2, "train_on": "samples", "judge": "bradley-terry"},
    ],
    ids=["estimates over the whole step", "adapter", "on data", "adapter on data", "full logits", "rounds"],
)
def test_other_ways_of_training_with_sharded_weights(train, same_trajectory, on_cpu, options):
    _, whole = train("whole", **options)
    _, sharded = train("sharded", {"processes": 2}, world_size=2, fsdp="true", **options)
    same_trajectory(whole, sharded)


def test_the_reference_is_trained_in_shards_too(train_reference, on_cpu):
    one, whole = train_reference("whole", keep_reference_logps=True)
    two, sharded = train_reference("sharded", 2, fsdp=True, keep_reference_logps=True)
    assert on_cpu() == ["in shards"] * 2
    assert two == pytest.approx(one, rel=1e-4)
    weights, others = load_file(whole / "model.safetensors"), load_file(sharded / "model.safetensors")
    assert weights.keys() == others.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(others[key], tensor, rtol=0, atol=1e-5, msg=key)
    kept, shared = (
        [one for row in read_rows(folder / "rows" / "train") for one in row] for folder in (whole, sharded)
    )
    assert [one[:-1] for one in kept] == [one[:-1] for one in shared]
    logps = [[one.reference_logp for one in sequences] for sequences in (kept, shared)]
    assert logps[1] == pytest.approx(logps[0], abs=1e-3)


def test_a_tied_head_in_shards(train, same_trajectory, on_cpu, folders, monkeypatch, tmp_path, make_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders.reference)
    make_model(tokenizer, layers=2, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    monkeypatch.setattr(folders, "reference", str(tmp_path / "tied"))
    _, whole = train("whole")
    _, sharded = train("sharded", {"processes": 2}, world_size=2, fsdp=True)
    same_trajectory(whole, sharded)


def test_a_run_in_shards_continues_from_its_checkpoint(train, same_trajectory, on_cpu, monkeypatch, tmp_path):
    # an optimizer without a state, such as the others' SGD, cannot be loaded into shards
    options = {"fsdp": True, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    _, whole = train("whole", {"processes": 2}, world_size=2, **options)
    monkeypatch.setenv("DIES_AT_STEP", "5")
    with pytest.raises(StageFailed):
        train("cut", {"processes": 2}, world_size=2, **options)
    assert (tmp_path / "cut" / "checkpoints" / "checkpoint-4").is_dir()
    monkeypatch.delenv("DIES_AT_STEP")
    _, resumed = train("cut", {"processes": 2}, world_size=2, **options)
    same_trajectory(whole, resumed, resumed=True)


def test_one_process_has_nothing_to_share_out(train):
    with pytest.raises(ConfigError, match="only one"):
        train("alone", fsdp=True)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"fsdp_config": {"version": 1}}, "version 2"),
        ({"fsdp_config": {"cpu_ram_efficient_loading": True}}, "cpu_ram_efficient_loading"),
    ],
)
def test_what_does_not_work_in_shards_is_refused(options, complaint):
    from softpref.spo import SPOConfig

    with pytest.raises(ConfigError, match=complaint):
        SPOConfig(output_dir="unused", use_cpu=True, bf16=False, fsdp=True, **options)
