"""Line charts as SVG text: axes with round numbers, faint measured points, a smoothed line, marked steps.

Colours come from the style sheet of the page (classes `raw`, `smooth`, `second`, `grid`, `mark`), so that a chart
follows light and dark appearance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_MARGIN_LEFT, _MARGIN_RIGHT, _MARGIN_TOP, _MARGIN_BOTTOM = 58, 16, 18, 30
_LOGARITHMIC_FROM_RATIO = 20.0  # a loss that falls this far is unreadable on a linear axis
_MAX_POINTS = 1500
_DOT_RADIUS, _MAX_LARGE_DOTS = 4.0, 40
_LARGEST_VALUE = 1e100  # beyond it, and below its inverse, sums and differences leave the range of floats
_MARK_CHARACTER_WIDTH = 6.0  # in SVG units; texts of marks that would overlap are left out
Points = Sequence[tuple[float, float]]


def line_chart(
    points: Points,
    label: str,
    width: int,
    height: int,
    marks: Mapping[int, str] | None = None,
    smoothing_points: int = 1,
    allow_logarithmic: bool = False,
    second: Points = (),
) -> str:
    """Return one `<svg>` element that draws values over steps.

    Args:
        points: (step, value), ascending; those that are not finite or absurdly large are left out.
        label: what the chart shows; read out by screen readers.
        width, height: size of the drawing in SVG units; the page scales it.
        marks: step -> text of a vertical dashed line.
        smoothing_points: width of the centred moving average; 1 draws the values themselves.
        allow_logarithmic: use a logarithmic axis when the values span more than a factor of 20.
        second: points of a second quantity in the same unit, such as held-out loss, drawn as connected dots.
    """
    points = [point for point in points if abs(point[1]) < _LARGEST_VALUE]
    second = [point for point in second if abs(point[1]) < _LARGEST_VALUE]
    if len({step for step, _ in points}) < 2:
        return f'<p class="empty">{escape(label)}: fewer than two points.</p>'
    smooth, points, second = smoothed(points, smoothing_points), thinned(points), thinned(second)
    frame = _Frame(points, second, width, height, allow_logarithmic)
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label, quote=True)}">', *frame.axes()]
    parts += frame.marks(marks or {})
    if smoothing_points > 1:
        parts.append(frame.line("raw", points))
    parts.append(frame.line("smooth", smooth))
    if len(second) > 1:
        parts.append(frame.line("second", second))
    radius = _DOT_RADIUS if len(second) <= _MAX_LARGE_DOTS else _DOT_RADIUS / 2
    parts += [frame.dot(step, value, radius) for step, value in second]
    return "".join(parts) + "</svg>"


class _Frame:
    """Axes that hold all points, and where a point is on them."""

    def __init__(self, points: Points, second: Points, width: int, height: int, allow_logarithmic: bool) -> None:
        self.width, self.height = width, height
        steps = [step for step, _ in (*points, *second)]
        values = [value for _, value in (*points, *second)]
        low, high = min(values), max(values)
        is_positive = low > 1 / _LARGEST_VALUE
        self.is_logarithmic = allow_logarithmic and is_positive and high / low > _LOGARITHMIC_FROM_RATIO
        most = max(3, height // 50)
        self.ticks = _logarithmic_ticks(low, high, most) if self.is_logarithmic else _round_ticks(low, high, most)
        self.first, self.last = min(steps), max(steps)
        self.low = self._scaled(min(self.ticks[0], low))
        self.spread = self._scaled(max(self.ticks[-1], high)) - self.low or 1.0

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.is_logarithmic else value

    def x(self, step: float) -> float:
        """Horizontal position of a step."""
        plot_width = self.width - _MARGIN_LEFT - _MARGIN_RIGHT
        return _MARGIN_LEFT + plot_width * (step - self.first) / (self.last - self.first)

    def y(self, value: float) -> float:
        """Vertical position of a value."""
        plot_height = self.height - _MARGIN_TOP - _MARGIN_BOTTOM
        return _MARGIN_TOP + plot_height * (1 - (self._scaled(value) - self.low) / self.spread)

    def axes(self) -> list[str]:
        """Lines and numbers of values, and numbers of steps."""
        parts, right, bottom = [], self.width - _MARGIN_RIGHT, self.height - 8
        for tick in self.ticks:
            y = self.y(tick)
            line = f'<line class="grid" x1="{_MARGIN_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            text = f'<text class="axis" x="{_MARGIN_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>'
            parts += [line, text]
        for tick in _round_ticks(self.first, self.last, max(4, self.width // 100)):
            if self.first <= tick <= self.last and tick == int(tick):
                x = self.x(tick)
                parts.append(f'<text class="axis" x="{x:.1f}" y="{bottom}" text-anchor="middle">{_short(tick)}</text>')
        return parts

    def marks(self, marks: Mapping[int, str]) -> list[str]:
        """Dashed lines from top to bottom with their texts to the right, as far as there is room for them."""
        lines, texts, free_from = [], [], 0.0
        for step, text in sorted(marks.items()):
            if not self.first <= step <= self.last:
                continue
            x = self.x(step)
            bottom = self.height - _MARGIN_BOTTOM
            lines.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{bottom}"/>')
            end = x + 6 + _MARK_CHARACTER_WIDTH * len(text)
            if x >= free_from and end <= self.width:
                free_from = end
                texts.append(f'<text class="mark-text" x="{x + 6:.1f}" y="12">{escape(text)}</text>')
        return lines + texts

    def line(self, name: str, points: Points) -> str:
        """A line through points, in the style of a class."""
        places = " ".join(f"{self.x(step):.1f},{self.y(value):.1f}" for step, value in points)
        return f'<polyline class="{name}" points="{places}"/>'

    def dot(self, step: float, value: float, radius: float) -> str:
        """A point that shows its numbers when the mouse is over it."""
        title = f"<title>step {step:g}: {value:.4g}</title>"
        return f'<circle class="dot" r="{radius:g}" cx="{self.x(step):.1f}" cy="{self.y(value):.1f}">{title}</circle>'


def thinned(points: Points, most: int = _MAX_POINTS) -> Points:
    """Return at most about `most` points: of neighbours the lowest and the highest, so that no peak is lost."""
    size = 2 * len(points) / most
    if size <= 2:
        return points
    kept = []
    for number in range(most // 2):
        bucket = points[int(number * size) : int((number + 1) * size)]
        lowest, highest = min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])
        kept += sorted({lowest, highest})
    return [points[0], *kept[1:-1], points[-1]]


def smoothed(points: Points, width: int) -> Points:
    """Return the means over up to `width` neighbours, fewer at the ends; of very many points those of means."""
    size = len(points) / _MAX_POINTS
    if size > 1:
        buckets = [points[int(number * size) : int((number + 1) * size)] for number in range(_MAX_POINTS)]
        points = [_mean(bucket) for bucket in buckets]
        width = round(width / size)
    half = width // 2
    windows = [points[max(0, index - half) : index + half + 1] for index in range(len(points))]
    return [(step, _mean(window)[1]) for (step, _), window in zip(points, windows, strict=True)]


def _mean(points: Points) -> tuple[float, float]:
    return sum(step for step, _ in points) / len(points), sum(value for _, value in points) / len(points)


def _round_ticks(low: float, high: float, most: int) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten that enclose low..high, at most about `most` inside."""
    spread = next(size for size in (high - low, abs(high), 1.0) if size > 1 / _LARGEST_VALUE)
    magnitude = 10 ** math.floor(math.log10(spread / most))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if spread / (factor * magnitude) <= most)
    first, last = math.floor(low / step), math.ceil(high / step)
    # Rounding to 12 digits removes 0.30000000000000004.
    return [float(f"{index * step:.12g}") for index in range(first, max(last, first + 1) + 1)]


def _logarithmic_ticks(low: float, high: float, most: int) -> list[float]:
    """Return powers of ten that enclose low..high: all, or of many decades some."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = -(-(last - first) // most)
    return [10.0**exponent for exponent in range(first, last + every, every)]


def _short(value: float) -> str:
    """Format the number of an axis: 0.002, 1e-5, 250, 4k, 1.5M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}".replace("e-0", "e-")
