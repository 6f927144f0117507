"""The exact optimum of the objective on a set of outputs that can be enumerated. Trains nothing."""

from __future__ import annotations

import torch
from torch import Tensor


def exact_optimum(
    rewards: Tensor,
    ref_logps: Tensor,
    *,
    alpha: float,
    beta: float = 0.0,
    pair_probabilities: Tensor | None = None,
) -> Tensor:
    """Minimise `L_pref^α(π) + β KL(π ‖ π_ref)` over all distributions, under Bradley-Terry preferences.

    Without regulariser the answer is `softmax(rewards / alpha)`. With it there is no closed form, but it is a
    smooth problem in N logits, solved here by L-BFGS in float64. Where the reference leaves mass outside the
    set, that rest counts as one more outcome, which no pair mentions.

    Args:
        rewards: `[N]`, expert rewards in nats.
        ref_logps: `[N]`, reference log-probabilities of the outputs; their exponentials sum to at most 1.
        alpha: softness, > 0.
        beta: regularisation strength, ≥ 0.
        pair_probabilities: `[N, N]`, how often the pair (i, j) is asked, any positive scale, symmetric or
            not; uniform over distinct pairs by default. Without regulariser it does not matter.

    Returns:
        `[N]` float64, log-probabilities of the optimum given the set (they sum to 1).

    Raises:
        ValueError: α ≤ 0, β < 0 or shapes that do not fit.
    """
    rewards, ref_logps = rewards.double(), ref_logps.double()
    if alpha <= 0 or beta < 0 or rewards.shape != ref_logps.shape or rewards.dim() != 1:
        raise ValueError(
            "exact_optimum needs alpha > 0, beta >= 0 and rewards and ref_logps of one shape [N]; "
            f"got alpha={alpha}, beta={beta}, {tuple(rewards.shape)}, {tuple(ref_logps.shape)}"
        )
    count = len(rewards)
    if pair_probabilities is not None and pair_probabilities.shape != (count, count):
        raise ValueError(
            f"pair_probabilities must be [{count}, {count}], got {list(pair_probabilities.shape)}"
        )
    if beta == 0 or count == 1:
        return (rewards / alpha).log_softmax(-1)
    if pair_probabilities is None:
        pairs = torch.ones(count, count, dtype=torch.float64)
    else:
        pairs = pair_probabilities.double()
    pairs = (pairs + pairs.T).contiguous()
    pairs.fill_diagonal_(0)
    pairs /= pairs.sum()
    # E over the label of −(1/α) log σ(±αΔ) = (1/α) [softplus(αΔ) − P(i beats j) αΔ], up to Δ's sign
    wins = pairs * torch.sigmoid(rewards[:, None] - rewards)
    rest = -torch.expm1(ref_logps.logsumexp(0))
    if rest > 1e-12:
        ref_logps = torch.cat([ref_logps, rest.log()[None]])
    start = torch.cat([rewards / alpha, rewards.new_zeros(len(ref_logps) - count)])
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

    # By antisymmetry only the row sums of `wins` meet Δ linearly, and softplus(α(t_i − t_j)) is
    # log(e^{αt_i} + e^{αt_j}) − αt_j: one N × N logarithm per evaluation, in tables that are kept.
    linear = wins.sum(1) - wins.sum(0)
    total = pairs.sum(0)
    sums, table_logs = torch.empty_like(pairs), torch.empty_like(pairs)

    def objective() -> Tensor:
        # gradients by hand: autograd would keep several N × N tensors
        with torch.no_grad():
            scaled = alpha * logits[:count]
            scaled = scaled - scaled.max()
            raised = scaled.clamp_min(-700).exp()
            torch.add(raised[:, None], raised, out=sums)
            torch.log(sums, out=table_logs)
            softplus = torch.dot(pairs.view(-1), table_logs.view(-1)) - total @ scaled
            value = (softplus - linear @ scaled) / alpha
            gradient = torch.zeros_like(logits)
            gradient[:count] = 2 * raised * torch.div(pairs, sums, out=sums).sum(1) - total - linear
            logps = logits.log_softmax(0)
            ratio = logps - ref_logps
            divergence = (logps.exp() * ratio).sum()
            gradient += beta * logps.exp() * (ratio - divergence)
            logits.grad = gradient
            return value + beta * divergence

    optimizer.step(objective)
    return logits.detach()[:count].log_softmax(0)
