"""The exact optimum of an objective on a set of outputs that can be enumerated. Trains nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softpref.objectives.preference import PreferenceKind


def exact_optimum(
    rewards: Tensor,
    ref_logps: Tensor,
    *,
    alpha: float,
    beta: float = 0.0,
    pair_probabilities: Tensor | None = None,
    groups: Tensor | None = None,
    kind: PreferenceKind = "pairwise",
    base_logps: Tensor | None = None,
) -> Tensor:
    """Minimise `L_pref^α(π) + β KL(π ‖ π_ref)` over all distributions, under Bradley-Terry preferences.

    Without regulariser the answer is `ν · exp(rewards / alpha)`, scaled, whatever is asked. With it there is
    no closed form, but it is a smooth problem in N logits, solved here by L-BFGS in float64, with labels in
    expectation (Plackett-Luce for more than two). Where the reference leaves mass outside the set, that rest
    counts as one more outcome, which no group mentions.

    Args:
        rewards: `[N]`, expert rewards in nats.
        ref_logps: `[N]`, reference log-probabilities of the outputs; their exponentials sum to at most 1.
        alpha: softness, > 0.
        beta: regularisation strength, ≥ 0.
        pair_probabilities: `[N, N]`, how often the pair (i, j) is asked, any positive scale, symmetric or
            not; uniform over distinct pairs by default.
        groups: `[M, n]`, places of the outputs that are asked together, each group equally often, in place of
            `pair_probabilities`; a sample of a distribution over groups too large to list.
        kind: what is learned of each group: its `best_of_n`, or its whole `ranking`; the same for n = 2.
        base_logps: `[N]`, log ν of the base measure, up to a constant; None: the counting measure.

    Returns:
        `[N]` float64, log-probabilities of the optimum given the set (they sum to 1).

    Raises:
        ValueError: α ≤ 0, β < 0, shapes that do not fit, or groups of another size than the kind allows.
    """
    rewards, ref_logps = rewards.double(), ref_logps.double()
    base_logps = torch.zeros_like(rewards) if base_logps is None else base_logps.double()
    shapes = {rewards.shape, ref_logps.shape, base_logps.shape}
    if alpha <= 0 or beta < 0 or len(shapes) > 1 or rewards.dim() != 1:
        raise ValueError(
            "exact_optimum needs alpha > 0, beta >= 0 and rewards, ref_logps, base_logps of one shape [N]; "
            f"got alpha={alpha}, beta={beta}, {tuple(rewards.shape)}, {tuple(ref_logps.shape)}"
        )
    if groups is None and kind != "pairwise":
        raise ValueError(f"kind {kind} needs groups, the sets of outputs that are asked together")
    if groups is not None and pair_probabilities is not None:
        raise ValueError("give pair_probabilities or groups, not both")
    if groups is not None and (groups.dim() != 2 or groups.shape[1] < 2):
        raise ValueError(f"groups must be [M, n] with n at least 2, got {list(groups.shape)}")
    if groups is not None and kind == "pairwise" and groups.shape[1] != 2:
        raise ValueError(f"groups of kind pairwise must be [M, 2], got {list(groups.shape)}")
    count = len(rewards)
    if pair_probabilities is None and beta == 0:  # no table of pairs: there may be many outputs
        return (base_logps + rewards / alpha).log_softmax(-1)
    pairs = _pairs(pair_probabilities, count)
    if beta == 0 or count == 1:
        return (base_logps + rewards / alpha).log_softmax(-1)
    preference = (
        _pair_preference(rewards, pairs, alpha)
        if groups is None
        else _group_preference(rewards, groups, kind, alpha)
    )
    rest = -torch.expm1(ref_logps.logsumexp(0))
    if rest > 1e-12:
        ref_logps = torch.cat([ref_logps, rest.log()[None]])
    start = torch.cat([base_logps + rewards / alpha, rewards.new_zeros(len(ref_logps) - count)])
    start[count:] = ref_logps[count:] - ref_logps[:count].logsumexp(0) + start[:count].logsumexp(0)
    logits = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=500,
        history_size=20,
        tolerance_grad=1e-9,
        tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        # gradients by hand: autograd would keep several tables of pairs or groups
        with torch.no_grad():
            value, inner = preference(logits[:count] - base_logps)
            logps = logits.log_softmax(0)
            ratio = logps - ref_logps
            divergence = (logps.exp() * ratio).sum()
            gradient = beta * logps.exp() * (ratio - divergence)
            gradient[:count] += inner
            logits.grad = gradient
            return value + beta * divergence

    step: Callable[[Callable[[], Tensor]], Tensor] = optimizer.step
    step(objective)
    return logits.detach()[:count].log_softmax(0)


def ipo_optimum(
    rewards: Tensor, ref_logps: Tensor, *, beta: float, pair_probabilities: Tensor | None = None
) -> Tensor:
    """The minimiser of identity preference optimization under Bradley-Terry preferences.

    In f = log π − log π_ref it is a weighted least-squares fit of the differences f_i − f_j to
    (2 P(i beats j) − 1) / (2β), which one linear system solves. Source: arXiv 2310.12036, equation 17.

    Args:
        rewards, ref_logps, pair_probabilities: as in `exact_optimum`.
        beta: IPO's β, > 0.

    Returns:
        `[N]` float64, log-probabilities given the set.

    Raises:
        ValueError: β ≤ 0 or shapes that do not fit.
    """
    rewards, ref_logps = rewards.double(), ref_logps.double()
    if beta <= 0 or rewards.shape != ref_logps.shape or rewards.dim() != 1:
        raise ValueError(
            "ipo_optimum needs beta > 0 and rewards and ref_logps of one shape [N]; "
            f"got beta={beta}, {tuple(rewards.shape)}, {tuple(ref_logps.shape)}"
        )
    pairs = _pairs(pair_probabilities, len(rewards))
    aims = torch.tanh((rewards[:, None] - rewards) / 2) / (2 * beta)  # 2σ(x) − 1 = tanh(x / 2)
    laplacian = torch.diag(pairs.sum(1)) - pairs
    laplacian += pairs.mean()  # f is free up to a constant: the mean is set to zero
    fitted: Tensor = torch.linalg.solve(laplacian, (pairs * aims).sum(1))
    return (ref_logps + fitted).log_softmax(0)


_Preference = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Logits `[N]` to the preference loss and its gradient `[N]`."""


