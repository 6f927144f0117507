"""One source record to one preference row. `texts` reads its fields, `labels` orders its completions.

What is unusable is `Refused`, with the reason; what the configuration does not want is `LeftOut`.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from softpref.data.columns import Column, Layout, Record, is_dimension, value_at
from softpref.data.config import DataConfig
from softpref.data.labels import (
    Order,
    order_by_scores,
    order_by_verdicts,
    order_list,
    order_pair,
    read_thumb,
)
from softpref.data.texts import (
    LeftOut,
    Refused,
    characters,
    check_text,
    cut_common_messages,
    cut_common_prefix,
    describe,
    is_list_of_texts,
    normalised,
    read_field,
    read_list,
    read_number,
    read_text,
    reads_transcripts,
)
from softpref.lm.implicit import is_transcript
from softpref.records.dataset import Text

_TEXT_ROLES = ("prompt", "chosen", "rejected", "completion_a", "completion_b", "completions", "completion")


class Preference(NamedTuple):
    """A prompt and its completions, best first in a dimension (empty: in all); the rest as in `Order`."""

    prompt: Text
    completions: list[Text]
    kind: str
    probability: float | None
    dimension: str = ""


class Candidate(NamedTuple):
    """One scored completion of a prompt (higher is better), to be ranked with others of the same prompt."""

    prompt: Text
    completion: Text
    score: float
    dimension: str = ""


class Demonstration(NamedTuple):
    """A prompt and how to answer it, for the reference model."""

    prompt: Text
    completion: Text


class Judged(NamedTuple):
    """A completion without a counterpart, and whether it is desirable."""

    prompt: Text
    completion: Text
    label: bool


def read_preference(record: Record, layout: Layout, config: DataConfig) -> Preference:
    """Read a row of the forms pair, candidates and list."""
    columns = layout.columns
    if layout.form == "list":
        prompt, completions = _read_list_form(record, layout, config)
    else:
        roles = ("chosen", "rejected") if layout.form == "pair" else ("completion_a", "completion_b")
        raw = [read_field(record, columns[role]) for role in roles]
        names = [f"{role} ({columns[role]!r})" for role in roles]
        if layout.form == "pair" and is_list_of_texts(raw[1]):
            names = [names[0], *(f"{names[1]} {place}" for place in range(1, len(raw[1]) + 1))]
            raw = [raw[0], *raw[1]]
            if len(raw) < 2:
                raise Refused("fewer than two completions", f"{columns['rejected']!r} is an empty list")
        prompt, completions = _read_texts(record, raw, names, layout, config)
    if layout.form == "list":
        order = order_list(len(completions), record, layout, config)
    elif len(completions) == 2:
        order = order_pair(record, layout, config)
    elif layout.label:
        raise Refused("one label for several rejected completions", f"{' and '.join(layout.label)}")
    else:
        order = Order(range(len(completions)), "best_of_n")
    found = _ordered(prompt, completions, order, config)
    return found._replace(dimension=read_dimension(record, layout))


def read_verdicts(record: Record, layout: Layout, config: DataConfig) -> list[Preference | LeftOut]:
    """Read a row of several completions with verdicts on their pairs: a row for each judged pair."""
    prompt, completions = _read_list_form(record, layout, config)
    dimension = read_dimension(record, layout)
    found: list[Preference | LeftOut] = []
    for order in order_by_verdicts(len(completions), record, layout, config):
        try:
            if isinstance(order, LeftOut):
                raise order
            found.append(_ordered(prompt, completions, order, config)._replace(dimension=dimension))
        except LeftOut as reason:
            found.append(reason)
    return found


def read_dimension(record: Record, layout: Layout) -> str:
    """The dimension that the row names; empty where it names none."""
    value = value_at(record, layout.columns["dimension"]) if "dimension" in layout.columns else None
    if value is None or value == "":
        return ""
    if not isinstance(value, str) or not is_dimension(value):
        raise Refused("dimension is not a name of up to 40 letters and digits", describe(value))
    return value


def has_label(record: Record, layout: Layout) -> bool:
    """Whether a row says anything of a dimension."""
    return any(value_at(record, layout.columns[role]) is not None for role in layout.label)


def read_weight(record: Record, layout: Layout) -> float | None:
    """The row's weight, at least 0; None where the source has none."""
    if "weight" not in layout.columns:
        return None
    weight = read_number(read_field(record, layout.columns["weight"]), "weight")
    if weight < 0:
        raise Refused("negative weight", f"{weight:g}")
    return weight


