"""Best of several, and win rates at equal length: brute force, and simulated judges."""

import itertools

import numpy as np
import pytest
from softpref.evaluation.metrics import WinRateMetric, sigmoid
from softpref.evaluation.quality import best_of, length_controlled_win_rate, sure_win_rate
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


def test_the_sure_win_rate_is_the_tenth_percentile_of_the_heads_win_rates():
    random = np.random.default_rng(0)
    ours, theirs = random.normal(0.3, 1, (20, 3, 8)), random.normal(0, 1, (20, 2, 8))
    rates = [
        np.mean([sigmoid(a[head] - b[head]) for p in range(20) for a in ours[p] for b in theirs[p]])
        for head in range(8)
    ]
    found = sure_win_rate(ours, theirs, bootstrap=Bootstrap(200))
    assert found.value == pytest.approx(np.percentile(rates, 10))
    assert found.low < found.value < found.high
    assert (found.n, found.prompts, found.unit) == (60, 20, "probability")
    assert sure_win_rate(ours[:1], theirs[:1]).low is None  # of one prompt nothing is known


def test_the_interval_of_the_sure_win_rate_is_that_of_the_win_rate_where_heads_agree():
    random = np.random.default_rng(1)
    ours, theirs = random.normal(0.3, 1, (30, 3, 1)), random.normal(0, 1, (30, 3, 1))
    alike = sure_win_rate(ours.repeat(4, axis=2), theirs.repeat(4, axis=2))
    usual = WinRateMetric.figures(policy=ours[..., 0], reference=theirs[..., 0], bootstrap=Bootstrap())
    parts = ("value", "low", "high", "n", "prompts")
    for part in parts:
        assert getattr(alike, part) == pytest.approx(getattr(usual["win_rate"], part)), part


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
