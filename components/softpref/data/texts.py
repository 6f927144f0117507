"""What the fields of a record hold: text or messages, lists, numbers; and what texts have in common.

Conversations in the various forms of public data become `role` and `content` here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from softpref.data.columns import Column, Record, is_message, value_at
from softpref.data.config import DataConfig
from softpref.lm import implicit
from softpref.lm.implicit import is_transcript
from softpref.records.dataset import Message, Text

_ROLES = ("system", "user", "assistant")
_ROLES_AS = {"human": "user", "gpt": "assistant"}  # as ShareGPT calls them
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_ROLE_OF_TURN = {"Human": "user", "Assistant": "assistant"}


class Refused(ValueError):
    """A row that cannot be used: `rule` is what it broke (counted), `detail` where and how."""

    def __init__(self, rule: str, detail: str = "") -> None:
        super().__init__(f"{rule}: {detail}" if detail else rule)
        self.rule, self.detail = rule, detail

    def of(self, part: str) -> Refused:
        """The same, of a part of the row."""
        return Refused(self.rule, f"{part}, {self.detail}" if self.detail else part)


class LeftOut(Refused):
    """A sound row that the configuration asked to leave out."""


def read_field(record: Record, column: Column) -> object:
    """The value of a column, or those of several."""
    if isinstance(column, list):
        return [read_field(record, one) for one in column]
    value = value_at(record, column)
    if value is None:
        raise Refused("field is missing", repr(column))
    return value


def read_list(record: Record, role: str, column: Column) -> list[Any]:
    """The list that a column holds, perhaps as JSON text in a CSV cell, or the values of several columns."""
    value = read_field(record, column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Refused(f"{role} is not a list", f"{column!r} is the text {short(value)}") from None
    if not isinstance(value, list):
        raise Refused(f"{role} is not a list", f"{column!r} is {describe(value)}")
    return value


def read_text(value: object, noun: str, where: str, config: DataConfig) -> Text:
    """Text or messages. Other types are refused: `str(True)` is no answer."""
    value, _ = normalised(value, reads_transcripts(config))
    if isinstance(value, list):
        return _messages(value, noun, where)
    if not isinstance(value, str):
        raise Refused(f"{noun} is not text", f"{where} is {describe(value)}")
    return check_text(value, noun, where)


def reads_transcripts(config: DataConfig) -> bool:
    return config.transcripts == "messages" and not config.implicit_prompt_end


def normalised(value: object, transcripts: bool) -> tuple[object, str]:
    """A value as text or messages of `role` and `content`, and which form of public data it had, or ''."""
    form = ""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            decoded = json.loads(value)
        except (ValueError, RecursionError):
            decoded = None
        several = isinstance(decoded, list) and decoded and all(map(is_message, decoded))
        if several or is_message(decoded):
            value, form = decoded, "JSON text in a cell"
    if is_message(value):
        value, form = [value], form or "a single message"
    if isinstance(value, list) and value and all(is_message(item) and "from" in item for item in value):
        form = "from and value (ShareGPT)"
        value = [{"role": item["from"], "content": item["value"]} for item in value]
    if isinstance(value, list):
        known = [*_ROLES, *_ROLES_AS]
        value = [
            {**item, "role": _ROLES_AS.get(item["role"], item["role"])}
            if isinstance(item, Mapping) and item.get("role") in known
            else item
            for item in value
        ]
    if transcripts and isinstance(value, str) and is_transcript(value):
        _, *parts = _TURN.split(value.lstrip("\n "))
        turns = [
            (_ROLE_OF_TURN[name], text.strip()) for name, text in zip(parts[::2], parts[1::2], strict=True)
        ]
        if turns[-1] == ("assistant", ""):  # a prompt that ends where the answer begins
            turns.pop()
        form = "transcripts (Human:, Assistant:)"
        value = [{"role": role, "content": text} for role, text in turns]
    return value, form


def is_list_of_texts(value: object) -> TypeGuard[list[object]]:
    """Whether a value is several completions, not the messages of one."""
    return isinstance(value, list) and not any(isinstance(item, Mapping) for item in value)


def check_text(value: str, noun: str, where: str) -> str:
    if not value.strip():
        raise Refused(f"{noun} is empty", where)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refused("text is not valid UTF-8", where) from None
    return value


def _messages(value: Sequence[object], noun: str, where: str) -> list[Message]:
    if not value:
        raise Refused(f"{noun} is empty", f"{where} has no messages")
    messages: list[Message] = []
    for index, message in enumerate(value):
        place = f"message {index + 1} of {where}"
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise Refused(f"{noun} is not text or messages", f"{place} has no role and content")
        role, content = message["role"], message["content"]
        if role not in _ROLES:
            raise Refused("unknown role", f"{place} has the role {short(role)}, known: {', '.join(_ROLES)}")
        if any(message.get(name) for name in ("tool_calls", "function_call")):
            raise Refused("tool calls are not supported", place)
        if not isinstance(content, str):
            raise Refused(f"{noun} is not text", f"the content of {place} is {describe(content)}")
        if role == "system" and index > 0:
            raise Refused("wrong order of roles", f"{place} is a system message, which may only come first")
        if messages and messages[-1]["role"] == role:
            raise Refused("wrong order of roles", f"{place} and the one before are both from {role}")
        messages.append({"role": role, "content": check_text(content, noun, place)})
    return messages


def read_number(value: object, role: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise Refused(f"{role} is not a number", describe(value))
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise Refused(f"{role} is not a number", describe(value)) from None
    if not math.isfinite(number):
        raise Refused(f"{role} is not finite", str(number))
    return number


def may_instruct(value: object) -> bool:
    """Whether it can be a system text, or none: a single word names a system rather than instructing one."""
    return value is None or (isinstance(value, str) and (not value.strip() or len(value.split()) > 1))


def describe(value: object) -> str:
    if isinstance(value, str):
        return f"the text {short(value)}"
    kind = "boolean" if isinstance(value, bool) else "number" if isinstance(value, (int, float)) else None
    if kind:
        return f"the {kind} {json.dumps(value)}"
    return "missing" if value is None else f"a {type(value).__name__}"


def short(value: object) -> str:
    text = ascii(value) if not isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# What texts share


def cut_common_prefix(texts: Sequence[str], end: str = "") -> tuple[str, list[str]]:
    """See `softpref.lm.implicit`.

    Raises:
        Refused: no place leaves a prompt and every completion.
    """
    found = implicit.cut_common_prefix(texts, end)
    if found is None:
        sought = f"the text {end!r}" if end else "a whole first word with something after it"
        raise Refused("no prompt found", f"there is no prompt column, and the texts do not share {sought}")
    return found


def cut_common_messages(conversations: Sequence[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """See `softpref.lm.implicit`.

    Raises:
        Refused: they share no beginning that ends with a user message.
    """
    found = implicit.cut_common_messages(conversations)
    if found is None:
        raise Refused("no prompt found", "the conversations share no beginning that ends with a user message")
    return found


def characters(text: Text) -> int:
    """Length in characters; of a conversation, that of its contents."""
    return len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)
