"""Weights in shards, one on each device (PyTorch's FSDP2, by the option `fsdp` of `TrainingArguments`).

Every process must gather a layer as often as the others, or they wait for one another forever. In training
steps they do: all run the same number of passes. What may run a different number on each, such as sampling,
runs in `whole_weights`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def shards(model: Any) -> list[Any]:
    """The modules whose parameters are sharded; none for a model that is whole."""
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:  # torch was built without distributed training
        return []
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def whole_weights(model: Any) -> Iterator[None]:
    """All of the weights on each device inside; for a model that is whole, nothing happens.

    All processes must enter and leave it at the same point; inside, each may do what it likes.
    """
    sharded = shards(model)
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        # accelerate keeps the last norm, the head, and embeddings tied to it, from the forward to the
        # backward pass; PyTorch the root
        kept = {id(module) for module in (model, _head(model))}
        for module in sharded:  # of a group of modules, the last one decides: the head
            module.reshard()
            module.set_reshard_after_forward(id(module) not in kept, recurse=False)


@contextmanager
def whole_head(model: Any) -> Iterator[None]:
    """Inside, a sharded head stays whole from its first use on.

    Its gradient is computed outside the model's passes, once for each pass; after the first one FSDP2 would
    free the weights that the next one needs.
    """
    head = _head(model)
    sharded: list[Any] = [module for module in shards(model) if module is head]
    for module in sharded:
        module.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()  # what the optimizer changes are the shards


def whole_copy(model: Any, state_dict: dict[str, Tensor]) -> nn.Module:
    """An unsharded model of the kind of `model`, on the CPU, with the weights of `state_dict`.

    Args:
        model: a sharded transformers model, perhaps with an adapter of peft around it.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    copy: nn.Module = _unsharded_class(inner)(inner.config)
    copy.generation_config = inner.generation_config
    if inner is not model:
        from peft import get_peft_model

        copy = get_peft_model(copy, model.peft_config["default"])
    dtypes = {tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        copy.to(dtypes.pop())
    copy.load_state_dict(state_dict)
    copy.eval()
    return copy


def _head(model: Any) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _unsharded_class(module: nn.Module) -> type:
    """The class of a module before it was sharded: FSDP2 puts one of its own in front of it."""
    from torch.distributed.fsdp import FSDPModule

    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
