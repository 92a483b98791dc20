"""Command line to `Config`: YAML files, dotted overrides, `--help`, `--print_config` and `--dry_run`."""

from __future__ import annotations

import dataclasses
import difflib
import os
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
    config = _with_home(Config(**values))
    validate(config)
    return CommandLine(config, bool(parsed.dry_run))


def load_config(argv: list[str]) -> Config:
    """Read and validate a configuration from command-line arguments.

    Args:
        argv: arguments after the program's name, for example `["--config", "run.yaml", "--optimizer.lr", "1e-4"]`.

    Raises:
        ConfigError: a key is unknown, missing, ill-typed, or its value cannot work; all such problems in one message.
    """
    return parse_command_line(argv).config


def _with_home(config: Config) -> Config:
    """Replace every "~" at the start of a path: no shell does that in YAML or after `--key=`."""
    home, checkpoint = os.path.expanduser, config.checkpoint
    train, valid = (
        [dataclasses.replace(source, path=home(source.path)) for source in sources]
        for sources in (config.data.train, config.data.valid)
    )
    load = checkpoint.load and home(checkpoint.load)
    export_hf = checkpoint.export_hf and home(checkpoint.export_hf)
    return dataclasses.replace(
        config,
        run_dir=home(config.run_dir),
        model=dataclasses.replace(config.model, hf_path=home(config.model.hf_path)),
        data=dataclasses.replace(config.data, train=train, valid=valid),
        checkpoint=dataclasses.replace(checkpoint, load=load, export_hf=export_hf),
    )


def valid_keys(settings: type = Config, prefix: str = "") -> dict[str, Any]:
    """Return every dotted key with its type: sections, their keys, and the keys of list items (data.train.path)."""
    keys: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(settings).items():
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


def _refuse_unknown_keys(argv: list[str]) -> None:
    """Raise one ConfigError that lists every unknown key of the YAML files and the overrides."""
    keys = valid_keys()
    problems: list[UserError] = []
    for position, argument in enumerate(argv):
        if not re.match(r"--?[a-zA-Z]", argument):
            continue
        name, equals, value = argument.lstrip("-").partition("=")
        name = name.removesuffix("+").removesuffix(".help")
        value = value if equals else "".join(argv[position + 1 : position + 2])
        if name == "config":
            problems += [_unknown(key, value, keys) for key in _unknown_in(_read_yaml(value), "", keys)]
        elif name not in _SWITCHES:
            unknown = _unknown_in(_override_value(value, keys.get(name)), name, keys)
            problems += [_unknown(key, "command line", keys) for key in unknown]
    if problems:
        raise combine(ConfigError, problems)


def _read_yaml(path: str) -> dict[str, Any]:
    """Read the mapping in a configuration file."""
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
    content.pop("dry_run", None)  # --print_config writes it
    return content


def _override_value(text: str, kind: Any) -> Any:
    """Parse an override whose own keys need a check, which is a list of data sources; return None for any other."""
    import yaml

    if not _item_type(kind):
        return None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None  # jsonargparse reports it with the key


def _unknown_in(value: Any, key: str, keys: dict[str, Any]) -> Iterator[str]:
    """Yield the dotted names at or below `key` that the tree does not have.

    Raises:
        ConfigError: a list of data sources holds something else; jsonargparse would import a class named there.
    """
    parent_is_dict = typing.get_origin(keys.get(key.rpartition(".")[0])) is dict
    if key and key not in keys and not parent_is_dict:
        yield key
    elif isinstance(value, dict) and typing.get_origin(keys.get(key)) is not dict:
        for name, child in value.items():
            yield from _unknown_in(child, f"{key}.{name}" if key else str(name), keys)
    elif isinstance(value, list) and _item_type(keys.get(key)):
        for item in value:
            if not isinstance(item, dict):
                raise ConfigError(f"{key} cannot hold {item!r}", fix=f"expected {_words(keys[key])}")
            yield from _unknown_in(item, key, keys)


def _unknown(key: str, where: str, keys: dict[str, Any]) -> ConfigError:
    nearest = nearest_key(key, keys)
    section = key.rpartition(".")[0]
    if nearest:
        fix = f"did you mean {nearest}?"
    elif section in keys:
        fix = f"{section} has " + ", ".join(name.rpartition(".")[2] for name in keys if name.startswith(f"{section}."))
    else:
        fix = "--help lists every key"
    return ConfigError(f"unknown key {key}", where=where, fix=fix)


def nearest_key(key: str, keys: dict[str, Any]) -> str | None:
    """Return the valid key that looks most like `key`, also when its section is missing or wrong."""
    candidates = [name for name, kind in keys.items() if "." not in key or not dataclasses.is_dataclass(kind)]
    candidates += ["dry_run", "print_config"]
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
    """Split jsonargparse's message into what is wrong, where, and what would be accepted."""
    text = " ".join(str(error).split())
    missing = re.search(r"following arguments are required: (.*)", text)
    if missing:
        return ConfigError(
            f"required keys are missing: {missing[1]}",
            fix="set them in the YAML file of --config or on the command line",
        )
    stray = re.search(r"unrecognized arguments: (.*)", text)
    if stray:
        return ConfigError(f"cannot understand {stray[1]!r}", where="command line", fix="write --section.key value")
    unknown = re.search(r"Group '([^']+)' does not accept option '([^']+)'", text)
    if unknown:
        return _unknown(f"{unknown[1]}.{unknown[2]}", "command line", valid_keys())
    key = re.search(r'key "([^"]+)"', text)
    if not key:
        return ConfigError(text)
    value = re.search(r"Given value:(.*)$", text) or re.search(r"Got value:(.*)$", text)
    what = f"{key[1]} cannot be {value[1].strip()!r}" if value else f"{key[1]} has a wrong value: {text}"
    return ConfigError(what, fix=f"expected {_words(valid_keys().get(key[1]))}")


def _words(kind: Any) -> str:
    """Describe what a type accepts."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_words(argument) for argument in arguments)
    if origin is list and dataclasses.is_dataclass(arguments[0]):
        return "a list of {" + ", ".join(entry.name for entry in dataclasses.fields(arguments[0])) + "}"
    if origin is list:
        return "a list such as [1, 2]" if arguments[0] is int else "a list such as [a, b]"
    if origin is tuple:
        return f"a list of {len(arguments)} numbers"
    if origin is dict:
        return "a mapping such as {vision_tower: 0.1}"
    if dataclasses.is_dataclass(kind):
        return "a section of keys"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return words.get(kind, "another value")
