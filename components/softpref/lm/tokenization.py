"""From prompt and completion, text or messages, to token ids, and back. Holds no model and no padding.

Both are tokenized as one text, as the model has seen such texts, and split by tokens: prompt tokens first,
then completion tokens, then the one token at which the model's generation stops. What is scored is exactly
what the policy could have generated.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from softpref.config import shown
from softpref.errors import ConfigError, DataError
from softpref.records.dataset import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_MOST_IDS = 2**31
_CUTS = 3  # how often a message is cut: alone, the rest may have other tokens than within the whole
_TAIL = 40  # characters by which the end of the ids is found in the prompt
_MEANING = {
    "cut_prompt": "a prompt longer than max_prompt_length, which lost its beginning",
    "cut_completion": "a completion longer than max_completion_length",
    "identical": "completions that are identical as tokens",
    "moved_border": "a token across the border of prompt and completion; the prompt ends before it",
}
"""What is counted of rows, by the names of `row_findings`."""


class TokenizedSequence(NamedTuple):
    """One prompt with one completion.

    Attributes:
        prompt: ids before the completion, beginning-of-sequence token included where the tokenizer has one.
        completion: ids after it; ends with a token that stops generation unless `truncated`.
        truncated: the completion was cut at the length limit and therefore carries no end token.
        prompt_truncated: the prompt lost its beginning.
        border_moved: a token stood across the border, so the prompt ends before the prompt's text does.
        reference_logp: nats, of the completion under a reference that is known to have scored it.
    """

    prompt: list[int]
    completion: list[int]
    truncated: bool
    prompt_truncated: bool = False
    border_moved: bool = False
    reference_logp: float | None = None


class TokenizedPrompt(NamedTuple):
    """Ids of a prompt, and whether it lost its beginning."""

    ids: list[int]
    truncated: bool


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    completions: Sequence[Text] = (),
    *,
    max_length: int | None = None,
) -> TokenizedPrompt:
    """Ids of a prompt, ready for generation: a chat gets its generation prompt, plain text its start token.

    With completions it ends where `tokenize_row` splits it from them. Alone it loses only white space at its
    end that would form one token with the first letter of an answer (`"Answer: "` where `" yes"` is a token):
    models have never seen that space as a token of its own, and write it themselves. Nothing more is removed:
    a model cannot guess a missing part of a word.

    Args:
        completions: what is known to follow it.
        max_length: keep at most this many ids: of a chat the system message and its last turns, of plain text
            the start token and the end, which is next to the completion.

    Raises:
        ConfigError: a chat prompt for a tokenizer without a chat template.
        DataError: the prompt has no token, is neither text nor messages, or the template refuses it.
    """

    def alone(kept: Text) -> tuple[list[int], None]:
        return _prompt_ids(tokenizer, kept, completions), None

    ids, _, shortened = _fitting(tokenizer, alone, prompt, max_length)
    return TokenizedPrompt(_last(tokenizer, ids, max_length), shortened)


def tokenize_row(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    completions: Sequence[Text],
    *,
    stop_ids: Sequence[int] | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
) -> list[TokenizedSequence]:
    """Tokenize completions of a prompt; exactly one token that stops generation closes each unless it is cut.

    All of them share one prompt: it ends before the first token that any of them does not share with the
    prompt's own text. What it loses by that begins every completion.

    Args:
        stop_ids: by default those of `stop_token_ids`.
        max_prompt_length: longer prompts lose their beginning, see `tokenize_prompt`.
        max_completion_length: completions longer than this (end token included) lose their end, and the end
            token with it: a cut text did not end there.

    Raises:
        DataError: a completion has no token or goes on after an end token, a message holds a control token,
            the chat template refuses the conversation or rewrites the prompt once it is answered.
        ConfigError: the tokenizer has no end-of-sequence token or lacks a chat template.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no eos_token; set one: a completion must be able to end")
    stops = stop_token_ids(tokenizer) if stop_ids is None else stop_ids
    for text in (prompt, *completions):
        _check_contents(tokenizer, text, stops)

    def parted(kept: Text) -> tuple[list[int], _Parted]:
        found = _parted(tokenizer, kept, completions)
        return found.prompt[: found.border], found

    prompt_ids, found, shortened = _fitting(tokenizer, parted, prompt, max_prompt_length)
    prompt_ids = _last(tokenizer, prompt_ids, max_prompt_length)
    sequences = []
    for completion, whole, own in zip(completions, found.wholes, found.borders, strict=True):
        ids = _closed(tokenizer, completion, whole, own, found.border, stops)
        truncated = max_completion_length is not None and len(ids) > max_completion_length
        moved = found.border < len(found.prompt)
        sequences.append(
            TokenizedSequence(prompt_ids, ids[:max_completion_length], truncated, shortened, moved)
        )
    return sequences


