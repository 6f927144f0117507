"""What evaluations ask of the reference alone, kept on disk: those of a sweep ask it once.

A file holds one answer. Its name is a hash of the reference's weights, of the code and of what was asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softpref.disk import content_hash

if TYPE_CHECKING:
    from torch import Tensor

    from softpref.lm.sampling import Sample

logger = logging.getLogger(__name__)

REFERENCE_CACHE = "SOFTPREF_REFERENCE_CACHE"
"""Of the environment: the folder, where `EvaluationConfig.reference_cache` names none."""
Ids = Sequence[int]


class ReferenceCache:
    """Answers of one reference.

    Args:
        model: the reference, in the precision in which it is evaluated.
        folder: where the answers are; without one, nothing is kept.
    """

    def __init__(self, model: Any, folder: str = "") -> None:
        self._model, self._folder = model, folder

    def logps(self, sequences: Sequence[tuple[Ids, Ids]], **how: Any) -> Tensor:
        """`score_sequences` of the reference, whose `how` are its further arguments."""
        from softpref.lm.scoring import score_sequences

        def scored() -> dict[str, Tensor]:
            return {"logps": score_sequences(self._model, sequences, **how)}

        asked = {"logps": [*map(list, sequences)], "plain": how.get("plain", False)}
        return self._kept(asked, scored, len(sequences), how.get("progress"))["logps"]

    def draws(
        self, draw: Callable[..., list[list[Sample]]], prompts: Sequence[Ids], count: int, **how: Any
    ) -> list[list[Sample]]:
        """`draw(model, prompts, count, **how)` of the reference: samples of each prompt."""
        import torch

        from softpref.lm.sampling import Sample

        def drawn() -> dict[str, Tensor]:
            samples = [one for group in draw(self._model, prompts, count, **how) for one in group]
            ids = [token for one in samples for token in one.completion]
            logps = [logp for one in samples for logp in one.token_logps]
            return {
                "ids": torch.tensor(ids, dtype=torch.int64),
                "logps": torch.tensor(logps, dtype=torch.float64),
                "lengths": torch.tensor([len(one.completion) for one in samples], dtype=torch.int64),
                "truncated": torch.tensor([one.truncated for one in samples]),
            }

        telling = {name: how[name] for name in ("max_new_tokens", "stop_ids", "seed")}
        asked = {"draws": [*map(list, prompts)], "count": count, **telling}
        kept = self._kept(asked, drawn, len(prompts) * count, how.get("progress"))
        lengths = kept["lengths"].tolist()
        ids, logps = (torch.split(kept[name], lengths) for name in ("ids", "logps"))
        samples = [
            Sample(list(prompts[place // count]), own.tolist(), under.tolist(), cut)
            for place, (own, under, cut) in enumerate(
                zip(ids, logps, kept["truncated"].tolist(), strict=True)
            )
        ]
        return [samples[i : i + count] for i in range(0, len(samples), count)]

    def _kept(
        self,
        asked: Mapping[str, Any],
        answer: Callable[[], dict[str, Tensor]],
        total: int,
        progress: Callable[[int], object] | None,
    ) -> dict[str, Tensor]:
        """The answer from its file; where there is none that can be read, computed and written.

        Args:
            total: what `progress` is told where nothing is computed.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        if not self._folder:
            return answer()
        key = hashlib.sha256(f"{self._identity}\n{json.dumps(asked)}".encode()).hexdigest()
        file = Path(self._folder) / f"reference-{key[:32]}.safetensors"
        try:
            found: dict[str, Tensor] = load_file(file)
        except FileNotFoundError:
            pass
        except (SafetensorError, OSError) as error:
            logger.warning("%s cannot be read and is made anew: %s", file, error)
        else:
            if progress:
                progress(total)
            return found
        found = answer()
        partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}")  # two evaluations may write it at once
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            save_file(found, partial)
            os.replace(partial, file)
        except (SafetensorError, OSError) as error:  # the evaluation does not depend on it
            logger.warning("%s cannot be written: %s", file, error)
            with contextlib.suppress(OSError):
                partial.unlink()
        return found

    @cached_property
    def _identity(self) -> str:
        """Of the weights, and of the code that computes with them."""
        import torch
        import transformers

        from softpref import lm
        from softpref.lm.fingerprint import model_fingerprint

        code = content_hash(*sorted(Path(str(lm.__file__)).parent.glob("*.py")))
        device = next(self._model.parameters()).device.type
        parts = (model_fingerprint(self._model), device, torch.__version__, transformers.__version__, code)
        return " ".join(map(str, parts))
