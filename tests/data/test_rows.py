"""What one record of a source becomes, and why another is refused."""

import json
import math

import pytest
from softpref.data.columns import settle_layout
from softpref.data.config import DataConfig
from softpref.data.rows import (
    Candidate,
    Preference,
    pair_thumbs,
    rank_candidates,
    read_candidate,
    read_preference,
    read_verdicts,
)
from softpref.data.texts import LeftOut, Refused, cut_common_prefix
from softpref.errors import ConfigError

pytestmark = pytest.mark.fast

PAIR = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
IMPLICIT = {"chosen": "chosen", "rejected": "rejected"}
VOTES = {role: role for role in ("prompt", "completion_a", "completion_b", "votes_a", "votes_b")}
TIED_VOTES = {**VOTES, "votes_equal": "votes_equal"}
LIST = {"prompt": "prompt", "completions": "completions"}


def read(record, columns, **config):
    """Read `record` with a configuration of a source that is never opened."""
    config = DataConfig(source="rows.jsonl", columns=columns, **config)
    known = [name for names in columns.values() for name in (names if isinstance(names, list) else [names])]
    layout = settle_layout(columns, known, config.template_fields)
    return read_preference(record, layout, config)


def voted(a, b, equal=None):
    row = {"prompt": "q", "completion_a": "A", "completion_b": "B", "votes_a": a, "votes_b": b}
    return row if equal is None else {**row, "votes_equal": equal}


def said(*texts, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]


def test_chosen_and_rejected_become_a_hard_pair():
    row = read({"prompt": "q", "chosen": "good", "rejected": "bad"}, PAIR)
    assert row == Preference("q", ["good", "bad"], "pairwise", None)


@pytest.mark.parametrize(
    ("votes", "ties", "completions", "probability"),
    [
        ((3, 1), "half", ["A", "B"], 0.75),
        ((1, 4), "half", ["B", "A"], 0.8),
        ((3, 1, 1), "half", ["A", "B"], 0.7),
        ((3, 1, 1), "drop", ["A", "B"], 0.75),
        ((2, 2, 1), "half", ["A", "B"], 0.5),
        ((1, 0), "half", ["A", "B"], None),  # a single vote is a hard label
        ((0, 1), "half", ["B", "A"], None),
        (("3", "1"), "half", ["A", "B"], 0.75),  # as CSV has them
    ],
)
def test_votes_become_the_probability_of_the_better_first(votes, ties, completions, probability):
    row = read(voted(*votes), TIED_VOTES if len(votes) == 3 else VOTES, ties=ties)
    assert row.completions == completions
    assert row.probability == (None if probability is None else pytest.approx(probability))


def test_hard_labels_keep_the_winner_and_leave_ties_out():
    assert read(voted(1, 4), VOTES, labels="hard") == Preference("q", ["B", "A"], "pairwise", None)
    with pytest.raises(LeftOut, match="tie"):
        read(voted(2, 2), VOTES, labels="hard")


def test_ties_are_left_out_when_asked():
    with pytest.raises(LeftOut, match="tie"):
        read(voted(2, 2, 1), TIED_VOTES, ties="drop")
    with pytest.raises(LeftOut, match="tie"):
        read(voted(0, 0, 5), TIED_VOTES, ties="drop")


def test_rows_with_too_few_votes_are_left_out():
    assert read(voted(2, 1), VOTES, min_votes=3).probability == pytest.approx(2 / 3)
    with pytest.raises(LeftOut, match="2 of 3"):
        read(voted(2, 0), VOTES, min_votes=3)


def test_shares_of_votes_that_sum_to_one_but_for_rounding_are_a_vote():
    assert 0.7 + 0.2 + 0.1 < 1
    assert read(voted(0.7, 0.2, 0.1), TIED_VOTES).probability == pytest.approx(0.75)


@pytest.mark.parametrize("ties", ["half", "drop"])
def test_a_row_without_any_vote_is_refused(ties):
    with pytest.raises(Refused, match="no votes"):
        read(voted(0, 0, 0), TIED_VOTES, ties=ties)


