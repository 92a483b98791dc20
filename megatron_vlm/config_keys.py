"""The keys of a configuration and their types: what is unknown, empty or ill-typed, a hint for it, and the values.

Files of other kinds that are read into dataclasses use the same checks.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import reprlib
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from megatron_vlm.config import Config
from megatron_vlm.errors import ConfigError
from megatron_vlm.files.config_files import load_yaml
from megatron_vlm.key_aliases import ALIASES, WITHOUT_KEY

SWITCHES = ("config", "dry_run", "print_config", "help")  # of the command line
SOURCE_KEYS = ("train", "valid")  # of `data`; a source may be written as its path alone
Where = Callable[[str], str]
"""Gives the place of a key: a file and line, or the command line."""
Unknown = Callable[[str, str], ConfigError]
"""Describes a key that does not exist, at a place."""
type_hints = functools.cache(typing.get_type_hints)
_short = reprlib.Repr(maxlevel=3, maxdict=6, maxlist=6, maxstring=80, maxother=80).repr


def valid_keys(settings: type = Config, prefix: str = "") -> dict[str, Any]:
    """Return every dotted key with its type: sections, their keys, and the keys of list items (data.train.path)."""
    keys: dict[str, Any] = {}
    for name, kind in type_hints(settings).items():
        keys[prefix + name] = kind
        nested = kind if dataclasses.is_dataclass(kind) else _item_type(kind)
        if isinstance(nested, type):
            keys.update(valid_keys(nested, f"{prefix}{name}."))
    return keys


def _item_type(kind: Any) -> type | None:
    """Return the dataclass that a list type holds, if it holds one."""
    held = next(iter(typing.get_args(kind)), None)
    holds_dataclass = typing.get_origin(kind) is list and dataclasses.is_dataclass(held)
    return held if holds_dataclass and isinstance(held, type) else None


def with_full_sources(content: Any) -> Any:
    """Write out the short forms of data.train and data.valid in a configuration's mapping; other contents stay."""
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, dict):
        return content
    full = {key: full_sources(data[key]) for key in SOURCE_KEYS if key in data}
    return {**content, "data": {**data, **full}}


def full_sources(value: Any) -> Any:
    """Return the full form of data sources that are given as a path, a list of paths, or one source."""
    items = value if isinstance(value, list) else [value]
    if value is None or not all(isinstance(item, str | dict) for item in items):
        return value
    return [{"path": item} if isinstance(item, str) else item for item in items]


def section_problems(
    content: Any, settings: type, section: str, where: Where, unknown: Unknown | None = None
) -> Iterator[ConfigError]:
    """Yield what is wrong with the keys and values of a section, as YAML gives them.

    Args:
        content: the section.
        settings: its class.
        section: its dotted name; "" for the whole configuration.
        where: place of a key.
        unknown: describes a key that does not exist; `unknown_key` by default.
    """
    if not isinstance(content, dict):
        yield _misfit(section, content, settings, where)
        return
    kinds = type_hints(settings)
    for name, value in content.items():
        key = f"{section}.{name}" if section else str(name)
        if name not in kinds:
            yield (unknown or unknown_key)(key, where(key))
        else:
            yield from value_problems(value, kinds[name], key, where, unknown)


def value_problems(
    value: Any, kind: Any, key: str, where: Where, unknown: Unknown | None = None
) -> Iterator[ConfigError]:
    """Yield what is wrong with the value of a key that exists.

    Args:
        value: as YAML gives it.
        kind: the key's type.
        key: its dotted name.
        where: place of a key.
        unknown: describes a key inside of it that does not exist; `unknown_key` by default.
    """
    item_type = _item_type(kind)
    if value is None and not _fits(None, kind):
        if dataclasses.is_dataclass(kind):
            yield ConfigError(f"section {key} is empty", where(key), "write its keys below it, or remove it")
        else:
            yield ConfigError(
                f"{key} is null", where(key), f"expected {words_for(kind)}; for its default leave the key out"
            )
    elif dataclasses.is_dataclass(kind) and isinstance(kind, type):
        yield from section_problems(value, kind, key, where, unknown)
    elif item_type is not None and isinstance(value, list):
        for number, item in enumerate(value, start=1):
            if not isinstance(item, dict):
                yield ConfigError(f"{key} cannot hold {_short(item)}", where(key), f"expected {words_for(kind)}")
                continue
            yield from section_problems(item, item_type, key, where, unknown)
            known = {entry.name: entry.default for entry in dataclasses.fields(item_type)}
            for name, default in known.items() if set(item) <= set(known) else ():
                if default is dataclasses.MISSING and name not in item:
                    yield ConfigError(f"item {number} of {key} has no {name}", where(key), f"add {name}")
    elif not _fits(value, kind) and not (isinstance(value, str) and _fits(parsed(value), kind)):
        yield _misfit(key, value, kind, where)


