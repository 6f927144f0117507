"""The arguments of `SPOTrainer`: models and tokenizers by name, adapters, arguments of other trainers.

Everything here is settled, or refused with what to write instead, before anything costly begins.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from softpref.config import closest
from softpref.errors import ConfigError
from softpref.lm.loading import check_finite, load_model, load_tokenizer
from softpref.spo.config import SPOConfig

_INSTEAD = {  # arguments of other trainers
    "tokenizer": "the tokenizer is handed over as processing_class",
    "data_collator": "batches are packed by SPOTrainer itself; leave it out",
    "quantization_config": "it is a key of SPOConfig.model_init_kwargs",
    "compute_loss_func": "SPOConfig.method names the loss",
    "preprocess_logits_for_metrics": "compute_metrics is given log-probabilities, there are no logits",
    "optimizer_cls_and_kwargs": "SPOConfig.optim and optim_args name an optimizer, optimizers takes one",
}


def refuse_arguments(names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse arguments that `SPOTrainer` does not have, and say what is meant.

    Args:
        known: those that it has.

    Raises:
        ConfigError: names the argument and where it belongs.
    """
    options = [field.name for field in dataclasses.fields(SPOConfig)]
    for name in names:
        instead = _INSTEAD.get(name)
        if instead is None and name in options:
            instead = f"it is an option of SPOConfig, args=SPOConfig({name}=…)"
        raise ConfigError(
            f"SPOTrainer takes no {name}{f': {instead}' if instead else closest(name, known, options)}"
        )


def settled_arguments(args: Any, model: Any) -> SPOConfig:
    """`args`, or SPOConfig's defaults under the model's name.

    Raises:
        ConfigError: they are another trainer's, or there are not enough samples for the processes.
    """
    if args is None:
        name = Path(model_name(model) or "model").name
        args = SPOConfig(output_dir=f"{name}-SPO")
    if not isinstance(args, SPOConfig):
        raise ConfigError(
            f"args must be an SPOConfig, got {type(args).__name__}; SPOConfig takes every option of "
            "TrainingArguments, and SPOTrainer(model, args, train_dataset, …) its arguments in this order"
        )
    if args.samples_policy and args.samples_per_refresh < args.sampling_interval * args.world_size:
        raise ConfigError(
            "SPOConfig.samples_per_refresh must be at least sampling_interval times the number of "
            f"processes ({args.sampling_interval} × {args.world_size}): every process takes part in every "
            f"step's slice; got {args.samples_per_refresh}"
        )
    at_once = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.method == "kto" and at_once < 2:
        raise ConfigError(
            "kto sets each row's completions against the prompt of another row of the same step: "
            "SPOConfig.per_device_train_batch_size or gradient_accumulation_steps must be at least 2"
        )
    passes = args.sampling_interval * args.world_size * args.gradient_accumulation_steps
    if args.fsdp and args.samples_policy and args.samples_per_refresh < passes:
        raise ConfigError(
            "with fsdp every process must run as many passes as the others, so each micro-batch needs a "
            "sample: SPOConfig.samples_per_refresh must be at least sampling_interval × processes × "
            f"gradient_accumulation_steps, {passes}; got {args.samples_per_refresh}"
        )
    return args


def model_name(model: Any) -> str:
    """The name or folder that a model was loaded from; empty for one that was made."""
    if isinstance(model, (str, Path)):
        return str(model)
    return getattr(getattr(model, "config", None), "name_or_path", "")


def loaded(model: Any, args: SPOConfig) -> Any:
    """The model itself, or what `softpref.lm.loading.load_model` makes of a name or folder.

    Raises:
        ConfigError: it is neither, or cannot be loaded.
    """
    if isinstance(model, (str, Path)):
        options = {"trust_remote_code": args.trust_remote_code, **args.init_kwargs}
        return load_model(model, **options)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            "SPOTrainer needs a model: one of transformers, its Hub id or folder, or a model_init that makes "
            f"one; got {model!r:.60}"
        )
    check_finite(model, f"model {model_name(model)}".rstrip())
    return model


