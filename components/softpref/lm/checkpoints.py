"""The folder in which a training keeps its checkpoints: whose they are, and which is the newest."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from softpref.errors import ConfigError

logger = logging.getLogger(__name__)

_IDENTITY = "run.json"  # in a folder of checkpoints: whose they are


def claim_checkpoints(folder: str | Path, identity: Mapping[str, object]) -> str | None:
    """The checkpoint to continue from, or None for a fresh start in `folder`.

    Args:
        identity: what a run is: its configuration and its data. Written on the first call.

    Raises:
        ConfigError: the folder holds checkpoints of another run; continuing would mix the two.
    """
    file = Path(folder) / _IDENTITY
    own = json.loads(json.dumps(identity, default=str))
    checkpoint = last_checkpoint(folder)
    if checkpoint and file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        differing = sorted(key for key in {*own, *found} if own.get(key) != found.get(key))
        if differing:
            changes = [f"{key}: {found.get(key)!r} there, {own.get(key)!r} here" for key in differing]
            raise ConfigError(
                f"{folder} holds checkpoints of another run ({', '.join(changes)}); name another folder, or "
                "remove it to start anew"
            )
    if checkpoint and os.environ.get("RANK", "0") == "0":
        logger.warning("continuing from %s", checkpoint)
    if not (checkpoint and file.is_file()):  # another process may be reading a file that is there already
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(own, indent=2), encoding="utf-8")
    return checkpoint


def remove_checkpoints(folder: str | Path) -> None:
    """Remove what training has left in its folder, and the folder if it holds nothing else."""
    folder = Path(folder)
    for checkpoint in folder.glob("checkpoint-[0-9]*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    with contextlib.suppress(OSError):  # the model is saved already
        for file in (folder / _IDENTITY, *folder.glob("nonfinite_batch*.safetensors")):
            file.unlink(missing_ok=True)
        folder.rmdir()


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint, or None.

    The trainer's state is the last file of a checkpoint; without it, the checkpoint was cut off.
    """
    found: list[tuple[int, Path]] = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        try:
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            found.append((int(state["global_step"]), folder))
        except (OSError, ValueError, KeyError):
            continue
    return str(max(found)[1]) if found else None