def test_annotator_columns_are_votes():
    columns = {"prompt": "q", "completion_a": "x", "completion_b": "y", "votes": ["n1", "n2", "n3"]}
    row = read({"q": "q", "x": "X", "y": "Y", "n1": 2, "n2": 2, "n3": 0}, columns)
    assert row.completions == ["Y", "X"]
    assert row.probability == pytest.approx(2.5 / 3)
    with pytest.raises(Refused, match=r"unknown votes value \(known: 1, 2, 0\): 3"):
        read({"q": "q", "x": "X", "y": "Y", "n1": 3, "n2": 2, "n3": 0}, columns)


def test_a_label_column_is_read_through_its_values():
    columns = {"prompt": "prompt", "completion_a": "a", "completion_b": "b", "preference": "gold"}
    row = {"prompt": "q", "a": "A", "b": "B", "gold": "a2"}
    meaning = {"a1": "a", "a2": "b", "equal": "tie"}
    assert read(row, columns, preference_values=meaning) == Preference("q", ["B", "A"], "pairwise", None)
    assert read({**row, "gold": "equal"}, columns, preference_values=meaning).probability == 0.5
    with pytest.raises(Refused, match="unknown preference value"):
        read(row, columns)
    with pytest.raises(Refused, match="field is missing"):
        read({**row, "gold": None}, columns, preference_values=meaning)


def test_a_probability_below_half_swaps_the_completions():
    columns = {**{role: role for role in ("prompt", "completion_a", "completion_b")}, "probability": "p"}
    row = read({"prompt": "q", "completion_a": "A", "completion_b": "B", "p": 0.25}, columns)
    assert row.completions == ["B", "A"]
    assert row.probability == 0.75


@pytest.mark.parametrize("score", [True, "high", None, math.nan, math.inf, [1]])
def test_votes_that_are_no_finite_number_are_refused(score):
    with pytest.raises(Refused, match=r"votes_a|missing"):
        read(voted(score, 1), VOTES)


@pytest.mark.parametrize("value", [True, False, 3, 2.5, {"text": "x"}])
@pytest.mark.parametrize("role", ["prompt", "chosen", "rejected"])
def test_what_is_not_text_is_refused_and_never_turned_into_text(role, value):
    record = {"prompt": "q", "chosen": "good", "rejected": "bad", role: value}
    with pytest.raises(Refused, match="is not text"):
        read(record, PAIR)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": ""}, "completion is empty"),
        ({"rejected": " \n\t"}, "completion is empty"),
        ({"prompt": "  "}, "prompt is empty"),
        ({"chosen": None}, "field is missing: 'chosen'"),
        ({"chosen": "bad "}, "completions are identical"),
        ({"chosen": "half a pair \ud83d"}, "not valid UTF-8"),
    ],
)
def test_defective_rows_are_refused_with_their_reason(change, reason):
    with pytest.raises(Refused, match=reason):
        read({"prompt": "q", "chosen": "good", "rejected": "bad", **change}, PAIR)


def test_a_template_builds_the_prompt_from_text_columns():
    template = "Debate: {debate}\nPosition: {stance}\nArgument: "
    record = {"debate": "Tea {hot}", "stance": "", "chosen": "x", "rejected": "y"}
    row = read(record, IMPLICIT, prompt_template=template)
    assert row.prompt == "Debate: Tea {hot}\nPosition: \nArgument: "
    with pytest.raises(Refused, match="'stance' is the number 4"):
        read({**record, "stance": 4}, IMPLICIT, prompt_template=template)


# Implicit prompts


def test_an_implicit_prompt_is_never_cut_inside_a_word():
    assert cut_common_prefix(["The sky is blue.", "The sky is black."]) == (
        "The sky is",
        [" blue.", " black."],
    )
    assert cut_common_prefix(["The sky", "The sky is blue"]) == ("The", [" sky", " sky is blue"])
    prompt, completions = cut_common_prefix(["Q: why?\n\nBecause of it", "Q: why?\n\nBecauses"])
    assert (prompt, completions) == ("Q: why?", ["\n\nBecause of it", "\n\nBecauses"])


@pytest.mark.parametrize(
    "texts",
    [["sky", "sky is blue"], ["blue", "black"], ["The  ", "The  blue"], ["same", "same"], [" a", " b"]],
)
def test_texts_without_a_shared_boundary_are_refused(texts):
    with pytest.raises(Refused, match="no prompt found"):
        cut_common_prefix(texts)


