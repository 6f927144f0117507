"""The HTML pages: their templates, the style sheet, and how numbers are written.

A page is one file that loads nothing from a network. Templates escape what they are given, except drawings,
which this package makes itself and which are marked `safe` there.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from softpref.records import Figure


def number(value: float | None) -> str:
    """Three decimals, or a dash for an unknown value."""
    if value is None:
        return "–"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"


def span(figure: Figure) -> str:
    """A figure's interval, or a dash."""
    return "–" if figure.low is None else f"{number(figure.low)} … {number(figure.high)}"


def render(template: str, **values: Any) -> str:
    """An HTML document from one of the templates beside this file."""
    return _environment.get_template(template).render(values)


_environment = Environment(
    loader=PackageLoader("softpref", "pages"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_environment.filters |= {
    "number": number,
    "span": span,
    "thousands": "{:,.0f}".format,
    "percent": "{:.0%}".format,
}