def read_candidate(record: Record, layout: Layout, config: DataConfig) -> Candidate:
    """Read a row that holds one completion and its score, rank or label."""
    column = layout.columns["completion"]
    raw = read_field(record, column)
    prompt, completions = _read_texts(record, [raw], [repr(column)], layout, config)
    (role,) = layout.label
    value = read_field(record, layout.columns[role])
    score = read_thumb(value) if role == "label" else read_number(value, role)
    _limit_length(prompt, completions, config)
    score = -score if role == "rank" else score
    return Candidate(prompt, completions[0], score, read_dimension(record, layout))


def pair_thumbs(candidates: Sequence[Candidate]) -> list[Preference]:
    """The fewest pairs of a prompt's candidates with label true and false in which each of them occurs."""
    good = [candidate.completion for candidate in candidates if candidate.score == 1]
    bad = [candidate.completion for candidate in candidates if candidate.score == 0]
    if not good or not bad:
        raise LeftOut("prompt with one label only", f"{len(good)} true and {len(bad)} false")
    _refuse_identical([*good, *bad], _numbered(candidates))
    prompt, dimension = candidates[0].prompt, candidates[0].dimension
    return [
        Preference(prompt, [good[i % len(good)], bad[i % len(bad)]], "pairwise", None, dimension)
        for i in range(max(len(good), len(bad)))
    ]


def rank_candidates(candidates: Sequence[Candidate], config: DataConfig) -> Preference:
    """Make one row of several candidates of the same prompt."""
    if len(candidates) < 2:
        raise Refused("fewer than two completions", "the prompt has no other completion to compare with")
    completions = [candidate.completion for candidate in candidates]
    _refuse_identical(completions, _numbered(candidates))
    order = order_by_scores([candidate.score for candidate in candidates], config)
    found = _ordered(candidates[0].prompt, completions, order, config)
    return found._replace(dimension=candidates[0].dimension)


def read_demonstration(record: Record, columns: Mapping[str, Column], config: DataConfig) -> Demonstration:
    """Read a demonstration, whose prompt may be the beginning of its conversation."""
    column = columns["completion"]
    completion = read_text(read_field(record, column), "completion", repr(column), config)
    prompt, completions = _split_prompt(_prompt(record, columns, config), [completion], config, False)
    prompt = _with_system(prompt, record, columns, config)
    _limit_length(prompt, completions, config)
    return Demonstration(prompt, completions[0])


def read_judged(record: Record, columns: Mapping[str, Column], config: DataConfig) -> Judged:
    """Read a completion without a counterpart, with its label."""
    label = bool(read_thumb(read_field(record, columns["label"])))
    return Judged(*read_demonstration(record, columns, config), label)


def read_prompt(record: Record, columns: Mapping[str, Column], config: DataConfig) -> Text:
    """Read a prompt alone."""
    prompt = _prompt(record, columns, config)
    if prompt is None:
        raise Refused("prompt is missing")
    return _with_system(_conversation_start(prompt, config), record, columns, config)


def value_forms(records: Iterable[Record], layout: Layout, config: DataConfig) -> list[str]:
    """The forms other than text and `role`/`content` messages that some records have their texts in."""
    found = set()
    for record in records:
        for role in _TEXT_ROLES:
            column = layout.columns.get(role, [])
            for name in column if isinstance(column, list) else [column]:
                value = value_at(record, name)
                values = value if role == "completions" and isinstance(value, list) else [value]
                found |= {normalised(each, reads_transcripts(config))[1] for each in values}
    return sorted(found - {""})


# Prompt and completions


def _read_list_form(record: Record, layout: Layout, config: DataConfig) -> tuple[Text, list[Text]]:
    raw = read_list(record, "completions", layout.columns["completions"])
    if len(raw) < 2:
        raise Refused("fewer than two completions", f"{len(raw)} in {layout.columns['completions']!r}")
    return _read_texts(record, raw, _numbered(raw), layout, config)


def _read_texts(
    record: Record,
    raw: Sequence[object],
    names: Sequence[str],
    layout: Layout,
    config: DataConfig,
) -> tuple[Text, list[Text]]:
    """A row's prompt, with its system text, and its completions.

    Args:
        names: how messages call the completions.
    """
    texts = [read_text(value, "completion", name, config) for value, name in zip(raw, names, strict=True)]
    prompt = _prompt(record, layout.columns, config)
    prompt, completions = _split_prompt(prompt, texts, config, layout.implicit)
    prompt = _with_system(prompt, record, layout.columns, config)
    _refuse_identical(completions, names)
    return prompt, completions


