"""The pages' templates and style sheet: installed with the package, and strict about what they are given."""

import tomllib
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from softpref.pages import number, render, span
from softpref.records.figures import Figure

pytestmark = pytest.mark.fast
ROOT = Path(__file__).resolve().parents[1]


def test_every_file_beside_the_code_is_installed_with_it():
    package = ROOT / "components/softpref"
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    installed = {file for pattern in patterns["softpref"] for file in package.glob(pattern)}
    there = {file for file in package.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert there <= installed  # and what lies behind links: recipes and cluster profiles


def test_a_page_that_lacks_something_is_not_written():
    with pytest.raises(UndefinedError, match="reason"):
        render("comparison.html", comparison={}, run=[], warnings=[])


def test_what_is_not_known_is_a_dash():
    assert number(None) == "–"
    assert (number(0.12345), number(123.45)) == ("0.123", "123.5")
    assert span(Figure(0.5)) == "–"
    assert span(Figure(0.7, 0.5, 1)) == "0.500 … 1.000"
