"""Small charts as SVG and HTML text: colours by CSS class, so that they follow the page into the dark and onto paper.

Every mark carries its numbers as a `<title>`, which browsers show when it is pointed at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 64, 14, 12, 46  # margins of a chart, in its own units
_SHAPES = {
    "circle": "M-1,0a1,1 0 1,0 2,0a1,1 0 1,0 -2,0z",
    "square": "M-.9,-.9h1.8v1.8h-1.8z",
    "diamond": "M0,-1.25L1.25,0L0,1.25L-1.25,0z",
    "triangle": "M0,-1.2L1.15,.9L-1.15,.9z",
}


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` on a line, in steps of factors where `log`."""

    low: float
    high: float
    log: bool = True
    unit: str = ""

    @classmethod
    def around(cls, values: Iterable[float], log: bool = True, unit: str = "", room: float = 0.06) -> Scale:
        """What holds all of `values` with some room at both ends."""
        found = sorted(values)
        low, high = found[0], found[-1]
        if log:
            margin = max(high / low, 1.2) ** room
            return cls(low / margin, high * margin, True, unit)
        return cls(0.0, high * (1 + room), False, unit)

    def place(self, value: float) -> float:
        """Where `value` lies, from 0 to 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 7) -> list[tuple[float, str]]:
        """Round values inside, labelled."""
        if not self.log or self.high / self.low < 8:
            found = self._even_ticks(most)
        else:
            tries = [self._log_ticks(steps) for steps in ((1, 2, 5), (1, 3), (1,))]
            found = next((ticks for ticks in tries if len(ticks) <= most), tries[-1][:: -(-len(tries[-1]) // most)])
        if self.unit == "×":
            return [(value, f"{value:.3g}×") for value in found]
        return [(value, si(value, " " if self.unit else "") + self.unit) for value in found]

    def _log_ticks(self, steps: tuple[int, ...]) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        values = [step * 10.0**decade for decade in decades for step in steps]
        return [value for value in values if self.low <= value <= self.high]

    def _even_ticks(self, most: int) -> list[float]:
        rough = (self.high - self.low) / most
        size = 10 ** math.floor(math.log10(rough))
        step = next(size * n for n in (1, 2, 5, 10) if size * n >= rough)
        return [step * i for i in range(math.ceil(self.low / step), int(self.high / step) + 1)]


def si(value: float, space: str = "") -> str:
    """A short number: 20k, 4.5T, 300n.

    >>> si(20000), si(4.5e12, " "), si(0.0025), si(3e-7), si(0)
    ('20k', '4.5 T', '2.5m', '300n', '0')
    """
    if value == 0:
        return "0" + space
    power = min(5, max(-3, math.floor(math.log10(abs(value)) / 3 + 1e-9)))
    return f"{value / 1000**power:.3g}{space}{'nµm kMGTP'[power + 3].strip()}"


@dataclass(frozen=True)
class Chart:
    """Two axes and what is drawn between them."""

    x: Scale
    y: Scale
    xlabel: str
    ylabel: str
    width: int = 760
    height: int = 420
    xticks: tuple[tuple[float, str], ...] = ()  # these and no others, where given

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A point in the chart's own units."""
        return (LEFT + self.x.place(x) * (self.width - LEFT - RIGHT),
                self.height - BOTTOM - self.y.place(y) * (self.height - TOP - BOTTOM))  # fmt: skip

    def line(self, points: Iterable[tuple[float, float]], style: str, title: str = "") -> str:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*point) for point in points))
        return f'<polyline class="{style}" points="{path}">{_title(title)}</polyline>'

    def mark(self, x: float, y: float, style: str, title: str, shape: str = "circle", size: float = 4.5) -> str:
        left, top = self.at(x, y)
        where = f"translate({left:.1f},{top:.1f}) scale({size})"
        return f'<path class="{style}" d="{_SHAPES[shape]}" transform="{where}">{_title(title)}</path>'

    def text(self, x: float, y: float, words: str, style: str = "note", shift: tuple[float, float] = (0, 0)) -> str:
        left, top = self.at(x, y)
        return f'<text class="{style}" x="{left + shift[0]:.1f}" y="{top + shift[1]:.1f}">{escape(words)}</text>'

    def svg(self, *parts: str, name: str) -> str:
        """The whole chart; `name` says to who cannot see it what it shows."""
        box = f'viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(name)}"'
        return f"<svg {box}>{''.join(self._axes())}{''.join(parts)}</svg>"

    def _axes(self) -> Iterable[str]:
        low = self.height - BOTTOM
        right = self.width - RIGHT
        for value, label in self.xticks or self.x.ticks():
            x = LEFT + self.x.place(value) * (right - LEFT)
            yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{low}"/>'
            yield f'<text class="tick" x="{x:.1f}" y="{low + 17}" text-anchor="middle">{label}</text>'
        for value, label in self.y.ticks():
            y = low - self.y.place(value) * (low - TOP)
            yield f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        middle, height = (LEFT + right) / 2, (TOP + low) / 2
        below = f'x="{middle}" y="{self.height - 8}"'
        yield f'<text class="label" {below} text-anchor="middle">{escape(self.xlabel)}</text>'
        turned = f'transform="translate(14,{height}) rotate(-90)"'
        yield f'<text class="label" {turned} text-anchor="middle">{escape(self.ylabel)}</text>'


def symbol(style: str, shape: str = "circle") -> str:
    """A mark for a legend."""
    path = f'<path class="{style}" d="{_SHAPES[shape]}" transform="scale(4.5)"/>'
    return f'<svg class="key" viewBox="-7 -7 14 14" aria-hidden="true">{path}</svg>'


def _title(words: str) -> str:
    return f"<title>{escape(words)}</title>" if words else ""
