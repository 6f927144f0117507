"""One source record to one preference row, or a reason why not. What a field holds is for `texts` to say."""

from __future__ import annotations

import itertools
import json
import math
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from softpref.data.columns import Layout, value_at
from softpref.data.config import DataConfig
from softpref.data.texts import (
    LeftOut,
    Refused,
    Text,
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
    short,
)
from softpref.errors import ConfigError
from softpref.lm.implicit import is_transcript

_MEANINGS = {
    "preference": {
        **{"a": "a", "b": "b", "tie": "tie", "1": "a", "2": "b"},
        **{"model_a": "a", "model_b": "b", "tie (bothbad)": "tie"},
    },
    "votes": {"1": "a", "2": "b", "0": "tie"},
}
_NO_PROMPT = (
    "no prompt column (name it in columns; implicit_prompt=true takes the words that the completions share)"
)


class Preference(NamedTuple):
    """A prompt and its completions, best first.

    `probability` is P(completions[0] beats completions[1]) of a pair with a soft label, else None.
    """

    prompt: Text
    completions: list[Text]
    kind: str
    probability: float | None


class Candidate(NamedTuple):
    """One scored completion of a prompt (higher is better), to be ranked with others of the same prompt."""

    prompt: Text
    completion: Text
    score: float


class Demonstration(NamedTuple):
    """A prompt and how to answer it, for the reference model."""

    prompt: Text
    completion: Text


def read_preference(record: Mapping[str, Any], layout: Layout, config: DataConfig) -> Preference:
    """Read a row of the forms pair, candidates and list.

    Raises:
        Refused: the row is unusable, for the reason given; `LeftOut` when the configuration leaves it out.
    """
    columns = layout.columns
    if layout.form == "list":
        raw = read_list(record, "completions", columns["completions"])
        if len(raw) < 2:
            raise Refused("fewer than two completions", f"{len(raw)} in {columns['completions']!r}")
        names = [f"completion {index + 1}" for index in range(len(raw))]
    else:
        roles = ("chosen", "rejected") if layout.form == "pair" else ("completion_a", "completion_b")
        raw = [read_field(record, columns[role]) for role in roles]
        names = [f"{role} ({columns[role]!r})" for role in roles]
        if layout.form == "pair" and is_list_of_texts(raw[1]):
            names = [names[0], *(f"{names[1]} {place}" for place in range(1, len(raw[1]) + 1))]
            raw = [raw[0], *raw[1]]
            if len(raw) < 2:
                raise Refused("fewer than two completions", f"{columns['rejected']!r} is an empty list")
    completions = [
        read_text(value, "completion", name, config) for value, name in zip(raw, names, strict=True)
    ]
    prompt, completions = _split_prompt(
        _prompt(record, columns, config), completions, config, layout.implicit
    )
    prompt = _with_system(prompt, record, columns, config)
    _refuse_identical(completions, names)

    if layout.form == "pair" and len(completions) > 2:
        if layout.label:
            raise Refused("one label for several rejected completions", f"{' and '.join(layout.label)}")
        row = Preference(prompt, completions, "best_of_n", None)
    elif layout.label == ("probability", "kind"):
        row = _as_written(prompt, completions, record, layout, config)
    elif layout.form == "list":
        scores = _scores(record, layout, len(completions))
        only_best = config.list_kind == "best_of_n" or layout.label == ("best",)
        row = _ranked(prompt, completions, scores, only_best, config.ties, config.labels)
    else:
        row = _oriented(prompt, completions, *_probability(record, layout, config), config)
    _limit_length(row.prompt, row.completions, config)
    return row