def parsed(text: str) -> Any:
    """Return what the text of an override, or in quotes, stands for; itself if it is not YAML."""
    try:
        return load_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def _misfit(key: str, value: Any, kind: Any, where: Where) -> ConfigError:
    fix = f"expected {words_for(kind)}"
    if dataclasses.is_dataclass(kind) and isinstance(value, str) and key in ALIASES:
        fix = f"did you mean {ALIASES[key]}?"
    return ConfigError(f"{key} cannot be {_short(value)}", where(key), fix)


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value, as YAML gives it, is of a type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return value in arguments if isinstance(value, str) else False
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(arguments) and all(map(_fits, value, arguments))
    if origin is dict:
        return isinstance(value, dict) and all(map(_fits, value.values(), len(value) * arguments[1:]))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def instance(value: Any, kind: Any) -> Any:
    """Return what a value, as YAML gives it, is as a type; `value_problems` has nothing against it.

    Args:
        value: a mapping for a dataclass, a list for a list or tuple, a number, text or null.
        kind: a dataclass or the type of one of its keys.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        kinds = type_hints(kind)
        return kind(**{name: instance(item, kinds[name]) for name, item in value.items()})
    if isinstance(value, str) and not _fits(value, kind):
        value = parsed(value)  # a number in quotes
    if origin in (types.UnionType, typing.Union):
        return instance(value, next(argument for argument in arguments if _fits(value, argument)))
    if origin in (list, tuple):
        kinds_of_items = arguments if origin is tuple else arguments * len(value)
        return origin(map(instance, value, kinds_of_items))
    if origin is dict:
        return {name: instance(item, arguments[1]) for name, item in value.items()}
    return float(value) if kind is float else value


def unknown_key(key: str, where: str) -> ConfigError:
    """Describe a key that does not exist, with the nearest that does, or what to do instead."""
    name = key.rpartition(".")[2].replace("-", "_")
    section, keys = key.rpartition(".")[0], valid_keys()
    nearest = nearest_key(key, keys)
    if name in SWITCHES and not section:
        fix = f"it belongs on the command line: --{name}"
    elif nearest:
        fix = f"did you mean {nearest}?"
    elif name in WITHOUT_KEY:
        fix = WITHOUT_KEY[name]
    elif section in keys:
        fix = f"{section} has " + ", ".join(name.rpartition(".")[2] for name in keys if name.startswith(f"{section}."))
    else:
        fix = "--help lists every key"
    return ConfigError(f"unknown key {_short(key)[1:-1]}", where=where, fix=fix)


def nearest_key(key: str, keys: dict[str, Any]) -> str | None:
    """Return the valid key that `key` means: of the same name in another section, another stack's name, or similar."""
    key = key.replace("-", "_")
    candidates = [name for name, kind in keys.items() if "." not in key or not dataclasses.is_dataclass(kind)]
    candidates += ["dry_run", "print_config"]
    last_name = key.rpartition(".")[2]
    same_name = [name for name in candidates if name.rpartition(".")[2] == last_name]
    if same_name:
        return difflib.get_close_matches(key, same_name, n=1, cutoff=0.0)[0]
    for name in (key, last_name):
        if name in ALIASES:
            return ALIASES[name]
    if last_name in WITHOUT_KEY:
        return None
    close = difflib.get_close_matches(key, candidates, n=1, cutoff=0.75)
    if close:
        return close[0]
    by_last_name = {name.rpartition(".")[2]: name for name in candidates}
    close = difflib.get_close_matches(last_name, by_last_name, n=1, cutoff=0.7)
    return by_last_name[close[0]] if close else None


def words_for(kind: Any) -> str:
    """Describe what a type accepts."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(words_for(argument) for argument in arguments)
    if origin is list and dataclasses.is_dataclass(arguments[0]):
        return "a list of {" + ", ".join(entry.name for entry in dataclasses.fields(arguments[0])) + "}"
    if origin is list:
        return "a list such as [1, 2]" if arguments[0] is int else "a list such as [a, b]"
    if origin is tuple:
        return f"a list of {len(arguments)} numbers"
    if origin is dict:
        if typing.get_origin(arguments[1]) is list:
            return "a mapping of keys to lists, such as {optimizer.lr: [1.0e-4, 3.0e-4]}"
        examples = {float: "{vision_tower: 0.1}", str: "{NAME: '5'}, with text in quotes"}
        return f"a mapping such as {examples.get(arguments[1], '{optimizer.lr: 1.0e-4}')}"
    if dataclasses.is_dataclass(kind):
        return "a section of keys"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return words.get(kind, "another value")
