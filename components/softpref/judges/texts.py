"""Dataset rows and samples as the texts that judges are asked about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypedDict

from softpref.records.dataset import Message, PreferenceRow, Text


class Conversation(str):
    """Messages as one text that remembers them.

    Most judges read the text. A reward model writes the messages in its own chat template.
    """

    messages: Sequence[Message]


def as_text(text: Text, *, roles: bool = False) -> str:
    """Plain text unchanged; messages as lines of their contents, with `roles` in front."""
    if isinstance(text, str):
        return text
    lines = (f"{message['role']}: {message['content']}" if roles else message["content"] for message in text)
    conversation = Conversation("\n".join(lines))
    conversation.messages = text
    return conversation


def as_given(text: str) -> Text:
    """The messages that a text was made of, or the text."""
    return text.messages if isinstance(text, Conversation) else text


class TextRow(TypedDict):
    """A row of the dataset as judges are asked about it: all messages as texts, the prompt's with roles."""

    prompt: str
    completions: list[str]
    kind: str
    probability: float | None


def text_rows(rows: Iterable[PreferenceRow]) -> Iterator[TextRow]:
    """Dataset rows as judges are asked about them; none that nobody has judged (`degree`)."""
    for row in rows:
        if row.get("degree"):
            continue
        yield {
            "prompt": as_text(row["prompt"], roles=True),
            "completions": [as_text(completion) for completion in row["completions"]],
            "kind": row["kind"],
            "probability": row["probability"],
        }


def preference_pairs(rows: Iterable[TextRow]) -> Iterator[tuple[str, str, str, float]]:
    """Dataset rows with text prompts and completions as `(prompt, better, worse, P(better wins))`."""
    for row in rows:
        completions = row["completions"]
        for better, worse, share in ordered_pairs(row["kind"], len(completions), row["probability"]):
            yield row["prompt"], completions[better], completions[worse], share


def ordered_pairs(kind: str, count: int, probability: float | None) -> Iterator[tuple[int, int, float]]:
    """Places of the better and the worse completion of each pair of a row, and P(better wins).

    Rankings and best-of-n rows give hard pairs: all ordered ones, or the best against each other.
    """
    share = 1.0 if probability is None or count > 2 else probability
    for better in range(count - 1 if kind == "ranking" else 1):
        for worse in range(better + 1, count):
            yield better, worse, share
