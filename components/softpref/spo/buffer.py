"""Samples of the policy between two refreshes: which prompts, which slice at which step, what is kept.

Knows no model: drawing is the caller's function. A refresh's prompts and randomness follow from the seed and
the optimizer step alone, so that any number of processes together draws the same samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from softpref.errors import ConfigError
from softpref.lm.sampling import Sample, sampling_noise

Draw = Callable[[list[list[int]], Tensor], list[Sample]]


class SampleBuffer:
    """Completions drawn every `interval` optimizer steps and consumed in equal slices between.

    Args:
        prompts: sets of prompt ids, which take turns and of which each is drawn from uniformly; with the
            training rows' prompts, repeats and all, the regulariser sees prompts as often as the preference
            term does.
        size: completions per refresh, all processes together.
        interval: optimizer steps a refresh lasts.
        max_new_tokens: length limit of a completion.
        seed: fixes prompts and noise of every refresh.
        rank, world_size: this process takes the samples `rank`, `rank + world_size`, …
        draw: `(prompts, noise [n, max_new_tokens]) -> samples`.
        annotate: `samples -> annotations`, one for each, made for all samples at once; they are not saved but
            made anew.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[Sequence[int]]],
        *,
        size: int,
        interval: int,
        max_new_tokens: int,
        seed: int,
        draw: Draw,
        annotate: Callable[[list[Sample]], list[Tensor | None]] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._prompts = prompts
        self._size, self._interval, self._max_new_tokens = size, interval, max_new_tokens
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._draw, self._annotate = draw, annotate
        self._samples: list[Sample] = []
        self._annotations: list[Tensor | None] = []
        self._expired = False
        self.policy_step: int | None = None
        """Optimizer step whose policy drew the present samples; None before the first refresh."""

    def slice_for(self, step: int) -> list[Sample]:
        """This process's samples for optimizer step `step` (counted from 0), drawn anew when they are due."""
        due = self.policy_step is None or not 0 <= step - self.policy_step < self._interval
        if due or (self._expired and step != self.policy_step):
            self._refresh(step)
        return [self._samples[i] for i in self._places(step)]

    def annotations_for(self, step: int) -> list[Tensor | None]:
        """What `annotate` made of the samples of `slice_for(step)`, to be called after it."""
        if len(self._annotations) != len(self._samples):
            make = self._annotate or (lambda samples: [None] * len(samples))
            self._annotations = make(self._samples)
        return [self._annotations[i] for i in self._places(step)]

    def _places(self, step: int) -> list[int]:
        assert self.policy_step is not None
        place = step - self.policy_step
        first, last = (self._size * i // self._interval for i in (place, place + 1))
        # samples are dealt round robin: sample g of all lies at g // world_size of process g % world_size
        mine = range(first + (self._rank - first) % self._world_size, last, self._world_size)
        return [g // self._world_size for g in mine]

    @property
    def sets(self) -> int:
        """How many sets of prompts take turns."""
        return len(self._prompts)

    def slice_size(self, step: int) -> int:
        """Samples that all processes together consume at `step`, which `slice_for` has served."""
        assert self.policy_step is not None
        place = step - self.policy_step
        return self._size * (place + 1) // self._interval - self._size * place // self._interval

    def expire(self) -> None:
        """Have the next step draw anew before the interval is over."""
        self._expired = True

    def forget(self) -> None:
        """Have the next step draw anew, whichever it is."""
        self.policy_step = None

    def save(self, folder: str | Path) -> None:
        """Write the buffer into a checkpoint, one file per process."""
        state = {
            "policy_step": self.policy_step,
            "expired": self._expired,
            "samples": [sample._asdict() for sample in self._samples],
        }
        self._file(folder).write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: str | Path) -> None:
        """Continue from a checkpoint's buffer.

        Raises:
            ConfigError: the checkpoint holds none for this process.
        """
        file = self._file(folder)
        if not file.is_file():
            raise ConfigError(
                f"checkpoint {folder} holds no samples for process {self._rank} of {self._world_size} "
                f"({file.name}); resume with as many processes, and with the KL term on, as it was saved with"
            )
        state = json.loads(file.read_text(encoding="utf-8"))
        self.policy_step, self._expired = state["policy_step"], state["expired"]
        self._samples = [Sample(**sample) for sample in state["samples"]]
        self._annotations = []

    def _refresh(self, step: int) -> None:
        random = np.random.default_rng((self._seed, step))
        orders = []
        for prompts in self._prompts:  # of each set, every prompt once before any comes twice
            rounds = -(-self._size // (len(self._prompts) * len(prompts)))
            orders.append(np.concatenate([random.permutation(len(prompts)) for _ in range(rounds)]))
        noise = sampling_noise(self._size, self._max_new_tokens, seed=int(random.integers(2**62)))
        mine = range(self._rank, self._size, self._world_size)
        turns = [divmod(g, len(self._prompts)) for g in mine]
        drawn = [list(self._prompts[of][orders[of][place]]) for place, of in turns]
        self._samples = self._draw(drawn, noise[list(mine)])
        self._annotations = []
        self.policy_step, self._expired = step, False

    def _file(self, folder: str | Path) -> Path:
        return Path(folder) / f"sample_buffer_{self._rank}_of_{self._world_size}.json"
