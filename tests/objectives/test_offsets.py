"""Losses whose margin has an offset: where they lead on outputs that can be enumerated, and their slopes."""

import itertools

import numpy as np
import pytest
import torch
from scipy.special import expit
from softpref.objectives import (
    dpo_loss,
    implied_rewards,
    ipo_loss,
    modpo_loss,
    odpo_loss,
    ordered_pairs,
    preference_loss,
    rdpo_loss,
    ropo_loss,
    sequential_loss,
    slic_loss,
    tdpo_loss,
    weighted_rewards,
)

pytestmark = pytest.mark.fast

OUTPUTS = 12
BETAS, WEIGHT = (0.7, 1.3, 0.4), 0.7


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


START = drawn(0, OUTPUTS).log_softmax(0)
REWARDS = drawn(1, 3, OUTPUTS)
"""Of each dimension, the experts'."""
PAIRS = torch.tensor(list(itertools.combinations(range(OUTPUTS), 2)))
FREQUENCIES = {"even": torch.ones(len(PAIRS)), "skewed": torch.logspace(0, -3, len(PAIRS))}
SIZES = torch.full((len(PAIRS),), 2)


def labels(rewards):
    return torch.sigmoid(rewards[PAIRS[:, 0]] - rewards[PAIRS[:, 1]])


def minimum(loss, start=None):
    """Log-probabilities `[OUTPUTS]` at which `loss` of them is least, by L-BFGS."""
    logits = (torch.zeros(OUTPUTS, dtype=torch.float64) if start is None else start.clone()).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=3000,
        history_size=30,
        tolerance_grad=1e-13,
        tolerance_change=1e-17,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = loss(logits.log_softmax(0))
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().log_softmax(0)


def learned(reference, rewards, loss, frequencies="even"):
    """What `loss(logps, ref_logps, outputs, probabilities=…)` makes of experts' labels of all pairs."""
    outputs, often = PAIRS.flatten(), FREQUENCIES[frequencies].double()

    def mean(logps):
        losses = loss(logps[outputs], reference[outputs], outputs, probabilities=labels(rewards))
        return (often * losses).sum() / often.sum()

    return minimum(mean, reference)


def round_of(reference, rewards, earlier, number, weights=WEIGHT, frequencies="even"):
    """A sequential round; `earlier` `[rounds, OUTPUTS]` are the rewards that the rounds before implied."""

    def loss(logps, ref_logps, outputs, **options):
        return sequential_loss(
            logps, ref_logps, earlier[:, outputs], beta=BETAS[number], dimension_weights=weights, **options
        )

    return learned(reference, rewards, loss, frequencies)


def tilted(reference, exponent):
    return (reference + exponent).log_softmax(0)


def divergence(target, other):
    return float((target.exp() * (target - other)).sum())


def centred(values):
    return values - values.mean(-1, keepdim=True)


def implied(logps, reference, number, offsets=None):
    return implied_rewards(logps, scale=BETAS[number], base_logps=reference, offsets=offsets)


NONE = torch.empty(0, OUTPUTS, dtype=torch.float64)


@pytest.fixture(scope="module")
def first():
    """After round 1: the policy, and the reward that it implies."""
    policy = round_of(START, REWARDS[0], NONE, 0)
    return policy, implied(policy, START, 0)


# -- values and slopes


def some_pairs(seed=4, count=9):
    logps, ref_logps, offsets = 3 * drawn(seed, 3, 2 * count)
    return logps.requires_grad_(), ref_logps.requires_grad_(), offsets.requires_grad_()


def softplus(x):
    return np.logaddexp(0, x)


