"""The HTML pages: their templates, style sheet and script, and how numbers are written.

A page is one file that loads nothing from a network; its content security policy lets only our script and
the charting library run, by their hashes. Templates escape what they are given, except drawings, which this
package makes itself and which are marked `safe` there. Tables, verdict and drawings need no script.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from softpref import __version__
from softpref.records.figures import Figure


def number(value: float | None) -> str:
    """Three decimals, or a dash for an unknown value."""
    if value is None:
        return "–"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"


def span(figure: Figure) -> str:
    """A figure's interval, or a dash."""
    return "–" if figure.low is None else f"{number(figure.low)} … {number(figure.high)}"


def render(template: str, data: Mapping[str, object] | None = None, **values: Any) -> str:
    """An HTML document from one of the templates beside this file.

    Args:
        data: what the page's script draws and lets readers browse, as JSON; None for a page without charts,
            which does without the charting library.
        values: what the template names.
    """
    script = files(__name__).joinpath("page.js").read_text(encoding="utf-8")
    library = _library() if data is not None else ("", "")
    hashes = " ".join(f"'{one}'" for one in (_hash(script), library[1]) if one)
    return _environment.get_template(template).render(
        values,
        data=data,
        script=script,
        library=library[0],
        policy="default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        f"form-action 'none'; script-src {hashes}",
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=__version__,
    )


@functools.cache
def _library() -> tuple[str, str]:
    """Plotly.js, packed to a third by gzip and base64, and its hash for the content security policy."""
    from plotly.offline import get_plotlyjs

    text = get_plotlyjs()
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode(), _hash(text)


def _hash(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


_environment = Environment(
    loader=PackageLoader("softpref", "pages"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
_environment.filters |= {
    "number": number,
    "span": span,
    "thousands": "{:,.0f}".format,
    "percent": "{:.0%}".format,
}
