"""A little SVG: scales, axes and marks as text, coloured by the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 360, 220
RIGHT, TOP, BOTTOM = 14, 12, 42
FONT = 12
_WIDE = 0.62  # width of a digit or letter, in font sizes; a little more than most fonts have

Scale = Callable[[float], float]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


def text_width(words: str) -> float:
    """Estimated width of a text in pixels."""
    return len(words) * FONT * _WIDE


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """Map [low, high] to [start, end], clamped."""
    span = (high - low) or 1.0

    def scale(value: float) -> float:
        return start + (min(max(value, low), high) - low) / span * (end - start)

    return scale


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [low, high]: steps of 1, 2 or 5 times a power of ten."""
    span = (high - low) or 1.0
    if not math.isfinite(span):
        return []
    raw = span / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A tick's text: no trailing zeros, k for thousands."""
    if abs(value) >= 10_000:
        words = f"{value / 1000:.4g}k"
    elif abs(value) < 1e-4 and value != 0:
        words = f"{value:.0e}"
    else:
        words = f"{value:.6g}"
    return words.replace("-", "−")


@dataclass
class Plot:
    """One panel with axes; marks are added in data coordinates.

    `x` and `y` are ranges; `log_x` puts x on a logarithmic scale. The left margin is as wide as the
    longest tick of y. Texts are escaped here.
    """

    title: str
    description: str
    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str = ""
    y_label: str = ""
    width: int = WIDTH
    height: int = HEIGHT
    log_x: bool = False
    grid: bool = True
    x_ticks: Sequence[tuple[float, str]] | None = None
    y_ticks: Sequence[tuple[float, str]] | None = None
    marks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Make the scales."""
        if self.y_ticks is None:
            self.y_ticks = [(t, short(t)) for t in ticks(*self.y, about=4)]
        widest = max((text_width(words) for _, words in self.y_ticks), default=0.0)
        self.left = (20 if self.y_label else 2) + widest + 6
        low, high = (math.log10(v) for v in self.x) if self.log_x else self.x
        inner = linear(low, high, self.left, self.width - RIGHT)
        self.px: Scale = (lambda v: inner(math.log10(max(v, 1e-12)))) if self.log_x else inner
        self.py: Scale = linear(*self.y, self.height - BOTTOM, TOP)

    def line(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """Join points with a line."""
        path = " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)
        self.marks.append(f'<polyline points="{path}" class="line {style}"/>')

    def steps(self, edges: Sequence[float], heights: Sequence[float], style: str) -> None:
        """Draw a histogram's outline over `edges`, lightly filled."""
        base = self.py(self.y[0])
        path = f"M{self.px(edges[0]):.1f},{base:.1f}"
        for left, right, h in zip(edges, edges[1:], heights, strict=False):
            path += f"L{self.px(left):.1f},{self.py(h):.1f}L{self.px(right):.1f},{self.py(h):.1f}"
        path += f"L{self.px(edges[-1]):.1f},{base:.1f}"
        self.marks.append(f'<path d="{path}" class="steps {style}"/>')

    def bar(self, x: float, value: float, width: float, style: str) -> None:
        """Draw a bar from the bottom to `value`, `width` in data units around `x`."""
        left, right = self.px(x - width / 2), self.px(x + width / 2)
        top, base = self.py(value), self.py(self.y[0])
        self.marks.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
            f'height="{max(base - top, 0):.1f}" class="bar {style}"/>'
        )

    def beam(self, start: float, end: float, y: float, height: float, style: str) -> None:
        """Draw a lying bar from `start` to `end`, `height` in data units around `y`."""
        left, right = self.px(start), self.px(end)
        top, base = self.py(y + height / 2), self.py(y - height / 2)
        self.marks.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{max(right - left, 0):.1f}" '
            f'height="{base - top:.1f}" class="bar {style}"/>'
        )

    def whisker(self, low: float, high: float, y: float) -> None:
        """Draw a lying interval with ends."""
        left, right, at = self.px(low), self.px(high), self.py(y)
        self.marks.append(
            f'<path d="M{left:.1f},{at - 3:.1f}v6m0,-3H{right:.1f}m0,-3v6" class="whisker" fill="none"/>'
        )

    def upright(self, x: float, y: float, height: float) -> None:
        """Draw a short upright line: the reference of a lying bar."""
        at, top, base = self.px(x), self.py(y + height / 2), self.py(y - height / 2)
        self.marks.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top:.1f}" y2="{base:.1f}" class="ref"/>'
        )

    def tick_mark(self, x: float, y: float, width: float) -> None:
        """Draw a short horizontal line: the reference beside a bar."""
        left, right = self.px(x - width / 2), self.px(x + width / 2)
        self.marks.append(
            f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{self.py(y):.1f}" y2="{self.py(y):.1f}" class="ref"/>'
        )

    def vertical(self, x: float) -> None:
        """Draw a dashed vertical line over the whole height."""
        at = self.px(x)
        self.marks.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{self.height - BOTTOM}" class="cut"/>'
        )

    def cell(self, column: float, row: float, share: float, note: str) -> None:
        """Shade a unit square around (column, row) by a share in 0 … 1, with a tooltip."""
        left, right = self.px(column - 0.47), self.px(column + 0.47)
        top, bottom = self.py(row + 0.47), self.py(row - 0.47)
        self.marks.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" '
            f'class="bar retain" opacity="{min(1.0, 0.12 + 0.88 * share):.2f}"><title>{escape(note)}</title></rect>'
        )

    def dot(self, x: float, y: float, style: str, note: str) -> None:
        """Draw a point with a tooltip."""
        self.marks.append(
            f'<circle cx="{self.px(x):.1f}" cy="{self.py(y):.1f}" r="5" class="dot {style}">'
            f"<title>{escape(note)}</title></circle>"
        )

    def label(self, x: float, y: float, words: str, taken: list[Box]) -> None:
        """Put words near a data point where nothing else is, with a leader line if further away.

        Args:
            x: of the point, in data coordinates.
            y: of the point.
            words: a short label, such as a number.
            taken: boxes that are occupied, in pixels; the label's own is added.
        """
        px, py, wide = self.px(x), self.py(y), text_width(words)
        for strict in (True, False):
            for cx, cy, far in _around(px, py, wide):
                box = (cx - wide / 2 - 1, cy - 7, cx + wide / 2 + 1, cy + 7)
                inside = (
                    box[0] >= self.left + 2 and box[2] <= self.width - 2
                    and box[1] >= 2 and box[3] <= self.height - BOTTOM - 2
                )  # fmt: skip
                if not inside or any(_meet(box, other) for other in taken):
                    continue
                end = (min(max(px, box[0]), box[2]), box[3] if cy < py else box[1])
                if far and strict and any(_crosses((px, py), end, other) for other in taken):
                    continue
                if far:
                    self.marks.append(
                        f'<line x1="{px:.1f}" y1="{py:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" class="leader"/>'
                    )
                self.marks.append(
                    f'<text x="{cx:.1f}" y="{cy + 4:.1f}" text-anchor="middle" class="number">{escape(words)}</text>'
                )
                taken.append(box)
                return

    def svg(self) -> str:
        """Return the panel as an SVG element that scales with the page."""
        parts = [
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" width="{self.width}" '
            f'height="{self.height}" xmlns="http://www.w3.org/2000/svg">',
            f"<title>{escape(self.title)}</title><desc>{escape(self.description)}</desc>",
        ]
        bottom, right = self.height - BOTTOM, self.width - RIGHT
        for value, words in self.y_ticks or ():
            at = self.py(value)
            if self.grid:
                parts.append(
                    f'<line x1="{self.left:.1f}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>'
                )
            parts.append(
                f'<text x="{self.left - 5:.1f}" y="{at + 3.5:.1f}" text-anchor="end">{escape(words)}</text>'
            )
        free = 0.0
        for value, words in self._x_ticks():
            half = text_width(words) / 2
            at = min(self.px(value), self.width - half - 1)
            if at - half < free:
                continue  # no room beside the tick before
            free = at + half + 4
            parts.append(
                f'<text x="{at:.1f}" y="{bottom + 19}" text-anchor="middle">{escape(words)}</text>'
            )
        parts.append(
            f'<line x1="{self.left:.1f}" x2="{right}" y1="{bottom}" y2="{bottom}" class="axis"/>'
        )
        if self.x_label:
            middle = (self.left + right) / 2
            parts.append(
                f'<text x="{middle:.1f}" y="{self.height - 5}" text-anchor="middle" class="label">{escape(self.x_label)}</text>'
            )
        if self.y_label:
            middle = (TOP + bottom) / 2
            parts.append(
                f'<text transform="translate(11,{middle:.1f}) rotate(-90)" text-anchor="middle" class="label">{escape(self.y_label)}</text>'
            )
        return "".join([*parts, *self.marks, "</svg>"])

    def standalone(self, colours: Mapping[str, str]) -> str:
        """Return the panel as a file of its own, which has no page to take colours from.

        Args:
            colours: of the styles of lines, by name.
        """
        rules = (
            "svg{font:12px sans-serif;background:#fff}.grid{stroke:#ddd}.axis,.leader{stroke:#888}"
        )
        rules += ".line{fill:none;stroke-width:2}"
        rules += "".join(f".{name}{{stroke:{colour}}}" for name, colour in colours.items())
        head, end, rest = self.svg().partition(">")
        return f"{head}{end}<style>{rules}</style>{rest}\n"

    def _x_ticks(self) -> Sequence[tuple[float, str]]:
        if self.x_ticks is not None:
            return self.x_ticks
        if not self.log_x:
            return [(t, short(t)) for t in ticks(*self.x, about=4)]
        low, high = (math.log10(v) for v in self.x)
        steps = (1, 2, 5) if high - low < 2.2 else (1,)
        powers = range(math.floor(low), math.ceil(high) + 1)
        values = [m * 10.0**k for k in powers for m in steps]
        return [(v, short(v)) for v in values if self.x[0] <= v <= self.x[1]]


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _around(px: float, py: float, wide: float) -> list[tuple[float, float, bool]]:
    """Places for a label, nearest first and upward first, and whether they need a leader line."""
    found = []
    for radius in (10, 16, 24, 34, 46, 60, 76, 94, 114, 136):
        for turn in (1, -1, 2, -2, 3, -3, 0, 4, -4, 5, -5, 6, -6, 7, -7, 8):
            angle = math.pi * (turn / 8 - 0.5)
            cx = px + (radius + (wide / 3 if radius <= 16 else 0)) * math.cos(angle)
            found.append((cx, py + radius * math.sin(angle), radius > 16))
    return found


def _crosses(start: tuple[float, float], end: tuple[float, float], box: Box) -> bool:
    """Whether a leader line, beyond its own dot, runs through a box."""
    length = math.dist(start, end)
    steps = max(2, int(length / 3))
    for k in range(1, steps):
        t = k / steps
        at = (start[0] + t * (end[0] - start[0]), start[1] + t * (end[1] - start[1]))
        if t * length > 9 and box[0] < at[0] < box[2] and box[1] < at[1] < box[3]:
            return True
    return False
