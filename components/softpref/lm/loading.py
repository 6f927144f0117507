"""Loads and saves models and tokenizers, of any source that `softpref.lm.sources` knows. Trains nothing.

Weights are read from safetensors (or GGUF) only, and code from a checkpoint is run only where asked.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softpref.disk import in_brief, what_is_at
from softpref.errors import ConfigError
from softpref.lm.sources import (
    check_model_source,
    check_remote_code,
    local_source,
)
from softpref.records.model import METADATA_FILE, ROUND_FOLDER, save_metadata

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# what the names begin with that an unfinished stage leaves
_IN_PROGRESS = ("checkpoints", "tracking", ROUND_FOLDER)


def load_model(
    source: str | Path,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    device: str | None = None,
    revision: str | None = None,
    **options: Any,
) -> Any:
    """Load a causal language model from a checkpoint folder (an adapter is merged) or a GGUF file.

    Args:
        source: such a folder or file, the URL of one, a model of the MLflow registry, or a Hub id.
        dtype: `float32`, `bfloat16`, or `auto` for the checkpoint's own.
        trust_remote_code: run model code that comes with it.
        device: where to move it.
        options: other arguments of `from_pretrained`, such as `attn_implementation`.

    Raises:
        ConfigError: the model is absent or cannot be read.
    """
    from transformers import AutoModelForCausalLM

    model: Any
    found: Any
    source = _present(source, trust_remote_code, revision)
    path = Path(source)
    try:
        if source.endswith(".gguf"):
            model = _load_gguf(path, dtype, **options)
        elif (path / "adapter_config.json").is_file():
            from peft import AutoPeftModelForCausalLM

            # merged: apart, the adapter would not be trained, and the reference would be the base without it
            adapted = AutoPeftModelForCausalLM.from_pretrained(
                source, dtype=dtype, trust_remote_code=trust_remote_code, **options
            )
            model = adapted.merge_and_unload().requires_grad_(True)
        else:
            model, found = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
                source,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                revision=revision or "main",
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
                **options,
            )
            _check_weights(source, found)
    except ConfigError:
        raise
    except Exception as error:  # of many libraries, which read what may be damaged
        raise ConfigError(f"model {source} cannot be loaded: {in_brief(error)}") from error
    check_finite(model, f"model {source}")
    settle_generation_config(model)
    return model.to(device) if device else model


def load_reward_model(
    source: str | Path,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    device: str | None = None,
    revision: str | None = None,
) -> Any:
    """Load a sequence-classification model: a language model with heads that give numbers, not words.

    Args:
        source, dtype, trust_remote_code, device, revision: as in `load_model`, but no GGUF file, which has no
            heads.

    Raises:
        ConfigError: the model is absent, cannot be read, or has no such heads.
    """
    from transformers import AutoModelForSequenceClassification

    found: Any
    source = _present(source, trust_remote_code, revision)
    if source.endswith(".gguf"):
        raise ConfigError(f"reward model {source}: a GGUF file holds no reward heads; give a checkpoint")
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            revision=revision or "main",
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    except Exception as error:  # of many libraries, which read what may be damaged
        raise ConfigError(f"reward model {source} cannot be loaded: {in_brief(error)}") from error
    classes = model.config.architectures or []
    if found["missing_keys"] and any("CausalLM" in name or "LMHead" in name for name in classes):
        raise ConfigError(
            f"reward model {source} is a language model ({', '.join(classes)}) without reward heads; train a "
            "judge from it with `softpref judge`"
        )
    _check_weights(source, found)
    check_finite(model, f"reward model {source}")
    return model.to(device) if device else model


def with_reward_heads(model: Any, heads: int, pad_id: int, layers: int = 0) -> Any:
    """A sequence-classification model on the body of a causal language model.

    Its heads begin at zero, where every pair is even: they differ by what they learn, and by nothing else.

    Args:
        layers: how many of the body's lowest layers it gets; 0: all.

    Raises:
        ConfigError: transformers has no such model of this architecture, or the body has fewer layers.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(model.config)
    config.num_labels = heads
    config.get_text_config().pad_token_id = pad_id
    if layers:
        _keep_layers(config.get_text_config(), layers)
    from_config: Callable[..., PreTrainedModel] = AutoModelForSequenceClassification.from_config
    try:
        rated: Any = from_config(config, dtype=model.dtype)
    except ValueError as error:
        raise ConfigError(
            f"transformers has no sequence classification for the architecture {config.model_type!r}, which "
            "a reward model needs; take another base_model"
        ) from error
    kept = rated.base_model.state_dict().keys()
    weights_of_body = model.base_model.state_dict()
    rated.base_model.load_state_dict({name: weights_of_body[name] for name in kept})
    body = {id(weights) for weights in rated.base_model.parameters()}
    with torch.no_grad():
        for weights in rated.parameters():
            if id(weights) not in body:
                weights.zero_()
    return rated


