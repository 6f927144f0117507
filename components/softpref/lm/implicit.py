"""Prompts that no column holds: what all answers of a row begin with, texts or messages."""

from __future__ import annotations

from collections.abc import Sequence

from softpref.lm.tokenization import shared_length


def cut_common_prefix(texts: Sequence[str], end: str = "") -> tuple[str, list[str]] | None:
    """Split texts that share their beginning into that prompt and what follows it.

    The cut falls where a word ends in every text, so that completions keep their leading white space and
    `prompt + completion` is the text again; or after the last common `end`, if one is given.

    Returns:
        None where no such place leaves a prompt and every completion.
    """
    shared = texts[0][: shared_length(*texts)]
    if end:
        places = [shared.rfind(end) + len(end)] if end in shared else []
    else:
        places = [
            place
            for place in range(len(shared), 0, -1)
            if all(place < len(text) and text[place].isspace() for text in texts)
            and not shared[place - 1].isspace()
        ]
    for place in places:
        if all(text[place:].strip() for text in texts):
            return shared[:place], [text[place:] for text in texts]
    return None


def cut_common_messages(
    conversations: Sequence[Sequence[dict[str, str]]],
) -> tuple[list[dict[str, str]], list[list[dict[str, str]]]] | None:
    """Split conversations that share their beginning into that prompt and the answers.

    Returns:
        None where they share no beginning that ends with a user message.
    """
    shared = shared_length(*conversations)
    for place in range(min(shared, min(map(len, conversations)) - 1), 0, -1):
        if conversations[0][place - 1]["role"] == "user":
            return list(conversations[0][:place]), [list(messages[place:]) for messages in conversations]
    return None


def is_transcript(text: str) -> bool:
    """Whether a text is a conversation written out, with turns `Human:` and `Assistant:`."""
    return text.lstrip("\n ").startswith("Human:") and "\n\nAssistant:" in text
