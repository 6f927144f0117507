"""Where the preference losses lead: minimised over a table of outputs, every group and label enumerated."""

import itertools
import math

import pytest
import torch
from softpref.objectives import preference_loss

pytestmark = pytest.mark.fast

REWARDS = torch.tensor([1.5, 0.2, -0.7, 0.9, -1.4, 0.0], dtype=torch.float64)
LENGTHS = torch.tensor([3.0, 7.0, 2.0, 12.0, 5.0, 1.0], dtype=torch.float64)
"""Tokens of each output, for weights that go by the mean per token."""
ALPHAS = (0.1, 0.5, 1.0, 2.0, 5.0)
KINDS = ("pairwise", "best_of_n", "ranking")
WEIGHTS = {
    "no weights": {},
    "half weights": {"weight_exponent": 0.5},
    "whole weights": {"weight_exponent": 1.0},
    "half weights per token": {"weight_exponent": 0.5, "per_token": True},
    "whole weights per token": {"weight_exponent": 1.0, "per_token": True},
}
FREQUENCIES = {"even groups": 0.0, "skewed groups": -3.0}
"""Power of ten that lies between the groups asked most and least often."""


class Question:
    """All groups of outputs (pairs, or four of six), each with every label that experts may give it.

    `orders` `[labels, n]` are the outputs, best first; `chances` `[labels]` how often each is seen, by
    Plackett-Luce within a group.
    """

    def __init__(self, kind, skew=0.0):
        self.kind = kind
        size = 2 if kind == "pairwise" else 4
        sets = list(itertools.combinations(range(len(REWARDS)), size))
        if kind == "best_of_n":  # the order behind the best is no label
            orders = [[(one, *(i for i in group if i != one)) for one in group] for group in sets]
        else:
            orders = [list(itertools.permutations(group)) for group in sets]
        frequencies = torch.logspace(0, skew, len(sets), dtype=torch.float64)
        self.orders = torch.tensor(orders).flatten(0, 1)
        strengths = REWARDS[self.orders]
        decided = range(1 if kind == "best_of_n" else size - 1)
        labels = sum(strengths[:, k] - strengths[:, k:].logsumexp(1) for k in decided).exp()
        self.chances = frequencies.repeat_interleave(len(orders[0])) * labels
        self.chances /= self.chances.sum()

    def loss(self, logits, *, alpha, per_token=False, base=None, **options):
        flat = self.orders.flatten()
        logps = logits.log_softmax(0)[flat]
        if per_token:
            options["weight_scores"] = logps / LENGTHS[flat]
        if base is not None:
            options["base_logps"] = base[flat]
        sizes = torch.full((len(self.orders),), self.orders.shape[1])
        losses = preference_loss(logps, sizes, alpha=alpha, kind=self.kind, **options)
        return (self.chances * losses).sum()


def follow(loss, start, *, steps=100):
    """Logits at which the gradient of `loss(logits)` vanishes, by damped Newton steps along it.

    The weights are constants to autograd, so that gradient is a field rather than the slope of one function.
    The weights of every step are those of the point where it starts; the loss's value is looked at nowhere.
    """
    logits, identity = start.clone(), torch.eye(len(start), dtype=start.dtype)
    for _ in range(steps):
        point = logits.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(point), point, create_graph=True)
        (curvature,) = torch.autograd.grad(gradient, point, identity, is_grads_batched=True)
        if gradient.abs().max() < 1e-13:
            break
        damping = 0.1 * gradient.detach().norm() * identity
        # the field is blind to a constant added to all logits
        logits = logits - torch.linalg.solve(curvature + damping + 1e-14, gradient.detach())
        logits -= logits.mean()
    return logits


def gradient_at(loss, logits):
    logits = logits.clone().requires_grad_(True)
    return torch.autograd.grad(loss(logits), logits)[0]


