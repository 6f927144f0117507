"""Imported in a launched process: accelerate shards on accelerators alone; here it takes CPUs for such.

Everything else is its own, and PyTorch's: FSDP2 over gloo. A training whose weights are not in shards fails,
and the one called `cut` dies at its fifth step, unless it continues from a checkpoint.
"""

import os

import torch
import transformers
from accelerate import state
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
prepare, step = state.PartialState._prepare_backend, transformers.Trainer.training_step


def as_accelerators(self, *args, **options):
    backend, kind = prepare(self, *args, **options)
    if kind == DistributedType.MULTI_CPU and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend)
    return backend, DistributedType.MULTI_XPU if kind == DistributedType.MULTI_CPU else kind


def watched_step(self, model, *args, **options):
    assert isinstance(model, FSDPModule)
    begun = self.__dict__.setdefault("begun", self.state.global_step)
    if "/cut/" in self.args.output_dir and (begun, self.state.global_step) == (0, 4):
        os._exit(9)
    return step(self, model, *args, **options)


state.PartialState._prepare_backend = as_accelerators
transformers.Trainer.training_step = watched_step
