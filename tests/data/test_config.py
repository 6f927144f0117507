"""Wrong parameters of the data stage are refused at once, with what would be right."""

import subprocess
import sys

import pytest
from softpref.config import build_config
from softpref.data.columns import check_present, check_roles, paths_of, settle_layout, value_at
from softpref.data.config import DataConfig
from softpref.errors import ConfigError

pytestmark = pytest.mark.fast

CANDIDATES = {"completion_a": "x", "completion_b": "y"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"test_fraction": 1.5}, "between 0 and 1"),
        ({"test_fraction": 0.6, "validation_fraction": 0.4}, "nothing to train on"),
        ({"rows": -1}, "rows must be at least 1"),
        ({"votes": -1}, "votes must be at least 0"),
        ({"ties": "keep"}, "'half' | 'drop'"),
        ({"test_fractoin": 0.1}, "did you mean 'test_fraction'"),
        ({"source": "x.csv", "prompt_template": "no field"}, "no {column} field"),
        ({"source": "x.csv", "prompt_template": "{a!r}"}, "plain {column} fields"),
        ({"source": "x.csv", "prompt_template": "{a"}, "malformed"),
        ({"source": "x.csv", "columns": {"choosen": "a"}}, "did you mean 'chosen'"),
        ({"source": "x.csv", "columns": {"chosen": "a"}}, "'rejected' is missing"),
        ({"source": "x.csv", "columns": {"prompt": "a"}}, "must name chosen/rejected"),
        (
            {"source": "x.csv", "columns": {"chosen": "a", "rejected": "b", "completions": "c"}},
            "got chosen/rejected and",
        ),
        ({"source": "x.csv", "columns": {"chosen": ["a"], "rejected": "b"}}, "must be one column name"),
        ({"source": "x.csv", "columns": CANDIDATES}, "exactly one of: votes_a and votes_b, or votes"),
        ({"source": "x.csv", "columns": {**CANDIDATES, "votes_a": "v"}}, "exactly one of"),
        ({"source": "x.csv", "columns": {**CANDIDATES, "votes": "v", "preference": "p"}}, "exactly one of"),
        ({"source": "x.csv", "preference_values": {"left": "first"}}, "must be 'a', 'b' or 'tie'"),
        ({"source": "x.csv", "sft_columns": {"answer": "a"}}, "role 'answer'"),
        ({"prompt_template": "{prompt}"}, 'does not go with source "story"'),
    ],
)
def test_a_wrong_parameter_is_refused_with_what_would_be_right(values, message):
    with pytest.raises(ConfigError) as caught:
        build_config(DataConfig, values)
    assert message in str(caught.value)


def test_a_template_and_a_prompt_column_exclude_each_other():
    with pytest.raises(ConfigError, match="not both"):
        check_roles({"prompt": "q", "chosen": "a", "rejected": "b"}, has_template=True)


def test_columns_named_like_roles_are_found():
    known = ["id", "prompt", "chosen", "rejected", "extra"]
    assert settle_layout({}, known).columns == {r: r for r in ("chosen", "rejected", "prompt")}
    votes = ["completion_a", "completion_b", "votes_a", "votes_b", "votes_equal", "probability"]
    layout = settle_layout({}, votes)
    assert layout.label == ("votes_a", "votes_b")
    assert "votes_equal" in layout.columns
    assert layout.guessed
    with pytest.raises(ConfigError, match="the source has 'question', 'answer'"):
        settle_layout({}, ["question", "answer"])


def test_a_prompt_column_is_taken_where_columns_does_not_name_it():
    mapping = {"completion_a": "a", "completion_b": "b", "preference": "label"}
    known = ["prompt", "a", "b", "label", "id"]
    layout = settle_layout(mapping, known)
    assert layout.columns == {"prompt": "prompt", **mapping}
    assert layout.unused == ("id",)
    assert "prompt" not in settle_layout({**mapping, "prompt": None}, known).columns
    assert "prompt" not in settle_layout(mapping, known, template=["prompt"]).columns
    with pytest.raises(ConfigError, match="grouped by prompt: name a prompt column"):
        settle_layout({"completion": "a", "score": "b"}, ["a", "b"])


