"""Implied preferences beside shares of votes: closed forms, and simulated voters."""

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from softpref.evaluation.calibration import BINS, calibration
from softpref.evaluation.metrics import sigmoid
from softpref.intervals import Bootstrap

pytestmark = pytest.mark.fast
QUICK = Bootstrap(200)


def voted(random, count, prompts=200, voters=5, sharpness=1.0):
    """Margins of a model that is `sharpness` times as sure as the voters, and the shares of their votes."""
    truth = random.normal(0, 1.5, count)
    shares = random.binomial(voters, sigmoid(truth)) / voters
    return sharpness * truth, shares, random.integers(prompts, size=count)


def test_figures_of_three_pairs_are_those_of_a_hand_calculation():
    figures = calibration(
        [np.log(3), -np.log(4), 0.0], [0.75, 1.0, 0.5], ["a", "b", "c"], bootstrap=QUICK
    ).figures
    assert figures["implied_accuracy"].value == pytest.approx(0.5)  # right, wrong; the third has no majority
    coin = -0.75 * np.log(0.75) - 0.25 * np.log(0.25)
    assert figures["vote_entropy"].value == pytest.approx((coin + 0 + np.log(2)) / 3)
    assert figures["implied_log_loss"].value == pytest.approx((coin + np.log(5) + np.log(2)) / 3)
    expected = jensenshannon([0.2, 0.8], [1.0, 0.0]) ** 2 / 3
    assert figures["vote_divergence"].value == pytest.approx(expected)
    # the model prefers the second text of the second pair with 0.8, and no voter does
    assert figures["overconfidence"].value == pytest.approx((0 + 0.8 + 0) / 3)


def test_which_completion_comes_first_changes_nothing():
    margins, shares, prompts = voted(np.random.default_rng(0), 400)
    flip = np.random.default_rng(1).random(400) < 0.5
    turned = calibration(
        np.where(flip, -margins, margins), np.where(flip, 1 - shares, shares), prompts, bootstrap=QUICK
    )
    straight = calibration(margins, shares, prompts, bootstrap=QUICK)
    for name, figure in straight.figures.items():
        assert turned.figures[name].value == pytest.approx(figure.value), name
    assert np.allclose([bin.share for bin in turned.bins], [bin.share for bin in straight.bins])


def test_a_calibrated_model_shows_no_more_error_than_chance_and_a_sharper_one_is_overconfident():
    random = np.random.default_rng(0)
    calm = calibration(*voted(random, 4000, prompts=4000), bootstrap=QUICK)
    figures = calm.figures
    assert figures["overconfidence"].low < 0 < figures["overconfidence"].high
    assert figures["calibration_error"].value < 1.6 * figures["calibration_floor"].value
    assert all(bin.low < bin.confidence < bin.high for bin in calm.bins[3:6])
    sharp = calibration(*voted(random, 4000, prompts=4000, sharpness=4.0), bootstrap=QUICK).figures
    assert sharp["overconfidence"].low > 0.05
    assert sharp["calibration_error"].low > 3 * sharp["calibration_floor"].value
    assert sharp["vote_divergence"].value > figures["vote_divergence"].value
    assert sharp["implied_accuracy"].value == pytest.approx(figures["implied_accuracy"].value, abs=0.03)


def test_bins_hold_equally_many_pairs_from_the_least_confident_on():
    bins = calibration(*voted(np.random.default_rng(0), 995), bootstrap=QUICK).bins
    assert len(bins) == BINS
    assert {bin.pairs for bin in bins} == {99, 100}
    assert [bin.confidence for bin in bins] == sorted(bin.confidence for bin in bins)
    assert all(0.5 <= bin.confidence <= 1 for bin in bins)


def test_no_pair_and_one_prompt_have_no_intervals():
    nothing = calibration([], [], []).figures
    assert nothing["calibration_error"].value is None
    assert nothing["implied_accuracy"].value is None
    one = calibration([1.0, -1.0], [1.0, 1.0], ["p", "p"]).figures
    assert one["calibration_error"].value is not None
    assert one["calibration_error"].low is None
    assert one["calibration_floor"].value is None
