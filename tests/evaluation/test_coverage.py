"""Intervals cover what they claim to, in simulated evaluations whose truth is known."""

import numpy as np
import pytest
from softpref.intervals import Bootstrap, interval

EVALUATIONS = 1000
SAMPLES = 8  # of each prompt


def rewards(random, prompts, spread=1.0):
    """Scores of mean 0, `[prompts, SAMPLES]`: prompts differ, and so do the samples of one prompt."""
    return spread * random.standard_normal((prompts, 1)) + random.standard_normal((prompts, SAMPLES))


def wins(random, prompts):
    """0 and 1 of mean 0.6, `[prompts, SAMPLES]`, with a chance of its own for each prompt."""
    return (random.random((prompts, SAMPLES)) < random.beta(3, 2, (prompts, 1))).astype(float)


def skewed_rewards(random, prompts):
    """Of mean 0, where few prompts are far above the others: offsets of skewness 1."""
    return random.gamma(4.0, 0.5, (prompts, 1)) - 2.0 + random.standard_normal((prompts, SAMPLES))


@pytest.mark.parametrize("prompts", [10, 30, 100])
@pytest.mark.parametrize(
    ("draw", "truth", "least"), [(rewards, 0.0, 0.93), (wins, 0.6, 0.93), (skewed_rewards, 0.0, 0.90)]
)
def test_nominal_95_percent_intervals_cover_the_truth(draw, truth, least, prompts):
    random = np.random.default_rng(prompts)
    labels = np.repeat(np.arange(prompts), SAMPLES)
    covered = 0
    for seed in range(EVALUATIONS):
        found = interval(draw(random, prompts).ravel(), labels, bootstrap=Bootstrap(500, 0.95, seed))
        covered += found.low <= truth <= found.high
    assert least <= covered / EVALUATIONS <= 0.97


@pytest.mark.parametrize("prompts", [10, 30, 100])
def test_two_equal_models_are_told_apart_in_at_most_six_percent_of_evaluations(prompts):
    random = np.random.default_rng(prompts)
    wrong, evaluations = 0, 2 * EVALUATIONS
    for seed in range(evaluations):
        of_prompts = 2 * random.standard_normal((prompts, 1))  # what both models share
        first, second = (of_prompts + rewards(random, prompts, 0.3) for _ in range(2))
        found = interval((first - second).mean(1), np.arange(prompts), bootstrap=Bootstrap(500, 0.95, seed))
        wrong += not found.low <= 0 <= found.high
    assert wrong / evaluations <= 0.06
