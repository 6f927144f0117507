"""README.md and the pages of docs/ name commands, options, recipes and files that exist."""

import re
from pathlib import Path

import pytest
from softpref.preflight.parameters import TABLE

pytestmark = pytest.mark.fast

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def found(pattern):
    """Each match of `pattern` in the pages, with the page."""
    return {match for page in PAGES for match in re.findall(pattern, page.read_text(encoding="utf-8"))}


def test_readme_can_be_read_in_one_go():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) < 200


@every_page
def test_a_link_to_a_file_leads_to_one(page):
    for link in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).is_file(), link


def test_a_file_that_is_named_exists():
    named = found(r"`((?:pipelines|images|infra|tests|docs|components)/[\w./-]+)`")
    assert len(named) > 5
    for path in named - {"pipelines/packages/spo_sweep-lab.yaml"}:  # which a command writes
        assert (REPOSITORY / path).exists(), path


def test_a_target_of_make_exists():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = found(r"(?:^|`) *make ([a-z-]+)")
    assert {"sweep", "test", "docs"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_a_recipe_exists():
    recipes = found(r"--recipe (\w+)")
    assert recipes >= {"own", "storyteller"}
    for recipe in recipes:
        assert (REPOSITORY / f"pipelines/recipes/{recipe}.yaml").is_file(), recipe


def test_an_option_of_a_pipeline_is_a_parameter_or_one_of_the_launcher():
    launcher = {"recipe", "runner", "cluster", "endpoint", "namespace", "wait", "help", "output", "gpus"}
    options = set()
    for command in found(r"python pipelines/spo_\w+\.py ((?:[^\n`#]|\\\n)*)"):
        options |= set(re.findall(r"--([a-z][\w-]*)", command))
    assert {"alphas", "source"} <= options
    assert {option.replace("-", "_") for option in options} <= launcher | set(TABLE)
