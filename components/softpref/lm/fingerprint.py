"""A model's identity: the hash of its weights, wherever it was loaded from."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def model_fingerprint(model: Any) -> str:
    """SHA-256 of a model's weights by name; of a PEFT model, of the model beneath its adapter."""
    digest = hashlib.sha256()
    prefix = ""
    if hasattr(model, "peft_config"):
        prefix, model = getattr(model.base_model, "prefix", ""), model.get_base_model()
    weights = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in model.state_dict().items()
        if not (prefix and (prefix in name or ".modules_to_save." in name))
    }
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
