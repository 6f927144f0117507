"""The gate and the challenge, on figures alone."""

import pytest
from softpref.errors import ConfigError
from softpref.fitness import gate_failures
from softpref.records.figures import figures_of
from softpref.registry import gate
from softpref.registry.config import RegistryConfig
from softpref.registry.gate import challenge

from tests.evaluations import evaluation

pytestmark = pytest.mark.fast


def figure(value, low=None, high=None):
    return {"value": value, "low": low, "high": high, "n": 100, "unit": "share"}


def scores(**figures):
    return {"win_rate": figure(0.7, 0.6, 0.8), "kl_sequence": figure(2.0, 1.5, 2.5), **figures}


@pytest.mark.parametrize(
    ("limits", "failing"),
    [
        ({}, None),
        ({"min_win_rate": 0.59}, None),
        ({"min_win_rate": 0.6}, "win_rate is 0.7 .*not above min_win_rate = 0.6"),  # the value would pass
        ({"min_win_rate": 0.0}, None),
        ({"max_kl": 2.5}, None),
        ({"max_kl": 2.2}, "kl_sequence is 2 .*over max_kl = 2.2"),
        ({"min_win_rate": None, "max_kl": None}, None),
    ],
)
def test_gate_looks_at_the_cautious_end_of_the_interval(limits, failing):
    failures = gate_failures(evaluation(metrics=scores()), RegistryConfig("story", **limits).limits)
    assert len(failures) == (failing is not None)
    if failing:
        import re

        assert re.search(failing, failures[0])


@pytest.mark.parametrize("missing", [{}, figure(None), figure(float("nan"), float("nan"), float("nan"))])
def test_figure_that_was_not_measured_fails_the_gate(missing):
    limits = RegistryConfig("story", max_kl=3).limits
    assert "win_rate" in gate_failures(evaluation(metrics=scores(win_rate=missing)), limits)[0]
    assert "kl_sequence" in gate_failures(evaluation(metrics=scores(kl_sequence=missing)), limits)[0]


def evaluated(metrics, evaluation_id="e", **more):
    return evaluation(metrics=metrics, evaluation_id=evaluation_id, **more)


def Champion(version, evaluation_id, metrics, evaluated_on=None):
    return gate.Champion(version, evaluation_id, figures_of(metrics), evaluated_on)


def test_first_model_through_the_gate_becomes_champion():
    assert challenge(evaluated(scores()), None, RegistryConfig("story")).moves


def test_nobody_is_promoted_by_a_coin():
    coin = {"name": "bradley-terry", "accuracy": figure(0.52, 0.47, 0.57)}
    champion = Champion("3", "e", {"win_rate": figure(0.5, 0.5, 0.5), "preference_accuracy": figure(0.5)})
    accuracy = {"preference_accuracy": figure(0.7, 0.6, 0.8)}
    for held in (None, champion):
        verdict = challenge(evaluated(scores() | accuracy, judge=coin), held, RegistryConfig("story"))
        assert not verdict.moves
        assert "no better than a coin" in verdict.reason
        # people's own preferences, by which no judge decides
        config = RegistryConfig("story", compare_metric="preference_accuracy")
        assert challenge(evaluated(scores() | accuracy, judge=coin), held, config).moves


def test_nobody_is_promoted_by_a_figure_without_an_interval():
    verdict = challenge(evaluated({"win_rate": figure(0.9)}), None, RegistryConfig("story"))
    assert not verdict.moves
    assert "without an interval of win_rate" in verdict.reason


@pytest.mark.parametrize(
    ("mine", "theirs", "options", "moves", "words"),
    [
        (figure(0.71, 0.6, 0.8), figure(0.7, 0.6, 0.8), {}, True, "beats the champion"),
        (figure(0.7, 0.6, 0.8), figure(0.7, 0.6, 0.8), {}, False, "does not beat"),
        (figure(0.6, 0.5, 0.7), figure(0.7, 0.6, 0.8), {}, False, "does not beat"),
        (figure(0.71, 0.6, 0.8), figure(0.7, 0.6, 0.8), {"beyond_noise": True}, False, "no more than noise"),
        (figure(0.9, 0.85, 0.95), figure(0.7, 0.6, 0.8), {"beyond_noise": True}, True, "beats the champion"),
        (figure(0.9, 0.8, 1.0), figure(None), {}, False, "champion, version 3, has no win_rate"),
    ],
)
def test_champion_yields_only_to_a_strictly_better_model(mine, theirs, options, moves, words):
    champion = Champion("3", "e", {"win_rate": theirs})
    verdict = challenge(evaluated({"win_rate": mine}), champion, RegistryConfig("story", **options))
    assert verdict.moves is moves
    assert words in verdict.reason


EVALUATED_ON = {
    "data": "d1",
    "judge": "expert f1",
    "reference": "r1",
    "settings": {"samples_per_prompt": 32, "split": "test"},
}


@pytest.mark.parametrize(
    ("theirs", "difference"),
    [
        ({"reference": "r2"}, "was evaluated against another reference (its weights differ); evaluate"),
        ({"data": "d2"}, "was evaluated on other test rows; evaluate"),
        ({"judge": "bradley-terry f2"}, "was evaluated by the bradley-terry judge (here expert); evaluate"),
        ({"judge": "expert f2"}, "was evaluated by another expert judge (its scores differ); evaluate"),
        (
            {"reference": "r2", "settings": {"samples_per_prompt": 8, "split": "test"}},
            "against another reference (its weights differ) and with samples_per_prompt = 8 (here 32); eval",
        ),
        (None, "was evaluated otherwise; its version does not say how; evaluate"),
    ],
)
def test_other_evaluations_are_not_compared_and_it_is_said_what_differs(theirs, difference):
    known = None if theirs is None else EVALUATED_ON | theirs
    champion = Champion("3", "another", {"win_rate": figure(0.1, 0.1, 0.1)}, known)
    mine = evaluated(scores(), evaluated_on=EVALUATED_ON)
    verdict = challenge(mine, champion, RegistryConfig("story"))
    assert not verdict.moves
    assert verdict.reason.startswith("not comparable: the champion, version 3, ")
    assert difference in verdict.reason


def test_metric_of_the_challenge_can_be_chosen():
    champion = Champion("3", "e", {"win_rate": figure(0.9), "expected_reward": figure(1.0)})
    mine = evaluated({"win_rate": figure(0.7, 0.6, 0.8), "expected_reward": figure(2.0, 1.0, 3.0)})
    assert challenge(mine, champion, RegistryConfig("story", compare_metric="expected_reward")).moves
    assert not challenge(mine, champion, RegistryConfig("story")).moves


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"registered_model_name": "a/b"}, "registered_model_name"),
        ({"registered_model_name": " "}, "registered_model_name"),
        ({"registered_model_name": "a", "min_win_rate": 55}, "min_win_rate"),
        ({"registered_model_name": "a", "max_kl": 0}, "max_kl"),
        ({"registered_model_name": "a", "await_seconds": 0}, "await_seconds"),
    ],
)
def test_wrong_parameters_are_refused_by_name(wrong, word):
    with pytest.raises(ConfigError, match=word):
        RegistryConfig(**wrong)


@pytest.mark.parametrize("name", ["a/b", "a:b", "o'neil", 'the "best"', "a\\b", " "])
def test_a_name_that_an_address_or_a_condition_cannot_bear_is_refused(name):
    with pytest.raises(ConfigError, match="registered_model_name must be a name without"):
        RegistryConfig(name)