def test_an_implicit_prompt_ends_behind_the_given_text():
    texts = ["Human: hi\n\nAssistant: Yes, sure", "Human: hi\n\nAssistant: Yes, no"]
    row = read({"chosen": texts[0], "rejected": texts[1]}, IMPLICIT, implicit_prompt_end="\n\nAssistant:")
    assert row.prompt == "Human: hi\n\nAssistant:"
    assert row.completions == [" Yes, sure", " Yes, no"]
    with pytest.raises(Refused, match="no prompt found"):
        read({"chosen": "a b", "rejected": "a c"}, IMPLICIT, implicit_prompt_end="\n\nAssistant:")


# Conversations


def test_explicit_conversations_are_kept():
    record = {"prompt": said("hi"), "chosen": said("yes", first="a"), "rejected": said("no", first="a")}
    row = read(record, PAIR)
    assert row.prompt == said("hi")
    assert row.completions == [said("yes", first="a"), said("no", first="a")]


def test_an_implicit_conversation_is_cut_at_a_message():
    record = {"chosen": said("hi", "yes", "why", "so"), "rejected": said("hi", "yes", "why", "soon")}
    row = read(record, IMPLICIT)
    assert row.prompt == said("hi", "yes", "why")
    assert row.completions == [said("so", first="a"), said("soon", first="a")]


def test_a_prompt_column_beside_full_conversations_must_agree_with_them():
    record = {"prompt": "hi", "chosen": said("hi", "yes"), "rejected": said("hi", "no")}
    assert read(record, PAIR).prompt == said("hi")
    with pytest.raises(Refused, match="contradicts"):
        read({**record, "prompt": "other"}, PAIR)


def test_plain_rows_become_messages_when_asked():
    row = read(
        {"prompt": "q", "chosen": "x", "rejected": "y"}, PAIR, as_messages=True, system_prompt="Be kind."
    )
    assert row.prompt == [{"role": "system", "content": "Be kind."}, *said("q")]
    assert row.completions == [said("x", first="a"), said("y", first="a")]


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        (said("hi", "yes", "why"), "wrong order of roles"),
        ([{"role": "user", "content": "hi"}, {"role": "user", "content": "hi"}], "wrong order of roles"),
        ([*said("hi", "yes"), {"role": "system", "content": "x"}], "wrong order of roles"),
        ([*said("hi"), {"role": "bot", "content": "x"}], "unknown role"),
        ([*said("hi"), {"role": "assistant", "content": True}], "is not text"),
        ([*said("hi"), {"role": "assistant", "content": " "}], "completion is empty"),
        ([*said("hi"), {"role": "assistant", "content": "x", "tool_calls": [1]}], "tool calls"),
        ([{"from": "human", "text": "hi"}], "no role and content"),
        (["hi", "x"], "no role and content"),
        ([], "completion is empty"),
        ("plain", "mix plain text and messages"),
        (said("other", "yes"), "no prompt found"),
    ],
)
def test_defective_conversations_are_refused_with_their_reason(chosen, reason):
    with pytest.raises(Refused, match=reason):
        read({"chosen": chosen, "rejected": said("hi", "no")}, IMPLICIT)


HUMAN = "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: why\n\nAssistant:"


def test_transcripts_become_messages_and_are_cut_at_their_roles():
    record = {"chosen": f"{HUMAN} I think so.", "rejected": f"{HUMAN} I do not."}
    row = read(record, IMPLICIT)
    assert row.prompt == said("hi", "yes", "why")
    assert row.completions == [said("I think so.", first="a"), said("I do not.", first="a")]
    text = read(record, IMPLICIT, transcripts="text")
    assert text[:4] == (HUMAN, [" I think so.", " I do not."], "pairwise", None)
    explicit = read(
        {"prompt": HUMAN, "chosen": said("so", first="a"), "rejected": said("no", first="a")}, PAIR
    )
    assert explicit.prompt == said("hi", "yes", "why")


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ([{"from": "human", "value": "hi"}], lambda text: [{"from": "gpt", "value": text}]),
        ([{"from": "human", "value": "hi"}], lambda text: {"from": "gpt", "value": text}),
        (said("hi"), lambda text: {"role": "assistant", "content": text}),
        (json.dumps(said("hi")), lambda text: json.dumps(said(text, first="a"))),
    ],
    ids=["ShareGPT", "ShareGPT, single", "single", "JSON text"],
)
def test_messages_are_read_in_the_forms_of_public_data(prompt, answer):
    row = read({"prompt": prompt, "chosen": answer("yes"), "rejected": answer("no")}, PAIR)
    assert row[:4] == (said("hi"), [said("yes", first="a"), said("no", first="a")], "pairwise", None)


