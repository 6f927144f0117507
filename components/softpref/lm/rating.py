"""Scores of whole texts under models with reward heads: a prompt with its completion as tokens, and batches.

A sequence-classification model reads both and gives a number for each of its heads. Holds no judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from softpref.lm.packing import evaluation_mode
from softpref.lm.tokenization import conversation_ids, has_chat_template, plain_ids
from softpref.records.dataset import Message, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENS_AT_ONCE = 2**13  # padding included

Encoded = Mapping[str, list[int]]
"""What a model reads of one text: `input_ids`, and whatever else its tokenizer gives with them."""


def rated_text(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text, max_length: int | None
) -> Encoded:
    """A prompt with its completion as reward models are fed.

    With a chat template both go through it, a plain prompt as the user's message and a plain completion as
    the assistant's. Without one, a tokenizer that marks two texts ([CLS] … [SEP] … [SEP]) gets them as a
    pair, and any other gets one text, with the end token behind it. A single message is then its content
    alone; of more, each is a line with its role.

    Args:
        max_length: of longer texts the beginning is left out, but not the start token.

    Raises:
        DataError: the chat template refuses the conversation.
    """
    if has_chat_template(tokenizer):
        messages = [*_messages(prompt, "user"), *_messages(completion, "assistant")]
        return {"input_ids": conversation_ids(tokenizer, messages, max_length)}
    asked, answered = _text(prompt), _text(completion)
    if tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None:
        cut = {} if max_length is None else {"truncation": "longest_first", "max_length": max_length}
        found = tokenizer(asked, answered, return_attention_mask=False, verbose=False, **cut)
        return dict(found)
    if not isinstance(prompt, str):
        asked += "\n" if len(prompt) == 1 else "\nassistant: "
    return {"input_ids": plain_ids(tokenizer, asked + answered, max_length)}


def padded(encoded: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """One batch, padded on the right, with its `attention_mask`: each `[texts, longest]`."""
    parts = {name: [torch.tensor(one[name]) for one in encoded] for name in encoded[0]}
    parts["attention_mask"] = [torch.ones_like(ids) for ids in parts["input_ids"]]
    return {
        name: pad_sequence(rows, batch_first=True, padding_value=pad_id if name == "input_ids" else 0)
        for name, rows in parts.items()
    }


def head_scores(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Scores of a batch, `[texts, heads]` fp32, with gradient."""
    heads: Tensor = model(**batch).logits
    return heads.float()


class Rated(NamedTuple):
    """What a model with reward heads says of texts."""

    logits: Tensor  # [texts, heads]


class RewardHeads(nn.Module):
    """The heads of a sequence-classification model, on what its body makes of texts.

    Trained, they are the model's own. For a body that is not trained: see `read`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.score = model.score
        self.config = model.config

    def forward(self, features: Tensor) -> Rated:
        """Scores of texts whose `features` are `[texts, width]`."""
        return Rated(self.score(features))

    def gradient_checkpointing_enable(self, **_: object) -> None:
        """Nothing: trainers call it where it is asked for, and no layers are here to compute again."""


def read(
    model: Any, encoded: Sequence[Encoded], *, progress: Callable[[int], object] | None = None
) -> Tensor:
    """What the heads of a model are given of each text, `[texts, width]` fp32 on the CPU; see `rate`."""
    heads, model.score = model.score, nn.Identity()
    try:
        return rate(model, encoded, progress=progress)
    finally:
        model.score = heads


@torch.no_grad()
def rate(
    model: Any, encoded: Sequence[Encoded], *, progress: Callable[[int], object] | None = None
) -> Tensor:
    """Scores of any number of texts, `[texts, heads]` fp32 on the CPU, in the order given.

    Texts of like length are computed together. A model without a padding token takes them one by one.

    Args:
        progress: called with the number of texts that a batch has added.
    """
    pad_id = model.config.get_text_config().pad_token_id
    device = next(model.parameters()).device
    scores = torch.empty(0, model.config.num_labels)
    with evaluation_mode(model):
        for places in _batches([len(one["input_ids"]) for one in encoded], alone=pad_id is None):
            batch = padded([encoded[place] for place in places], pad_id or 0)
            found = head_scores(model, {name: part.to(device) for name, part in batch.items()})
            if not len(scores):
                scores = torch.empty(len(encoded), found.shape[1])
            scores[places] = found.cpu()
            if progress:
                progress(len(places))
    return scores


def _batches(lengths: Sequence[int], *, alone: bool) -> Iterator[list[int]]:
    """Places of texts, the longest first, so that what does not fit into memory fails at once."""
    places: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if places and (alone or lengths[places[0]] * (len(places) + 1) > _TOKENS_AT_ONCE):
            yield places
            places = []
        places.append(place)
    if places:
        yield places


def _messages(text: Text, role: str) -> Sequence[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _text(text: Text) -> str:
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return text[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in text)
