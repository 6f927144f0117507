"""Which model serves which use, by paired differences."""

import copy

import numpy as np
import pytest
from scipy import stats
from softpref.evaluation.uses import best_for, difference, use_lines

from tests.evaluations import evaluation, evaluations

pytestmark = pytest.mark.fast


def member(name, **by_prompt):
    """Values are of a few prompts, each of which stands for three like it."""
    return {
        "name": name,
        "by_prompt": {figure: 3 * values for figure, values in by_prompt.items()},
        "metrics": {},
    }


SHARP = member("sharp", expected_reward=[3.0, 1.0, 2.0, 4.0], good_diversity=[0.1, 0.2, 0.1, 0.2])
SOFT = member("soft", expected_reward=[2.0, 0.1, 0.9, 2.9], good_diversity=[0.4, 0.5, 0.4, 0.4])
TWIN = member("twin", expected_reward=[2.9, 1.1, 1.9, 4.1], good_diversity=[0.2, 0.1, 0.2, 0.1])


def test_each_use_has_the_best_by_its_figure_and_those_that_cannot_be_told_from_it():
    one, many = best_for(evaluations([SHARP, SOFT, TWIN]))
    assert (one.use, one.figure, one.best, one.alike) == ("one answer", "expected_reward", "sharp", ["twin"])
    assert one.differences["soft"].value == pytest.approx(-1.025)
    assert one.differences["soft"].high < 0
    assert (many.figure, many.best, many.alike) == ("good_diversity", "soft", [])
    assert use_lines([one, many]) == [
        "best for: one answer: sharp (not told from it: twin)",
        "best for: many different good answers: soft",
    ]


def test_of_distances_the_least_is_best():
    near, far = member("near", vote_divergence=[0.01, 0.02]), member("far", vote_divergence=[0.3, 0.2])
    (found,) = best_for(evaluations([far, near]))
    assert (found.use, found.best) == ("probabilities like people's votes", "near")


def test_a_broken_model_serves_no_use():
    broken = copy.deepcopy(SHARP)
    broken["metrics"] = {
        name: {"value": value, "low": value, "high": value}
        for name, value in {"truncated_fraction": 0.9, "reference_truncated_fraction": 0.1}.items()
    }
    one, many = best_for(evaluations([broken, SOFT, TWIN]))
    assert one.best == "twin"
    assert set(many.differences) == {"twin"}


def test_a_judge_like_a_coin_decides_no_use_that_rests_on_it():
    coin = {"name": "bradley-terry", "accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}}
    votes = {"vote_divergence": 3 * [0.1, 0.2, 0.1, 0.2]}
    judged = [one | {"judge": coin, "by_prompt": one["by_prompt"] | votes} for one in (SHARP, SOFT)]
    assert [found.figure for found in best_for(evaluations(judged))] == ["vote_divergence"]


def test_a_difference_is_as_sure_as_a_paired_t_test_of_many_prompts():
    random = np.random.default_rng(0)
    prompts = random.normal(0, 5, 400)  # prompts differ far more than models do
    ours, theirs = (prompts + random.normal(mean, 0.5, 400) for mean in (0.1, 0.0))
    found = difference(
        evaluation(by_prompt={"win_rate": ours.tolist()}),
        evaluation(by_prompt={"win_rate": theirs.tolist()}),
        "win_rate",
    )
    low, high = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found.value == pytest.approx(np.mean(ours - theirs))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)
