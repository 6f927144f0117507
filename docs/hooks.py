"""What mkdocs does not do by itself: the site has pages from outside docs/, and formulas without a script."""

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).parents[1]
OUTSIDE = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "infra/README.md", "infra/kubeflow/*"),
    *("pipelines/recipes/*", "pipelines/clusters/*.yaml", "tests/benchmarks/*.md", "tests/benchmarks/*.png"),
    "tests/lm/ARCHITECTURES.md",
)
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in OUTSIDE:
        for path in sorted(REPOSITORY.glob(pattern)):
            place = path.relative_to(REPOSITORY).as_posix()
            files.append(File.generated(config, _in_site(place), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """In the repository links lead from file to file; here they lead from page to page."""
    folder = Path(str(page.file.abs_src_path)).relative_to(REPOSITORY).parent.as_posix()

    def moved(link: re.Match[str]) -> str:
        place = _in_site(posixpath.normpath(posixpath.join(folder, link[1])))
        return "](" + posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or ".")

    if page.file.src_uri == "parameters.md":
        markdown = markdown.replace("][", "]\\[")  # METHOD[:BETA][,OPTION=VALUE] is no link
    return LINK.sub(moved, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """LaTeX becomes MathML, which browsers draw themselves."""

    def drawn(formula: re.Match[str]) -> str:
        display = "block" if formula[1] == "div" else "inline"
        mathml = convert(html.unescape(formula[2].strip()), display=display)
        return mathml.replace("<mi>log</mi>", '<mi>log</mi><mspace width="0.17em"/>')

    return FORMULA.sub(drawn, content)


def _in_site(place: str) -> str:
    """Where a file of the repository stands in the site: docs/ is its root, README.md its first page."""
    return "index.md" if place == "README.md" else place.removeprefix("docs/")