def read_verdicts(
    record: Mapping[str, Any], layout: Layout, config: DataConfig
) -> list[Preference | LeftOut]:
    """Read a row of several completions with verdicts on their pairs: a pair for each verdict.

    Verdicts are a matrix, in whose row i and column j is how often i won over j (a number or a share; nothing
    in both places of a pair means that nobody judged it), or a list of labels like those of `preference`, for
    the pairs (1, 2), (1, 3), … (2, 3), … in this order.

    Raises:
        Refused: the row is unusable, for the reason given.
    """
    raw = read_list(record, "completions", layout.columns["completions"])
    names = [f"completion {index + 1}" for index in range(len(raw))]
    texts = [read_text(value, "completion", name, config) for value, name in zip(raw, names, strict=True)]
    if len(texts) < 2:
        raise Refused("fewer than two completions", f"{len(raw)} in {layout.columns['completions']!r}")
    prompt, completions = _split_prompt(
        _prompt(record, layout.columns, config), texts, config, layout.implicit
    )
    prompt = _with_system(prompt, record, layout.columns, config)
    _refuse_identical(completions, names)
    count = len(completions)
    pairs = list(itertools.combinations(range(count), 2))
    values = read_list(record, "verdicts", layout.columns["verdicts"])
    if len(values) == count and all(isinstance(value, list) and len(value) == count for value in values):
        wins = [
            [read_number(int(cell) if isinstance(cell, bool) else cell or 0, "verdict") for cell in row]
            for row in values
        ]
        if min(map(min, wins)) < 0:
            raise Refused("negative verdicts", short(wins))
        votes = [(wins[first][second], wins[second][first], 0.0) for first, second in pairs]
    elif len(values) == len(pairs) and not any(isinstance(value, list) for value in values):
        meanings = config.preference_values or _MEANINGS["preference"]
        votes = []
        for value in values:
            meaning = None if value is None else _meaning(value, "preference", meanings)
            votes.append((float(meaning == "a"), float(meaning == "b"), float(meaning == "tie")))
    else:
        expected = f"{count} rows of {count}, or {len(pairs)} labels, for {count} completions"
        raise Refused("verdicts fit neither a matrix nor a list of all pairs", f"expected {expected}")
    read: list[Preference | LeftOut] = []
    for (first, second), judged in zip(pairs, votes, strict=True):
        if not any(judged):
            continue
        pair = [completions[first], completions[second]]
        try:
            row = _oriented(prompt, pair, *_share(*judged, config, config.min_votes > 1), config)
            _limit_length(row.prompt, row.completions, config)
            read.append(row)
        except LeftOut as reason:
            read.append(reason)
    if not read:
        raise Refused("no votes")
    return read


def read_weight(record: Mapping[str, Any], layout: Layout) -> float | None:
    """The row's weight, at least 0; None where the source has none.

    Raises:
        Refused: it is missing, no number, or negative.
    """
    if "weight" not in layout.columns:
        return None
    weight = read_number(read_field(record, layout.columns["weight"]), "weight")
    if weight < 0:
        raise Refused("negative weight", f"{weight:g}")
    return weight


def read_candidate(record: Mapping[str, Any], layout: Layout, config: DataConfig) -> Candidate:
    """Read a row that holds one completion and its score or rank.

    Raises:
        Refused: the row is unusable, for the reason given.
    """
    column = layout.columns["completion"]
    completion = read_text(read_field(record, column), "completion", repr(column), config)
    prompt, completions = _split_prompt(
        _prompt(record, layout.columns, config), [completion], config, layout.implicit
    )
    prompt = _with_system(prompt, record, layout.columns, config)
    role = layout.label[0]
    value = read_field(record, layout.columns[role])
    score = _thumb(value) if role == "label" else read_number(value, role)
    _limit_length(prompt, completions, config)
    return Candidate(prompt, completions[0], -score if role == "rank" else score)


