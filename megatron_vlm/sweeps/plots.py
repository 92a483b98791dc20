"""Figures of a sweep, drawn by plotly: parallel coordinates and curves, coloured by the metric, for light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from plotly import colors, graph_objects

from megatron_vlm.report.chart import smoothed, thinned
from megatron_vlm.sweeps.points import short_keys, value_text
from megatron_vlm.sweeps.results import HIGHER_IS_BETTER, METRICS, Result, is_ranked

_LOGARITHMIC_LOSS_FROM_RATIO = 20.0
_LOGARITHMIC_KEY_FROM_RATIO = 4.0  # learning rates and sizes are chosen by factors
_MOST_NAMED_TICKS = 10
_MOST_NAMED_CURVES = 15
_POINTS_OF_ALL_CURVES = 40_000  # more make a page slow
_POINTS_PER_SMOOTHED = 40
# Readable on light and dark paper, and told apart by everybody; the best point has the first colour.
_SCALE = [[0.0, "#1f77d0"], [0.5, "#a083b5"], [1.0, "#e2862a"]]
_INK, _RULE = "#7d8794", "rgba(125, 135, 148, 0.25)"
_LOOK: dict[str, Any] = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"color": _INK, "family": "system-ui, sans-serif", "size": 12},
    "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": _INK, "activecolor": "#1f77d0"},
    "margin": {"l": 60, "r": 30, "t": 30, "b": 50},
}


def parallel_coordinates(results: Sequence[Result], keys: Sequence[str], metric: str) -> graph_objects.Figure | None:
    """Draw a line per point through its values and its metric; None where fewer than two points have the metric.

    Args:
        results: of the points.
        keys: the axes, from the left; the metric is the last.
        metric: what colours the lines.
    """
    drawn = [result for result in results if is_ranked(result, metric)]
    if len(drawn) < 2 or not keys:
        return None
    names = short_keys(keys)
    axes = [_axis(names[key], [result.status.point.overrides.get(key) for result in drawn]) for key in keys]
    values = [result.metrics[metric] for result in drawn]
    best_is_high = metric in HIGHER_IS_BETTER
    line = {"color": values, "colorscale": _SCALE, "reversescale": best_is_high}
    last = {"label": METRICS[metric], "values": values}
    figure = graph_objects.Figure(graph_objects.Parcoords(line=line, dimensions=[*axes, last]))
    return figure.update_layout(**{**_LOOK, "height": 420, "margin": {"l": 70, "r": 70, "t": 60, "b": 30}})


def curves(
    results: Sequence[Result],
    metric: str,
    label: str,
    points_of: Callable[[Result], Sequence[tuple[int, float]]],
    smooth: bool,
) -> graph_objects.Figure | None:
    """Draw a curve per point over steps, in the colour of its metric; None where no point has two steps.

    Args:
        results: of the points, best first.
        metric: what colours the curves.
        label: of the vertical axis.
        points_of: steps and values of a point.
        smooth: whether to draw moving averages.
    """
    drawn = [(result, points_of(result)) for result in results]
    drawn = [(result, points) for result, points in drawn if len(points) > 1]
    if not drawn:
        return None
    most = max(50, _POINTS_OF_ALL_CURVES // len(drawn))
    known = [result.metrics[metric] if is_ranked(result, metric) else None for result, _ in drawn]
    shades = _shades(known, metric in HIGHER_IS_BETTER)
    figure = graph_objects.Figure()
    for (result, points), shade in zip(drawn, shades, strict=True):
        shown = thinned(smoothed(points, max(1, len(points) // _POINTS_PER_SMOOTHED)) if smooth else points, most)
        figure.add_scatter(
            x=[step for step, _ in shown],
            y=[value for _, value in shown],
            mode="lines" if smooth else "lines+markers",
            name=escape(result.status.point.name),
            line={"color": shade, "width": 1.8},
            marker={"size": 5},
            hovertemplate="%{y:.4g} after step %{x}<extra>%{fullData.name}</extra>",
        )
    values = [value for _, points in drawn for _, value in points]
    is_logarithmic = _spans(values, _LOGARITHMIC_LOSS_FROM_RATIO)
    grid = {"gridcolor": _RULE, "zerolinecolor": _RULE}
    named = len(drawn) <= _MOST_NAMED_CURVES
    below = {"orientation": "h", "y": -0.18, "x": 0, "font": {"size": 11}}
    return figure.update_layout(
        **_LOOK,
        height=400 + (22 * len(drawn) if named else 0),
        showlegend=named,
        legend=below,
        hovermode="closest",
        xaxis={"title": "step", **grid},
        yaxis={"title": label, "type": "log" if is_logarithmic else "linear", **grid},
    )


def _shades(values: Sequence[float | None], best_is_high: bool) -> list[str]:
    """Return a colour for each value; grey without a value."""
    known = [value for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    places = [None if value is None else (value - low) / ((high - low) or 1.0) for value in values]
    places = [1 - place if best_is_high and place is not None else place for place in places]
    return [_INK if place is None else colors.sample_colorscale(_SCALE, place)[0] for place in places]


def _spans(values: Sequence[float], ratio: float) -> bool:
    """Return whether positive values differ by more than a factor."""
    return min(values) > 0 and max(values) / min(values) >= ratio


def _axis(label: str, values: Sequence[Any]) -> dict[str, Any]:
    """Return a key's axis: linear, logarithmic where values differ by a factor, or of categories."""
    label = escape(label)
    if not all(type(value) in (int, float) for value in values):
        texts = [value_text(value) for value in values]
        names = list(dict.fromkeys(texts))
        ticks = {"tickvals": [*range(len(names))], "ticktext": [escape(name) for name in names]}
        return {"label": label, "values": [names.index(text) for text in texts], **ticks}
    is_logarithmic = _spans(values, _LOGARITHMIC_KEY_FROM_RATIO)
    scaled = [math.log10(value) for value in values] if is_logarithmic else list(values)
    named = dict(zip(scaled, values, strict=True))
    if is_logarithmic and len(named) > _MOST_NAMED_TICKS:
        exponents = range(math.ceil(min(scaled)), math.floor(max(scaled)) + 1)
        named = {min(scaled): min(values), **{float(e): 10.0**e for e in exponents}, max(scaled): max(values)}
    elif len(named) > _MOST_NAMED_TICKS:
        return {"label": label, "values": scaled}
    ticks = {"tickvals": sorted(named), "ticktext": [f"{named[place]:.4g}" for place in sorted(named)]}
    return {"label": label, "values": scaled, **ticks}
