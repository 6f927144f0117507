"""Stage 3, SPO training with online sampling. Needs torch, transformers and accelerate only."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softpref.spo.config import SPOConfig
    from softpref.spo.trainer import SPOTrainer

__all__ = ["SPOConfig", "SPOTrainer"]


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when a class is asked for: a pipeline's `--help` needs neither."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module("softpref.spo.config" if name == "SPOConfig" else "softpref.spo.trainer")
    return getattr(module, name)