@pytest.mark.parametrize(
    ("known", "columns"),
    [
        (["prompt", "response_a", "response_b", "winner"], "prompt response_a response_b winner"),
        (
            ["prompt", "response_1", "response_2", "preference_strength"],
            "prompt response_1 response_2 preference_strength",
        ),
        (
            ["prompt", "answers", "answers[].answer", "answers[].rank"],
            "prompt answers[].answer answers[].rank",
        ),
        (
            ["instruction", "completions", "completions[].response", "completions[].overall_score"],
            "instruction completions[].response completions[].overall_score",
        ),
        (["instruction", "input", "chosen", "rejected"], "instruction chosen rejected input"),
    ],
)
def test_well_known_names_are_found_and_said(known, columns):
    layout = settle_layout({}, known)
    assert list(layout.columns.values()) == columns.split()
    assert layout.unused == ()
    assert layout.notes[0].startswith("recognised by the columns' names: ")


@pytest.mark.parametrize(
    ("known", "ways"),
    [
        (["prompt", "responses", "ranking"], ['"order": "ranking"', '"ranks": "ranking"']),
        (
            ["question", "instruction", "chosen", "rejected"],
            ['"prompt": "question"', '"prompt": "instruction"'],
        ),
        (["question", "output_1", "output_2", "output_3"], ["nothing says which is better", "ranks"]),
    ],
)
def test_a_name_with_two_meanings_is_refused_with_both_ways_to_say_it(known, ways):
    with pytest.raises(ConfigError) as caught:
        settle_layout({}, known)
    assert all(way in str(caught.value) for way in ways)


def test_scores_beside_chosen_and_rejected_are_unused_until_asked_for():
    known = ["prompt", "chosen", "rejected", "score_chosen", "score_rejected"]
    assert settle_layout({}, known).unused == ("score_chosen", "score_rejected")
    asked = settle_layout({}, known, scaled=True)
    assert (asked.label, asked.unused) == (("score_chosen", "score_rejected"), ())


def test_a_prompt_is_cut_from_shared_words_only_of_chosen_and_rejected_alone_or_when_asked():
    assert settle_layout({}, ["chosen", "rejected"]).implicit
    assert settle_layout({}, ["chosen", "rejected", "margin"]).implicit
    assert not settle_layout({}, ["chosen", "rejected", "frage"]).implicit
    assert settle_layout({}, ["chosen", "rejected", "frage"], implicit=True).implicit
    assert not settle_layout({}, ["completion_a", "completion_b", "preference"]).implicit


def test_paths_reach_into_nested_columns():
    record = {"a.b": 1, "m": {"x": 2}, "l": [{"t": "u"}, {"t": "v", "n": {"k": 3}}], "j": '[{"t": "w"}]'}
    assert [*paths_of(record)] == ["a.b", "m", "m.x", "l", "l[].t", "j"]
    assert [*paths_of({"chosen": [{"role": "user", "content": "hi"}]})] == ["chosen"]
    assert value_at(record, "a.b") == 1
    assert value_at(record, "m.x") == 2
    assert value_at(record, "l[].t") == ["u", "v"]
    assert value_at(record, "l[].n.k") == [None, 3]
    assert value_at(record, "j[].t") == ["w"]
    assert value_at({"l": {"t": ["u", "v"]}}, "l[].t") == ["u", "v"]  # as older `datasets` keep lists
    assert value_at(record, "m.x.y") is None
    with pytest.raises(ConfigError, match=r"no column 'l\[\].s'; it has .*; did you mean 'l\[\].t'"):
        check_present([("columns['completions']", "l[].s")], paths_of(record), "rows.jsonl")


def test_an_absent_column_is_refused_with_the_closest_and_all_present():
    with pytest.raises(ConfigError) as caught:
        check_present([("columns['chosen']", "argument_c")], ["argument_a", "stance"], "pairs.jsonl")
    assert "'argument_c'; it has 'argument_a', 'stance'; did you mean 'argument_a'?" in str(caught.value)


def test_the_configuration_loads_without_heavy_libraries():
    heavy = "{'torch', 'datasets', 'transformers', 'mlflow', 'matplotlib', 'kfp', 'pandas'}"
    code = f"import sys, softpref.data.config, softpref.data.stage; print({heavy} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "set()"


def test_templates_take_escapes_for_what_a_shell_and_a_form_do_not():
    typed = DataConfig(source="x.csv", prompt_template=r"Debate: {debate}\nArgument:\t\\n")
    assert typed.prompt_template == "Debate: {debate}\nArgument:\t\\n"
    assert DataConfig(source="x.csv", implicit_prompt_end=r"\n\nAssistant:").implicit_prompt_end == (
        "\n\nAssistant:"
    )
    written = DataConfig(source="x.csv", prompt_template="{debate}\nArgument:")
    assert written.prompt_template == "{debate}\nArgument:"