def tokenize_sequence(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text, **options: Any
) -> TokenizedSequence:
    """Tokenize one completion of a prompt, as `tokenize_row` does, with its options."""
    return tokenize_row(tokenizer, prompt, [completion], **options)[0]


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a conversation can be written as this tokenizer's model has seen conversations."""
    return bool(_template(tokenizer))


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], max_length: int | None = None
) -> list[int]:
    """Ids of a whole conversation as the chat template writes it, for a model that reads to its end.

    Args:
        max_length: keep at most this many ids: the start token and the end.

    Raises:
        DataError: the template refuses the conversation.
    """
    [ids] = _ids(tokenizer, [_rendered(tokenizer, messages)], special=False)
    return _last(tokenizer, ids, max_length)


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int | None = None) -> list[int]:
    """Ids of a whole plain text, begun as the tokenizer begins one and closed by the end token.

    Args:
        max_length: as in `conversation_ids`.
    """
    [ids] = _ids(tokenizer, [text], special=True)
    return _last(tokenizer, [*ids, tokenizer.eos_token_id], max_length)


def row_findings(sequences: Sequence[TokenizedSequence]) -> list[str]:
    """What is counted of a row: names of `cut_prompt`, `cut_completion`, `identical` and `moved_border`."""
    different = {tuple(sequence.completion) for sequence in sequences}
    found = {
        "cut_prompt": any(sequence.prompt_truncated for sequence in sequences),
        "cut_completion": any(sequence.truncated for sequence in sequences),
        "identical": len(different) < len(sequences),
        "moved_border": any(sequence.border_moved for sequence in sequences),
    }
    return [name for name, holds in found.items() if holds]


def log_findings(counts: Counter[str], rows: str, left_out: Iterable[str] = ()) -> None:
    """Log how many of `counts["given"]` rows have what, and which of them are left out."""
    for text in findings_text(counts, rows, left_out):
        logger.warning("%s", text)


def findings_text(counts: Mapping[str, int], rows: str, left_out: Iterable[str] = ()) -> list[str]:
    """A sentence for each thing that was counted of rows."""
    return [
        f"{counts[name]} of {counts['given']} {rows} have {meaning}"
        f"{', and were left out' if name in left_out else ''}."
        for name, meaning in _MEANING.items()
        if counts.get(name)
    ]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of completion ids without special tokens, exactly as tokenized (no clean-up of spaces)."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def decode_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, prompt_ids: Sequence[int], ids: Sequence[int]
) -> str:
    """The text after a prompt's text, of ids that follow the prompt's ids.

    For plain text that differs from the ids' own text where a tokenizer strips a space from a text's
    beginning, or where the prompt's ids end before its text does.
    """
    text = decode(tokenizer, ids)
    if not isinstance(prompt, str):
        return text
    before, whole = (decode(tokenizer, list(part)) for part in (prompt_ids, [*prompt_ids, *ids]))
    if not whole.startswith(before):
        return text
    end = before[-_TAIL:]  # the prompt may have been cut at its beginning
    place = prompt.rfind(end)
    rest = prompt[place + len(end) :] if place >= 0 else ""  # the part of the prompt that its ids lack
    return whole[len(before) :].removeprefix(rest)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model: Any = None) -> list[int]:
    """Ids that end a completion, both when it is drawn and when it is scored.

    They are the tokenizer's end token, those of the model's generation config (chat models often name
    several, `<|im_end|>` beside `<|endoftext|>`), and the token that the chat template writes right after an
    assistant's words: some models end their turns with one that neither names (Gemma's `<end_of_turn>`).

    Raises:
        ConfigError: the generation config names what is no id.
    """
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if wrong := [one for one in ids if not (isinstance(one, int) and 0 <= one < _MOST_IDS)]:
        raise ConfigError(
            f"the model's generation_config.json has {shown(wrong[0])} as eos_token_id, which is no id of a "
            "token; correct it there"
        )
    turn = _end_of_turn(tokenizer, _template(tokenizer))
    return sorted({*ids, tokenizer.eos_token_id, turn} - {None})


class _Parted(NamedTuple):
    """A row in tokens, before any length limit.

    Attributes:
        prompt: its own ids, of which the first `border` stand before every completion too.
        wholes: ids of the prompt with each completion.
        borders: the place of the first id at which each differs from the prompt's.
    """

    prompt: list[int]
    wholes: list[list[int]]
    borders: list[int]

    @property
    def border(self) -> int:
        return min([len(self.prompt), *self.borders])


