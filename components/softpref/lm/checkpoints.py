"""The folder in which a training keeps its checkpoints: whose they are, which are whole, which is the newest.

A checkpoint is a folder `checkpoint-STEP`. Its last file is a manifest with the size and the hash of every
other one, whatever they are: weights, optimizer, random states of each process, samples. Without the manifest
it was cut off; where a file differs, it is damaged.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from accelerate.utils import gather_object
from transformers import TrainingArguments

from softpref.disk import DAMAGED, content_hash, flush_below, in_brief, remove_parts, write_whole
from softpref.errors import ConfigError
from softpref.finished import as_recorded, differences

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
LOSS_FILE = "training_loss.json"  # the sum of the losses of all steps until then
_IDENTITY = "run.json"  # in a folder of checkpoints: whose they are
_HASH = "xxh3_128"  # of `content_hash`


class Claim(NamedTuple):
    """How a training begins.

    Attributes:
        checkpoint: to continue from; None for a fresh start.
        same_run: whether the folder was this run's before, or nobody's.
    """

    checkpoint: str | None
    same_run: bool


def claim_checkpoints(folder: str | Path, identity: Mapping[str, object], args: TrainingArguments) -> Claim:
    """Find out how to begin; all processes must call it, and begin alike.

    A fresh start where there are checkpoints and none is whole: nothing of them is of use, and a training
    that nobody watches should go on.

    Args:
        identity: what a run is: its configuration and its data. Written on the first call.

    Raises:
        ConfigError: the folder holds checkpoints of another run, and continuing would mix the two; or it
            cannot be told whose they are.
    """
    file = Path(folder) / _IDENTITY
    own = as_recorded(identity)
    found, unreadable = own, ""
    if file.exists():
        try:
            found = dict(json.loads(file.read_text(encoding="utf-8")))
        except DAMAGED as error:
            unreadable = in_brief(error)
    checkpoint = last_checkpoint_of_all(folder, args)  # after which the first process may write the file
    if checkpoint and unreadable:
        raise ConfigError(
            f"{file}, which says whose the checkpoints are, cannot be read ({unreadable}); remove the file "
            "if they are of this very run, or the folder to start anew"
        )
    if checkpoint and found != own:
        raise ConfigError(
            f"{folder} holds checkpoints of another run ({differences(found, own)}); name another folder, or "
            "remove it to start anew"
        )
    if args.process_index == 0:
        if checkpoint:
            logger.warning("continuing from %s", checkpoint)
        elif checkpoints_in(folder):
            logger.warning("no checkpoint in %s is whole: training starts anew", folder)
    if args.should_save and not (checkpoint and file.is_file()):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(own, indent=2))
    return Claim(checkpoint, found == own and not unreadable)


def remove_checkpoints(folder: str | Path) -> None:
    """Remove what training has left in its folder, and the folder if it holds nothing else."""
    folder = Path(folder)
    for checkpoint in checkpoints_in(folder).values():
        shutil.rmtree(checkpoint, ignore_errors=True)
    with contextlib.suppress(OSError):  # the model is saved already
        remove_parts(folder)
        for file in (folder / _IDENTITY, *folder.glob("nonfinite_batch*.safetensors")):
            file.unlink(missing_ok=True)
        folder.rmdir()


def checkpoints_in(folder: str | Path) -> dict[int, Path]:
    """The checkpoints of a folder by their step, the oldest first, whole or not."""
    found = {
        int(match[1]): path
        for path in Path(folder).glob("checkpoint-*")
        if (match := re.fullmatch("checkpoint-([0-9]+)", path.name)) and path.is_dir()
    }
    return dict(sorted(found.items()))


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint, or None; newer ones that are not whole are named in a warning."""
    for path in reversed(checkpoints_in(folder).values()):
        if not (fault := obstacle(path)):
            return str(path)
        logger.warning("the checkpoint %s is passed over: %s", path, fault)
    return None


def last_checkpoint_of_all(folder: str | Path, args: TrainingArguments) -> str | None:
    """`last_checkpoint`, read by the processes that write checkpoints, for all; all must call it.

    Where each machine keeps its own, the newest that all have.
    """
    found = gather_object([last_checkpoint(folder)] if args.should_save else [])
    return None if None in found else min(found, key=step_of)


def step_of(checkpoint: str | Path) -> int:
    """The optimizer step after which a checkpoint was saved, by its name."""
    return int(Path(checkpoint).name.rpartition("-")[2])


def seal_checkpoint(folder: str | Path) -> None:
    """Have a checkpoint on the disk, and write its manifest, the last file."""
    folder = Path(folder)
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    flush_below(folder)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, _HASH: content_hash(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_whole(folder / MANIFEST_FILE, json.dumps({"files": files}, indent=1))


def obstacle(folder: str | Path) -> str:
    """Why no training can go on from a checkpoint; empty where one can."""
    fault = fault_of(folder)
    if not fault and not (Path(folder) / LOSS_FILE).is_file():
        fault = "it holds the model alone (save_only_model)"
    return fault


def fault_of(folder: str | Path) -> str:
    """What keeps a checkpoint from being whole; empty for a whole one. Reads all of its files."""
    file = Path(folder) / MANIFEST_FILE
    try:
        files: dict[str, tuple[int, str]] = {
            name: (int(described["size"]), described[_HASH])
            for name, described in json.loads(file.read_text(encoding="utf-8"))["files"].items()
        }
    except FileNotFoundError:
        return f"it has no {MANIFEST_FILE}, its last file, so writing it was cut off"
    except DAMAGED as error:
        return f"its {MANIFEST_FILE} cannot be read ({in_brief(error)})"
    for name, (size, digest) in files.items():
        path = Path(folder) / name
        try:
            if path.stat().st_size != size:
                return f"its {name} has {path.stat().st_size:,} bytes, and had {size:,}"
            if content_hash(path) != digest:
                return f"its {name} is not what was written"
        except FileNotFoundError:
            return f"its {name} is absent"
        except OSError as error:
            return f"its {name} cannot be read ({error.strerror})"
    return "" if files else f"its {MANIFEST_FILE} names no file"


def thin_checkpoints(folder: str | Path, newest: int, limit: int | None, best: str | None) -> None:
    """Remove checkpoints before the newest, which is whole: what was cut off, and the oldest over a limit.

    Args:
        newest: its step; later ones, of a trajectory that was given up, are left alone.
        limit: how many stay; None: all that are whole.
        best: one that stays in any case.
    """
    if limit is None:
        return
    earlier = [path for step, path in checkpoints_in(folder).items() if step < newest]
    whole = [path for path in earlier if (path / MANIFEST_FILE).is_file()]
    kept = [Path(best)] if best and Path(best) in whole else []
    others = [path for path in whole if path not in kept]
    kept += others[len(others) - max(0, limit - 1 - len(kept)) :]
    for path in earlier:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