def pair_thumbs(candidates: Sequence[Candidate], config: DataConfig) -> list[Preference]:
    """Pairs of a prompt's candidates with label true and false, in which each of them is, as few as do it.

    Raises:
        LeftOut: the prompt has completions with one of both labels only.
    """
    good = [candidate.completion for candidate in candidates if candidate.score == 1]
    bad = [candidate.completion for candidate in candidates if candidate.score == 0]
    if not good or not bad:
        raise LeftOut("prompt with one label only", f"{len(good)} true and {len(bad)} false")
    _refuse_identical([*good, *bad], [f"completion {index + 1}" for index in range(len(candidates))])
    return [
        Preference(candidates[0].prompt, [good[i % len(good)], bad[i % len(bad)]], "pairwise", None)
        for i in range(max(len(good), len(bad)))
    ]


def rank_candidates(candidates: Sequence[Candidate], config: DataConfig) -> Preference:
    """Make one row of several candidates of the same prompt.

    Raises:
        Refused: too few, identical or tied completions.
    """
    if len(candidates) < 2:
        raise Refused("fewer than two completions", "the prompt has no other completion to compare with")
    completions = [candidate.completion for candidate in candidates]
    _refuse_identical(completions, [f"completion {index + 1}" for index in range(len(completions))])
    scores = [candidate.score for candidate in candidates]
    only_best = config.list_kind == "best_of_n"
    return _ranked(candidates[0].prompt, completions, scores, only_best, config.ties, config.labels)


def read_demonstration(
    record: Mapping[str, Any], columns: Mapping[str, str], config: DataConfig
) -> Demonstration:
    """Read a prompt and one completion.

    Raises:
        Refused: the row is unusable, for the reason given.
    """
    column = columns["completion"]
    completion = read_text(read_field(record, column), "completion", repr(column), config)
    prompt, completions = _split_prompt(_prompt(record, columns, config), [completion], config, False)
    _limit_length(prompt, completions, config)
    return Demonstration(prompt, completions[0])


def read_prompt(record: Mapping[str, Any], columns: Mapping[str, str], config: DataConfig) -> Text:
    """Read a prompt alone.

    Raises:
        Refused: the row is unusable, for the reason given.
    """
    prompt = _prompt(record, columns, config)
    if prompt is None:
        raise Refused("prompt is missing")
    return _conversation_start(prompt, config)


def value_forms(records: Iterable[Mapping[str, Any]], layout: Layout, config: DataConfig) -> list[str]:
    """The forms other than text and `role`/`content` messages that some records have their texts in."""
    roles = ("prompt", "chosen", "rejected", "completion_a", "completion_b", "completions", "completion")
    found = set()
    for record in records:
        for role in roles:
            column = layout.columns.get(role, [])
            for name in column if isinstance(column, list) else [column]:
                value = value_at(record, name)
                values = value if role == "completions" and isinstance(value, list) else [value]
                found |= {normalised(each, reads_transcripts(config))[1] for each in values}
    return sorted(found - {""})


# Prompts


def _prompt(record: Mapping[str, Any], columns: Mapping[str, Any], config: DataConfig) -> Text | None:
    if "prompt" in columns:
        prompt = read_text(read_field(record, columns["prompt"]), "prompt", repr(columns["prompt"]), config)
        more = value_at(record, columns["input"]) if "input" in columns else None
        if more is None or more == "":
            return prompt
        if not isinstance(prompt, str) or not isinstance(more, str):
            raise Refused("input is not text", f"{columns['input']!r} is {describe(more)}")
        return f"{prompt}\n{check_text(more, 'input', repr(columns['input']))}"
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
                raise Refused(_NO_PROMPT)
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


def _with_system(
    prompt: Text, record: Mapping[str, Any], columns: Mapping[str, Any], config: DataConfig
) -> Text:
    """The prompt with the row's system text: a message of a conversation, a paragraph before plain text."""
    system = value_at(record, columns["system"]) if "system" in columns else None
    if system is None or system == "":
        return prompt
    if not isinstance(system, str):
        raise Refused("system is not text", f"{columns['system']!r} is {describe(system)}")
    check_text(system, "system", repr(columns["system"]))
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
    if prompt[-1]["role"] != "user":
        raise Refused("wrong order of roles", f"the prompt ends with a message from {prompt[-1]['role']}")
    if prompt[0]["role"] == "assistant" or [message["role"] for message in prompt[:2]] == [
        "system",
        "assistant",
    ]:
        raise Refused("wrong order of roles", "the prompt begins with a message from assistant")
    if config.system_prompt and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": config.system_prompt}, *prompt]
    return prompt


