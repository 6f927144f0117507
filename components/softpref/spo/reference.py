"""Log-probabilities of the reference on disk: computed once, never mistaken for another model's or data's.

A file holds those of the rows of one data set under one model. Its name and its metadata contain the hashes
of both. Runs no model.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from softpref.errors import ConfigError, DataError
from softpref.lm.fingerprint import model_fingerprint
from softpref.spo.config import SPOConfig
from softpref.spo.rows import Row

Scorer = Callable[[list[tuple[list[int], list[int]]]], list[float]]
"""`(prompt ids, completion ids)` pairs to the reference's sequence log-probabilities, nats."""


def kept_logps(
    rows: Sequence[Row],
    folder: str | Path,
    model_hash: str,
    score: Scorer,
    *,
    writes: bool = True,
    everywhere: Callable[[bool], bool] = bool,
) -> list[list[float]]:
    """A model's log-probability of each row's completions, from the cache; what is not there is computed.

    Args:
        folder: where the files are.
        model_hash: of the model, and of whatever else its values depend on (`scorer_fingerprint`).
        score: computes log-probabilities; called on every process or on none.
        writes: whether this process writes the file.
        everywhere: whether something holds on every process. Another run may write the file at any moment,
            and all processes must do the same.

    Raises:
        ConfigError: the file found belongs to another model or other rows, or cannot be read.
        DataError: it lacks a completion.
    """
    if writes:
        Path(folder).mkdir(parents=True, exist_ok=True)  # where that fails, it fails before scoring
    sequences = {_key(row["prompt"], one): (row["prompt"], one) for row in rows for one in row["completions"]}
    keys = sorted(sequences)
    data_hash = hashlib.sha256("".join(keys).encode()).hexdigest()
    file = Path(folder) / f"reference_logps-{model_hash[:16]}-{data_hash[:16]}.safetensors"
    identity = {"model_hash": model_hash, "data_hash": data_hash}
    if everywhere(file.is_file()):
        known = _read(file, identity)
    else:
        known = dict(zip(keys, score([sequences[key] for key in keys]), strict=True))
        if writes:
            _write(file, identity, known)
    found = []
    for number, row in enumerate(rows):
        try:
            found.append([known[_key(row["prompt"], one)] for one in row["completions"]])
        except KeyError:
            raise DataError(
                f"{file} lacks a completion of row {number}; it was cut off or changed: remove it, and it is "
                "made anew"
            ) from None
    return found


def scorer_fingerprint(model: Any, args: SPOConfig) -> str:
    """SHA-256 of a reference and of the precision in which `args` have it computed."""
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    made = f" with {sorted(args.init_kwargs.items())}" if args.init_kwargs else ""
    return hashlib.sha256(f"{model_fingerprint(model)} in {precision}{made}".encode()).hexdigest()


def set_reference_logps(rows: Sequence[Row], score: Scorer) -> None:
    """Give every row its `ref_logps`, computed now and not cached."""
    for row, logps in zip(rows, computed_logps(rows, score), strict=True):
        row["ref_logps"] = logps


def computed_logps(rows: Sequence[Row], score: Scorer) -> list[list[float]]:
    """The log-probability of each row's completions, computed now and not cached."""
    logps = iter(score([(row["prompt"], one) for row in rows for one in row["completions"]]))
    return [[next(logps) for _ in row["completions"]] for row in rows]


@contextmanager
def adapter_off(model: Any) -> Iterator[Any]:
    """A PEFT model with its adapter disabled: the reference."""
    with model.disable_adapter():
        yield model


def _key(prompt: Sequence[int], completion: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps([list(prompt), list(completion)]).encode()).hexdigest()[:32]


def _read(file: Path, identity: dict[str, str]) -> dict[str, float]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            found = content.metadata() or {}
            keys = bytes(content.get_tensor("keys").numpy().tobytes()).hex()
            logps = content.get_tensor("logps").tolist()
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); remove it, and it is made anew") from error
    for name, expected in identity.items():
        if found.get(name) != expected:
            raise ConfigError(
                f"{file} was made for another {name.removesuffix('_hash')} ({name} {found.get(name)}, here "
                f"{expected}); name another reference_cache, or remove the file"
            )
    return {keys[32 * i : 32 * (i + 1)]: logp for i, logp in enumerate(logps)}


def _write(file: Path, identity: dict[str, str], known: dict[str, float]) -> None:
    from safetensors.torch import save_file

    keys = torch.frombuffer(bytearray(bytes.fromhex("".join(known))), dtype=torch.uint8)
    tensors = {"keys": keys.view(-1, 16), "logps": torch.tensor(list(known.values()))}
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}")  # containers often share process ids
    save_file(tensors, partial, metadata=identity)
    os.replace(partial, file)  # atomic, also where two runs write it at once
