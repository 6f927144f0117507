"""Short labels beside the points of a chart, where they cover neither points, lines nor each other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from softpref.evaluation.charts import INK
from softpref.evaluation.curves import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox


class Labels:
    """The points of one panel, and short labels that cover neither them nor each other."""

    _PLACES = ((0, 1), (1, 0), (0, -1), (-1, 0), (0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7))

    def __init__(self, axes: Axes) -> None:
        self._axes = axes
        self._labels: list[tuple[Point, str, float]] = []
        self._lines: list[Sequence[Point]] = []

    def add(self, place: Point, text: str = "", radius: float = 4.0) -> None:
        """A point of `radius` in typographic points, and what to write beside it."""
        self._labels.append((place, text, radius))

    def keep_clear(self, line: Sequence[Point]) -> None:
        """A line that labels cover only where there is no other place."""
        self._lines.append(line)

    def place(self, figure: Figure) -> None:
        """Write the labels. One that finds no place is left out: the table names every member."""
        unit = figure.dpi / 72
        left, bottom, right, top = self._axes.get_window_extent().extents
        points = [_square(self._pixels(place), radius * unit) for place, _, radius in self._labels]
        strokes = [
            _square(start + share * (end - start), unit)
            for line in self._lines
            for start, end in itertools.pairwise(map(self._pixels, line))
            for share in np.linspace(0, 1, 40)
        ]
        written: list[Bbox] = []
        for place, text, radius in self._labels:
            if not text:
                continue
            note = self._axes.annotate(
                text, place, xytext=(0, 0), textcoords="offset points", ha="center", va="center",
                fontsize=8.5, color=INK, zorder=6,
            )  # fmt: skip
            box = note.get_window_extent()
            offsets = [
                np.array([x * (box.width / 2 + far * unit), y * (box.height / 2 + far * unit)])
                for far in (radius + 1.5, radius + 7, radius + 13)
                for x, y in self._PLACES
            ]
            for offset, avoided in itertools.chain(
                ((offset, [*points, *written, *strokes]) for offset in offsets),
                ((offset, [*points, *written]) for offset in offsets),
            ):
                moved = box.translated(*offset)
                inside = moved.x0 > left and moved.y0 > bottom
                inside &= moved.x1 < right + 10 * unit and moved.y1 < top + 10 * unit
                if inside and not moved.count_overlaps(avoided):
                    note.set_position(tuple(offset / unit))
                    written.append(moved)
                    break
            else:
                note.remove()

    def _pixels(self, place: Point) -> np.ndarray:
        return np.asarray(self._axes.transData.transform(place))


def _square(centre: np.ndarray, radius: float) -> Bbox:
    from matplotlib.transforms import Bbox

    return Bbox([centre - radius, centre + radius])
