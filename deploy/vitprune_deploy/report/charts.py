"""Charts as inline SVG text: a plane with axes, and bars over blocks. Colours are classes that the page styles.

Every mark carries its values as a tooltip, and every chart a title; the page puts a table of the numbers behind it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 34, 46
BARS_TOP = 44  # the numbers of full bars stand under the legend
CHARACTER = 6.2  # average width of one in the font of charts
LARGEST_LABELLED = 24  # blocks whose bars have room for their number

Pair = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """A linear axis; ``low`` and ``high`` are the ends of what is shown."""

    label: str
    low: float
    high: float

    @classmethod
    def around(cls, label: str, values: Sequence[float], *, zero: bool = False, margin: float = 0.06) -> Axis:
        """The axis that shows all finite ``values``, from 0 on if ``zero``."""
        known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = (min(0.0, *known) if zero else min(known)), max(known)
        spare = margin * ((high - low) or abs(high) or 1.0)
        return cls(label, low if zero else low - spare, high + spare)

    def ticks(self, most: int = 7) -> list[float]:
        """Round numbers along the axis, at most ``most``."""
        rough = (self.high - self.low) / most
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


@dataclass
class Plot:
    """A plane that marks are added to. ``kind`` is the class of a mark: what it shows, and so its colour."""

    title: str
    x: Axis
    y: Axis
    marks: list[str] = field(default_factory=list)
    legend: list[tuple[str, str, str]] = field(default_factory=list)  # shape, kind, label

    def line(self, points: Sequence[Pair], kind: str, label: str = "", *, step: bool = False) -> None:
        """A line through ``points``, or a staircase that rises at each of them."""
        corners = list(points)
        if step:
            corners = [corner for (_, before), at in itertools.pairwise(points)
                       for corner in ((at[0], before), at)]  # fmt: skip
            corners = [points[0], *corners]
        path = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in corners)
        self.marks.append(f'<polyline class="line {kind}" points="{path}"/>')
        self._explain("line", kind, label)

    def dots(self, points: Sequence[Pair], kind: str, label: str = "", *, tips: Sequence[str] = ()) -> None:
        """A dot at each of ``points``; ``tips`` are their tooltips."""
        for place, (x, y) in enumerate(points):
            tip = f"<title>{escape(tips[place])}</title>" if tips else ""
            at = f'cx="{self._x(x):.1f}" cy="{self._y(y):.1f}"'
            self.marks.append(f'<circle class="dot {kind}" {at} r="{6 if kind == "chosen" else 4}">{tip}</circle>')
        self._explain("dot", kind, label)

    def whiskers(self, spans: Sequence[tuple[Pair, Pair]], kind: str) -> None:
        """A thin line between the two points of each span."""
        for (x1, y1), (x2, y2) in spans:
            ends = f'x1="{self._x(x1):.1f}" y1="{self._y(y1):.1f}" x2="{self._x(x2):.1f}" y2="{self._y(y2):.1f}"'
            self.marks.append(f'<line class="whisker {kind}" {ends}/>')

    def rule(self, x: float, kind: str, label: str) -> None:
        """A line from bottom to top at ``x``."""
        self.marks.append(
            f'<line class="rule {kind}" x1="{self._x(x):.1f}" x2="{self._x(x):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        )
        self._explain("line", kind, label)

    def svg(self) -> str:
        """The chart."""
        return _wrap(self.title, HEIGHT, [*self._axes(), *self.marks, *_legend(self.legend)])

    def _axes(self) -> list[str]:
        base, parts = HEIGHT - BOTTOM, []
        for value in self.x.ticks():
            parts += [_text(self._x(value), base + 16, _tick(value), "tick", "middle")]
            parts += [
                f'<line class="grid" x1="{self._x(value):.1f}" x2="{self._x(value):.1f}" y1="{TOP}" y2="{base}"/>'
            ]
        for value in self.y.ticks(5):
            at = self._y(value)
            parts += [_text(LEFT - 7, at + 4, _tick(value), "tick", "end")]
            parts += [f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>']
        middle = (TOP + base) / 2
        parts += [_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, self.x.label, "label", "middle")]
        turned = f'transform="rotate(-90 14 {middle})"'
        return [*parts, _text(14, middle, self.y.label, "label", "middle", turned)]

    def _explain(self, shape: str, kind: str, label: str) -> None:
        if label:
            self.legend.append((shape, kind, label))

    def _x(self, value: float) -> float:
        return LEFT + (value - self.x.low) / (self.x.high - self.x.low) * (WIDTH - LEFT - RIGHT)

    def _y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y.low) / (self.y.high - self.y.low) * (HEIGHT - TOP - BOTTOM)


def bars(title: str, unit: str, dense: Sequence[int], kept: Sequence[int]) -> str:
    """What each block keeps, as a bar inside the outline of what it had."""
    height, base, top = 160, 130, BARS_TOP
    step = (WIDTH - LEFT - RIGHT) / len(dense)
    most, width = max([*dense, 1]), min(44.0, 0.72 * step)
    parts = [_text(14, (top + base) / 2, unit, "label", "middle", f'transform="rotate(-90 14 {(top + base) / 2})"')]
    for value in sorted({0, most}):
        parts.append(_text(LEFT - 7, base - value / most * (base - top) + 4, f"{value:,}", "tick", "end"))
    for block, (had, has) in enumerate(zip(dense, kept, strict=True)):
        x = LEFT + step * (block + 0.5)
        tip = f"<title>block {block}: {has} of {had} {escape(unit)}</title>"
        for kind, value in (("dense", had), ("pruned", has)):
            tall = value / most * (base - top)
            box = f'x="{x - width / 2:.1f}" y="{base - tall:.1f}" width="{width:.1f}" height="{tall:.1f}"'
            parts.append(f'<rect class="bar {kind}" {box}>{tip}</rect>')
        if len(dense) <= LARGEST_LABELLED:
            parts.append(_text(x, base - had / most * (base - top) - 4, str(has), "value", "middle"))
        if block % math.ceil(len(dense) / LARGEST_LABELLED) == 0:
            parts.append(_text(x, base + 14, str(block), "tick", "middle"))
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 2, "block", "label", "middle"))
    return _wrap(title, height, [*parts, *_legend([("box", "dense", "dense"), ("box", "pruned", "kept")])])


def staircase(samples: Sequence[float], most: int = 400) -> list[Pair]:
    """The share of ``samples``, in percent, that is no greater than each of at most ``most`` of them."""
    ranked = np.sort(np.asarray(samples, dtype=float))
    places = np.unique(np.linspace(0, len(ranked) - 1, min(most, len(ranked))).round().astype(int))
    return [(float(ranked[place]), 100 * (place + 1) / len(ranked)) for place in places]


def _wrap(title: str, height: int, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
    return f"{head}<title>{escape(title)}</title>{''.join(parts)}</svg>"


def _legend(entries: Sequence[tuple[str, str, str]]) -> list[str]:
    parts, x = [], float(LEFT)
    for shape, kind, label in entries:
        if shape == "dot":
            parts.append(f'<circle class="key dot {kind}" cx="{x + 7:.1f}" cy="14" r="4"/>')
        elif shape == "box":
            parts.append(f'<rect class="key bar {kind}" x="{x + 2:.1f}" y="9" width="11" height="11"/>')
        else:
            parts.append(f'<line class="key line {kind}" x1="{x:.1f}" x2="{x + 14:.1f}" y1="14" y2="14"/>')
        parts.append(_text(x + 19, 18, label, "label", "start"))
        x += 19 + CHARACTER * len(label) + 16
    return parts


def _text(x: float, y: float, text: str, kind: str, anchor: str, more: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'


def _tick(value: float) -> str:
    return f"{value:.6g}" if abs(value) > 1e-12 else "0"