def _parted(tokenizer: PreTrainedTokenizerBase, prompt: Text, completions: Sequence[Text]) -> _Parted:
    texts, special = _joined(tokenizer, prompt, completions)
    ids, *wholes = _ids(tokenizer, texts, special=special)
    if not ids:
        raise DataError(f"the prompt {prompt!r} has no token; a prompt needs at least one")
    parted = _Parted(ids, wholes, [shared_length(ids, whole) for whole in wholes])
    if parted.border == 0:
        raise DataError(
            f"no token of the prompt {prompt!r} stays as it is once a completion follows; end it with a "
            "space, a line break or a mark"
        )
    return parted


def _closed(
    tokenizer: PreTrainedTokenizerBase,
    completion: Text,
    whole: list[int],
    own: int,
    border: int,
    stops: Sequence[int],
) -> list[int]:
    """The ids behind the border up to the first that stops generation, which is added where there is none.

    Args:
        own: the first place at which this completion differs from the prompt.
    """
    end = next((place for place in range(own, len(whole)) if whole[place] in stops), len(whole))
    if end == own:
        raise DataError(f"the completion {completion!r} has no token")
    rest = [token for token in whole[end:] if token not in stops]
    if rest and (isinstance(completion, str) or decode(tokenizer, rest).strip()):
        token = tokenizer.convert_ids_to_tokens(whole[end])
        raise DataError(
            f"the completion {completion!r} has the end token {token!r} before its end; a completion "
            "ends there, nothing can follow"
        )
    return [*whole[border:end], whole[end] if end < len(whole) else tokenizer.eos_token_id]


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Text, completions: Sequence[Text]) -> list[int]:
    _check_contents(tokenizer, prompt, stop_token_ids(tokenizer))
    if completions:
        parted = _parted(tokenizer, prompt, completions)
        return parted.prompt[: parted.border]
    [text], special = _joined(tokenizer, prompt, ())
    ids, answered = _ids(tokenizer, [text, text + "a"], special=special)
    if not ids:
        raise DataError(f"the prompt {prompt!r} has no token; a prompt needs at least one")
    border = shared_length(ids, answered)
    dropped = decode(tokenizer, ids[border:])
    return ids if dropped.strip() or border == 0 else ids[:border]


def _fitting(
    tokenizer: PreTrainedTokenizerBase,
    ids_of: Callable[[Text], tuple[list[int], Any]],
    prompt: Text,
    limit: int | None,
) -> tuple[list[int], Any, bool]:
    """What `ids_of` makes of a prompt, or of as many of a chat's last turns as fit; whether it is longer.

    If the last turn alone is too long, its message loses its beginning; the template's text stays.
    """
    found = ids_of(prompt)
    if limit is None or len(found[0]) <= limit:
        return *found, False
    for kept in _shortened(prompt):
        try:
            found = ids_of(kept)
        except DataError:  # the template does not take the conversation without its first turns
            break
        prompt = kept
        if len(found[0]) <= limit:
            break
    for _ in range(_CUTS):
        excess = len(found[0]) - limit
        shorter = _cut_last_message(tokenizer, prompt, excess) if excess > 0 else None
        if shorter is None:
            break
        prompt, found = shorter, ids_of(shorter)
    return *found, True


def _cut_last_message(tokenizer: PreTrainedTokenizerBase, prompt: Text, excess: int) -> Text | None:
    """A chat whose last message lacks its first `excess` tokens; None if it has no more than that."""
    if isinstance(prompt, str) or not prompt:
        return None
    *before, last = prompt
    ids = tokenizer(last["content"], add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) <= excess:
        return None
    return [*before, {**last, "content": decode(tokenizer, ids[excess:])}]


def _joined(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, completions: Sequence[Text]
) -> tuple[list[str], bool]:
    """The prompt's text, those with each completion, and whether the tokenizer adds tokens of its own.

    A chat template writes all of a conversation's tokens itself.
    """
    if isinstance(prompt, str):
        if not all(isinstance(completion, str) for completion in completions):
            raise _mixed(prompt, completions)
        return [prompt, *(f"{prompt}{completion}" for completion in completions)], True
    if not _is_messages(prompt):
        raise DataError(f"a prompt must be text or a list of messages, got {prompt!r}")
    if not all(_is_messages(completion) for completion in completions):
        raise _mixed(prompt, completions)
    text = _rendered(tokenizer, prompt, add_generation_prompt=True)
    wholes = [_rendered(tokenizer, [*prompt, *completion]) for completion in completions]
    for whole in wholes:
        if not whole.startswith(text):
            there = shared_length(text, whole)
            raise DataError(
                "the chat template does not keep the prompt's text as the beginning of the conversation's: "
                f"the prompt goes on with {text[there : there + 40]!r}, the conversation with "
                f"{whole[there : there + 40]!r}; take a template that writes the same in both"
            )
    return [text, *wholes], False


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    """Ids of texts in one call: begun once, and not closed by tokenizers that close every text."""
    probe, *found = tokenizer(["a", *texts], add_special_tokens=special, verbose=False)["input_ids"]
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if special and len(probe) > 1 and probe[-1] == eos:
        found = [ids[:-1] if ids[-1:] == [eos] else ids for ids in found]
    # a text that begins with the start token gets no second one
    return [ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids for ids in found]