def test_text_that_merely_looks_like_json_stays_text():
    row = read({"prompt": "q", "chosen": '[{"a": 1}]', "rejected": "{no"}, PAIR)
    assert row.completions == ['[{"a": 1}]', "{no"]


def test_a_prompt_is_not_guessed_where_other_columns_may_hold_it():
    columns = {"completion_a": "a", "completion_b": "b", "preference": "label"}
    record = {"a": "The sum is 0.", "b": "The sum is 1.", "label": "1"}
    with pytest.raises(Refused, match=r"no prompt column .* implicit_prompt=true"):
        read(record, columns)


def test_an_input_follows_the_instruction_where_there_is_one():
    columns = {**PAIR, "prompt": "instruction", "input": "input"}
    record = {"instruction": "Sum up.", "input": "Text", "chosen": "x", "rejected": "y"}
    assert read(record, columns).prompt == "Sum up.\nText"
    assert read({**record, "input": ""}, columns).prompt == "Sum up."
    del record["input"]
    assert read(record, columns).prompt == "Sum up."


def test_several_rejected_completions_are_a_best_of_n_row():
    record = {"prompt": "q", "chosen": "x", "rejected": ["y", "z"]}
    assert read(record, PAIR) == Preference("q", ["x", "y", "z"], "best_of_n", None)
    assert read({**record, "rejected": ["y"]}, PAIR) == Preference("q", ["x", "y"], "pairwise", None)
    with pytest.raises(Refused, match="fewer than two"):
        read({**record, "rejected": []}, PAIR)
    with pytest.raises(Refused, match="one label for several"):
        read({**record, "margin": 1}, {**PAIR, "margin": "margin"})


# Scores, margins, strengths, winners: 1 / (1 + e^-x) is 0.731 at 1, 0.881 at 2, 0.953 at 3


@pytest.mark.parametrize(
    ("strength", "better", "probability"),
    [
        (-3, "A", 0.9526),
        (-2, "A", 0.8808),
        (-1, "A", 0.7311),
        (0, "A", 0.5),
        (1, "B", 0.7311),
        (3, "B", 0.9526),
    ],
)
def test_a_strength_becomes_a_probability(strength, better, probability):
    columns = {"prompt": "q", "completion_a": "a", "completion_b": "b", "strength": "s"}
    record = {"q": "q", "a": "A", "b": "B", "s": strength}
    row = read(record, columns)
    assert (row.completions[0], row.probability) == (better, pytest.approx(probability, abs=1e-4))
    if strength:
        assert read(record, columns, labels="hard").probability is None
    with pytest.raises(Refused, match="outside -3 to 3"):
        read({**record, "s": -100}, columns)


def test_scores_and_margins_become_probabilities_by_the_scale():
    columns = {**PAIR, "score_chosen": "c", "score_rejected": "r"}
    record = {"prompt": "q", "chosen": "x", "rejected": "y", "c": 8, "r": 6, "m": 1e9}
    assert read(record, columns).probability == pytest.approx(0.8808, abs=1e-4)
    assert read(record, columns, score_scale=0.5).probability == pytest.approx(0.7311, abs=1e-4)
    turned = read({**record, "c": 5}, columns)
    assert (turned.completions, turned.probability) == (["y", "x"], pytest.approx(0.7311, abs=1e-4))
    assert read(record, {**PAIR, "margin": "m"}).probability == 1.0


def test_winners_are_understood_and_zero_is_not():
    columns = {"prompt": "q", "completion_a": "a", "completion_b": "b", "preference": "w"}
    record = {"q": "q", "a": "A", "b": "B"}
    for label in ("model_b", "2", 2, "B"):
        assert read({**record, "w": label}, columns).completions == ["B", "A"]
    for label in ("tie", "tie (bothbad)"):
        assert read({**record, "w": label}, columns).probability == 0.5
    with pytest.raises(Refused) as caught:
        read({**record, "w": "left"}, columns)
    assert "known: a, b, tie, 1, 2, model_a" in caught.value.rule
    with pytest.raises(ConfigError, match=r'"0": "tie".* or .*"0": "a", "1": "b"'):
        read({**record, "w": 0}, columns)