def _keep_layers(config: Any, layers: int) -> None:
    """Make a model's configuration that of one of its lowest layers alone."""
    whole = config.num_hidden_layers
    if layers > whole:
        raise ConfigError(f"layers is {layers}, and the model has {whole} layers")
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == whole:  # says something of each
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers


def load_tokenizer(
    source: str | Path,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    needs_end: bool = True,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, with a padding token (the end token serves where none is named).

    Args:
        source, trust_remote_code: as in `load_model`.
        needs_end: whether one without an end-of-sequence token is refused; an encoder's has none.

    Raises:
        ConfigError: it is absent, cannot be read, or has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    source = _present(source, trust_remote_code, revision)
    path = Path(source)
    try:
        if source.endswith(".gguf"):
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                source, trust_remote_code=trust_remote_code, revision=revision or "main"
            )
    except Exception as error:  # of many libraries, which read what may be damaged
        raise ConfigError(f"the tokenizer of {source} cannot be loaded: {in_brief(error)}") from error
    if tokenizer.eos_token_id is None and needs_end:
        raise ConfigError(f"the tokenizer of {source} has no eos_token; add one, a completion must end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _present(source: str | Path, trust_remote_code: bool, revision: str | None) -> str:
    """Where a model's files are on this machine, or a Hub id that the Hub answers for."""
    source = str(source)
    check_model_source(source)
    source = local_source(source)
    check_remote_code(source, trust_remote_code)
    if not Path(source).exists():
        _check_hub_model(source, revision)
    return source


def save_model_folder(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    metadata: dict[str, Any],
    *,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Save a model as a stage's result: what `save_model_files` saves, and the metadata.

    The metadata come last: a folder that has them is complete.
    """
    save_model_files(model, tokenizer, folder, metadata, state_dict=state_dict)
    save_metadata(folder, metadata)


def save_model_files(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    metadata: dict[str, Any],
    *,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Save a model's safetensors, tokenizer, generation config and model card.

    Args:
        metadata: for the model card.
        state_dict: weights to save in place of the model's own.
    """
    folder = Path(folder)
    model.generation_config = sampling_generation_config(model, tokenizer)
    model.save_pretrained(folder, **({} if state_dict is None else {"state_dict": state_dict}))
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = "\n".join(f"| {key} | {value} |" for key, value in metadata.items())
    weight = metadata.get("extrapolation")
    extrapolated = (
        f"Its weights are extrapolated (ExPO, arXiv 2404.16792): aligned + {weight:g} × (aligned − SFT).\n\n"
        if weight
        else ""
    )
    (folder / "README.md").write_text(
        "---\nlibrary_name: transformers\ntags: [softpref]\n---\n\n"
        f"# {metadata.get('name', 'model')}\n\n"
        "Trained with softpref, Soft Preference Optimization (arXiv 2405.00747). It is meant to be sampled "
        f"at temperature 1: its softness is its distribution.\n\n{extrapolated}"
        f"| setting | value |\n| --- | --- |\n{rows}\n",
        encoding="utf-8",
    )


def require_new_folder(folder: str | Path) -> None:
    """Refuse to write over a finished model, or over anything that an unfinished run did not leave.

    Raises:
        ConfigError: the folder holds such a thing, or is no folder.
    """
    folder = Path(folder)
    if (folder / METADATA_FILE).exists():
        raise ConfigError(f"{folder} holds a finished model already; name another folder or remove it first")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} {what_is_at(folder)}; name a new folder for the model")
    present = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if present and not any(name.startswith(_IN_PROGRESS) for name in present):
        some = ", ".join(present[:3])
        raise ConfigError(
            f"{folder} holds something else already ({some}{', …' if present[3:] else ''}); "
            "name a new folder for the model, nothing is overwritten"
        )


def sampling_generation_config(model: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A generation config that serves the model's own distribution: sampling at temperature 1, no cut.

    Softness is a property of the distribution: greedy decoding would throw it away.
    """
    from transformers import GenerationConfig

    from softpref.lm.tokenization import stop_token_ids

    stops = stop_token_ids(tokenizer, model)
    return GenerationConfig.from_dict(
        {
            "do_sample": True,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": stops[0] if len(stops) == 1 else stops,
            "pad_token_id": tokenizer.pad_token_id,
        }
    )


def _check_weights(source: str, found: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that lacks weights of the model: transformers would initialise them at random.

    Args:
        found: the loading info of transformers; tied weights that are saved once are not missing there.
    """
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    other_shapes = sorted(
        f"{name} ({list(saved)} in the file, {list(wanted)} in the model)"
        for name, saved, wanted in found["mismatched_keys"]
    )
    faults = [f"it lacks {_some(missing)}"] if missing else []
    faults += [f"shapes differ: {_some(other_shapes)}"] if other_shapes else []
    if faults:
        faults += [f"it holds {_some(unexpected)}, which the model does not have"] if unexpected else []
        raise ConfigError(
            f"model {source}: its weights are not those of its config.json: {'; '.join(faults)}; what "
            "is missing would be random numbers: correct config.json, or complete the weights"
        )
    if unexpected:
        logger.warning("base model %s holds weights that are not used: %s", source, _some(unexpected))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


def check_finite(model: Any, name: str) -> None:
    """Refuse weights that are no numbers: a training would fail at its first step, and blame its settings.

    Args:
        name: of the model, for the message.
    """
    import torch

    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of others there is no `aminmax`
    faults = []
    for key, parameter in model.named_parameters():
        weights = parameter.detach()
        if weights.dtype not in kinds or weights.is_meta or not weights.numel():
            continue
        if not all(bool(end.isfinite()) for end in torch.aminmax(weights)):
            faults.append(f"{key} ({int((~weights.isfinite()).sum()):,} of {weights.numel():,})")
    if faults:
        raise ConfigError(
            f"{name} holds weights that are not finite (NaN or infinite): {_some(faults)}; the checkpoint "
            "itself is damaged, or came out of a training that diverged: take another one"
        )


def settle_generation_config(model: Any) -> None:
    """Replace a generation config that cannot be saved: training would end at its first checkpoint.

    Only its special tokens are kept; nothing else of it is used here.
    """
    from transformers import GenerationConfig

    config = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError as error:
        kept = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig.from_dict(kept)
        logger.warning(
            "the model's generation config cannot be saved (%s); its token ids are kept, the rest is not",
            " ".join(str(error).split())[:300],
        )


def _check_hub_model(source: str, revision: str | None) -> None:
    """Refuse within seconds a Hub model that is neither in the local cache nor known to the Hub.

    transformers asks for every file several times, and takes a minute to say that it is not there.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    for name in ("config.json", "adapter_config.json"):
        if isinstance(try_to_load_from_cache(source, name, revision=revision or "main"), str):
            return
    try:
        HfApi().model_info(source, revision=revision, timeout=10)
    except Exception as error:  # the Hub client raises a dozen unrelated types
        reason = str(error).strip().splitlines()[:1]
        raise ConfigError(
            f"model {source} is no folder here, and the Hub does not provide it "
            f"({type(error).__name__}: {''.join(reason)}); check the name and the network, or download "
            "it and give its folder"
        ) from error


def _load_gguf(path: Path, dtype: str, **options: Any) -> Any:
    """Dequantize a GGUF file into an ordinary model: one loaded directly refuses to be saved."""
    import torch
    from transformers import AutoModelForCausalLM

    target = torch.float32 if dtype in ("auto", "float32") else getattr(torch, dtype)
    quantized: Any
    found: Any
    quantized, found = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
        path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
    )
    _check_weights(str(path), found)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    from_config: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
    model = from_config(config, dtype=target, **options)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = quantized.generation_config
    return model
