"""A model and its tokenizer from nothing: built for the texts at hand, the weights random."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from softpref.config import closest
from softpref.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def build_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer: every text can be written with it, and read back unchanged.

    One special token closes a completion, another pads; a prompt is its text alone.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    return wrapped(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )


def build_model(model_config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A randomly initialised causal language model for `tokenizer`.

    Raises:
        ConfigError: the model type is unknown, or an option does not fit it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {
        **_known_options(model_config),
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    from_config: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
    try:
        return from_config(AutoConfig.for_model(**options))
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConfigError(f"model_config {dict(model_config)} does not describe a model: {error}") from error


def _known_options(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """The options, if the model type has them all: transformers itself keeps an unknown one in silence.

    A whole number where the type's default is a float becomes one: what has been through a pipeline's form
    can no longer tell 1.0 from 1.
    """
    from transformers import AutoConfig

    try:
        defaults = AutoConfig.for_model(model_config["model_type"])
    except ValueError as error:
        raise ConfigError(f"model_config: {error}") from error
    known = {*defaults.to_dict(), *defaults.attribute_map, "rope_theta"}
    for option in model_config:
        if option not in known:
            raise ConfigError(f"model_config has no option {option!r}{closest(option, known)}")
    return {
        option: float(value)
        if type(value) is int and type(getattr(defaults, option, None)) is float
        else value
        for option, value in model_config.items()
    }
