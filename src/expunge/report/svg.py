"""A little SVG: scales, axes and marks as text, coloured by the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 36
FONT = 11

Scale = Callable[[float], float]


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """Map [low, high] to [start, end], clamped."""
    span = (high - low) or 1.0

    def scale(value: float) -> float:
        return start + (min(max(value, low), high) - low) / span * (end - start)

    return scale


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [low, high]: steps of 1, 2 or 5 times a power of ten."""
    span = (high - low) or 1.0
    raw = span / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A tick's text: no trailing zeros, k for thousands."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.10g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.0e}"


@dataclass
class Plot:
    """One panel with axes; marks are added in data coordinates.

    `x` and `y` are ranges; `log_x` puts x on a logarithmic scale. Texts are escaped here.
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
    x_ticks: Sequence[tuple[float, str]] | None = None
    y_ticks: Sequence[tuple[float, str]] | None = None
    marks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Make the scales."""
        low, high = (math.log10(v) for v in self.x) if self.log_x else self.x
        inner = linear(low, high, LEFT, self.width - RIGHT)
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

    def dot(self, x: float, y: float, style: str, note: str) -> None:
        """Draw a point with a tooltip."""
        self.marks.append(
            f'<circle cx="{self.px(x):.1f}" cy="{self.py(y):.1f}" r="5" class="dot {style}">'
            f"<title>{escape(note)}</title></circle>"
        )

    def text(self, left: float, top: float, words: str) -> None:
        """Put words at a pixel position."""
        self.marks.append(f'<text x="{left:.1f}" y="{top:.1f}">{escape(words)}</text>')

    def svg(self) -> str:
        """Return the panel as an SVG element that scales with the page."""
        parts = [
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" width="{self.width}" '
            f'height="{self.height}" xmlns="http://www.w3.org/2000/svg">',
            f"<title>{escape(self.title)}</title><desc>{escape(self.description)}</desc>",
        ]
        bottom, right = self.height - BOTTOM, self.width - RIGHT
        wanted = self.y_ticks or [(t, short(t)) for t in ticks(*self.y, about=4)]
        for value, words in wanted:
            at = self.py(value)
            parts.append(
                f'<line x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>'
            )
            parts.append(
                f'<text x="{LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{escape(words)}</text>'
            )
        for value, words in self._x_ticks():
            at = self.px(value)
            parts.append(
                f'<text x="{at:.1f}" y="{bottom + 14}" text-anchor="middle">{escape(words)}</text>'
            )
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}" class="axis"/>')
        if self.x_label:
            middle = (LEFT + right) / 2
            parts.append(
                f'<text x="{middle:.1f}" y="{self.height - 5}" text-anchor="middle" class="label">{escape(self.x_label)}</text>'
            )
        if self.y_label:
            middle = (TOP + bottom) / 2
            parts.append(
                f'<text transform="translate(11,{middle:.1f}) rotate(-90)" text-anchor="middle" class="label">{escape(self.y_label)}</text>'
            )
        return "".join([*parts, *self.marks, "</svg>"])

    def _x_ticks(self) -> Sequence[tuple[float, str]]:
        if self.x_ticks is not None:
            return self.x_ticks
        if not self.log_x:
            return [(t, short(t)) for t in ticks(*self.x, about=4)]
        low, high = (math.log10(v) for v in self.x)
        return [(10.0**k, short(10.0**k)) for k in range(math.ceil(low), math.floor(high) + 1)]
