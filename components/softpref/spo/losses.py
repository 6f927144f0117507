"""Which loss a method takes of a batch's log-probabilities: the one place that knows all methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from softpref.fitness import SATURATED
from softpref.objectives import (
    apo_down_loss,
    apo_zero_loss,
    cpo_loss,
    dpo_loss,
    group_of,
    ipo_loss,
    kto_loss,
    log_odds,
    nll_loss,
    ordered_pairs,
    orpo_loss,
    preference_loss,
    rdpo_loss,
    ropo_loss,
    simpo_loss,
    slic_loss,
    sppo_loss,
    tdpo1_loss,
    tdpo_loss,
)
from softpref.spo.config import SPOConfig

# Of each method of pairs its loss, what that takes of both completions besides their log-probabilities, and
# its own options. The likelihood of cpo and orpo is added as to the others.
_OF_PAIRS: dict[str, tuple[Callable[..., Tensor], tuple[str, ...], tuple[str, ...]]] = {
    "dpo": (dpo_loss, ("ref_logps",), ("label_smoothing",)),
    "rdpo": (rdpo_loss, ("ref_logps",), ("label_smoothing",)),
    "ipo": (ipo_loss, ("ref_logps",), ()),
    "slic": (slic_loss, ("ref_logps",), ()),
    "ropo": (ropo_loss, ("ref_logps",), ("ropo_alpha",)),
    "apo_zero": (apo_zero_loss, ("ref_logps",), ()),
    "apo_down": (apo_down_loss, ("ref_logps",), ()),
    "tdpo": (tdpo_loss, ("ref_logps", "divergences"), ("tdpo_alpha",)),
    "tdpo1": (tdpo1_loss, ("ref_logps", "divergences"), ()),
    "simpo": (simpo_loss, ("lengths",), ("simpo_gamma",)),
    "cpo": (partial(cpo_loss, nll_weight=0.0), ("lengths",), ()),
    "orpo": (partial(orpo_loss, nll_weight=0.0), ("lengths",), ()),
}


def method_losses(
    args: SPOConfig,
    logps: Tensor,
    rows: Mapping[str, Any],
    *,
    ref_logps: Tensor | None = None,
    divergences: Tensor | None = None,
    weight_scores: Tensor | None = None,
    weighted: bool = True,
) -> Tensor:
    """The loss of each row of a batch under `args.method`.

    Args:
        logps: `[sequences]`, log-probabilities under the policy, nats.
        rows: the batch's `group_sizes` and `probabilities` `[groups]`, `kinds` (one for each group),
            `lengths` `[sequences]` in tokens, and `win_probabilities` `[sequences]` for `sppo`; `offsets`
            `[sequences]` where margins have one; `log_mean_weight` where the batch is a part of an
            optimizer step with weights; `kl`, an estimate of KL(π ‖ π_ref), for `kto`.
        ref_logps: `[sequences]`, under the reference, where `args.scores_reference`.
        divergences: `[sequences]`, Σ_t KL(π_ref ‖ π) along each completion, where `args.takes_divergences`.
        weight_scores: `[sequences]`, scores of `spo`'s weight; by default the log-probabilities.
        weighted: whether rows have `spo`'s weight.

    Returns:
        `[groups]`. Methods of pairs take the mean over the pairs that a row's order decides, `kto` that over
        its completions.
    """
    sizes, probabilities, kinds = rows["group_sizes"], rows["probabilities"], rows["kinds"]
    if args.method == "spo":
        return preference_loss(
            logps,
            sizes,
            alpha=args.alpha,
            kind=kinds,
            probabilities=probabilities,
            soft_labels=args.soft_labels,
            weight_exponent=args.weight_exponent if weighted else 0.0,
            weight_scores=weight_scores,
            log_mean_weight=rows.get("log_mean_weight"),
            base_logps=None if ref_logps is None else args.anchor * ref_logps,
            offsets=rows.get("offsets"),
        )
    if args.method == "sppo":
        assert ref_logps is not None
        return sppo_loss(logps, ref_logps, rows["win_probabilities"], sizes, beta=args.beta)
    if args.method == "kto":
        assert ref_logps is not None
        losses = kto_loss(
            logps,
            ref_logps,
            _desirable(sizes, kinds, probabilities),
            rows["kl"],
            beta=args.beta,
            desirable_weight=args.desirable_weight,
            undesirable_weight=args.undesirable_weight,
            offsets=rows.get("offsets"),
        )
        return _group_means(losses, group_of(sizes), len(sizes))
    places, groups = ordered_pairs(sizes, kinds)
    of_places = {"lengths": rows["lengths"], "ref_logps": ref_logps, "divergences": divergences}
    loss, inputs, options = _OF_PAIRS[args.method]
    losses = loss(
        logps[places],
        *(of_places[name][places] for name in inputs),
        beta=args.beta,
        probabilities=probabilities[groups],
        soft_labels=args.soft_labels,
        offsets=rows["offsets"][places] if "offsets" in rows else None,
        **{name: getattr(args, name) for name in options},
    )
    if args.likelihood_weight:
        likelihood = nll_loss(logps[places], rows["lengths"][places], probabilities[groups])
        losses = losses + args.likelihood_weight * likelihood
    return _group_means(losses, groups, len(sizes))


def _desirable(sizes: Tensor, kinds: Sequence[str], probabilities: Tensor) -> Tensor:
    """How desirable each completion is, `[sequences]`: the share of its decided pairs that it wins.

    That of a row with one completion is the row's probability.
    """
    alone = torch.repeat_interleave(sizes, sizes) == 1
    won = probabilities.repeat_interleave(sizes) * alone
    decided = alone.to(won.dtype)
    places, groups = ordered_pairs(sizes, kinds)  # type: ignore[arg-type]
    first, second = places.view(-1, 2).unbind(-1)
    for place, share in ((first, probabilities[groups]), (second, 1 - probabilities[groups])):
        won = won.index_add(0, place, share)
        decided = decided.index_add(0, place, torch.ones_like(share))
    return won / decided


def implicit_rewards(
    args: SPOConfig, logps: Tensor, rows: Mapping[str, Any], ref_logps: Tensor | None
) -> Tensor:
    """The reward that the policy implies for each completion, up to a constant of the prompt: `[sequences]`.

    It is α·(logp − anchor·logp_ref) for `spo`, β·logp for `cpo`, β·logp per token for `simpo`, the log-odds
    for `orpo`, and β·(logp − logp_ref) for the others; less the offset of the row, if it has one.

    Args:
        logps, rows, ref_logps: as in `method_losses`.
    """
    if args.method == "orpo":
        rewards = log_odds(logps, rows["lengths"])
    else:
        scale, base = _scale_and_base(args, logps, ref_logps)
        rewards = scale * ((logps / rows["lengths"] if args.method == "simpo" else logps) - base)
    return rewards - rows["offsets"] if "offsets" in rows else rewards


def _scale_and_base(args: SPOConfig, logps: Tensor, ref_logps: Tensor | None) -> tuple[float, Tensor]:
    """Scale and base, `[sequences]`, of what a reward is made of: `scale · (logp − base)`."""
    scale, anchor = (args.alpha, args.anchor) if args.method == "spo" else (args.beta, 1.0)
    if ref_logps is None or not args.scores_reference:
        return scale, torch.zeros_like(logps)
    return scale, anchor * ref_logps


@torch.no_grad()
def preference_metrics(
    args: SPOConfig, logps: Tensor, rows: Mapping[str, Any], ref_logps: Tensor | None
) -> dict[str, Tensor]:
    """`logps/*` and `rewards/*` of each row of a batch, `[groups]` each.

    For rewards see `implicit_rewards`. `rewards/saturated` is the share of margins beyond 5, where a logistic
    loss has no curvature left: softness has no effect there. `logps/accuracies` compares plain
    log-probabilities. Rejected is the last of a row; a best-of-n row does not rank its others, so there the
    metrics are means over all of them. A row of one completion is chosen if it is desirable, else rejected;
    what it has not is not a number.

    Args:
        logps, rows, ref_logps: as in `method_losses`.
    """
    sizes, kinds = rows["group_sizes"], rows["kinds"]
    scale, base = _scale_and_base(args, logps, ref_logps)
    rewards = implicit_rewards(args, logps, rows, ref_logps)
    chosen, rejected, groups = _chosen_and_rejected(sizes, kinds)
    margins = rewards[chosen] - rewards[rejected]
    # where policy and reference are the same, the margin is only rounding of the log-probabilities: a tie
    rounding = 0 * logps if ref_logps is None else 1e-6 * scale * (logps.abs() + base.abs())
    ties = margins.abs() <= rounding[chosen] + rounding[rejected]
    each = {
        "logps/chosen": logps[chosen],
        "logps/rejected": logps[rejected],
        "logps/accuracies": (logps[chosen] > logps[rejected]).float(),
        "rewards/chosen": rewards[chosen],
        "rewards/rejected": rewards[rejected],
        "rewards/margins": margins,
        "rewards/accuracies": torch.where(ties, 0.5, (margins > 0).float()),
        "rewards/saturated": (margins.abs() > SATURATED).float(),
    }
    figures = {name: _group_means(values, groups, len(sizes)) for name, values in each.items()}
    good = rows["probabilities"] > 0.5
    for name in figures:
        has = good if name.endswith("/chosen") else ~good if name.endswith("/rejected") else good & ~good
        figures[name] = figures[name].masked_fill((sizes == 1) & ~has, torch.nan)
    return figures


def _chosen_and_rejected(sizes: Tensor, kinds: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Flat places of each row's best, of what it is set against, and the row of each such pair."""
    pairs: list[tuple[int, int, int]] = []
    start = 0
    for group, (size, kind) in enumerate(zip(sizes.tolist(), kinds, strict=True)):
        first = start + 1 if kind == "best_of_n" else start + size - 1
        pairs += [(start, place, group) for place in range(first, start + size)]
        start += size
    chosen, rejected, groups = torch.tensor(pairs, device=sizes.device).unbind(-1)
    return chosen, rejected, groups


def _group_means(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Mean of the values of each group: `[n], [n] -> [count]`."""
    sums = values.new_zeros(count).index_add(0, groups, values)
    return sums / torch.bincount(groups, minlength=count)
