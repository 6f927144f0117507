"""CONTRIBUTING.md names files, commands and identifiers that exist."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

REPOSITORY = Path(__file__).parents[1]
TEXT = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
PATHS = sorted(
    set(re.findall(r"`((?:components|tests|pipelines|images|docs)/[\w./-]+|[\w-]+\.(?:toml|txt|md))`", TEXT))
)


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_it_names_exists(path):
    assert (REPOSITORY / path).exists()


def test_a_command_that_it_names_is_a_target():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"`make ([\w-]+)", TEXT)
    assert len(targets) > 5
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_a_name_that_a_list_gives_stands_in_the_file_before_it():
    for step in re.split(r"\n(?=\d\. |\n)", TEXT):
        files = re.findall(r"`(components/[\w/]+\.py)`", step)
        code = "".join((REPOSITORY / file).read_text(encoding="utf-8") for file in files)
        for name in re.findall(r"`(_?[A-Za-z_]+)`", step) if files and step[0].isdigit() else ():
            assert re.search(rf"\b{name}\b", code), (name, files)
