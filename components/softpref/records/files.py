"""JSON files that hold an object: read with an error that says what to do, written whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from softpref.disk import DAMAGED, flush_below, in_brief, remove_parts, what_is_at, write_whole
from softpref.errors import ConfigError, DataError

PARAMETERS_FILE, TIMINGS_FILE, RESULT_FILE = "parameters.yaml", "timings.json", "result.json"

T = TypeVar("T")


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The object in a file, of a folder that is `what`.

    Raises:
        ConfigError: there is no such file.
        DataError: it is damaged.
    """
    if not os.path.isfile(path):
        raise ConfigError(f"{path} {what_is_at(path)}; give {what}")
    values: dict[str, Any] = read_if_there(path)
    return values


def read_if_there(path: Path) -> Any:
    """The object in a file; empty where it is absent.

    Raises:
        DataError: it is damaged.
    """
    return typed(path, path, _object_in) if path.exists() else {}


def _object_in(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}, not an object")
    json.dumps(values, ensure_ascii=False).encode()  # an escape can stand for what is no text
    return values


def typed(path: Path, values: Any, read: Callable[[Any], T]) -> T:
    """What `read` makes of a file's values; that they are not what softpref writes is a `DataError`."""
    try:
        return read(values)
    except DataError:
        raise
    except DAMAGED as error:
        raise DataError(
            f"{path} cannot be read: {in_brief(error)}; it is damaged, or not a file of softpref's: have the "
            "stage that writes it do so again"
        ) from error


def write_object(path: Path, values: Mapping[str, object]) -> None:
    """Write the file that says that its folder is complete, when all others of the folder are on disk."""
    remove_parts(path.parent)
    flush_below(path.parent)
    write_whole(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