def _pairs(pair_probabilities: Tensor | None, count: int) -> Tensor:
    """The symmetric distribution over ordered pairs, `[N, N]`: sums to 1, zero on the diagonal."""
    if pair_probabilities is None:
        pairs = torch.ones(count, count, dtype=torch.float64)
    elif pair_probabilities.shape == (count, count):
        pairs = pair_probabilities.double()
    else:
        raise ValueError(
            f"pair_probabilities must be [{count}, {count}], got {list(pair_probabilities.shape)}"
        )
    pairs = (pairs + pairs.T).contiguous()
    pairs.fill_diagonal_(0)
    shares: Tensor = pairs / pairs.sum()
    return shares


def _pair_preference(rewards: Tensor, pairs: Tensor, alpha: float) -> _Preference:
    # E over the label of −(1/α) log σ(±αΔ) = (1/α) [softplus(αΔ) − P(i beats j) αΔ], up to Δ's sign
    wins = pairs * torch.sigmoid(rewards[:, None] - rewards)
    # By antisymmetry only the row sums of `wins` meet Δ linearly, and softplus(α(t_i − t_j)) is
    # log(e^{αt_i} + e^{αt_j}) − αt_j: one N × N logarithm per evaluation, in tables that are kept.
    linear = wins.sum(1) - wins.sum(0)
    total = pairs.sum(0)
    sums, table_logs = torch.empty_like(pairs), torch.empty_like(pairs)

    def preference(logits: Tensor) -> tuple[Tensor, Tensor]:
        scaled = alpha * logits
        scaled = scaled - scaled.max()
        raised = scaled.clamp_min(-700).exp()
        torch.add(raised[:, None], raised, out=sums)
        torch.log(sums, out=table_logs)
        softplus = torch.dot(pairs.view(-1), table_logs.view(-1)) - total @ scaled
        value = (softplus - linear @ scaled) / alpha
        gradient = 2 * raised * torch.div(pairs, sums, out=sums).sum(1) - total - linear
        return value, gradient

    return preference


def _group_preference(rewards: Tensor, groups: Tensor, kind: PreferenceKind, alpha: float) -> _Preference:
    """A ranking is a best-of-k among each set of completions that may be left, as often as it is left."""
    size = groups.shape[1]
    weights = {tuple(range(size)): rewards.new_full((len(groups),), 1 / len(groups))}
    if kind == "ranking":
        for left in range(size, 2, -1):
            for places in [one for one in weights if len(one) == left]:
                chances = rewards[groups[:, places]].softmax(-1)
                for i in range(left):
                    rest = places[:i] + places[i + 1 :]
                    taken = weights[places] * chances[:, i]
                    weights[rest] = weights[rest] + taken if rest in weights else taken
    parts = [(groups[:, places], weight[:, None]) for places, weight in weights.items()]
    linear = torch.zeros_like(rewards)
    for members, weight in parts:
        linear.index_add_(0, members.reshape(-1), (weight * rewards[members].softmax(-1)).reshape(-1))

    def preference(logits: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = -(linear @ logits), -linear
        for members, weight in parts:
            scaled = alpha * logits[members]
            value = value + (weight[:, 0] * scaled.logsumexp(-1)).sum() / alpha
            shares = (weight * scaled.softmax(-1)).reshape(-1)
            gradient = gradient.index_add(0, members.reshape(-1), shares)
        return value, gradient

    return preference
