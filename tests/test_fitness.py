"""Who is fit to be chosen and registered: planted figures of broken and of healthy models."""

import math

import pytest
from softpref.fitness import Limits, ailments, gate_failures, judge_doubt

from tests import evaluations

pytestmark = pytest.mark.fast


def figure(value, spread=0.02):
    return {
        "value": value,
        "low": value - spread,
        "high": value + spread,
        "n": 100,
        "prompts": 10,
        "unit": "",
    }


def evaluation(exact=None, judge=None, **figures):
    """Of a model like its reference, which writes 40 tokens of 2.5 nats each, with some figures changed."""
    usual = {"win_rate": 0.6, "kl_sequence": 4.0, "kl_token": 0.1, "completion_length": 40.0}
    usual |= {"truncated_fraction": 0.01, "reference_truncated_fraction": 0.01}
    usual |= {"repetition": 0.02, "reference_repetition": 0.02}
    usual |= {"cross_entropy": 2.5, "reference_cross_entropy": 2.5, **figures}
    metrics = {name: one if isinstance(one, dict) else figure(one) for name, one in usual.items()}
    return evaluations.evaluation(metrics=metrics, exact=exact, judge=judge or {"name": "expert"})


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        # one sentence over and over: after its first saying it is no surprise
        ({"repetition": 0.8, "cross_entropy": 0.6, "kl_token": 0.55}, "repeats itself: 80% of the 4-grams"),
        ({"truncated_fraction": 0.4}, "40% of its samples cut at the length limit, the reference 1%"),
        # random tokens of a vocabulary of 500 keep log(500) nats of entropy
        (
            {"cross_entropy": 9.0, "kl_token": 9.0 - math.log(500)},
            "writes what its reference would not: 9.00",
        ),
        # one odd sentence for every prompt has no entropy
        ({"cross_entropy": 3.4, "kl_token": 3.4}, "3.40 nats of KL per token from its reference"),
    ],
)
def test_a_broken_model_is_told_by_what_is_wrong_with_it(broken, said):
    (ailment, *others) = ailments(evaluation(**broken))
    assert said in ailment
    assert "no " not in " ".join(others)
    assert gate_failures(evaluation(**broken), Limits())[0] == f"it {ailment}"


def test_what_leaked_from_a_known_set_is_told():
    leaked = evaluation(exact={"mass_on_set": figure(0.89), "reference_mass_on_set": figure(0.99)})
    assert ailments(leaked) == ["has only 0.89 of its probability on the known set, the reference 0.99"]


@pytest.mark.parametrize(
    "healthy",
    [
        {},
        # the sharpest: one typical text for each prompt, as far as a model can be that keeps to the reference
        {"cross_entropy": 2.4, "kl_token": 2.4, "kl_sequence": 96.0},
        # softer: rarer texts, and more of them
        {"cross_entropy": 3.1, "kl_token": 0.3},
        {"repetition": 0.09},
        # short answers that the reference gives once in a thousand times
        {
            "completion_length": 2.0,
            "cross_entropy": 3.45,
            "reference_cross_entropy": 0.01,
            "kl_token": 3.4,
            "kl_sequence": 6.8,
        },
        # a reference that is no better
        {"repetition": 0.7, "reference_repetition": 0.65, "truncated_fraction": 0.9}
        | {"reference_truncated_fraction": 0.88},
        # more truncated samples than the reference's, but by chance
        {"truncated_fraction": figure(0.2, 0.2), "reference_truncated_fraction": figure(0.1, 0.1)},
    ],
)
def test_sharper_softer_and_short_models_are_healthy(healthy):
    assert ailments(evaluation(**healthy)) == []


def test_without_intervals_only_a_blatant_fault_counts():
    def alone(**values):
        return {name: {"value": value, "low": None, "high": None} for name, value in values.items()}

    few = alone(truncated_fraction=0.15, repetition=0.3, cross_entropy=4.5)
    assert ailments(evaluation(**few)) == []
    blatant = alone(truncated_fraction=0.2, repetition=0.5, cross_entropy=6.0)
    assert len(ailments(evaluation(**blatant))) == 3


def test_what_was_not_measured_is_not_held_against_a_model():
    assert ailments(evaluations.evaluation()) == []


@pytest.mark.parametrize(
    ("accuracy", "doubt"),
    [
        (figure(0.7, 0.1), ""),
        (figure(0.6, 0.1), "agrees with 0.60 [0.50, 0.70] of the held-out preferences"),
        ({"value": 1.0, "low": None, "high": None}, "is unknown"),
        (None, "is unknown"),
    ],
)
def test_a_judge_must_be_better_than_a_coin_and_be_known_to_be(accuracy, doubt):
    judged = evaluation(judge={"name": "bradley-terry", "accuracy": accuracy})
    assert doubt in judge_doubt(judged)
    failures = gate_failures(judged, Limits(min_win_rate=0.5))
    assert bool(failures) is bool(doubt)
    assert gate_failures(judged, Limits(min_win_rate=0)) == []


LENGTH = {"length_accuracy": figure(0.66, 0.05), "longer_accuracy": figure(0.66, 0.05)}
SHORT = LENGTH | {"longer_accuracy": figure(0.34, 0.05)}


@pytest.mark.parametrize(
    ("figures", "doubt"),
    [
        ({}, ""),  # an evaluation from before length was measured
        (LENGTH | {"over_length": figure(0.04, 0.03)}, ""),
        (LENGTH | {"over_length": figure(0.04, 0.05)}, "'longer is better' with 0.66 [0.61, 0.71]"),
        (LENGTH | {"over_length": figure(0.04, 0.05)}, "0.04 [-0.01, 0.09], is not above 0"),
        (SHORT | {"over_length": figure(-0.1, 0.05)}, "'shorter is better'"),
    ],
)
def test_a_judge_must_be_better_than_length_alone(figures, doubt):
    judged = evaluation(judge={"name": "reward-model", "accuracy": figure(0.7, 0.1), **figures})
    assert doubt in judge_doubt(judged)
    assert bool(judge_doubt(judged)) is bool(doubt)
    assert bool(gate_failures(judged, Limits(min_win_rate=0.5))) is bool(doubt)
    expert = evaluation(judge={"name": "expert", "accuracy": figure(0.7, 0.1), **figures})
    assert judge_doubt(expert) == ""


@pytest.mark.parametrize(
    ("win_rate", "failure"),
    [
        (
            figure(0.5, 0.0),
            r"win_rate is 0.5 \[0.5, 0.5\], n=100: its low end is not above min_win_rate = 0.5",
        ),
        (figure(0.53, 0.04), "its low end is not above"),
        (figure(0.53, 0.02), None),
        ({"value": 0.9, "low": None, "high": None, "n": 8}, "gives no interval for win_rate"),
    ],
)
def test_the_gate_asks_for_a_model_better_than_its_reference(win_rate, failure):
    import re

    failures = gate_failures(evaluation(win_rate=win_rate), Limits(min_win_rate=0.5))
    assert len(failures) == (failure is not None)
    assert not failure or re.search(failure, failures[0])
