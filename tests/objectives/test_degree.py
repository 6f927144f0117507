"""The degree loss by its formula, its gradient by finite differences, the accuracy of length by search."""

import itertools
import math
import random

import pytest
import torch
from softpref.objectives import degree_logits, degree_loss, length_accuracy

pytestmark = pytest.mark.fast


def loss_of(states, sides, levels, weight, bias, counts):
    logits = degree_logits(states, sides, weight, bias)
    losses = torch.nn.functional.cross_entropy(logits, levels, reduction="none")
    return degree_loss(losses, sides, counts)


@pytest.fixture
def given():
    torch.manual_seed(0)
    sides = torch.tensor([0, 1, 1, 0, 1])
    levels = torch.tensor([3, 0, 2, 1, 2])
    counts = torch.bincount(sides)
    return torch.randn(5, 6), sides, levels, torch.randn(2, 4, 6), torch.randn(2, 4), counts


def test_the_loss_is_half_the_mean_of_either_side(given):
    states, sides, levels, weight, bias, counts = given
    each = [[], []]
    for state, side, level in zip(states.tolist(), sides.tolist(), levels.tolist(), strict=True):
        scores = [
            sum(a * b for a, b in zip(row, state, strict=True)) + c
            for row, c in zip(weight[side].tolist(), bias[side].tolist(), strict=True)
        ]
        each[side].append(math.log(sum(map(math.exp, scores))) - scores[level])
    expected = sum(sum(one) / len(one) for one in each) / 2
    assert loss_of(*given).item() == pytest.approx(expected, rel=1e-5)
    # a part of a step adds up to the whole
    parts = [
        loss_of(states[i : i + 2], sides[i : i + 2], levels[i : i + 2], weight, bias, counts)
        for i in (0, 2, 4)
    ]
    assert sum(parts).item() == pytest.approx(expected, rel=1e-5)


def test_a_side_without_texts_adds_nothing(given):
    states, _, levels, weight, bias, _ = given
    alone = loss_of(states, torch.zeros(5, dtype=int), levels, weight, bias, torch.tensor([5, 0]))
    logits = degree_logits(states, torch.zeros(5, dtype=int), weight, bias)
    assert alone.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, levels).item() / 2)


def test_a_head_of_zeros_is_at_ln_k_and_moves_no_state(given):
    states, sides, levels, weight, bias, counts = given
    states.requires_grad_()
    weight, bias = (0 * one for one in (weight, bias))
    weight.requires_grad_()
    loss = loss_of(states, sides, levels, weight, bias, counts)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4), rel=1e-6)
    assert not states.grad.any()
    assert weight.grad.abs().max() > 0.1


def test_the_gradient_is_that_of_finite_differences(given):
    states, sides, levels, weight, bias, counts = given
    exact = [one.double().requires_grad_() for one in (states, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda states, weight, bias: loss_of(states, sides, levels, weight, bias, counts), exact
    )


def test_a_state_that_tells_the_level_is_learned_and_one_that_does_not_stays_at_ln_k():
    levels, sides = torch.arange(8) % 4, torch.arange(8) // 4
    telling = torch.nn.functional.one_hot(levels, 4).float() * (1 + sides[:, None])
    for states, expected in ((telling, 0.0), (torch.ones(8, 4), math.log(4))):
        weight, bias = torch.zeros(2, 4, 4, requires_grad=True), torch.zeros(2, 4, requires_grad=True)
        optimizer = torch.optim.Adam([weight, bias], lr=0.3)
        for _ in range(100):
            optimizer.zero_grad()
            loss = loss_of(states, sides, levels, weight, bias, torch.tensor([4, 4]))
            loss.backward()
            optimizer.step()
        assert loss.item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("seed", range(20))
def test_the_accuracy_of_length_is_that_of_the_best_division(seed):
    rng = random.Random(seed)
    texts = [(rng.randint(0, 6), rng.randint(0, 2)) for _ in range(rng.randint(1, 12))]
    counts = torch.zeros(7, 3)
    for length, level in texts:
        counts[length, level] += 1
    best = 0
    for first, second in itertools.combinations_with_replacement(range(8), 2):
        # the shortest are said to be at level 2, the longest at level 0
        right = sum(
            level == (2 if length < first else 1 if length < second else 0) for length, level in texts
        )
        best = max(best, right / len(texts))
    assert length_accuracy(counts) == pytest.approx(best)
