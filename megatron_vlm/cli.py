"""Command line to `Config`: YAML files, dotted overrides, `--help`, `--print_config` and `--dry_run`."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.config import Config
from megatron_vlm.config_checks import validate
from megatron_vlm.errors import ConfigError, UserError, combine

_SWITCHES = ("config", "dry_run", "print_config", "help", "h")


@dataclass(frozen=True)
class CommandLine:
    """What one command line asked for."""

    config: Config
    dry_run: bool


def parse_command_line(argv: list[str], program: str = "pretrain_vlm.py") -> CommandLine:
    """Read `--config FILE.yaml`, then dotted overrides, and validate the result.

    Args:
        argv: arguments after the program's name.
        program: name that `--help` shows.

    Returns:
        The validated configuration and whether `--dry_run` was given.

    Raises:
        ConfigError: unknown, missing or ill-typed keys, or values that cannot work together.
        SystemExit: code 0, after `--help` or `--print_config`.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=program,
        exit_on_error=False,
        description="Train a vision-language model. Every key below may stand in the YAML file or on the command line.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below.")
    parser.add_argument("--dry_run", action="store_true", help="Check everything without training; needs no GPU.")
    parser.add_class_arguments(Config)
    _refuse_unknown_keys(argv)
    try:
        parsed = parser.instantiate(parser.parse_args(argv))
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise _readable(error) from None
    values = {entry.name: getattr(parsed, entry.name) for entry in dataclasses.fields(Config)}
    config = Config(**values)
    validate(config)
    return CommandLine(config, bool(parsed.dry_run))


def valid_keys(settings: type = Config, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the tree with its type; sections are included with their dataclass."""
    keys: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(settings).items():
        keys[prefix + name] = kind
        if dataclasses.is_dataclass(kind):
            keys.update(valid_keys(typing.cast(type, kind), f"{prefix}{name}."))
    return keys


def _refuse_unknown_keys(argv: list[str]) -> None:
    """Raise one ConfigError that lists every unknown key of the YAML files and the overrides."""
    keys = valid_keys()
    problems: list[UserError] = []
    for position, argument in enumerate(argv):
        if not re.match(r"--?[a-zA-Z]", argument):
            continue
        name, _, value = argument.lstrip("-").partition("=")
        if name == "config":
            path = value or "".join(argv[position + 1 : position + 2])
            problems += [_unknown(key, path, keys) for key in _unknown_in_yaml(path, keys)]
        elif name not in _SWITCHES and not _is_known(name.removesuffix("+").removesuffix(".help"), keys):
            problems.append(_unknown(name.removesuffix("+"), "command line", keys))
    if problems:
        raise combine(ConfigError, problems)


def _is_known(name: str, keys: dict[str, Any]) -> bool:
    """Whether `name` is a key, or an entry of a key that holds a dictionary."""
    parent = name.rpartition(".")[0]
    return name in keys or (parent in keys and typing.get_origin(keys[parent]) is dict)


def _unknown_in_yaml(path: str, keys: dict[str, Any]) -> Iterator[str]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file: {error.strerror}", where=path) from None
    except UnicodeDecodeError:
        raise ConfigError("the configuration file is not UTF-8 text", where=path) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        raise ConfigError(f"not valid YAML: {getattr(error, 'problem', None) or error}", where=where) from None
    if not isinstance(content, dict):
        raise ConfigError("the configuration file holds no mapping of keys to values", where=path)
    yield from _unknown_in_mapping(content, "", keys)


def _unknown_in_mapping(content: dict[Any, Any], prefix: str, keys: dict[str, Any]) -> Iterator[str]:
    for name, value in content.items():
        key = f"{prefix}{name}"
        if not prefix and name in ("config", "dry_run"):
            continue
        if not _is_known(key, keys):
            yield key
        elif isinstance(value, dict) and typing.get_origin(keys.get(key)) is not dict:
            yield from _unknown_in_mapping(value, f"{key}.", keys)
        elif isinstance(value, list):
            yield from _unknown_in_items(value, key, keys)


def _unknown_in_items(items: list[Any], key: str, keys: dict[str, Any]) -> Iterator[str]:
    """Unknown keys inside a list of dataclasses, such as data.train."""
    item_types = [kind for kind in typing.get_args(keys.get(key)) if dataclasses.is_dataclass(kind)]
    known = {entry.name for kind in item_types for entry in dataclasses.fields(kind)}
    for item in items:
        if known and isinstance(item, dict):
            yield from (f"{key}.{name}" for name in item if name not in known)


def _unknown(key: str, where: str, keys: dict[str, Any]) -> ConfigError:
    nearest = nearest_key(key, keys)
    return ConfigError(
        f"unknown key {key}", where=where, fix=f"did you mean {nearest}?" if nearest else "--help lists every key"
    )


def nearest_key(key: str, keys: dict[str, Any]) -> str | None:
    """The valid key that looks most like `key`, also when its section is missing or wrong."""
    candidates = dict.fromkeys([*keys, "dry_run", "print_config"])
    for name, kind in keys.items():
        for item in typing.get_args(kind):
            if dataclasses.is_dataclass(item):
                candidates.update(dict.fromkeys(f"{name}.{entry.name}" for entry in dataclasses.fields(item)))
    last_name = key.rpartition(".")[2]
    same_name = [name for name in candidates if name.rpartition(".")[2] == last_name]
    if same_name:
        return difflib.get_close_matches(key, same_name, n=1, cutoff=0.0)[0]
    close = difflib.get_close_matches(key, candidates, n=1, cutoff=0.75)
    if close:
        return close[0]
    by_last_name = {name.rpartition(".")[2]: name for name in candidates}
    close = difflib.get_close_matches(last_name, by_last_name, n=1, cutoff=0.7)
    return by_last_name[close[0]] if close else None


def _readable(error: Exception) -> ConfigError:
    """jsonargparse's message as what, where and what would be accepted."""
    text = " ".join(str(error).split())
    missing = re.search(r"following arguments are required: (.*)", text)
    if missing:
        return ConfigError(
            f"required keys are missing: {missing[1]}",
            fix="set them in the YAML file of --config or on the command line",
        )
    typed = re.search(r'key "([^"]+)": (?:.*?)Expected an? (.+?)\. Got value: (.*)$', text)
    if typed:
        key, _, value = typed.groups()
        return ConfigError(f"{key} cannot be {value!r}", where=key, fix=f"expected {_expected(key)}")
    return ConfigError(text)


def _expected(key: str) -> str:
    """The type of a key in words."""
    kind = valid_keys().get(key)
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    if key in ("data.train", "data.valid"):
        return "a list of {path, weight}"
    if isinstance(kind, types.GenericAlias | types.UnionType):
        return str(kind).replace("None", "null")
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(typing.cast(type, kind), str(kind))
