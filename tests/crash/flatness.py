# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether figures that were taken again and again stay flat, and a picture of them; pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from statistics import median
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LEAST: Final = 5
"""Fewer values say nothing of a trend."""
_WIDTH, _HEIGHT, _COLUMNS, _LEFT, _TOP = 300, 90, 3, 14, 34
_COLOURS: Final = {True: "#2a8f4d", False: "#c8323c", None: "#8a8a8a"}


@dataclass
class Series:
    """A figure over time, and by how much it may grow.

    ``absolute`` is in the figure's unit, ``relative`` a part of the figure; without ``judged`` it
    is shown only, since others have a share in it.
    """

    name: str
    unit: str = ""
    absolute: float = 0.0
    relative: float = 0.0
    judged: bool = True
    values: list[float] = field(default_factory=list)

    def medians(self) -> tuple[float, float]:
        """Return the medians of the second fifth and of the last; the first is for warming up.

        A few values that stand out change neither.
        """
        fifth = max(1, len(self.values) // LEAST)
        return median(self.values[fifth : 2 * fifth]), median(self.values[-fifth:])

    def allowed(self) -> float:
        """Return by how much the median may grow."""
        return self.absolute + self.relative * self.medians()[0]

    def flat(self) -> bool | None:
        """Whether it has not grown by more than it may; None if that is not asked.

        What was taken too seldom is not flat.
        """
        if not self.judged:
            return None
        if len(self.values) < LEAST:
            return False
        early, late = self.medians()
        return late - early <= self.allowed()

    def verdict(self) -> str:
        """Say it in words."""
        flat = self.flat()
        if flat is None or len(self.values) < LEAST:
            return "shown only" if flat is None else "too few values"
        early, late = self.medians()
        said = "flat" if flat else "GROWS"
        return f"{said}: {early:.6g} to {late:.6g} (allowed {self.allowed():.3g})"


def draw(series: Sequence[Series], title: str) -> str:
    """Return a picture of all *series*, in SVG."""
    rows = -(-len(series) // _COLUMNS)
    width, height = _COLUMNS * (_WIDTH + _LEFT) + _LEFT, 40 + rows * (_HEIGHT + _TOP + 8)
    return "\n".join(
        [
            "<!-- SPDX-License-Identifier: LGPL-2.1-or-later -->",
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
            "<style>text { font: 11px sans-serif }</style>",
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            f'<text x="{_LEFT}" y="22" style="font-size: 15px">{escape(title)}</text>',
            *(line for number, each in enumerate(series) for line in _panel(each, number)),
            "</svg>",
            "",
        ]
    )


def _panel(series: Series, number: int) -> Iterable[str]:
    left = _LEFT + number % _COLUMNS * (_WIDTH + _LEFT)
    top = 40 + number // _COLUMNS * (_HEIGHT + _TOP + 8) + _TOP
    colour = _COLOURS[series.flat()]
    values = series.values or [0.0]
    least, most = min(values), max(values)
    # A figure that hardly moves is to look so.
    span = max(most - least, abs(most) / 10, 1.0)
    middle = (least + most) / 2
    points = " ".join(
        f"{left + _WIDTH * at / max(1, len(values) - 1):.1f},"
        f"{top + _HEIGHT * (0.5 - 0.9 * (value - middle) / span):.1f}"
        for at, value in enumerate(values)
    )
    unit = f" {series.unit}" if series.unit else ""
    yield f'<text x="{left}" y="{top - 18}" style="font-weight: bold">{escape(series.name)}</text>'
    text = f"{least:.6g} to {most:.6g}{unit}; {series.verdict()}"
    yield f'<text x="{left}" y="{top - 5}" fill="{colour}">{escape(text)}</text>'
    yield f'<rect x="{left}" y="{top}" width="{_WIDTH}" height="{_HEIGHT}" fill="#f6f6f6"/>'
    yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.3"/>'
