"""What came of breaking something many times, and how it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Say = Callable[[str], None]


@dataclass
class Outcome:
    """Of one kind of case.

    Attributes:
        cases: how many there were.
        refused: in how many softpref refused in a sentence; in the others the result was right, but for
            the faults.
        faults: what went wrong, a sentence a case.
    """

    name: str
    cases: int = 0
    refused: int = 0
    faults: list[str] = field(default_factory=list)

    def note(self, *, refused: bool = False, fault: str = "") -> None:
        """Count a case."""
        self.cases += 1
        if fault:
            self.faults.append(fault)
        else:
            self.refused += refused

    @property
    def right(self) -> int:
        return self.cases - self.refused - len(self.faults)


def table(title: str, outcomes: Sequence[Outcome]) -> str:
    """The outcomes of a part as lines, with their sums."""
    total = Outcome("in all")
    for one in outcomes:
        total.cases, total.refused = total.cases + one.cases, total.refused + one.refused
        total.faults += one.faults
    lines = [f"{title:28} {'cases':>6} {'right':>6} {'refused':>8} {'faults':>7}"]
    lines += [
        f"{one.name:28} {one.cases:6} {one.right:6} {one.refused:8} {len(one.faults):7}"
        for one in [*outcomes, total]
    ]
    return "\n".join(lines)
