"""Distributions from which values of keys are drawn."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

_SIGNIFICANT_DIGITS = 6  # of drawn numbers: names of points and files hold them in full
_LARGEST = 1e300


def distribution_problem(described: Any) -> tuple[str, str] | None:
    """Return what is wrong with the description of a distribution, and a remedy; None if nothing is.

    Args:
        described: what the sweep file has for a key.
    """
    names = ", ".join(_DRAW)
    if not isinstance(described, dict) or len(described) != 1 or next(iter(described)) not in _DRAW:
        return f"is {described!r}", f"give one of {names}, such as {{log_uniform: [1e-5, 1e-3]}}"
    ((name, values),) = described.items()
    if name == "choice":
        return None if isinstance(values, list) and values else (f"has choice: {values!r}", "list the values")
    number = (int,) if name == "int" else (int, float)
    if not isinstance(values, list) or len(values) != 2 or not all(type(value) in number for value in values):
        return f"has {name}: {values!r}", "give [LOW, HIGH], two " + ("whole numbers" if name == "int" else "numbers")
    low, high = values
    if not -_LARGEST < low <= high < _LARGEST:
        return f"has {name}: [{low}, {high}]", "give the smaller number first"
    if name == "log_uniform" and low <= 0:
        return f"has log_uniform from {low}", "give numbers above 0, or use uniform"
    return None


def draw(described: dict[str, Any], generator: random.Random) -> Any:
    """Draw a value.

    Args:
        described: a distribution with which `distribution_problem` finds nothing wrong.
        generator: the source of randomness; every draw takes one number from it.
    """
    ((name, values),) = described.items()
    return _DRAW[name](values, generator.random())


def _uniform(values: list[float], fraction: float) -> float:
    low, high = values
    return _rounded(low + (high - low) * fraction, low, high)


def _log_uniform(values: list[float], fraction: float) -> float:
    low, high = values
    return _rounded(math.exp(math.log(low) + (math.log(high) - math.log(low)) * fraction), low, high)


def _int(values: list[int], fraction: float) -> int:
    low, high = values
    return min(high, low + int(fraction * (high - low + 1)))


def _choice(values: list[Any], fraction: float) -> Any:
    return values[int(fraction * len(values))]


def _rounded(value: float, low: float, high: float) -> float:
    return min(high, max(low, float(f"{value:.{_SIGNIFICANT_DIGITS}g}")))


_DRAW: dict[str, Callable[[list[Any], float], Any]] = {
    "uniform": _uniform,
    "log_uniform": _log_uniform,
    "int": _int,
    "choice": _choice,
}