# Lists


def test_an_order_names_the_places_best_first():
    record = {"prompt": "q", "completions": ["x", "y", "z"], "o": [2, 0, 1]}
    assert read(record, {**LIST, "order": "o"}) == Preference("q", ["z", "x", "y"], "ranking", None)
    assert read(record, {**LIST, "ranks": "o"}).completions == ["y", "z", "x"]
    for order in ([1, 2, 3], [0, 0, 1], [0, 1]):
        with pytest.raises(Refused, match="each completion once"):
            read({**record, "o": order}, {**LIST, "order": "o"})


def test_lists_of_objects_are_reached_by_paths():
    record = {"prompt": "q", "answers": [{"t": "b", "rank": 2}, {"t": "a", "rank": 1}, {"t": "c", "rank": 3}]}
    columns = {"prompt": "prompt", "completions": "answers[].t", "ranks": "answers[].rank"}
    assert read(record, columns) == Preference("q", ["a", "b", "c"], "ranking", None)


def test_lists_are_ordered_by_score_or_rank_best_first():
    record = {"prompt": "q", "completions": ["b", "c", "a"], "s": [2, 1, 3.5], "r": [2, 3, 1]}
    for label in ({"scores": "s"}, {"ranks": "r"}):
        assert read(record, {**LIST, **label}) == Preference("q", ["a", "b", "c"], "ranking", None)
    assert read(record, LIST).completions == ["b", "c", "a"]  # as it stands when nothing else is said


def test_only_the_best_is_trusted_in_best_of_n():
    record = {"prompt": "q", "completions": ["b", "c", "a"], "s": [1, 1, 3], "best": 2}
    expected = Preference("q", ["a", "b", "c"], "best_of_n", None)
    assert read(record, {**LIST, "best": "best"}) == expected
    assert read(record, {**LIST, "scores": "s"}, list_kind="best_of_n") == expected
    with pytest.raises(Refused, match="out of range: 3"):
        read({**record, "best": 3}, {**LIST, "best": "best"})


def test_equal_scores_are_refused_or_thinned_as_asked():
    columns = {**LIST, "scores": "s"}
    record = {"prompt": "q", "completions": ["a", "b", "c", "d"], "s": [2, 5, 2, 1]}
    with pytest.raises(Refused, match="equal scores"):
        read(record, columns)
    assert read(record, columns, ties="drop").completions == ["b", "a", "d"]
    pair = {"prompt": "q", "completions": ["a", "b"], "s": [2, 2]}
    assert read(pair, columns) == Preference("q", ["a", "b"], "pairwise", 0.5)
    with pytest.raises(LeftOut, match="tie"):
        read(pair, columns, ties="drop")
    with pytest.raises(LeftOut, match="tie"):
        read({**record, "s": [1, 1, 1, 1]}, columns, ties="drop")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"completions": ["a"]}, "fewer than two"),
        ({"completions": ["a", "b", "a"]}, "identical: completion 1 and completion 3"),
        ({"completions": ["a", True, "c"]}, "completion 2 is the boolean true"),
        ({"completions": "a, b"}, "not a list"),
        ({"s": [1, 2]}, "differ in number: 2 and 3"),
        ({"s": [1, 2, math.nan]}, "not finite"),
        ({"s": [1, 2, False]}, "not a number"),
    ],
)
def test_defective_lists_are_refused_with_their_reason(change, reason):
    with pytest.raises(Refused, match=reason):
        read(
            {"prompt": "q", "completions": ["a", "b", "c"], "s": [1, 2, 3], **change}, {**LIST, "scores": "s"}
        )


def test_a_list_may_stand_as_text_in_a_cell_or_in_several_columns():
    assert read({"prompt": "q", "completions": '["a", "b", "c"]', "s": "[1, 3, 2]"}, {**LIST, "scores": "s"})[
        1
    ] == [
        "b",
        "c",
        "a",
    ]
    columns = {"prompt": "prompt", "completions": ["x", "y"], "scores": ["sx", "sy"]}
    assert read({"prompt": "q", "x": "X", "y": "Y", "sx": 0, "sy": 1}, columns).completions == ["Y", "X"]


