"""Wrong parameters of the data stage are refused at once, with what would be right."""

import subprocess
import sys

import pytest
from softpref.config import build_config
from softpref.data.columns import check_present, check_roles, guess_roles
from softpref.data.config import DataConfig
from softpref.errors import ConfigError

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
        ({"source": "x.csv", "columns": {"completion": "a", "score": "s"}}, "name a prompt column"),
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
    assert guess_roles(known, has_template=False).columns == {r: r for r in ("chosen", "rejected", "prompt")}
    votes = ["completion_a", "completion_b", "votes_a", "votes_b", "votes_equal", "probability"]
    layout = guess_roles(votes, has_template=False)
    assert layout.label == ("votes_a", "votes_b")
    assert "votes_equal" in layout.columns
    assert layout.guessed
    with pytest.raises(ConfigError, match="the source has 'question', 'answer'"):
        guess_roles(["question", "answer"], has_template=False)


def test_an_absent_column_is_refused_with_the_closest_and_all_present():
    with pytest.raises(ConfigError) as caught:
        check_present([("columns['chosen']", "argument_c")], ["argument_a", "stance"], "pairs.jsonl")
    assert "'argument_c'; did you mean 'argument_a'?; it has 'argument_a', 'stance'" in str(caught.value)


def test_the_configuration_loads_without_heavy_libraries():
    heavy = "{'torch', 'datasets', 'transformers', 'mlflow', 'matplotlib', 'kfp', 'pandas'}"
    code = f"import sys, softpref.data.config, softpref.data.stage; print({heavy} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "set()"
