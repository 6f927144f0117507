"""The figures of a sweep's members as tables by softness, for a terminal and for KFP's UI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from softpref.artifacts import plain
from softpref.evaluation.curves import position
from softpref.records.evaluation import Evaluation
from softpref.records.figures import Figure

_GAP = "&nbsp;&nbsp;"


class Column(NamedTuple):
    """A figure of each member: its title, where it is, its name there."""

    title: str
    group: str
    metric: str

    def of(self, member: Evaluation) -> Figure | None:
        return (getattr(member, self.group) or {}).get(self.metric)

    def cell(self, member: Evaluation) -> str:
        """The value, with its interval where samples vary; a dash where it is not known."""
        figure = self.of(member)
        if figure is None or figure.value is None:
            return "–"
        if self.group != "metrics":
            return f"{figure.value:.3f}"
        return figure.text()


_WIN_RATE = Column("win rate", "metrics", "win_rate")
_SAMPLED = (
    Column("expected reward", "metrics", "expected_reward"),
    Column("KL (nats)", "metrics", "kl_sequence"),
    Column("entropy (nats)", "metrics", "entropy_sequence"),
)
_MASS = Column("mass on set", "exact", "mass_on_set")
_EXACT = (
    Column("entropy on set", "exact", "entropy"),
    Column("optimum's", "exact", "optimum_entropy"),
    Column("KL(optimum‖policy)", "exact", "kl_optimum_to_policy"),
    _MASS,
)
_THEORY = (
    Column("optimum's reward", "theory", "optimum_expected_reward"),
    Column("optimum's KL", "theory", "optimum_kl"),
    Column("KL(optimum‖policy)", "theory", "kl_optimum_to_policy"),
    Column("effective share", "theory", "effective_sample_size"),
)


def columns(members: Sequence[Evaluation]) -> list[Column]:
    """The columns for these members: theory's figures only where some member has them."""
    exact = any(member.exact for member in members)
    theory = any(member.theory for member in members)
    return [_WIN_RATE, *_SAMPLED, *(_EXACT if exact else ()), *(_THEORY if theory else ())]


def softness(member: Evaluation) -> str:
    """α of a model of SPO; a dash for another method."""
    return f"{member.alpha:g}" if member.method == "spo" and member.alpha is not None else "–"


def format_table(members: Sequence[Evaluation]) -> str:
    """The plain-text table by α that the console prints, each figure with its interval."""
    shown = columns(members)
    lines = [["model", "α", *(column.title for column in shown)]]
    lines += [
        [member.name, softness(member), *(column.cell(member) for column in shown)]
        for member in sorted(members, key=position)
    ]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    rendered = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([rendered[0], "─" * max(map(len, rendered)), *rendered[1:]])


def markdown_table(members: Sequence[Evaluation], chosen: str | None) -> str:
    """The table by α in Markdown, six columns wide, for UIs that cut off more; the chosen model is bold.

    Cells begin with spaces, since KFP's UI puts nothing between columns. The last column is the mass on the
    set of all outcomes where that is known, else the win rate.

    Args:
        chosen: name of a member, or None.
    """
    shown = [*_SAMPLED, _MASS if any(member.exact for member in members) else _WIN_RATE]
    lines = [
        ["model", *(f"{_GAP}{title}" for title in ("α", *(column.title for column in shown)))],
        [":--", *["--:"] * (1 + len(shown))],
    ]
    for member in sorted(members, key=position):
        name = plain(member.name)
        cells = [softness(member), *(column.cell(member) for column in shown)]
        cells = [_GAP + cell.replace(", ", ",\N{NO-BREAK SPACE}") for cell in cells]  # kept on one line
        lines.append([f"**{name}**, chosen" if member.name == chosen else name, *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