def test_candidates_of_a_prompt_are_ranked():
    config = DataConfig()
    row = rank_candidates(
        [Candidate("q", "bad", -1.0), Candidate("q", "good", 2.0), Candidate("q", "ok", 0.0)], config
    )
    assert row == Preference("q", ["good", "ok", "bad"], "ranking", None)
    with pytest.raises(Refused, match="fewer than two"):
        rank_candidates([Candidate("q", "alone", 1.0)], config)


def test_long_rows_are_left_out_when_asked():
    record = {"prompt": "1234", "chosen": "12345", "rejected": "1"}
    assert read(record, PAIR, max_characters=9).completions == ["12345", "1"]
    with pytest.raises(LeftOut, match="9 of 8"):
        read(record, PAIR, max_characters=8)


# System texts, weights, verdicts and thumbs


def test_a_system_text_is_a_message_of_a_conversation_and_a_paragraph_before_plain_text():
    row = {"system": "Be kind.", "prompt": "q", "chosen": "good", "rejected": "bad"}
    columns = {**PAIR, "system": "system"}
    assert read(row, columns).prompt == "Be kind.\n\nq"
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "q"}]
    assert read(row, columns, as_messages=True).prompt == chat
    assert read(row, columns, as_messages=True, system_prompt="Be brief.").prompt == chat
    assert read({**row, "system": ""}, columns).prompt == "q"
    with pytest.raises(Refused, match="system contradicts"):
        read({**row, "system": "Be brief.", "prompt": chat}, columns)
    assert settle_layout({}, list(row)).columns["system"] == "system"
    assert "system" not in settle_layout({**PAIR, "system": None}, list(row)).columns


def verdicts(values, completions=("A", "B", "C"), **config):
    config = DataConfig(source="rows.jsonl", **config)
    record = {"prompt": "q", "completions": list(completions), "verdicts": values}
    return read_verdicts(record, settle_layout({}, list(record)), config)


def test_each_judged_pair_of_a_matrix_is_a_row_with_its_share_of_wins():
    assert verdicts([[0, 3, 1], [1, 0, None], [1, 0, 0]]) == [
        Preference("q", ["A", "B"], "pairwise", 0.75),
        Preference("q", ["A", "C"], "pairwise", 0.5),
    ]
    assert verdicts([[0, 0.2, 0], [0.8, 0, 0], [0, 1, 0]]) == [
        Preference("q", ["B", "A"], "pairwise", 0.8),
        Preference("q", ["C", "B"], "pairwise", None),  # a single vote is a hard label
    ]


def test_a_list_of_verdicts_is_about_the_pairs_in_order():
    meanings = {"1": "a", "0": "b", "-": "tie"}
    assert verdicts([1, 0, "-"], preference_values=meanings) == [
        Preference("q", ["A", "B"], "pairwise", None),
        Preference("q", ["C", "A"], "pairwise", None),
        Preference("q", ["B", "C"], "pairwise", 0.5),
    ]
    with pytest.raises(ConfigError, match="a label 0 can mean two things"):
        verdicts([1, 0, 1])
    with pytest.raises(Refused, match="3 rows of 3, or 3 labels"):
        verdicts([1, 2])
    with pytest.raises(Refused, match="no votes"):
        verdicts([[0, 0, 0]] * 3)


def test_thumbs_up_are_paired_with_thumbs_down_of_the_same_prompt():
    config = DataConfig(source="rows.jsonl")
    layout = settle_layout({}, ["prompt", "completion", "label"])
    labels = {"a": True, "b": "false", "c": 0, "d": False}
    read_ones = [
        read_candidate({"prompt": "q", "completion": text, "label": label}, layout, config)
        for text, label in labels.items()
    ]
    pairs = pair_thumbs(read_ones)
    assert [row.completions for row in pairs] == [["a", "b"], ["a", "c"], ["a", "d"]]
    with pytest.raises(LeftOut, match="one label only: 0 true and 3 false"):
        pair_thumbs(read_ones[1:])
    with pytest.raises(Refused, match="neither true nor false"):
        read_candidate({"prompt": "q", "completion": "a", "label": "good"}, layout, config)
