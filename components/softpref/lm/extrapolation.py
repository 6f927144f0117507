"""Models extrapolated past alignment (ExPO, arXiv 2404.16792): weights and folders. Trains nothing.

θ = θ_aligned + w · (θ_aligned − θ_sft): alignment moved the weights from the SFT model to the aligned one.
w > 0 goes further in that direction; w in (−1, 0) goes back towards the SFT model, −0.5 half way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softpref.errors import ConfigError
from softpref.lm.loading import load_model, save_model_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_FOLDER = "extrapolated-"
_NAMED = 3  # tensors that an error message lists


def parse_weights(text: str) -> list[float]:
    """Extrapolation weights from text like `"0.3, 0.5"`; none from an empty one.

    Raises:
        ConfigError: one is not a number above −1, is 0, or has the same six digits as another.
    """
    weights = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            weights.append(float(part))
        except ValueError as error:
            raise ConfigError(
                f"extrapolation must be weights separated by commas, like '0.3, 0.5', got {text!r}"
            ) from error
    _check_weights(weights)
    return weights


def extrapolated_folders(folder: str | Path) -> list[Path]:
    """The folders `extrapolated-W` in a model folder, or of their evaluations in an evaluation's."""
    return sorted(path for path in Path(folder).glob(f"{_FOLDER}*") if path.is_dir())


def extrapolate(
    aligned: torch.nn.Module | Mapping[str, torch.Tensor],
    reference: torch.nn.Module | Mapping[str, torch.Tensor],
    weight: float,
) -> dict[str, torch.Tensor]:
    """The weights `θ_aligned + weight · (θ_aligned − θ_reference)`. Source: arXiv 2404.16792.

    Computed in float32 (float64 where the model is) on the CPU, and cast back to each aligned tensor's type.
    Tensors that the aligned model ties stay tied; integer and boolean ones are the aligned model's. Neither
    model is changed.

    Args:
        aligned: the aligned model, or its state dict.
        reference: the SFT model that it was trained from, or its state dict; of any floating type.
        weight: w > −1, not 0.

    Returns:
        A state dict, on the CPU.

    Raises:
        ConfigError: the weight is out of range, names, shapes or kinds of tensors differ (the message names
            some), or the result does not fit the aligned model's type.
    """
    import torch

    _check_weights([weight])
    ours, theirs = _state(aligned), _state(reference)
    counterparts = _counterparts(ours, theirs)
    result: dict[str, torch.Tensor] = {}
    made: dict[Any, torch.Tensor] = {}  # by place in memory: tied tensors are made once
    for name, tensor in ours.items():
        place = _place(tensor)
        if place not in made:
            if tensor.is_floating_point():
                wide = torch.promote_types(tensor.dtype, torch.float32)
                end, start = tensor.to("cpu", wide), counterparts[name].to("cpu", wide)
                moved = torch.add(end, end - start, alpha=weight).to(tensor.dtype)
                if not moved.isfinite().all() and end.isfinite().all():
                    raise ConfigError(
                        f"extrapolated by {weight:g}, {name} exceeds what {tensor.dtype} can hold; "
                        "take a smaller weight"
                    )
            else:
                moved = tensor.to("cpu", copy=True)
            made[place] = moved
        result[name] = made[place]
    return result


def write_extrapolations(
    policy: Any,
    reference_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    metadata: Mapping[str, Any],
    weights: Iterable[float],
    *,
    trust_remote_code: bool = False,
) -> None:
    """Write a model folder `output_dir/extrapolated-W` for each weight W.

    They are written before the aligned model's own folder is completed (`save_model_folder`), so that its
    metadata say that everything is there. At most three copies of the weights are in memory: the policy, the
    reference and one extrapolated model.

    Args:
        policy: the aligned model, whole: an adapter is merged first.
        reference_dir: the SFT model that it was trained from.
        output_dir: folder of the aligned model.
        metadata: `softpref.json` of the aligned model; an extrapolated one's differs in `name`
            (`NAME-expo-W`) and `extrapolation` (W).
        weights: see `parse_weights`.
        trust_remote_code: run model code that comes with the reference.

    Raises:
        ConfigError: `extrapolate` refuses.
    """
    reference = load_model(reference_dir, trust_remote_code=trust_remote_code)
    for weight in weights:
        own = {"name": f"{metadata['name']}-expo-{weight:g}", "extrapolation": weight}
        state = extrapolate(policy, reference, weight)
        folder = Path(output_dir) / f"{_FOLDER}{weight:g}"
        save_model_folder(policy, tokenizer, folder, {**metadata, **own}, state_dict=state)


def _check_weights(weights: list[float]) -> None:
    for weight in weights:
        if not (math.isfinite(weight) and weight > -1 and weight != 0):
            raise ConfigError(
                f"an extrapolation weight must be above -1 and not 0, got {weight:g}; 0 is the aligned model "
                "itself, -1 the SFT model, which are there already"
            )
    written = [f"{weight:g}" for weight in weights]
    twice = sorted({text for text in written if written.count(text) > 1})
    if twice:
        raise ConfigError(f"extrapolation weights must differ in six digits; {', '.join(twice)} comes twice")


def _state(model: Any) -> dict[str, torch.Tensor]:
    state = model if isinstance(model, Mapping) else model.state_dict()
    return {name: tensor.detach() for name, tensor in state.items()}


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two tensors exactly when they are one."""
    if not tensor.numel():
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _counterparts(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The reference's tensor for each of the aligned model's; a tied one may be there under one name alone.

    Raises:
        ConfigError: names, shapes, kinds, or what is tied differ.
    """
    import torch

    known = {_place(theirs[name]) for name in ours if name in theirs}
    surplus = [name for name, tensor in theirs.items() if name not in ours and _place(tensor) not in known]
    tied: dict[Any, list[str]] = {}
    for name, tensor in ours.items():
        tied.setdefault(_place(tensor), []).append(name)
    found: dict[str, torch.Tensor] = {}
    missing, apart, differing = [], [], []
    for names in tied.values():
        candidates = [theirs[name] for name in names if name in theirs]
        if not candidates:
            missing.append(names[0])
            continue
        tensor, counterpart = ours[names[0]], candidates[0]
        if tensor.shape != counterpart.shape:
            differing.append(f"{names[0]} ({list(tensor.shape)} against {list(counterpart.shape)})")
        elif tensor.is_floating_point() != counterpart.is_floating_point():
            differing.append(f"{names[0]} ({tensor.dtype} against {counterpart.dtype})")
        elif any(not torch.equal(counterpart, other) for other in candidates[1:]):
            apart.append(" = ".join(names))
        found |= dict.fromkeys(names, counterpart)
    faults = {
        "only the aligned model has": missing,
        "only the reference has": surplus,
        "they differ in": differing,
        "only the aligned model ties": apart,
    }
    said = [
        f"{what} {', '.join(names[:_NAMED])}{f' and {len(names) - _NAMED} more' if names[_NAMED:] else ''}"
        for what, names in faults.items()
        if names
    ]
    if said:
        raise ConfigError(
            f"the aligned model cannot be extrapolated from this reference: {'; '.join(said)}; "
            "give the SFT model that it was trained from"
        )
    return found
