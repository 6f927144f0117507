"""Stage 3, SPO training with online sampling. Needs torch, transformers and accelerate only."""

from softpref.spo.config import SPOConfig
from softpref.spo.trainer import SPOTrainer

__all__ = ["SPOConfig", "SPOTrainer"]
