"""Curves of methods, and their entropy at equal expected reward."""

import itertools

import numpy as np
import pytest
from softpref.evaluation import curves as module
from softpref.evaluation.curves import Point, entropy_at, most_entropy, shortfall
from softpref.evaluation.exact import ExactPrompt, entropy, softmax_frontier

from tests.evaluations import evaluations

pytestmark = pytest.mark.fast

REWARDS = np.random.default_rng(0).normal(size=40)
NOTHING = np.zeros(40)
FRONTIER = softmax_frontier([ExactPrompt(REWARDS, NOTHING, NOTHING, NOTHING, 1.0)])
MAXIMUM = [Point(*pair) for pair in FRONTIER]


def curves(members):
    return module.curves(evaluations(members))


def equal_reward(members):
    return module.equal_reward(evaluations(members))


def softmax(values):
    return np.exp(values - np.logaddexp.reduce(values))


def member(method, value, reward, nats, **extra):
    exact = {"expected_reward": {"value": reward}, "entropy": {"value": nats}}
    samples = {"expected_reward": {"value": reward + 10}, "entropy_sequence": {"value": nats + 10}}
    return {
        "name": f"{method}-{value:g}",
        "method": method,
        "alpha": value if method == "spo" else 1.0,
        "beta": 0.05 if method == "spo" else value,
        "rounds": 1,
        "train_on": "preferences",
        "extrapolation": 0.0,
        "exact": exact,
        "softmax_frontier": FRONTIER,
        "metrics": samples,
        **extra,
    }


def tilted(method, value, tilt=NOTHING, **extra):
    """A member whose policy is softmax(reward / value + tilt)."""
    policy = softmax(REWARDS / value + tilt)
    return member(method, value, float(policy @ REWARDS), entropy(np.log(policy)), **extra)


HABIT = np.random.default_rng(1).normal(size=40) * 0.5
SPO = [tilted("spo", alpha) for alpha in (2.0, 0.5, 1.0)]
DPO = [tilted("dpo", beta, HABIT) for beta in (0.3, 4.0)]


def test_members_of_one_method_are_a_curve_by_their_parameter():
    members = [
        DPO[1],
        *SPO,
        tilted("ipo", 0.1),
        tilted("spo", 1.0, extrapolation=0.5),
        tilted("spo", 1.0, rounds=3, train_on="self_play"),
        DPO[0],
    ]
    found = curves(members)
    assert [(curve.name, curve.symbol) for curve in found] == [
        ("SPO", "α"),
        ("SPO, 3 rounds on self-play", "α"),
        ("SPO, extrapolated by 0.5", "α"),
        ("DPO", "β"),
        ("IPO", "β"),
    ]
    assert [one.alpha for one in found[0].members] == [0.5, 1.0, 2.0]
    assert [one.beta for one in found[3].members] == [0.3, 4.0]
    assert [curve.plain for curve in found] == [True, False, False, True, True]


def test_spo_of_several_regularisers_is_several_curves():
    found = curves([*SPO, tilted("spo", 1.0, beta=0.2)])
    assert [curve.name for curve in found] == ["SPO, β = 0.05", "SPO, β = 0.2"]
    assert {curve.plain for curve in found} == {True}


def test_a_softmax_policy_lacks_no_entropy_and_another_does():
    for alpha in (0.35, 0.8, 1.7):
        policy = softmax(REWARDS / alpha)
        place = Point(float(policy @ REWARDS), entropy(np.log(policy)))
        assert shortfall(place, MAXIMUM) == pytest.approx(0.0, abs=1e-4)
    random = np.random.default_rng(2)
    for _ in range(50):
        policy = softmax(REWARDS + random.normal(size=40) * 0.3)
        place = Point(float(policy @ REWARDS), entropy(np.log(policy)))
        assert shortfall(place, MAXIMUM) > 0


