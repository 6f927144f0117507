"""Splits go by prompt, in exact shares, and stay the same."""

import pytest
from softpref.data.splits import SPLITS, WITH_JUDGE, assign_splits, few_prompts, prompt_key
from softpref.errors import DataError

pytestmark = pytest.mark.fast


def keys(count):
    return [prompt_key(f"prompt {index}") for index in range(count)]


def counts(assignment):
    return [list(assignment.values()).count(split) for split in SPLITS]


@pytest.mark.parametrize(
    ("prompts", "validation", "test", "expected"),
    [
        (100, 0.1, 0.2, [70, 10, 20]),
        (40, 0.1, 0.1, [32, 4, 4]),
        (3, 0.1, 0.1, [1, 1, 1]),
        (24, 0.1, 0.0, [22, 2, 0]),
        (1, 0.0, 0.0, [1, 0, 0]),
    ],
)
def test_fractions_are_exact_and_every_wanted_split_gets_a_prompt(prompts, validation, test, expected):
    assignment = assign_splits(keys(prompts), validation_fraction=validation, test_fraction=test, seed=0)
    assert counts(assignment) == expected


@pytest.mark.parametrize(
    ("prompts", "judge", "expected"),
    [(100, 0.5, [35, 10, 20, 35]), (100, 0.25, [52, 10, 20, 18]), (4, 0.1, [1, 1, 1, 1])],
)
def test_the_judge_has_its_share_of_what_held_out_prompts_leave(prompts, judge, expected):
    shares = {"validation_fraction": 0.1, "test_fraction": 0.2, "seed": 0}
    assignment = assign_splits(keys(prompts), judge_fraction=judge, **shares)
    assert [list(assignment.values()).count(split) for split in WITH_JUDGE] == expected
    without = assign_splits(keys(prompts), **shares)
    changed = {key for key in without if assignment[key] != without[key]}
    assert {without[key] for key in changed} == {"train"}
    assert {assignment[key] for key in changed} == {"judge"}


@pytest.mark.parametrize(
    ("prompts", "validation", "known_reward", "said"),
    [
        (100, 0.1, False, []),
        (
            90,
            0.1,
            False,
            ["the split validation has only 9 of 90 prompts", "the split test has only 9 of 90 prompts"],
        ),
        (
            90,
            0.1,
            True,
            ["the split test has only 9 of 90 prompts, and intervals take 10: no model will be"],
        ),
        (90, 0.0, False, ["raise test_fraction"]),
    ],
)
def test_too_few_held_out_prompts_for_intervals_are_said_with_what_they_cost(
    prompts, validation, known_reward, said
):
    split_of = assign_splits(keys(prompts), validation_fraction=validation, test_fraction=0.1, seed=0)
    found = few_prompts(split_of, known_reward)
    assert len(found) == len(said)
    assert all(any(part in sentence for sentence in found) for part in said)


def test_a_judge_needs_a_prompt_of_its_own():
    with pytest.raises(DataError, match=r"train, validation, test, judge .* at least 4"):
        assign_splits(keys(3), validation_fraction=0.1, test_fraction=0.1, judge_fraction=0.5, seed=0)


def test_too_few_prompts_are_an_error_that_says_how_many_are_needed():
    with pytest.raises(
        DataError, match=r"2 distinct prompts cannot fill train, validation, test .* at least 3"
    ):
        assign_splits(keys(2), validation_fraction=0.1, test_fraction=0.1, seed=0)


def test_the_split_of_a_prompt_depends_on_the_seed_and_not_on_the_order():
    shares = {"validation_fraction": 0.2, "test_fraction": 0.2}
    forward = assign_splits(keys(50), seed=3, **shares)
    assert assign_splits([*keys(50)[::-1], *keys(9)], seed=3, **shares) == forward
    assert assign_splits(keys(50), seed=4, **shares) != forward


@pytest.mark.parametrize("other", ["what  is tea?", "What is\ntea?", " What is tea? ", "What is ｔea?"])
def test_prompts_that_differ_in_case_or_white_space_count_as_one(other):
    assert prompt_key(other) == prompt_key("What is tea?")
    message = [{"role": "user", "content": "What is tea?"}]
    assert prompt_key([{"role": "user", "content": other}]) == prompt_key(message)
    assert prompt_key("What is coffee?") != prompt_key("What is tea?")