def tokenizer_of(processing_class: Any, model: Any, args: SPOConfig) -> PreTrainedTokenizerBase:
    """The given tokenizer, or that of the model's name.

    Raises:
        ConfigError: it is not a tokenizer, or the model has no name.
    """
    if processing_class is None:
        name = model_name(model)
        if not name:
            raise ConfigError(
                "SPOTrainer needs processing_class, the tokenizer of the model: the model has no name from "
                "which to load it"
            )
        revision = args.init_kwargs.get("revision")
        return load_tokenizer(name, trust_remote_code=args.trust_remote_code, revision=revision)
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        inner = ", its tokenizer is processor.tokenizer" if hasattr(processing_class, "tokenizer") else ""
        raise ConfigError(
            f"processing_class must be a tokenizer, got {type(processing_class).__name__}{inner}; left out, "
            "it is loaded from the model's name"
        )
    return processing_class


def with_adapter(model: Any, peft_config: Any, args: SPOConfig) -> Any:
    """The model under the adapter that `peft_config`, or else `SPOConfig.use_peft`, asks for, if any.

    Raises:
        ConfigError: it has an adapter already, or the new one does not fit.
    """
    if peft_config is None and not args.use_peft:
        return model
    if hasattr(model, "peft_config"):
        raise ConfigError(
            "the model has an adapter already; leave out peft_config (and use_peft) to train on with it, or "
            "hand over model.merge_and_unload()"
        )
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ConfigError("use_peft needs the package peft: pip install 'softpref[peft]'") from error
    try:
        return get_peft_model(model, peft_config or _lora(args, model))
    except ValueError as error:  # layers that the model does not have, a rank that is none
        raise ConfigError(f"peft_config does not fit the model: {error}") from error


def check_reference(ref_model: Any, model: Any, args: SPOConfig) -> None:
    """Refuse a reference that would change with the policy, or whose vocabulary differs where that matters.

    Raises:
        ConfigError: says which.
    """
    if ref_model is model:
        raise ConfigError(
            "ref_model is the model to train itself, and would move with it; leave ref_model out, then a "
            "frozen copy is made"
        )
    theirs, ours = (getattr(getattr(one, "config", None), "vocab_size", None) for one in (ref_model, model))
    if theirs != ours and (args.kl_strength or args.takes_divergences):
        raise ConfigError(
            f"ref_model has a vocabulary of {theirs} tokens, the model one of {ours}: the KL term compares "
            "them token by token; take a reference of the same family"
        )


def check_optimizer(optimizer: Any, model: nn.Module, args: SPOConfig) -> None:
    """Refuse an optimizer that holds no trained parameter, and any where the trainer has more to train."""
    if optimizer and args.degree_weight:
        raise ConfigError(
            "with a degree_weight the trainer makes the optimizer itself, for the head of the degree loss is "
            "in it; leave optimizers out, and name one by SPOConfig.optim"
        )
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if optimizer and not any(
        id(one) in trained for group in optimizer.param_groups for one in group["params"]
    ):
        raise ConfigError(
            "optimizers holds none of the parameters that are trained; make it of the very model that is "
            "handed over, and of one with its adapter if there is any"
        )


def switch_dropout_off(model: nn.Module) -> None:
    """Switch dropout off, in modules and where layers keep its rate as a number."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def _lora(args: SPOConfig, model: Any) -> Any:
    from peft import LoraConfig

    targets: Any = args.lora_target_modules
    if targets != "all-linear":
        targets = [name.strip() for name in targets.split(",") if name.strip()]
        _check_targets(targets, model)
    return LoraConfig(
        r=args.lora_r, lora_alpha=args.lora_alpha, target_modules=targets, task_type="CAUSAL_LM"
    )


def _check_targets(targets: list[str], model: Any) -> None:
    """Refuse LoRA targets that the model does not have: peft ignores them if any other matches."""
    modules = [f".{name}" for name, _ in model.named_modules() if name]
    unknown = [target for target in targets if not any(name.endswith(f".{target}") for name in modules)]
    if unknown:
        known = {name.rpartition(".")[2] for name in modules}
        known = {name for name in known if not name.isdecimal()}
        near = {close for target in unknown for close in difflib.get_close_matches(target, known)}
        raise ConfigError(
            f"lora_target_modules names {', '.join(unknown)}, which the model does not have; "
            f"{'nearest' if near else 'it has'}: {', '.join(sorted(near or known))}"
        )
