"""Command line to `Config`: YAML files, dotted overrides, `--help`, `--print_config` and `--dry_run`."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vlm.config import Config
from megatron_vlm.config_checks import validate
from megatron_vlm.config_keys import (
    SOURCE_KEYS,
    SWITCHES,
    Where,
    full_sources,
    instance,
    parsed,
    section_problems,
    type_hints,
    unknown_key,
    valid_keys,
    value_problems,
    with_full_sources,
    words_for,
)
from megatron_vlm.errors import ConfigError, UserError, combine
from megatron_vlm.files.config_files import load_yaml, read_config_file

_COMMAND_LINE = "command line"


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
    import yaml

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    jsonargparse.set_loader(
        "configuration",
        lambda text: with_full_sources(load_yaml(text)),
        (yaml.YAMLError, ValueError, RecursionError),
    )
    parser = jsonargparse.ArgumentParser(
        prog=program,
        parser_mode="configuration",
        exit_on_error=False,
        description="Train a vision-language model. Every key below may stand in the YAML file or on the command line.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below.")
    parser.add_argument("--dry_run", action="store_true", help="Check everything without training; needs no GPU.")
    parser.add_class_arguments(Config)
    argv = _with_full_sources(argv)
    _check_keys(argv)
    try:
        parsed = parser.instantiate(parser.parse_args(argv))
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise _readable(error) from None
    values = {entry.name: getattr(parsed, entry.name) for entry in dataclasses.fields(Config)}
    config = with_paths(Config(**values), os.path.expanduser)
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


def config_from(content: Mapping[str, Any], where: Where) -> Config:
    """Build and validate a configuration from the mapping of a YAML file, some fifty times as fast as `load_config`.

    Args:
        content: sections and keys, as YAML gives them.
        where: place of a key, for messages.

    Raises:
        ConfigError: as `load_config`.
    """
    full = with_full_sources(dict(content))
    problems: list[UserError] = list(section_problems(full, Config, "", where))
    if not problems:
        problems = [
            ConfigError(f"required key {key} is missing", fix="set it in the YAML file")
            for key in _missing(full, Config)
        ]
    if problems:
        raise combine(ConfigError, problems)
    config: Config = with_paths(instance(full, Config), os.path.expanduser)
    validate(config)
    return config


def _missing(content: Mapping[str, Any], settings: type, section: str = "") -> Iterator[str]:
    """Yield the dotted names of keys that have no default and no value."""
    kinds = type_hints(settings)
    for entry in dataclasses.fields(settings):
        has_default = not (entry.default is entry.default_factory is dataclasses.MISSING)
        if dataclasses.is_dataclass(kinds[entry.name]):
            yield from _missing(content.get(entry.name) or {}, kinds[entry.name], f"{section}{entry.name}.")
        elif not has_default and entry.name not in content:
            yield section + entry.name


def with_paths(config: Config, change: Callable[[str], str]) -> Config:
    """Return a configuration in which every path is changed; for "~", as no shell does in YAML or after `--key=`."""
    checkpoint = config.checkpoint
    train, valid = (
        [dataclasses.replace(source, path=change(source.path)) for source in sources]
        for sources in (config.data.train, config.data.valid)
    )
    load = checkpoint.load and change(checkpoint.load)
    export_hf = checkpoint.export_hf and change(checkpoint.export_hf)
    return dataclasses.replace(
        config,
        run_dir=change(config.run_dir),
        model=dataclasses.replace(config.model, hf_path=change(config.model.hf_path)),
        data=dataclasses.replace(config.data, train=train, valid=valid),
        checkpoint=dataclasses.replace(checkpoint, load=load, export_hf=export_hf),
    )


def _check_keys(argv: list[str]) -> None:
    """Raise one ConfigError that lists every unknown, ill-typed or empty key of files and overrides."""
    keys = valid_keys()
    problems: list[UserError] = []
    for position, argument in enumerate(argv):
        if not re.match(r"--?[a-zA-Z]", argument):
            continue
        name, equals, text = argument.lstrip("-").partition("=")
        following = argv[position + 1] if position + 1 < len(argv) else None
        if not equals:
            text = following or ""
        has_value = equals or (following is not None and not re.match(r"--?[a-zA-Z]", following))
        if name in ("dry_run", "help", "h") and equals:
            problems.append(ConfigError(f"--{name} takes no value", _COMMAND_LINE, f"write --{name} alone"))
        elif (name == "config" or name in keys) and not has_value:
            problems.append(ConfigError(f"--{name} has no value", _COMMAND_LINE, f"write --{name} VALUE"))
        elif name == "config":
            problems += _file_problems(text)
        elif name not in (*SWITCHES, "h"):
            problems += _override_problems(name.removesuffix("+").removesuffix(".help"), text, keys)
    if problems:
        raise combine(ConfigError, problems)


def _with_full_sources(argv: list[str]) -> list[str]:
    """Write out the short forms of data.train and data.valid."""
    written = list(argv)
    for position, argument in enumerate(argv):
        name, equals, text = argument.partition("=")
        if name.removesuffix("+") not in {f"--data.{key}" for key in SOURCE_KEYS}:
            continue
        place = position if equals else position + 1
        if equals or (place < len(argv) and not argv[place].startswith("--")):
            text = text if equals else argv[place]
            given = parsed(text)
            full = full_sources(given)
            if full != given:
                written[place] = f"{name}={json.dumps(full)}" if equals else json.dumps(full)
    return written


def _file_problems(path: str) -> list[UserError]:
    """Return what is wrong in a configuration file."""
    try:
        file = read_config_file(path)
    except UserError as error:
        return [error]
    content = dict(with_full_sources(file.content))
    if isinstance(content.get("dry_run"), bool):
        del content["dry_run"]  # --print_config writes it
    return list(section_problems(content, Config, "", file.where))


def _override_problems(key: str, text: str, keys: dict[str, Any]) -> Iterator[ConfigError]:
    """Yield what is wrong with one override of the command line."""
    kind = keys.get(key)
    if kind is None and typing.get_origin(keys.get(key.rpartition(".")[0])) is dict:
        kind = typing.get_args(keys[key.rpartition(".")[0]])[1]
    if kind is None:
        yield unknown_key(key, _COMMAND_LINE)
        return
    value = None if text == "null" else text
    if dataclasses.is_dataclass(kind) or typing.get_origin(kind) is list:
        value = parsed(text)
    yield from value_problems(value, kind, key, lambda _: _COMMAND_LINE)


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
        return ConfigError(f"cannot understand {stray[1]!r}", where=_COMMAND_LINE, fix="write --section.key value")
    unknown = re.search(r"Group '([^']+)' does not accept option '([^']+)'", text)
    if unknown:
        return unknown_key(f"{unknown[1]}.{unknown[2]}", _COMMAND_LINE)
    key = re.search(r'key "([^"]+)"', text)
    if not key:
        return ConfigError(text)
    value = re.search(r"Given value:(.*)$", text) or re.search(r"Got value:(.*)$", text)
    what = f"{key[1]} cannot be {value[1].strip()!r}" if value else f"{key[1]} has a wrong value: {text}"
    return ConfigError(what, fix=f"expected {words_for(valid_keys().get(key[1]))}")
