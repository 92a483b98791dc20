"""Line charts as SVG text: axes with round numbers, faint measured points, a smoothed line, marked steps.

Colours come from the style sheet of the page (classes `raw`, `smooth`, `grid`, `mark`), so that a chart follows light
and dark appearance.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

_MARGIN_LEFT, _MARGIN_RIGHT, _MARGIN_TOP, _MARGIN_BOTTOM = 58, 16, 18, 30
_LOGARITHMIC_FROM_RATIO = 20.0  # a loss that falls this far is unreadable on a linear axis
_MAX_POINTS = 1500


def line_chart(
    steps: Sequence[float],
    values: Sequence[float],
    label: str,
    width: int,
    height: int,
    marks: Mapping[int, str] | None = None,
    smoothing_points: int = 1,
    allow_logarithmic: bool = False,
    dots: Sequence[tuple[float, float]] = (),
) -> str:
    """Returns one `<svg>` element that draws `values` over `steps`.

    Args:
        steps, values: Equally long; points that are not finite are left out.
        label: What the chart shows; read out by screen readers.
        width, height: Size of the drawing in SVG units; the page scales it.
        marks: Step -> text of a vertical dashed line.
        smoothing_points: Width of the centred moving average; 1 draws the values themselves.
        allow_logarithmic: Use a logarithmic axis when the values span more than a factor of 20.
        dots: Further points (step, value) of a second quantity, such as held-out loss; those beyond the axes of the
            first are left out.
    """
    points = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    points = points[:: max(1, len(points) // _MAX_POINTS)]
    if len(points) < 2:
        return f'<p class="empty">{escape(label)}: fewer than two points.</p>'
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    logarithmic = allow_logarithmic and min(ys) > 0 and max(ys) / min(ys) > _LOGARITHMIC_FROM_RATIO
    ticks = _logarithmic_ticks(min(ys), max(ys)) if logarithmic else _round_ticks(min(ys), max(ys))
    scale_y = math.log10 if logarithmic else float
    low, high = scale_y(min(ticks[0], min(ys))), scale_y(max(ticks[-1], max(ys)))
    plot_width, plot_height = width - _MARGIN_LEFT - _MARGIN_RIGHT, height - _MARGIN_TOP - _MARGIN_BOTTOM

    def place_x(step: float) -> float:
        return _MARGIN_LEFT + plot_width * (step - xs[0]) / (xs[-1] - xs[0])

    def place_y(value: float) -> float:
        return _MARGIN_TOP + plot_height * (1 - (scale_y(value) - low) / (high - low))

    def path(series: Sequence[float]) -> str:
        return " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in zip(xs, series, strict=True))

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label, quote=True)}">']
    for tick in ticks:
        y = place_y(tick)
        parts.append(f'<line class="grid" x1="{_MARGIN_LEFT}" x2="{width - _MARGIN_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="axis" x="{_MARGIN_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _round_ticks(xs[0], xs[-1]):
        if xs[0] <= tick <= xs[-1]:
            x = place_x(tick)
            parts.append(f'<text class="axis" x="{x:.1f}" y="{height - 8}" text-anchor="middle">{tick:g}</text>')
    for step, text in (marks or {}).items():
        if xs[0] <= step <= xs[-1]:
            parts.append(_mark(place_x(step), text, height))
    if smoothing_points > 1:
        parts.append(f'<polyline class="raw" points="{path(ys)}"/>')
    parts.append(f'<polyline class="smooth" points="{path(_moving_average(ys, smoothing_points))}"/>')
    for x, y in dots:
        if xs[0] <= x <= xs[-1] and (y > 0 or not logarithmic) and low <= scale_y(y) <= high:
            parts.append(f'<circle class="dot" r="4" cx="{place_x(x):.1f}" cy="{place_y(y):.1f}"/>')
    return "".join(parts) + "</svg>"


def _mark(x: float, text: str, height: int) -> str:
    """Draw a dashed line from top to bottom with its text to the right."""
    line = f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_MARGIN_TOP - 6}" y2="{height - _MARGIN_BOTTOM}"/>'
    return line + f'<text class="mark-text" x="{x + 6:.1f}" y="{_MARGIN_TOP + 4}">{escape(text)}</text>'


def _moving_average(values: Sequence[float], width: int) -> list[float]:
    """Return the mean over up to `width` neighbours, fewer at the ends."""
    half = width // 2
    averages = []
    for index in range(len(values)):
        window = values[max(0, index - half) : index + half + 1]
        averages.append(sum(window) / len(window))
    return averages


def _round_ticks(low: float, high: float) -> list[float]:
    """Return four to eight multiples of 1, 2 or 5 times a power of ten that enclose low..high."""
    spread = high - low or abs(high) or 1.0
    magnitude = 10 ** math.floor(math.log10(spread / 4))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if spread / (factor * magnitude) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    # Rounding to 12 digits removes 0.30000000000000004.
    return [float(f"{index * step:.12g}") for index in range(first, max(last, first + 1) + 1)]


def _logarithmic_ticks(low: float, high: float) -> list[float]:
    """Return the powers of ten that enclose low..high."""
    return [10.0**exponent for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
