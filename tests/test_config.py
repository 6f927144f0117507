"""One path from files, text and JSON to a checked dataclass."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
from softpref.config import build_config, parse_overrides, read_mapping
from softpref.errors import ConfigError

pytestmark = pytest.mark.fast


@dataclass
class Oven:
    degrees: float
    minutes: int = 10
    mode: Literal["fan", "grill"] = "fan"
    light: bool = False
    note: str | None = None
    shelves: dict = field(default_factory=dict)
    racks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.degrees < 0:
            raise ConfigError("degrees must be at least 0")


def test_text_becomes_the_type_of_the_field():
    oven = build_config(
        Oven, {"degrees": "180.5", "minutes": "20", "light": "true", "shelves": '{"top": 1}', "note": ""}
    )
    assert oven == Oven(180.5, 20, "fan", True, "", {"top": 1})


def test_later_layers_win():
    assert build_config(Oven, {"degrees": 1, "minutes": 1}, {"minutes": 2}).minutes == 2


def test_whole_floats_are_integers_because_kfp_hands_them_over_so():
    assert build_config(Oven, {"degrees": 1, "minutes": 5.0}).minutes == 5


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"degrees": 1, "minuts": 3}, "no parameter 'minuts'; did you mean 'minutes'"),
        ({"degrees": 1, "qqq": 3}, "known: degrees, light, minutes, mode, note, racks, shelves"),
        ({}, "needs degrees"),
        ({"degrees": None}, "degrees needs a value"),
        ({"degrees": "hot"}, "degrees must be float, got 'hot'"),
        ({"degrees": 1, "minutes": 2.5}, "minutes must be int, got 2.5"),
        ({"degrees": 1, "minutes": True}, "minutes must be int, got True"),
        ({"degrees": 1, "minutes": "--5"}, "minutes must be int, got '--5'"),
        ({"degrees": 1, "mode": "steam"}, "'fan' | 'grill'"),
        ({"degrees": 1, "light": "maybe"}, "light must be bool"),
        ({"degrees": -1}, "at least 0"),
        ({"degrees": 1, "shelves": "top=1, low=2"}, 'like {"top": "1", "low": "2"}'),
        ({"degrees": 1, "shelves": "{top: 1}"}, 'like {"top": 1}'),
        ({"degrees": 1, "shelves": "top"}, 'like {"KEY": "VALUE"}'),
        ({"degrees": 1, "racks": "top,low"}, 'like ["top", "low"]'),
    ],
)
def test_wrong_values_are_refused_with_what_would_be_right(values, says):
    with pytest.raises(ConfigError) as refusal:
        build_config(Oven, values)
    assert says in str(refusal.value)


@pytest.mark.parametrize("text", ["{degrees: 1}", "[1, 2]", "3"])
def test_overrides_must_be_a_json_object(text):
    with pytest.raises(ConfigError, match="JSON"):
        parse_overrides(text)


def test_no_overrides_are_no_values():
    assert parse_overrides("") == parse_overrides(None) == {}


def test_files_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_mapping(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_mapping(broken)
    broken.write_bytes(b"a: 1\n\x07b: 2")  # of which the parser speaks in two lines
    with pytest.raises(ConfigError, match="not valid YAML") as refused:
        read_mapping(broken)
    assert "\n" not in str(refused.value)
    broken.write_text("- 1", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds a list"):
        read_mapping(broken)


@pytest.mark.parametrize(
    "content",
    [
        b"# caf\xe9\ndegrees: 1",
        b"degrees: " + b"9" * 5000,
        b'{"a":' * 20000,
        b"a: &a [*a]",
        b'{"note": "\\ud800"}',
        b'{"note": "a\\u0000b"}',
    ],
)
def test_a_file_that_cannot_be_understood_is_refused_with_a_sentence(tmp_path, content):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"configuration file .*c\.yaml"):
        read_mapping(tmp_path / "c.yaml")


def test_keys_are_text_as_written_and_other_encodings_are_read(tmp_path):
    (tmp_path / "c.yaml").write_bytes("labels: {yes: a, 0: b}".encode("utf-16"))
    assert read_mapping(tmp_path / "c.yaml") == {"labels": {"yes": "a", "0": "b"}}


@pytest.mark.parametrize("values", [{"degrees": 10**400}, {"degrees": 1, "minutes": "9" * 5000}])
def test_numbers_beyond_bounds_are_refused(values):
    with pytest.raises(ConfigError, match="must be"):
        build_config(Oven, values)


def test_a_mapping_may_lay_another_under_itself_that_does_so_too(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("a: &a {k: 0, l: 0}\nb: {m: &b {<<: *a, k: 1}}\nc: {<<: *b, l: 2}\n")
    assert read_mapping(path) == {
        "a": {"k": 0, "l": 0},
        "b": {"m": {"k": 1, "l": 0}},
        "c": {"k": 1, "l": 2},
    }