def _last(tokenizer: PreTrainedTokenizerBase, ids: list[int], length: int | None) -> list[int]:
    """At most `length` ids: the end, behind the start token where there is one."""
    if length is None or len(ids) <= length:
        return ids
    if length > 1 and ids[0] == tokenizer.bos_token_id:
        return [ids[0], *ids[-(length - 1) :]]
    return ids[-length:]


def _shortened(prompt: Text) -> Iterator[Text]:
    """A chat without its first turn, without its first two …; its system messages stay."""
    if isinstance(prompt, str) or not _is_messages(prompt):
        return
    roles = [message.get("role") for message in prompt]
    head = next((place for place, role in enumerate(roles) if role not in ("system", "developer")), 0)
    turns = [place for place in range(head, len(roles)) if roles[place] == "user"]
    for place in turns[1:]:
        yield [*prompt[:head], *prompt[place:]]


def shared_length(first: Sequence[object], *others: Sequence[object]) -> int:
    """How many items all sequences begin with."""
    for other in others:
        pairs = enumerate(zip(first, other, strict=False))
        first = first[: next((place for place, (a, b) in pairs if a != b), len(other))]
    return len(first)


def _mixed(prompt: Text, completions: Sequence[Any]) -> DataError:
    other = next(
        c for c in completions if not (isinstance(c, str) if isinstance(prompt, str) else _is_messages(c))
    )
    return DataError(
        "prompt and completion must both be text or both be messages, got "
        f"{type(prompt).__name__} and {other!r}"
    )


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(message, Mapping) and isinstance(message.get("content"), str) for message in value)
    )


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = False,
) -> str:
    from jinja2 import TemplateError

    if not _template(tokenizer):
        raise ConfigError(
            "the data are messages but the tokenizer has no chat template; "
            "use a chat model's tokenizer or turn the data into plain text"
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(one) for one in messages], add_generation_prompt=add_generation_prompt, tokenize=False
            )
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise DataError(
            f"the chat template refuses messages of the roles {roles}: {error}; give what it takes (a system "
            "message can begin the first user message, neighbours of one role can be joined), or a tokenizer "
            "with another chat template"
        ) from error


def _check_contents(tokenizer: PreTrainedTokenizerBase, text: Any, stops: Sequence[int]) -> None:
    """Refuse a control token in a message's own text: it would end the turn, or begin another."""
    controls, pattern = _controls(tokenizer, tuple(stops), len(tokenizer))
    for message in text if _is_messages(text) else ():
        content = message["content"]
        if pattern is None or not pattern.search(content):
            continue
        for token in tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]:
            if token in controls:
                raise DataError(
                    f"a message of the role {message.get('role')} holds the control token "
                    f"{tokenizer.convert_ids_to_tokens(token)!r} in its content {content[:80]!r}; take it "
                    "out, or write it in another way: templates write such tokens themselves"
                )


@lru_cache(maxsize=4)
def _controls(
    tokenizer: PreTrainedTokenizerBase, stops: tuple[int, ...], size: int
) -> tuple[frozenset[int], re.Pattern[str] | None]:
    """Ids of control tokens, and a pattern of their texts. `size` is the tokenizer's, which may grow."""
    added = tokenizer.added_tokens_decoder
    ids = {*tokenizer.all_special_ids, *stops, *(i for i, token in added.items() if token.special)}
    ids.discard(tokenizer.unk_token_id)  # what words without a token of their own become
    texts = [str(text) for text in tokenizer.convert_ids_to_tokens(sorted(ids)) if text]
    return frozenset(ids), re.compile("|".join(map(re.escape, texts))) if texts else None


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The default chat template; None if there is none, or several without a default."""
    found: str | dict[str, str] | None = tokenizer.chat_template
    return found.get("default") if isinstance(found, dict) else found


@lru_cache(maxsize=4)
def _end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str | None) -> int | None:
    """The added token that the chat template writes right behind an assistant's words, if it does."""
    if not template:
        return None
    words = "softpref"
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": words}]
    try:
        text = _rendered(tokenizer, turn)
    except DataError:
        return None
    _, found, behind = text.rpartition(words)
    added = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    ids: list[int] = tokenizer(behind, add_special_tokens=False)["input_ids"] if found else []
    place = next((place for place, token in enumerate(ids) if token in added), None)
    if place is None or decode(tokenizer, ids[:place]).strip():
        return None
    return ids[place]
