"""Expressions over the keys of a point, such as `optimizer.lr / 10`: simpleeval's language, on values alone.

Numbers, text, comparison, arithmetic, and/or/not, `A if CONDITION else B`, and the functions below. There is nothing to
call but these and nothing to reach but keys.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from megatron_vlm.config_keys import nearest_key, valid_keys
from megatron_vlm.errors import ConfigError

FUNCTIONS = {"abs": abs, "float": float, "int": int, "max": max, "min": min, "round": round, "str": str}
_CONSTANTS = {"null": None, "true": True, "false": False}  # as YAML writes them; Python's words are known too
_ASSIGNMENT = re.compile(r"(?<![=!<>])=(?!=)")
_SIGNIFICANT_DIGITS = 12  # of results, so that 3e-4 / 10 is 3e-05


def evaluate(expression: str, content: Mapping[str, Any], where: str) -> Any:
    """Return the value of an expression.

    Args:
        expression: its text.
        content: sections and keys of a configuration, with defaults.
        where: place of the expression.

    Raises:
        ConfigError: it is no such expression, names a key that does not exist, or has no value.
    """
    import simpleeval

    sections, names_of_keys = _names()
    names = {key: _Section(**value) if key in sections else value for key, value in content.items()} | _CONSTANTS
    evaluator = simpleeval.SimpleEval(functions=FUNCTIONS, names=names, allowed_attrs={_Section: names_of_keys})
    try:
        ast.parse(expression.strip(), mode="eval")  # simpleeval would take statements too, such as A = B
        value = evaluator.eval(expression)
    except (simpleeval.InvalidExpression, SyntaxError) as error:
        raise _readable(expression, error, where) from None
    except Exception as error:  # whatever an operation on values of the wrong type raises
        what = f"{expression!r} cannot be computed: {error}"
        raise ConfigError(what, where, "keys without a value are null") from None
    if isinstance(value, _Section):
        raise ConfigError(f"{expression!r} is a section, which has no value", where, "write section.key")
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value


class _Section(SimpleNamespace):
    """Keys of a section."""


@functools.cache
def _names() -> tuple[set[str], set[str]]:
    """Return the sections, and the names of all keys in sections."""
    pairs = [key.split(".", 1) for key in valid_keys() if "." in key]
    sections = {key for key, kind in valid_keys().items() if dataclasses.is_dataclass(kind)}
    return sections, {name for section, name in pairs if section in sections}


def _readable(expression: str, error: Exception, where: str) -> ConfigError:
    """Describe why an expression was refused, with the key that may be meant."""
    keys = {**valid_keys(), **_CONSTANTS}
    if isinstance(error, SyntaxError) and _ASSIGNMENT.search(expression):
        return ConfigError(f"{expression!r} has =, which compares nothing", where, "did you mean ==?")
    for name in _dotted_names(expression):
        if name not in keys:
            nearest = nearest_key(name, keys)
            fix = f"did you mean {nearest}?" if nearest else "write keys as section.key"
            return ConfigError(f"{expression!r} names {name}, which is no key", where, fix)
    reason = str(error).replace(str(_Section), "a section").removesuffix(f", for expression '{expression}'.")
    functions = ", ".join(FUNCTIONS)
    return ConfigError(
        f"{expression!r} is refused: {reason}",
        where,
        f"use keys, numbers, text in quotes, + - * / // % **, comparison, and/or/not, if/else, and {functions}",
    )


def _dotted_names(expression: str) -> list[str]:
    """Return what stands in an expression for a key; nothing where it cannot be parsed."""
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    inner |= {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute) and id(node) not in inner]
    return [ast.unparse(node) for node in nodes]