# Which is better


def _probability(record: Mapping[str, Any], layout: Layout, config: DataConfig) -> tuple[float, bool]:
    """P(first beats second), and whether the label is hard: a single vote, a name, chosen before rejected."""
    columns, label = layout.columns, layout.label
    if not label:
        return 1.0, True
    if label == ("probability",):
        probability = read_number(read_field(record, columns["probability"]), "probability")
        if not 0 <= probability <= 1:
            raise Refused("probability is outside 0 to 1", str(probability))
        return probability, False
    if (len(label) == 2 and label[0].startswith("score_")) or label[0] in ("margin", "strength"):
        numbers = [read_number(read_field(record, columns[role]), role) for role in label]
        difference = numbers[0] - numbers[1] if len(numbers) == 2 else numbers[0]
        if label == ("strength",):
            if abs(difference) > 3:
                raise Refused("strength is outside -3 to 3", f"{difference:g}")
            difference = -difference  # negative where the first is better
        if not math.isfinite(difference):
            raise Refused("difference is not finite", str(numbers))
        return _sigmoid((config.score_scale or 1.0) * difference), False
    if label == ("votes_a", "votes_b"):
        roles = ["votes_a", "votes_b", *(["votes_equal"] if "votes_equal" in columns else [])]
        counts = [read_number(read_field(record, columns[role]), role) for role in roles]
        if min(counts) < 0:
            raise Refused("negative votes", str(counts))
        first, second, equal = counts if len(counts) == 3 else (*counts, 0.0)
    else:
        role = label[0]
        values = (
            read_list(record, "votes", columns["votes"])
            if role == "votes"
            else [read_field(record, columns["preference"])]
        )
        meanings = config.preference_values or _MEANINGS[role]
        votes = [_meaning(value, role, meanings) for value in values]
        first, second, equal = (float(votes.count(meaning)) for meaning in ("a", "b", "tie"))
    return _share(first, second, equal, config, counted=label != ("preference",))


def _share(
    first: float, second: float, equal: float, config: DataConfig, counted: bool
) -> tuple[float, bool]:
    """The share of votes for the first, and whether it is a single vote."""
    if config.ties == "drop":
        equal = 0.0
    total = first + second + equal
    if total == 0:
        if config.ties == "drop":
            raise LeftOut("tie")
        raise Refused("no votes")
    if counted and total < config.min_votes:
        raise LeftOut("fewer votes than min_votes", f"{total:g} of {config.min_votes}")
    return (first + equal / 2) / total, total == 1 and {first, second} == {0, 1}


def _thumb(value: Any) -> float:
    text = str(value).strip().casefold()
    if text not in ("true", "false", "1", "0", "1.0", "0.0"):
        raise Refused("label is neither true nor false", describe(value))
    return float(text in ("true", "1", "1.0"))


def _sigmoid(value: float) -> float:
    tail = math.exp(-abs(value))  # does not overflow
    return 1 / (1 + tail) if value >= 0 else tail / (1 + tail)


def _meaning(value: Any, role: str, meanings: Mapping[str, str]) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    key = value if isinstance(value, str) else json.dumps(value, default=str)
    folded = {known.casefold(): meaning for known, meaning in meanings.items()}
    if key.strip().casefold() not in folded:
        if key.strip() == "0" and meanings is _MEANINGS["preference"]:
            raise ConfigError(
                'a label 0 can mean two things; say which in preference_values: {"1": "a", "2": "b", "0": '
                '"tie"} or {"0": "a", "1": "b"}'
            )
        raise Refused(f"unknown {role} value (known: {', '.join(meanings)})", short(value))
    return folded[key.strip().casefold()]