def test_between_its_models_a_curve_is_interpolated_along_the_bent_frontier():
    """What the method gives between two distant parameters is met far better than by a straight line."""
    ends = [Point(one["exact"]["expected_reward"]["value"], one["exact"]["entropy"]["value"]) for one in DPO]
    true = tilted("dpo", 0.8, HABIT)["exact"]
    reward, nats = true["expected_reward"]["value"], true["entropy"]["value"]
    bent, straight = entropy_at(ends, reward, MAXIMUM), entropy_at(ends, reward)
    assert abs(bent - nats) < 0.05
    assert straight < nats - 0.3
    (low, high) = sorted(ends)
    share = (reward - low.reward) / (high.reward - low.reward)
    assert straight == pytest.approx(low.entropy + share * (high.entropy - low.entropy))
    level = float(most_entropy(np.array([reward]), MAXIMUM)[0])
    lacks = [shortfall(place, MAXIMUM) for place in (low, high)]
    assert bent == pytest.approx(level - lacks[0] - share * (lacks[1] - lacks[0]))


def test_outside_its_range_a_curve_has_no_entropy_and_at_a_model_its_own():
    line = [Point(0.0, 3.0), Point(1.0, 2.0)]
    assert entropy_at(line, -0.1) is None
    assert entropy_at(line, 1.1) is None
    assert entropy_at(line, 1.0) == 2.0
    assert entropy_at(line[:1], 0.0) == 3.0
    assert entropy_at(line[:1], 0.1) is None
    assert entropy_at([], 0.1) is None


def test_where_a_curve_turns_back_its_highest_entropy_counts():
    line = [Point(0.0, 3.0), Point(1.0, 2.0), Point(0.4, 1.0)]
    assert entropy_at(line, 0.5) == pytest.approx(2.5)
    assert entropy_at(line[::-1], 0.5) == pytest.approx(2.5)


def test_methods_are_compared_at_the_rewards_of_spo():
    found = equal_reward([*DPO, *SPO, tilted("ipo", 0.01, HABIT)])
    assert found["basis"] == "exact"
    assert found["curves"] == ["maximum", "SPO", "DPO", "IPO"]
    assert [row["name"] for row in found["rows"]] == ["spo-0.5", "spo-1", "spo-2"]
    for row, own in zip(found["rows"], sorted(SPO, key=lambda one: one["alpha"]), strict=True):
        assert row["expected_reward"] == own["exact"]["expected_reward"]["value"]
        assert row["entropy"]["SPO"] == pytest.approx(own["exact"]["entropy"]["value"])
        assert row["entropy"]["maximum"] == pytest.approx(row["entropy"]["SPO"], abs=1e-4)
        assert row["entropy"]["DPO"] < row["entropy"]["SPO"] - 0.02
        assert row["entropy"]["IPO"] is None


def test_without_exact_figures_samples_are_compared():
    members = [*SPO, *(one | {"exact": None, "softmax_frontier": None} for one in DPO)]
    found = equal_reward(members)
    assert found["basis"] == "samples"
    assert "maximum" not in found["curves"]
    for row in found["rows"]:
        assert row["expected_reward"] > 9
        assert row["entropy"]["SPO"] > 10


@pytest.mark.parametrize("members", [[], DPO, [one | {"softmax_frontier": None} for one in SPO]])
def test_without_spo_or_anything_beside_it_nothing_is_compared(members):
    assert equal_reward(members) is None


def test_the_order_in_which_members_come_changes_nothing():
    members = [*SPO, *DPO, tilted("spo", 1.0, HABIT, extrapolation=0.5)]
    for shuffled in itertools.islice(itertools.permutations(members), 0, 720, 97):
        assert equal_reward(shuffled) == equal_reward(members)


def test_another_anchor_or_a_kl_term_is_another_curve():
    members = [
        member("spo", alpha, alpha, 1.0, anchor=anchor) for anchor in (0.0, 1.0) for alpha in (1.0, 2.0)
    ]
    members += [member("dpo", 0.1, 1.0, 1.0), member("dpo", 0.1, 1.0, 1.0, kl_beta=0.05)]
    members += [member("dpo", 0.1, 1.0, 1.0, kl_beta=0.05, kl_on="none")]
    members += [member("spo", 1.0, 1.0, 1.0, anchor=1.0, kl_on=on) for on in ("samples", "data", "none")]
    found = curves(members)
    assert [len(curve.members) for curve in found] == [3, 2, 1, 1, 1, 1, 1]
    names = ["SPO, anchor 1", "SPO, anchor 0", "SPO, anchor 1, KL on data", "SPO, anchor 1, no KL term"]
    names += ["DPO", "DPO, KL β = 0.05", "DPO, no KL term"]
    assert [curve.name for curve in found] == names