def _prompt(record: Record, columns: Mapping[str, Column], config: DataConfig) -> Text | None:
    if "prompt" in columns:
        prompt = read_text(read_field(record, columns["prompt"]), "prompt", repr(columns["prompt"]), config)
        more = _text_beside(record, columns, "input")
        if not more:
            return prompt
        if not isinstance(prompt, str):
            raise Refused("input is not text", "a prompt of messages takes none")
        return f"{prompt}\n{more}"
    if config.prompt_template:
        parts = []
        for literal, field, _, _ in string.Formatter().parse(config.prompt_template):
            parts.append(literal)
            if field is not None:
                value = read_field(record, field)
                if not isinstance(value, str):
                    raise Refused("prompt is not text", f"{field!r} is {describe(value)}")
                parts.append(value)
        return check_text("".join(parts), "prompt", "prompt_template")
    return None


def _text_beside(record: Record, columns: Mapping[str, Column], role: str) -> str:
    """The text of a row that need not be there; empty without it."""
    value = value_at(record, columns[role]) if role in columns else None
    if value is None or value == "":
        return ""
    if not isinstance(value, str):
        raise Refused(f"{role} is not text", f"{columns[role]!r} is {describe(value)}")
    return check_text(value, role, repr(columns[role]))


def _split_prompt(
    prompt: Text | None, completions: list[Text], config: DataConfig, implicit: bool
) -> tuple[Text, list[Text]]:
    """Settle what is prompt and what is completion, and make both conversational or both plain."""
    conversations = [completion for completion in completions if isinstance(completion, list)]
    if conversations and len(conversations) < len(completions):
        raise Refused("completions mix plain text and messages")
    if not conversations:
        plain = [completion for completion in completions if isinstance(completion, str)]
        if prompt is None:
            end = config.implicit_prompt_end
            if not end and all(map(is_transcript, plain)):
                end = "\n\nAssistant:"
            elif not implicit:
                raise Refused(
                    "no prompt column (name it in columns; implicit_prompt=true takes the words that the "
                    "completions share)"
                )
            prompt, plain = cut_common_prefix(plain, end)
        if isinstance(prompt, str) and not config.as_messages:
            return prompt, list(plain)
        conversations = [[{"role": "assistant", "content": text}] for text in plain]
    elif prompt is None or any(messages[0]["role"] != "assistant" for messages in conversations):
        # The conversations hold their prompt; a prompt column beside them only repeats its last question.
        begin, conversations = cut_common_messages(conversations)
        if prompt is not None and prompt not in (begin, begin[-1]["content"]):
            raise Refused("prompt contradicts the messages", "the conversation opens with another prompt")
        prompt = begin
    for messages in conversations:
        if [message["role"] for message in messages] != ["assistant"]:
            roles = ", ".join(message["role"] for message in messages)
            raise Refused("wrong order of roles", f"a completion is one assistant message, got {roles}")
    return _conversation_start(prompt, config), list(conversations)


def _with_system(prompt: Text, record: Record, columns: Mapping[str, Column], config: DataConfig) -> Text:
    """The prompt with the row's system text: a message of a conversation, a paragraph before plain text."""
    system = _text_beside(record, columns, "system")
    if not system:
        return prompt
    if isinstance(prompt, str):
        return f"{system}\n\n{prompt}"
    own = prompt[0]["content"] if prompt[0]["role"] == "system" else None
    if own not in (None, system, config.system_prompt):  # the row's own wins over the one for all
        raise Refused("system contradicts the messages", "the conversation has another system message")
    return [{"role": "system", "content": system}, *prompt[own is not None :]]


def _conversation_start(prompt: Text, config: DataConfig) -> Text:
    if isinstance(prompt, str):
        if not config.as_messages:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    roles = [message["role"] for message in prompt]
    if roles[-1] != "user":
        raise Refused("wrong order of roles", f"the prompt ends with a message from {roles[-1]}")
    if roles[0] == "assistant" or roles[:2] == ["system", "assistant"]:
        raise Refused("wrong order of roles", "the prompt begins with a message from assistant")
    if config.system_prompt and roles[0] != "system":
        prompt = [{"role": "system", "content": config.system_prompt}, *prompt]
    return prompt


def _ordered(prompt: Text, completions: Sequence[Text], order: Order, config: DataConfig) -> Preference:
    kept = [completions[place] for place in order.places]
    _limit_length(prompt, kept, config)
    return Preference(prompt, kept, order.kind, order.probability)


def _numbered(completions: Sequence[object]) -> list[str]:
    return [f"completion {number}" for number in range(1, len(completions) + 1)]


def _refuse_identical(completions: Sequence[Text], names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for completion, name in zip(completions, names, strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        if (other := seen.setdefault(text.strip(), name)) != name:
            raise Refused("completions are identical", f"{other} and {name}")


def _limit_length(prompt: Text, completions: Sequence[Text], config: DataConfig) -> None:
    if config.max_characters is not None:
        length = characters(prompt) + max(map(characters, completions))
        if length > config.max_characters:
            raise LeftOut("longer than max_characters", f"{length} of {config.max_characters}")
