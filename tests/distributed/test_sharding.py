"""Weights in shards on two processes (FSDP2): the trajectory of one process, and whole models on disk.

accelerate shards on accelerators alone. Here a start file has it take two CPUs for such; everything else is its
own, and PyTorch's: FSDP2 over gloo.
"""

import os

import pytest

ON_CPU = """
import os
if os.environ.get("RANK"):
    import torch
    from accelerate import state
    from accelerate.utils import DistributedType
    prepare = state.PartialState._prepare_backend
    def as_accelerators(self, *args, **options):
        backend, kind = prepare(self, *args, **options)
        return backend, DistributedType.MULTI_XPU if kind == DistributedType.MULTI_CPU else kind
    state.PartialState._prepare_backend = as_accelerators
    from torch.distributed.fsdp import FSDPModule
    shard = FSDPModule.__init_subclass__
"""


@pytest.fixture
def on_cpu(monkeypatch, tmp_path):
    folder = tmp_path / "start"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(ON_CPU)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")


def test_sharded_weights_take_the_steps_of_one_process(train, same_trajectory, on_cpu, capfd):
    _, whole = train("whole")
    _, sharded = train("sharded", {"processes": 2}, world_size=2, fsdp=True)
    same_trajectory(whole, sharded)