def divergence(logps, other):
    return float((logps.exp() * (logps - other)).sum())


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skew", FREQUENCIES.values(), ids=FREQUENCIES)
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_minimiser_is_softmax_of_reward_over_alpha(alpha, kind, skew, weights):
    question = Question(kind, skew)
    target = (REWARDS / alpha).log_softmax(0)

    def loss(logits):
        return question.loss(logits, alpha=alpha, **weights)

    assert float(gradient_at(loss, target).abs().max()) < 1e-14
    start = torch.zeros_like(REWARDS)
    assert float(gradient_at(loss, start).norm()) > 0.01
    assert divergence(target, follow(loss, start).log_softmax(0)) <= 1e-4


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("anchor", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("weight_exponent", [0.0, 0.5])
def test_with_a_base_measure_the_minimiser_is_its_tilt(alpha, kind, anchor, weight_exponent):
    """The base is the reference to the power of the anchor; some of its outputs are tens of nats rarer."""
    question = Question(kind, skew=-3.0)
    base = anchor * torch.tensor([-30.0, -2.0, -11.0, -5.5, -1.0, -18.0], dtype=torch.float64)
    target = (base + REWARDS / alpha).log_softmax(0)

    def loss(logits):
        return question.loss(logits, alpha=alpha, base=base, weight_exponent=weight_exponent)

    assert float(gradient_at(loss, target).abs().max()) < 1e-13
    if not weight_exponent:  # weights by probability all but vanish where it does
        assert divergence(target, follow(loss, base.clone()).log_softmax(0)) <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_following_the_plain_gradient_comes_ever_closer_and_arrives(kind, weights):
    # the loss of each group is convex in the logits and least at the target, whatever constant weighs it
    question = Question(kind, skew=-1.0)
    target = REWARDS - REWARDS.mean()
    logits = torch.tensor([-1.0, 0.5, 1.0, -0.5, 1.0, -1.0], dtype=torch.float64)
    distances = [float((logits - target).norm())]
    for _ in range(300):
        logits = logits - 3 * gradient_at(lambda x: question.loss(x, alpha=1.0, **weights), logits)
        distances.append(float((logits - target).norm()))
    assert all(after < before for before, after in itertools.pairwise(distances) if before > 1e-7)
    assert divergence(target.log_softmax(0), logits.log_softmax(0)) <= 1e-4


@pytest.mark.parametrize("kind", ["best_of_n", "ranking"])
def test_the_losses_of_groups_are_least_at_the_target_and_no_neighbour_is_better(kind):
    question, generator = Question(kind, skew=-1.0), torch.Generator().manual_seed(0)
    least = float(question.loss(REWARDS / 2, alpha=2.0))
    for scale in (1e-3, 1e-1, 1.0, 10.0):
        moved = REWARDS / 2 + scale * torch.randn(len(REWARDS), generator=generator, dtype=torch.float64)
        assert float(question.loss(moved, alpha=2.0)) > least


def soft_loss(logits, *, skew=0.0, **options):
    """Every pair once, its label the probability that its first beats its second."""
    pairs = torch.tensor(list(itertools.combinations(range(len(REWARDS)), 2)))
    frequencies = torch.logspace(0, skew, len(pairs), dtype=torch.float64)
    labels = torch.sigmoid(REWARDS[pairs[:, 0]] - REWARDS[pairs[:, 1]])
    sizes = torch.full((len(pairs),), 2)
    logps = logits.log_softmax(0)[pairs.flatten()]
    losses = preference_loss(logps, sizes, probabilities=labels, **options)
    return (frequencies * losses).sum() / frequencies.sum()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("weight_exponent", [0.0, 0.5])
def test_linear_soft_labels_keep_the_minimiser(alpha, weight_exponent):
    def loss(logits):
        return soft_loss(logits, alpha=alpha, skew=-3.0, weight_exponent=weight_exponent)

    learned = follow(loss, torch.zeros_like(REWARDS)).log_softmax(0)
    assert divergence((REWARDS / alpha).log_softmax(0), learned) <= 1e-4


def test_linear_soft_labels_are_the_expectation_of_hard_ones():
    logits = torch.linspace(-2, 1, len(REWARDS), dtype=torch.float64)
    hard, soft = Question("pairwise").loss(logits, alpha=0.7), soft_loss(logits, alpha=0.7)
    assert float(hard) == pytest.approx(float(soft), rel=1e-12)


def test_geometric_soft_labels_move_the_minimiser_out_to_the_best_output_alone():
    # every margin enters times 2p − 1, whose sign is that of the margin of rewards: sharper is always better
    losses = [
        float(soft_loss(sharpness * REWARDS, alpha=1.0, soft_labels="geometric"))
        for sharpness in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    ]
    assert losses == sorted(losses, reverse=True)
    assert float(soft_loss(REWARDS, alpha=1.0)) < float(soft_loss(2 * REWARDS, alpha=1.0))
    field = gradient_at(lambda x: soft_loss(x, alpha=1.0, soft_labels="geometric"), REWARDS)
    assert float(field.abs().max()) > 0.01
    assert field.argmin() == REWARDS.argmax()


@pytest.mark.parametrize("kind", KINDS)
def test_softness_one_gives_the_experts_small_softness_their_favourite_and_large_softness_all(kind):
    question = Question(kind)
    learned = {
        alpha: follow(lambda x, a=alpha: question.loss(x, alpha=a), torch.zeros_like(REWARDS)).softmax(0)
        for alpha in (0.1, 1.0, 5.0, 100.0)
    }
    torch.testing.assert_close(learned[1.0], REWARDS.softmax(0), rtol=0, atol=1e-9)
    assert float(learned[0.1][REWARDS.argmax()]) > 0.99
    torch.testing.assert_close(learned[100.0], torch.full_like(REWARDS, 1 / 6), rtol=0, atol=5e-3)
    entropies = [float(-(chances * chances.log()).sum()) for chances in learned.values()]
    assert entropies == sorted(entropies)
    assert entropies[-1] == pytest.approx(math.log(6), abs=1e-3)
