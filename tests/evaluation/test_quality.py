"""Best of several, and win rates at equal length: brute force, and simulated judges."""

import itertools

import numpy as np
import pytest
from softpref.evaluation.metrics import sigmoid
from softpref.evaluation.quality import best_of, length_controlled_win_rate
from softpref.intervals import Bootstrap

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_best_of_k_is_the_mean_over_all_subsets(count):
    scores = np.random.default_rng(0).normal(size=7)
    expected = np.mean([max(subset) for subset in itertools.combinations(scores, count)])
    assert best_of(scores, count) == pytest.approx(expected)


def test_best_of_more_than_there_are_is_not_known():
    assert np.isnan(best_of([1.0, 2.0], 3))
    assert np.isnan(best_of([], 1))


def judged(random, prompts, per_prompt, advantage, per_word, extra_words):
    """Wins under a judge who gives `per_word` nats a word, of answers that are `extra_words` longer."""
    lengths = random.normal(50 + extra_words, 10, (prompts, per_prompt))
    theirs = random.normal(50, 10, (prompts, per_prompt))
    difference = lengths - theirs
    chance = sigmoid(advantage + per_word * 30 * np.tanh(difference / difference.std()) / 2)
    return (random.random(chance.shape) < chance).astype(float), lengths, theirs


def test_a_model_that_wins_by_length_alone_has_half_when_length_is_taken_out():
    found, covered = [], 0
    for seed in range(20):
        won, lengths, theirs = judged(np.random.default_rng(seed), 100, 8, 0.0, 0.1, 15)
        assert won.mean() > 0.6
        figure = length_controlled_win_rate(won, lengths, theirs, bootstrap=Bootstrap(100))
        found.append(figure.value)
        covered += figure.low < 0.5 < figure.high
    assert np.mean(found) == pytest.approx(0.5, abs=0.02)
    assert covered >= 17
    assert (figure.n, figure.prompts) == (800, 100)


def test_a_better_model_keeps_its_advantage_whatever_its_length():
    for extra in (-15, 0, 15):
        won, lengths, theirs = judged(np.random.default_rng(1), 200, 8, 1.0, 0.1, extra)
        figure = length_controlled_win_rate(won, lengths, theirs, bootstrap=Bootstrap(100))
        assert figure.low < sigmoid(np.array(1.0)) < figure.high


def test_equal_lengths_leave_the_win_rate_as_it_is_and_certain_wins_are_no_error():
    same = [[30.0, 30.0]] * 4
    found = length_controlled_win_rate([[1.0, 0.0], [1.0, 1.0]] * 2, same, same, bootstrap=Bootstrap(100))
    assert found.value == pytest.approx(0.75, abs=1e-3)
    certain = length_controlled_win_rate([[1.0, 1.0]] * 4, same, same, bootstrap=Bootstrap(100))
    assert 0.99 < certain.value <= 1.0


def test_no_pair_has_no_figure_and_one_prompt_no_interval():
    assert length_controlled_win_rate([], [], []).value is None
    assert length_controlled_win_rate([[1.0, 0.0]], [[1.0, 2.0]], [[2.0, 1.0]]).low is None
