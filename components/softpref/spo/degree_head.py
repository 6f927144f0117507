"""The head that reads degree levels off a policy's states: trained beside it, and never part of it.

It has its own group in the policy's optimizer, and its own file in a checkpoint. No wrapper of the policy
knows it, so its gradient is averaged over processes here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from softpref.errors import ConfigError
from softpref.objectives import degree_logits
from softpref.spo.config import SPOConfig

_FILE = "degree_head.safetensors"
_FASTER = 10  # times the policy's learning rate: at a policy's rates a new head would hardly move


class DegreeHead(nn.Module):
    """`degree_heads` linear classifiers of `degree_levels` levels, in fp32, that begin at zero.

    `max_grad_norm` clips the policy's gradient alone.

    Args:
        model: the policy, whose head says how wide its states are.

    Raises:
        ConfigError: the model has no output embeddings that say so.
    """

    def __init__(self, model: Any, args: SPOConfig) -> None:
        super().__init__()
        width = getattr(model.get_output_embeddings(), "in_features", None)
        if width is None:
            raise ConfigError(
                f"degree_weight needs a model with a linear head, and {type(model).__name__} has none that "
                "get_output_embeddings() gives; leave degree_weight out"
            )
        shape = args.degree_heads, args.degree_levels
        self.weight = nn.Parameter(torch.zeros(*shape, width, device=args.device))
        self.bias = nn.Parameter(torch.zeros(*shape, device=args.device))

    def forward(self, states: Tensor, sides: Tensor) -> Tensor:
        """Scores of the levels: `[texts, width], [texts] -> [texts, K]`."""
        with torch.autocast(states.device.type, enabled=False):
            return degree_logits(states, sides.clamp(max=len(self.weight) - 1), self.weight, self.bias)

    def join(self, optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
        """Be trained by the policy's optimizer, unless it does so already."""
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if id(self.weight) not in known:
            own = {"params": list(self.parameters()), "lr": _FASTER * learning_rate, "weight_decay": 0.0}
            optimizer.add_param_group(own)

    def save(self, folder: str | Path) -> None:
        """Write it into a checkpoint."""
        from safetensors.torch import save_file

        save_file({name: value.cpu() for name, value in self.state_dict().items()}, Path(folder) / _FILE)

    def load(self, folder: str | Path) -> None:
        """Continue with a checkpoint's.

        Raises:
            ConfigError: the checkpoint holds none.
        """
        from safetensors.torch import load_file

        file = Path(folder) / _FILE
        if not file.is_file():
            raise ConfigError(
                f"checkpoint {folder} holds no head of the degree loss ({_FILE}); resume with the "
                "degree_weight that it was saved with"
            )
        self.load_state_dict(load_file(file))


class DegreeCallback(TrainerCallback):
    """Gives the head the gradient of a whole optimizer step, and says which epoch draws levels.

    Args:
        head: the present one.
        average: over processes.
        begin: called at the beginning of an epoch with the optimizer step.
    """

    def __init__(
        self,
        head: Callable[[], DegreeHead],
        average: Callable[[Tensor], Tensor],
        begin: Callable[[int], None],
    ) -> None:
        self._head, self._average, self._begin = head, average, begin

    def on_epoch_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        self._begin(state.global_step)

    def on_step_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        for parameter in self._head().parameters():
            parameter.grad = torch.zeros_like(parameter)  # also where no text of the step takes part

    def on_pre_optimizer_step(self, args: object, state: object, control: object, **kwargs: object) -> None:
        for parameter in self._head().parameters():
            assert parameter.grad is not None
            parameter.grad = self._average(parameter.grad)