def _oriented(
    prompt: Text, pair: list[Text], probability: float, hard: bool, config: DataConfig
) -> Preference:
    if probability < 0.5:
        pair, probability = pair[::-1], 1 - probability
    return _pair(prompt, pair, probability, hard, config.ties, config.labels)


def _pair(
    prompt: Text, completions: list[Text], probability: float, hard: bool, ties: str, labels: str
) -> Preference:
    if probability == 0.5 and (ties == "drop" or labels == "hard"):
        raise LeftOut("tie")
    soft = not hard and labels == "soft"
    return Preference(prompt, completions, "pairwise", probability if soft else None)


def _as_written(
    prompt: Text, completions: list[Text], record: Mapping[str, Any], layout: Layout, config: DataConfig
) -> Preference:
    """A row of a dataset of this stage: best first, with a probability where the label of a pair is soft."""
    if value_at(record, layout.columns["probability"]) is not None:
        if len(completions) != 2:
            raise Refused("probability of a list that is no pair", f"{len(completions)} completions")
        pair = layout._replace(label=("probability",))
        return _oriented(prompt, completions, *_probability(record, pair, config), config)
    only_best = "best_of_n" in (config.list_kind, read_field(record, layout.columns["kind"]))
    scores = [float(-place) for place in range(len(completions))]
    return _ranked(prompt, completions, scores, only_best, config.ties, config.labels)


def _scores(record: Mapping[str, Any], layout: Layout, count: int) -> list[float]:
    """Scores of a list's completions, higher is better."""
    if not layout.label:
        return [float(-place) for place in range(count)]
    role = layout.label[0]
    if role == "order":
        order = [read_number(value, role) for value in read_list(record, role, layout.columns[role])]
        if sorted(order) != list(range(count)):
            raise Refused("order does not name each completion once", f"{order}, expected 0 to {count - 1}")
        return [float(-order.index(place)) for place in range(count)]
    if role == "best":
        best = read_number(read_field(record, layout.columns["best"]), "best")
        if not best.is_integer() or not 0 <= best < count:
            raise Refused("best is out of range", f"{best:g}, expected 0 to {count - 1}")
        return [float(place == best) for place in range(count)]
    scores = [read_number(value, role) for value in read_list(record, role, layout.columns[role])]
    if len(scores) != count:
        raise Refused(f"{role} and completions differ in number", f"{len(scores)} and {count}")
    return [-score for score in scores] if role == "ranks" else scores


def _ranked(
    prompt: Text, completions: list[Text], scores: list[float], only_best: bool, ties: str, labels: str
) -> Preference:
    order = sorted(range(len(scores)), key=lambda index: -scores[index])  # stable: ties stay in given order
    if len(order) == 2:
        tie = scores[0] == scores[1]
        pair = [completions[index] for index in order]
        return _pair(prompt, pair, 0.5 if tie else 1.0, not tie, ties, labels)
    first_of_score = [
        index for place, index in enumerate(order) if place == 0 or scores[index] != scores[order[place - 1]]
    ]
    if only_best:  # ties below the best do no harm
        top = scores[order[0]]
        first_of_score = [order[0], *(index for index in order if scores[index] != top)]
    if len(first_of_score) < len(order):
        if ties == "half":
            raise Refused("equal scores", "a ranking has no ties; ties='drop' leaves out all but the first")
        if len(first_of_score) < 2:
            raise LeftOut("tie")
    kept = [completions[index] for index in first_of_score]
    if len(kept) == 2:
        return _pair(prompt, kept, 1.0, True, ties, labels)
    return Preference(prompt, kept, "best_of_n" if only_best else "ranking", None)


# Checks on the whole row


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
