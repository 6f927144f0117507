"""What a stage was called with, beside its result: called with the same once more, it returns that again."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softpref.disk import DAMAGED, write_whole
from softpref.errors import ConfigError
from softpref.records.files import RESULT_FILE

_SAID = 5  # differences in a message
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60


def write_result(folder: str | Path, made_from: Mapping[str, object], result: object) -> None:
    """Write `result.json`: what a stage returns, and what it was called with.

    Args:
        made_from: configuration and inputs, as `as_recorded` gives them.
    """
    text = json.dumps({"made_from": made_from, "result": result}, indent=2, ensure_ascii=False)
    write_whole(Path(folder) / RESULT_FILE, text + "\n")


def finished_result(folder: str | Path, made_from: Mapping[str, object], what: str) -> Any:
    """What a stage that has finished in a folder returned, where it was called with the same.

    Args:
        what: what the folder holds, for the message.

    Raises:
        ConfigError: it was called with something else, or that is not known.
    """
    try:
        found = json.loads((Path(folder) / RESULT_FILE).read_text(encoding="utf-8"))
        there, result = dict(found["made_from"]), found["result"]
    except DAMAGED:
        there, result = {}, None
    if there == made_from:
        return result
    why = f", of something else ({differences(there, made_from)})" if there else ""
    raise ConfigError(f"{folder} holds {what} already{why}; name another folder or remove it first")


def as_recorded(values: Mapping[str, object]) -> dict[str, object]:
    """Values as JSON gives them back."""
    recorded: dict[str, object] = json.loads(json.dumps(values, default=str))
    return recorded


def differences(found: Mapping[str, object], own: Mapping[str, object]) -> str:
    """In what recorded values differ from those of this call, in words: some of them, best those of both."""
    differing = sorted(key for key in {*own, *found} if own.get(key) != found.get(key))
    differing.sort(key=lambda key: not (key in own and key in found))
    show = _repr.repr
    said = [f"{key}: {show(found.get(key))} there, {show(own.get(key))} here" for key in differing[:_SAID]]
    return ", ".join(said) + (f", and {len(differing) - _SAID} more" if differing[_SAID:] else "")
