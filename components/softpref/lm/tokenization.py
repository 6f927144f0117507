"""From a prompt and a completion, text or messages, to token ids, and back. Holds no model and no padding.

The split between prompt and completion is made in token space, so that what is scored is exactly what the
policy would have generated: prompt tokens first, then completion tokens, then one end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from softpref.errors import ConfigError, DataError

Text = str | Sequence[dict[str, str]]
"""A prompt or completion: plain text, or messages such as `[{"role": "user", "content": "…"}]`."""


class TokenizedSequence(NamedTuple):
    """One prompt with one completion.

    Attributes:
        prompt: ids before the completion, beginning-of-sequence token included where the tokenizer has one.
        completion: ids after it; ends with the end-of-sequence token unless `truncated`.
        truncated: the completion was cut at the length limit and therefore carries no end token.
    """

    prompt: list[int]
    completion: list[int]
    truncated: bool


def tokenize_prompt(tokenizer: Any, prompt: Text, *, max_length: int | None = None) -> list[int]:
    """Ids of a prompt, ready for generation: a chat gets its generation prompt, plain text its start token.

    Args:
        max_length: keep at most this many ids; the *end* of the prompt is kept, since it stands next to the
            completion.

    Raises:
        ConfigError: a chat prompt for a tokenizer without a chat template.
        DataError: the prompt has no token, or is neither text nor messages.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt, add_special_tokens=True)["input_ids"]
        eos = tokenizer.eos_token_id
        if ids and ids[-1] == eos and (len(ids) > 1 or eos != tokenizer.bos_token_id):
            ids = ids[:-1]  # some tokenizers close every text; a prompt is not closed
    elif _is_messages(prompt):
        ids = _chat_ids(tokenizer, prompt, add_generation_prompt=True)
    else:
        raise DataError(f"a prompt must be text or a list of messages, got {prompt!r}")
    if not ids:
        raise DataError(f"the prompt {prompt!r} has no token; a prompt needs at least one")
    return ids if max_length is None else ids[-max_length:]


def tokenize_row(
    tokenizer: Any,
    prompt: Text,
    completions: Sequence[Text],
    *,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
) -> list[TokenizedSequence]:
    """Tokenize completions of a prompt; exactly one end token closes each unless it is cut.

    Args:
        max_prompt_length: prompts longer than this lose their beginning.
        max_completion_length: completions longer than this (end token included) lose their end, and with it
            the end token: a cut text did not end there.

    Raises:
        DataError: a completion has no token, or the chat template does not keep the prompt's tokens as the
            beginning of the whole conversation's.
        ConfigError: the tokenizer has no end-of-sequence token or lacks a chat template.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ConfigError("the tokenizer has no eos_token; set one, for a completion must be able to end")
    prompt_ids = tokenize_prompt(tokenizer, prompt)
    texts = isinstance(prompt, str) and all(isinstance(completion, str) for completion in completions)
    given: Any = [None] * len(completions)
    if texts and completions:  # one call costs little more than a text does
        given = tokenizer(list(completions), add_special_tokens=False)["input_ids"]
    sequences = []
    for completion, ids in zip(completions, given, strict=True):
        completion_ids = _completion_ids(tokenizer, prompt, prompt_ids, completion, ids)
        truncated = max_completion_length is not None and len(completion_ids) > max_completion_length
        kept = prompt_ids if max_prompt_length is None else prompt_ids[-max_prompt_length:]
        sequences.append(TokenizedSequence(kept, completion_ids[:max_completion_length], truncated))
    return sequences


def tokenize_sequence(
    tokenizer: Any,
    prompt: Text,
    completion: Text,
    *,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
) -> TokenizedSequence:
    """Tokenize one completion of a prompt, as `tokenize_row` does."""
    limits = {"max_prompt_length": max_prompt_length, "max_completion_length": max_completion_length}
    return tokenize_row(tokenizer, prompt, [completion], **limits)[0]


def _completion_ids(
    tokenizer: Any, prompt: Text, prompt_ids: list[int], completion: Text, ids: list[int] | None
) -> list[int]:
    """The ids after the prompt's, closed by one end token; `ids` are the text's, where it is text."""
    eos = tokenizer.eos_token_id
    if isinstance(prompt, str) and isinstance(completion, str):
        completion_ids = tokenizer(completion, add_special_tokens=False)["input_ids"] if ids is None else ids
        while completion_ids and completion_ids[-1] == eos:
            completion_ids = completion_ids[:-1]
        if not completion_ids:
            raise DataError(f"the completion {completion!r} has no token")
        if eos in completion_ids:
            raise DataError(
                f"the completion {completion!r} has the end token {tokenizer.eos_token!r} before its end; "
                "a completion ends there, nothing can follow"
            )
        return [*completion_ids, eos]
    if _is_messages(prompt) and _is_messages(completion):
        whole = _chat_ids(tokenizer, [*prompt, *completion], add_generation_prompt=False)
        if whole[: len(prompt_ids)] != prompt_ids:
            raise DataError(
                "the chat template does not keep the prompt's tokens as the beginning of the conversation's; "
                f"prompt ends with {tokenizer.decode(prompt_ids[-8:])!r}, conversation has "
                f"{tokenizer.decode(whole[max(0, len(prompt_ids) - 8) : len(prompt_ids)])!r} there"
            )
        completion_ids = _close(whole[len(prompt_ids) :], eos)
        if completion_ids == [eos]:
            raise DataError(f"the completion {completion!r} has no token")
        return completion_ids
    raise DataError(
        "prompt and completion must both be text or both be messages, got "
        f"{type(prompt).__name__} and {completion!r}"
    )


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of completion ids without special tokens, exactly as tokenized (no clean-up of spaces)."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stop_token_ids(tokenizer: Any, model: Any) -> list[int]:
    """Ids that end a completion: the tokenizer's end token and those of the model's generation config.

    Chat models often name several (`<|im_end|>` beside `<|endoftext|>`).
    """
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [named] if isinstance(named, int) else list(named or [])
    return sorted({*ids, tokenizer.eos_token_id} - {None})


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(message, Mapping) and isinstance(message.get("content"), str) for message in value)
    )


def _chat_ids(
    tokenizer: Any, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool
) -> list[int]:
    if not tokenizer.chat_template:
        raise ConfigError(
            "the data are messages but the tokenizer has no chat template; "
            "use a chat model's tokenizer or turn the data into plain text"
        )
    return tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
    )


def _close(ids: list[int], eos: int) -> list[int]:
    """End with exactly one end token: drop what a template writes after it, such as a line break."""
    if eos in ids:
        return ids[: len(ids) - ids[::-1].index(eos)]
    return [*ids, eos]
