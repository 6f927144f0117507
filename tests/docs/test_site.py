"""The documentation builds without a warning, and what a reader's browser needs is in it."""

import dataclasses
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from softpref.spo import SPOConfig

REPOSITORY = Path(__file__).parents[2]


class Needs(HTMLParser):
    """What a page fetches by itself: scripts, style sheets, icons, images."""

    def __init__(self, text):
        super().__init__()
        self.addresses = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("script", "img", "iframe", "source") and attrs.get("src"):
            self.addresses.append(attrs["src"])
        if tag == "link" and attrs.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.addresses.append(attrs["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def text(site, page):
    return (site / page).read_text(encoding="utf-8")


def test_pages_fetch_nothing_from_elsewhere(site):
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]  # its links begin at the root
    assert len(pages) > 20
    for page in pages:
        needed = Needs(page.read_text(encoding="utf-8")).addresses
        assert any(address.endswith(".css") for address in needed), page
        for address in needed:
            assert (page.parent / address.split("?")[0]).is_file(), (page, address)


def test_formulas_are_mathml_and_none_is_left_as_latex(site):
    assert text(site, "method.html").count("<math") > 30
    for page in site.rglob("*.html"):
        assert 'class="arithmatex"' not in page.read_text(encoding="utf-8"), page


@pytest.mark.parametrize(
    ("page", "what"),
    [
        ("api/objectives.html", "Source: arXiv 2405.00747"),
        ("api/trainer.html", "sampling_interval"),
        ("api/stages.html", "registered_model_name"),
        ("parameters.html", "samples_per_refresh"),
        ("examples/index.html", "PreTrainedTokenizerFast"),
        ("infra/index.html", "CreateContainerConfigError"),
    ],
)
def test_references_hold_the_words_of_the_code(site, page, what):
    assert what in text(site, page)


def test_files_that_a_page_offers_are_in_the_site(site):
    for file in ("examples/softness.ipynb", "examples/align_in_thirty_lines.py"):
        assert (site / file).read_bytes() == (REPOSITORY / "docs" / file).read_bytes()


def test_an_option_that_the_page_of_methods_gives_a_value_is_one_of_training():
    text = (REPOSITORY / "docs/methods.md").read_text(encoding="utf-8")
    options = {name for code in re.findall(r"`[^`\n]+`", text) for name in re.findall(r"\b([a-z]\w*)=", code)}
    assert {"kl_beta", "rounds", "extrapolation"} <= options
    assert options <= {field.name for field in dataclasses.fields(SPOConfig)} | {"name"}  # name: of the model
