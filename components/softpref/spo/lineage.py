"""The rounds behind a model that learned several dimensions of preference, one after another.

A round trains on the rows of one dimension, from the model of the round before, which is its reference. What
the rounds before have learned of a completion is read off their models, and is an offset in the loss of the
present one (see `softpref.objectives.offsets`). A model's lineage, in its `softpref.json`, says how; the
models themselves stay where they are. Loads no model.

Source: arXiv 2405.12739.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softpref.disk import content_hash
from softpref.errors import ConfigError
from softpref.lm.sources import check_model_source, local_source
from softpref.objectives import implied_rewards, weighted_rewards
from softpref.records.model import METADATA_FILE, DimensionRound, ModelMetadata


class EarlierRound(NamedTuple):
    """A finished round, as the next ones need it.

    Attributes:
        reference: the model that it began with, or its name; its result is what the next round began with.
        method, alpha, anchor, beta: as in `SPOConfig`.
        weights: λ_i of the rounds before it.
    """

    reference: Any
    method: str = "dpo"
    alpha: float = 1.0
    anchor: float = 0.0
    beta: float = 0.1
    weights: Sequence[float] = ()


def earlier_rewards(rounds: Sequence[EarlierRound], logps: Sequence[Tensor]) -> Tensor:
    """What each round has learned of completions, up to a constant of the prompt: R̂ `[rounds, sequences]`.

    R̂_n = β_n (logp_n − logp_{n−1}) − Σ_{i<n} λ_{n,i} R̂_i; of `spo` α_n (logp_n − anchor · logp_{n−1}) with
    the same sum.

    Args:
        logps: `[sequences]` each, in nats: under the model that the first round began with, then under those
            that the rounds ended with.
    """
    rewards = logps[0].new_zeros(0, len(logps[0]))
    for one, (before, after) in zip(rounds, pairwise(logps), strict=True):
        spo = one.method == "spo"
        own = implied_rewards(
            after,
            scale=one.alpha if spo else one.beta,
            base_logps=one.anchor * before if spo else before,
            offsets=weighted_rewards(rewards, one.weights),
        )
        rewards = torch.cat([rewards, own[None]])
    return rewards


def lineage_of(reference: str, metadata: ModelMetadata) -> list[DimensionRound]:
    """The rounds behind the model that a round begins with; none of a model that is no policy.

    Args:
        reference: what messages call the model.
        metadata: of its folder.

    Raises:
        ConfigError: it is a policy of which they are not known.
    """
    if metadata.get("stage") != "train":
        return []
    lineage = metadata.get("lineage")
    if not lineage:
        raise ConfigError(
            f"reference {reference} is a policy, and its {METADATA_FILE} does not say which dimension it was "
            "trained on and from which model: train it with `dimensions`, or begin with the model that it "
            "was trained from"
        )
    if metadata.get("extrapolation"):
        raise ConfigError(
            f"reference {reference} is extrapolated, so what its rounds have learned cannot be read off it; "
            "begin with the policy that it was made from"
        )
    known = {one["dimension"] for one in lineage}
    if len(known) < len(lineage):
        raise ConfigError(f"reference {reference} has a dimension twice in its lineage: {', '.join(known)}")
    return lineage


def describe_round(
    config: Any,
    reference: str,
    folder: str,
    weights: Sequence[float],
    *,
    dataset_hash: str,
    defining: Sequence[str],
) -> DimensionRound:
    """What a model's lineage says of its own round.

    Args:
        config: its `SPOConfig`.
        reference: the source of the model that it begins with, as it is recorded.
        folder: where that lies on this machine.
        defining: the options that say what was trained.
    """
    described: Any = {
        "dimension": config.dimension,
        "dimension_weights": list(weights),
        "reference": os.path.abspath(reference) if os.path.exists(reference) else reference,
        "reference_hash": _weights_hash(folder),
        "dataset_hash": dataset_hash,
        **{name: getattr(config, name) for name in defining},
    }
    found: DimensionRound = described
    return found


def earlier_rounds(
    lineage: Sequence[DimensionRound], places: Sequence[str], *, tracking_uri: str = ""
) -> list[EarlierRound]:
    """The rounds of a lineage, with folders of the models that they began with.

    Args:
        places: where these are, in order; empty: where they were when the rounds were trained.

    Raises:
        ConfigError: one is not there, or is another model.
    """
    if places and len(places) != len(lineage):
        raise ConfigError(
            f"earlier_models names {len(places)} models, and {len(lineage)} rounds were trained before "
            f"({', '.join(one['dimension'] for one in lineage)}): give the model that each began with, in "
            "this order"
        )
    rounds = []
    for number, (one, place) in enumerate(
        zip(lineage, places or [one["reference"] for one in lineage], strict=True), start=1
    ):
        what = f"the model that round {number} ({one['dimension']}) began with"
        try:
            check_model_source(place)
            folder = local_source(place, tracking_uri=tracking_uri)
        except ConfigError as error:
            raise ConfigError(f"{what}: {error}; earlier_models can say where it is now") from error
        if one["reference_hash"] and _weights_hash(folder) not in ("", one["reference_hash"]):
            raise ConfigError(
                f"{what} has other weights than {place} has now; say in earlier_models where it is"
            )
        rounds.append(
            EarlierRound(
                folder,
                one["method"],
                one["alpha"],
                one["anchor"],
                one["beta"],
                one["dimension_weights"],
            )
        )
    return rounds


def of_dimension(rows: Any, dimension: str) -> tuple[Any, list[int]]:
    """The rows of a `datasets.Dataset` that are of a dimension, and their places."""
    names = rows["dimension"] if "dimension" in rows.column_names else []
    places = [place for place, name in enumerate(names) if name == dimension]
    return rows.select(places), places


def offsets_of(
    rounds: Sequence[EarlierRound], weights: Sequence[float], logps: Sequence[Sequence[Sequence[float]]]
) -> list[list[float]]:
    """Σ_i λ_i R̂_i of each row's completions, from each model's log-probabilities of them.

    Args:
        weights: λ_i of the present round.
        logps: of each model, in the order of `earlier_rewards`, of each row, of each completion.
    """
    flat = [torch.tensor([one for row in rows for one in row], dtype=torch.float64) for rows in logps]
    offsets = iter(weighted_rewards(earlier_rewards(rounds, flat), weights).tolist())
    return [[next(offsets) for _ in row] for row in logps[0]]


def _weights_hash(folder: str) -> str:
    """SHA-256 of a model folder's weights; empty where there are none here."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return content_hash(*files) if files else ""