# ℓ(z) and ℓ'(z), given β
FORMULAS = {
    dpo_loss: (lambda z, b: softplus(-z), lambda z, b: -expit(-z)),
    rdpo_loss: (
        lambda z, b: (0.9 * softplus(-z) - 0.1 * softplus(z)) / 0.8,
        lambda z, b: (-0.9 * expit(-z) - 0.1 * expit(z)) / 0.8,
    ),
    ipo_loss: (lambda z, b: (z - 0.5) ** 2 / b**2, lambda z, b: 2 * (z - 0.5) / b**2),
    slic_loss: (lambda z, b: np.maximum(0, 1 - z), lambda z, b: np.where(z < 1, -1.0, 0.0)),
    ropo_loss: (
        lambda z, b: 56 / 225 * (softplus(-z) + 14 * expit(-z)),
        lambda z, b: -56 / 225 * expit(-z) * (1 + 14 * expit(z)),
    ),
}


def mixed(value, z, p, way):
    if way is None:
        return value(z)
    if way == "geometric":
        return value((2 * p - 1) * z)
    return p * value(z) + (1 - p) * value(-z)


@pytest.mark.parametrize("way", [None, "linear", "geometric"])
@pytest.mark.parametrize("loss", FORMULAS, ids=lambda one: one.__name__)
def test_the_margin_is_scale_times_beta_h_less_the_offset(loss, way):
    """In value and gradient; a soft label turns or shrinks both parts of it together."""
    beta, scale, p = 0.3, 2.5, np.linspace(0.05, 1, 9)
    logps, ref_logps, offsets = some_pairs()
    soft = {} if way is None else {"probabilities": torch.tensor(p), "soft_labels": way}
    smoothing = {"label_smoothing": 0.1} if loss is rdpo_loss else {}
    found = loss(logps, ref_logps, beta=beta, offsets=offsets, scale=scale, **soft, **smoothing)
    ratios, o = ((x.detach().numpy()) for x in (logps - ref_logps, offsets))
    z = scale * (beta * (ratios[::2] - ratios[1::2]) - (o[::2] - o[1::2]))
    value, slope = (lambda x, f=f: f(x, beta) for f in FORMULAS[loss])
    np.testing.assert_allclose(found.detach(), mixed(value, z, p, way), rtol=1e-12)
    slopes = {
        None: slope(z),
        "linear": p * slope(z) - (1 - p) * slope(-z),
        "geometric": (2 * p - 1) * slope((2 * p - 1) * z),
    }[way]
    gradient, ref_gradient, offset_gradient = torch.autograd.grad(
        found.sum(), [logps, ref_logps, offsets], allow_unused=True
    )
    np.testing.assert_allclose(gradient[::2], scale * beta * slopes, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(gradient[1::2], -scale * beta * slopes, rtol=1e-11, atol=1e-14)
    assert ref_gradient is None
    assert offset_gradient is None


def test_divergences_of_tdpo_are_an_offset_in_value():
    logps, ref_logps, offsets = some_pairs()
    options = {"beta": 0.3, "offsets": offsets, "scale": 2.0}
    found = tdpo_loss(logps, ref_logps, torch.zeros_like(logps), **options)
    torch.testing.assert_close(found, dpo_loss(logps, ref_logps, **options))
    drift = torch.tensor([0.3, 0.9], dtype=torch.float64).repeat(9)
    found = tdpo_loss(logps, ref_logps, drift, tdpo_alpha=0.5, **options)
    options["offsets"] = offsets + 0.3 * 0.5 * drift.view(-1, 2).flip(-1).flatten()  # β a (D_l − D_w)
    torch.testing.assert_close(found, dpo_loss(logps, ref_logps, **options))


def test_the_first_round_is_dpo():
    logps, ref_logps, _ = some_pairs()
    for options in ({}, {"probabilities": torch.linspace(0, 1, 9, dtype=torch.float64)}):
        found = sequential_loss(logps, ref_logps, torch.empty(0, 18), beta=0.3, **options)
        expected = dpo_loss(logps, ref_logps, beta=0.3, **options)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        slopes = [torch.autograd.grad(each.sum(), logps)[0] for each in (found, expected)]
        torch.testing.assert_close(*slopes, rtol=0, atol=0)


def test_only_the_policy_has_a_gradient_and_the_offset_moves_its_weight_alone():
    logps, ref_logps, _ = some_pairs()
    policy_before, start, _ = some_pairs(5)
    rewards = implied_rewards(policy_before, scale=0.9, base_logps=start)
    assert not rewards.requires_grad
    assert not weighted_rewards(policy_before[None]).requires_grad
    losses = sequential_loss(logps, ref_logps, rewards[None], beta=0.3, dimension_weights=0.7)
    before = 0.9 * (policy_before - start).detach()
    z = 0.3 * (logps - ref_logps).detach() - 0.7 * before
    z = (z[::2] - z[1::2]).numpy()
    np.testing.assert_allclose(losses.detach(), softplus(-z), rtol=1e-12)
    gradients = torch.autograd.grad(losses.sum(), [logps, ref_logps, policy_before, start], allow_unused=True)
    np.testing.assert_allclose(gradients[0][::2], -0.3 * expit(-z), rtol=1e-12)
    np.testing.assert_allclose(gradients[0][1::2], 0.3 * expit(-z), rtol=1e-12)
    assert gradients[1:] == (None, None, None)


def test_a_round_does_not_begin_at_ln_2():
    logps, _, _ = some_pairs()
    rewards = drawn(6, 2, 18)
    losses = sequential_loss(logps, logps, rewards, beta=0.3, dimension_weights=(0.7, 0.2))
    o = (0.7 * rewards[0] + 0.2 * rewards[1]).numpy()
    np.testing.assert_allclose(losses.detach(), softplus(o[::2] - o[1::2]), rtol=1e-12)
    assert float((losses.detach() - np.log(2)).abs().min()) > 0.01


def test_turning_the_pair_and_its_label_changes_nothing():
    logps, ref_logps, offsets = some_pairs()
    p = torch.linspace(0, 1, 9, dtype=torch.float64)

    def turned(values):
        return values.view(-1, 2).flip(-1).flatten()

    for way in ("linear", "geometric"):
        both = [
            sequential_loss(*tensors, rewards[None], beta=0.3, probabilities=chance, soft_labels=way)
            for tensors, rewards, chance in (
                ((logps, ref_logps), offsets, p),
                ((turned(logps), turned(ref_logps)), turned(offsets), 1 - p),
            )
        ]
        torch.testing.assert_close(both[0], both[1])


def test_offsets_of_bf16_models_are_fp32():
    """Their log-probabilities are sums of hundreds of nats, of which bf16 keeps no fraction."""
    logps, base = torch.tensor([[-250.0, -201.0], [-251.0, -199.0]], dtype=torch.bfloat16)
    found = implied_rewards(logps, scale=0.1, base_logps=base, offsets=torch.tensor([0.125, 0.25]))
    assert found.dtype == torch.float32
    expected = 0.1 * (logps.double() - base.double()) - torch.tensor([0.125, 0.25])
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    weighted = weighted_rewards(torch.stack([logps, base]), (1.0, 0.5))
    assert weighted.dtype == torch.float32
    assert weighted.tolist() == [-375.5, -300.5]


# -- where they lead


@pytest.mark.parametrize("frequencies", FREQUENCIES)
def test_the_optimum_of_each_round_is_tilted_by_all_dimensions_and_rewards_come_back(frequencies):
    policies, earlier, weights = [START], NONE, (0.7, 0.3)
    for number in range(3):
        own = weights[:number]
        policy = round_of(policies[-1], REWARDS[number], earlier, number, own, frequencies)
        offsets = weighted_rewards(earlier, own)
        target = tilted(policies[-1], (REWARDS[number] + offsets) / BETAS[number])
        assert divergence(target, policy) < 1e-8
        reward = implied(policy, policies[-1], number, offsets)
        torch.testing.assert_close(centred(reward), centred(REWARDS[number]), rtol=0, atol=1e-4)
        policies.append(policy)
        earlier = torch.cat([earlier, reward[None]])
    # a recursion that forgets its offsets is another one
    wrong = implied(policies[2], policies[1], 1)
    assert float((centred(wrong) - centred(REWARDS[1])).abs().max()) > 0.1


def test_without_weights_or_without_change_a_round_is_dpo_of_its_own_dimension(first):
    policy, reward = first
    nothing = implied(START, START, 0)
    for start, earlier, weights in (
        (policy, reward[None], 0.0),
        (policy, torch.stack([reward, REWARDS[2]]), (0.0, 0.0)),
        *((START, nothing[None], weight) for weight in (0.5, 5.0)),  # the round before has changed nothing
        (START, torch.stack([nothing, nothing]), (5.0, 0.3)),
    ):
        found = round_of(start, REWARDS[1], earlier, 1, weights)
        assert divergence(tilted(start, REWARDS[1] / BETAS[1]), found) < 1e-9
    forgetful = round_of(policy, REWARDS[1], reward[None], 1, 0.0)
    mindful = round_of(policy, REWARDS[1], reward[None], 1, 2.0)
    assert divergence(mindful, forgetful) > 0.05


def test_the_more_an_earlier_dimension_weighs_the_more_of_it_is_kept(first):
    policy, reward = first
    weights = [0.0, 0.5, 1.0, 2.0, 4.0]
    means = []
    for weight in weights:
        found = round_of(policy, REWARDS[1], reward[None], 1, weight)
        means.append(float(found.exp() @ REWARDS[0]))
    assert means == sorted(means)
    # exponential tilting: the slope in λ is Var(R_1) / β_2
    exact = tilted(policy, (REWARDS[1] + 1.0 * REWARDS[0]) / BETAS[1])
    ends = [
        tilted(policy, (REWARDS[1] + w * REWARDS[0]) / BETAS[1]).exp() @ REWARDS[0] for w in (0.999, 1.001)
    ]
    mean = exact.exp() @ REWARDS[0]
    variance = exact.exp() @ (REWARDS[0] - mean) ** 2
    assert float((ends[1] - ends[0]) / 0.002) == pytest.approx(float(variance) / BETAS[1], rel=1e-5)
    assert means[2] == pytest.approx(float(mean), abs=1e-4)


def test_the_other_order_gives_the_same_model_only_with_strengths_made_for_it(first):
    policy, reward = first
    end = round_of(policy, REWARDS[1], reward[None], 1, WEIGHT)
    c_1, c_2 = 1 / BETAS[0] + WEIGHT / BETAS[1], 1 / BETAS[1]
    assert divergence(tilted(START, c_1 * REWARDS[0] + c_2 * REWARDS[1]), end) < 1e-8

    def other_order(weight, beta_of_1, beta_of_2):
        """Dimension 2 first, then dimension 1."""
        middle = tilted(START, REWARDS[1] / beta_of_2)
        offset = implied_rewards(middle, scale=beta_of_2, base_logps=START)

        def loss(logps, ref_logps, outputs, **options):
            earlier = offset[None, outputs]
            return sequential_loss(
                logps, ref_logps, earlier, beta=beta_of_1, dimension_weights=weight, **options
            )

        return learned(middle, REWARDS[0], loss)

    weight = 0.2
    assert divergence(end, other_order(weight, 1 / c_1, 1 / (c_2 - weight * c_1))) < 1e-8
    assert divergence(end, other_order(WEIGHT, BETAS[0], BETAS[1])) > 0.01


def test_the_optimum_of_modpo_is_tilted_by_the_weighted_rewards():
    weights, beta = (0.5, 0.2, 0.3), 0.6

    def loss(logps, ref_logps, outputs, **options):
        return modpo_loss(
            logps,
            ref_logps,
            REWARDS[1:, outputs],
            beta=beta,
            weight=weights[0],
            reward_weights=weights[1:],
            **options,
        )

    target = tilted(START, torch.tensor(weights, dtype=torch.float64) @ REWARDS / beta)
    assert divergence(target, learned(START, REWARDS[0], loss)) < 1e-8


def test_modpo_is_the_formula_of_its_paper():
    logps, ref_logps, rewards = some_pairs()
    found = modpo_loss(logps, ref_logps, rewards[None], beta=0.3, weight=0.4, reward_weights=0.6)
    ratios, r = (x.detach().numpy() for x in (logps - ref_logps, rewards))
    z = (0.3 * (ratios[::2] - ratios[1::2]) - 0.6 * (r[::2] - r[1::2])) / 0.4
    np.testing.assert_allclose(found.detach(), softplus(-z), rtol=1e-12)
    slopes, of_rewards = torch.autograd.grad(found.sum(), [logps, rewards], allow_unused=True)
    np.testing.assert_allclose(slopes[::2], -0.3 / 0.4 * expit(-z), rtol=1e-12)
    np.testing.assert_allclose(slopes[1::2], 0.3 / 0.4 * expit(-z), rtol=1e-12)
    assert of_rewards is None


@pytest.mark.parametrize("scaling", ["log", "linear"])
def test_odpo_is_the_formula_of_its_paper(scaling):
    logps, ref_logps, _ = some_pairs()
    scores = torch.linspace(0.1, 3, 18, dtype=torch.float64).flip(0).requires_grad_()
    found = odpo_loss(logps, ref_logps, scores, beta=0.3, odpo_alpha=0.5, scaling=scaling)
    ratios, s = (x.detach().numpy() for x in (logps - ref_logps, scores))
    differences = s[::2] - s[1::2]
    z = 0.3 * (ratios[::2] - ratios[1::2]) - 0.5 * (np.log(differences) if scaling == "log" else differences)
    np.testing.assert_allclose(found.detach(), softplus(-z), rtol=1e-12)
    slopes, of_scores = torch.autograd.grad(found.sum(), [logps, scores], allow_unused=True)
    np.testing.assert_allclose(slopes[::2], -0.3 * expit(-z), rtol=1e-12)
    np.testing.assert_allclose(slopes[1::2], 0.3 * expit(-z), rtol=1e-12)
    assert of_scores is None


def test_what_cannot_be_a_weight_or_an_offset_is_refused():
    logps, ref_logps, offsets = (each.detach() for each in some_pairs())
    pair = (logps, ref_logps)
    for call, words in (
        (lambda: weighted_rewards(offsets[None], (1.0, 2.0)), "one for each of 1 dimensions"),
        (lambda: weighted_rewards(offsets[None], -1.0), "at least 0"),
        (lambda: modpo_loss(*pair, offsets[None], beta=0.1, weight=0.0), "weight must be above 0"),
        (lambda: odpo_loss(*pair, offsets, beta=0.1), "higher for the first completion"),
        (lambda: odpo_loss(*pair, offsets, beta=0.1, scaling="square"), "'log' or 'linear'"),
        (lambda: odpo_loss(*pair, offsets, beta=0.1, odpo_alpha=-1), "odpo_alpha"),
        (lambda: dpo_loss(*pair, beta=0.1, scale=0.0), "scale must be above 0"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="scal"):
        dpo_loss(*pair, beta=0.1, scal=1.0)


# -- soft preference optimization as the learner of a round


def groups_of(kind):
    """All groups of three outputs (or pairs) with every label that experts may give, as in Plackett-Luce."""
    size = 2 if kind == "pairwise" else 3
    sets = list(itertools.combinations(range(6), size))
    orders = [list(itertools.permutations(one)) for one in sets]
    if kind == "best_of_n":
        orders = [[(one, *(i for i in group if i != one)) for one in group] for group in sets]
    return torch.tensor(orders).flatten(0, 1)


@pytest.mark.parametrize("kind", ["pairwise", "best_of_n", "ranking"])
@pytest.mark.parametrize("anchor", [0.0, 1.0])
@pytest.mark.parametrize("alpha", [0.5, 1.3])
def test_the_minimiser_of_the_preference_loss_is_tilted_by_the_offsets_too(kind, anchor, alpha):
    reward, offsets, base = REWARDS[0, :6], 0.7 * REWARDS[1, :6], anchor * START[:6]
    orders = groups_of(kind)
    strengths = reward[orders]
    places = 1 if kind == "best_of_n" else orders.shape[1] - 1
    chances = sum(strengths[:, k] - strengths[:, k:].logsumexp(1) for k in range(places)).exp()
    sizes, flat = torch.full((len(orders),), orders.shape[1]), orders.flatten()

    def loss(logits):
        losses = preference_loss(
            logits.log_softmax(0)[flat],
            sizes,
            alpha=alpha,
            kind=kind,
            base_logps=base[flat] if anchor else None,
            offsets=offsets[flat],
        )
        return (chances * losses).sum()

    target = (base + (reward + offsets) / alpha).log_softmax(0)
    point = target.clone().requires_grad_()
    assert float(torch.autograd.grad(loss(point), point)[0].abs().max()) < 1e-13
    logits = base.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(logits)
        value.backward()
        return value

    optimizer.step(closure)
    assert divergence(target, logits.detach().log_softmax(0)) < 1e-9


def test_rounds_of_soft_preference_optimization_mix_the_experts_of_several_dimensions():
    """Soft labels of all pairs, α = 0.7 and then 1.3, no reference: softmax((R_2 + λ R_1) / α_2)."""
    flat = PAIRS.flatten()

    def taught(reward, alpha, offsets):
        def loss(logps):
            return preference_loss(
                logps[flat], SIZES, alpha=alpha, probabilities=labels(reward), offsets=offsets[flat]
            ).mean()

        return minimum(loss)

    nothing = torch.zeros(OUTPUTS, dtype=torch.float64)
    policy = taught(REWARDS[0], 0.7, nothing)
    offsets = weighted_rewards(implied_rewards(policy, scale=0.7)[None], 0.7)
    after = taught(REWARDS[1], 1.3, offsets)
    assert divergence(((REWARDS[1] + 0.7 * REWARDS[0]) / 1.3).log_softmax(0), after) < 1e-8
    third = implied_rewards(after, scale=1.3, offsets=offsets)
    torch.testing.assert_close(centred(third), centred(REWARDS[1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("way", ["linear", "geometric"])
@pytest.mark.parametrize("kinds", ["pairwise", "best_of_n", "ranking"])
def test_with_an_offset_softness_0_is_the_limit_in_gradient(kinds, way):
    """The losses themselves differ by a constant over α."""
    size = 2 if kinds == "pairwise" else 4
    logps, offsets = drawn(8, 2, 3 * size)
    sizes = torch.full((3,), size)
    options = (
        {"probabilities": torch.tensor([0.9, 0.2, 0.5]).double(), "soft_labels": way} if size == 2 else {}
    )
    gradients = []
    for alpha in (0.0, 1e-6):
        point = logps.clone().requires_grad_()
        losses = preference_loss(point, sizes, alpha=alpha, kind=kinds, offsets=offsets, **options)
        gradients.append(torch.autograd.grad(losses.sum(), point)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-5)
    assert float(gradients[0].abs().max()) > 0.1


def test_offsets_of_the_preference_loss_have_no_gradient_and_one_for_all_changes_nothing():
    logps, offsets = drawn(9, 2, 9)
    offsets.requires_grad_()
    sizes, kinds = torch.tensor([2, 3, 4]), ["pairwise", "best_of_n", "ranking"]
    for alpha in (0.0, 0.8):
        plain = preference_loss(logps.requires_grad_(), sizes, alpha=alpha, kind=kinds)
        even = preference_loss(
            logps, sizes, alpha=alpha, kind=kinds, offsets=torch.tensor([5.0] * 2 + [-3.0] * 7)
        )
        torch.testing.assert_close(even, plain)
        losses = preference_loss(logps, sizes, alpha=alpha, kind=kinds, offsets=offsets)
        assert torch.autograd.grad(losses.sum(), offsets, allow_unused=True) == (None,)


def test_pairs_of_a_ranking_take_the_differences_of_its_offsets():
    logps, ref_logps, offsets = drawn(10, 3, 3)
    places, _ = ordered_pairs(torch.tensor([3]), "ranking")
    found = dpo_loss(logps[places], ref_logps[places], beta=0.4, offsets=offsets[places])
    u = (0.4 * (logps - ref_logps) - offsets).numpy()
    expected = [softplus(u[j] - u[i]) for i, j in ((0, 1), (0, 2), (1, 2))]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
