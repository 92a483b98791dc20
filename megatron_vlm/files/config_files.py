"""Configuration files: YAML without its traps, and the line of every key.

Keys that stand twice are refused: YAML would take the last one in silence. Numbers are those that everybody means:
`1:30` (YAML 1.1's ninety) and `010` (its eight) are text, `1e-4` (its text) is a number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from megatron_vlm.errors import ConfigError, UserError, combine
from megatron_vlm.files.small_files import read_small

MAX_CONFIG_BYTES = 256 * 2**10


class _Loader(yaml.SafeLoader):
    """PyYAML's loader in Python (that in C ends with a segmentation fault on deep nesting) with other numbers."""


_REPLACED_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def load_yaml(text: str) -> Any:
    """Parse YAML as configurations are written.

    Raises:
        yaml.YAMLError: it is not YAML.
        ValueError: a number has too many digits.
    """
    return yaml.load(text, Loader=_Loader)


@dataclass(frozen=True)
class ConfigFile:
    """The contents of a configuration file.

    Attributes:
        path: the file.
        content: its mapping.
        lines: line number of every key, by its dotted name; keys in items of lists have none.
    """

    path: str
    content: dict[Any, Any]
    lines: dict[str, int] = field(default_factory=dict)

    def where(self, key: str) -> str:
        """Return file and line of a key, or of the nearest section above it that has a line."""
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return f"{self.path}:{self.lines[key]}" if key else self.path


def read_config_file(path: str) -> ConfigFile:
    """Read a configuration file.

    Raises:
        ConfigError: it cannot be read, is not YAML, has no mapping, or has keys that stand twice.
    """
    file, problems = ConfigFile(path, {}), list[UserError]()
    try:
        loader = _Loader(read_small(path, MAX_CONFIG_BYTES).decode("utf-8"))
        node = loader.get_single_node()
        problems = _note_keys(node, "", file, set())  # now: constructing resolves merge keys, in place
        content = None if node is None else loader.construct_document(node)
    except OSError as error:
        fix = "give the path of a YAML file after --config"
        raise ConfigError(f"cannot read the configuration file: {error.strerror}", path or "''", fix) from None
    except UnicodeDecodeError:
        raise ConfigError("the configuration file is not UTF-8 text", path, "save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"not valid YAML: {problem}", where, "correct this line or the one before it") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not valid YAML: {error}", path, "correct it") from None
    if not isinstance(content, dict):
        fix = "write keys and values, such as run_dir: runs/first"
        raise ConfigError("the configuration file holds no mapping of keys to values", path, fix)
    if problems:
        raise combine(ConfigError, problems)
    return ConfigFile(path, content, file.lines)


def _note_keys(node: yaml.Node | None, section: str, file: ConfigFile, seen: set[int]) -> list[UserError]:
    """Note the line of every key at or below a node; return the keys that stand twice."""
    problems: list[UserError] = []
    if id(node) in seen:  # a YAML alias
        return problems
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            problems += _note_keys(item, "", ConfigFile(file.path, {}), seen)
    elif isinstance(node, yaml.MappingNode):
        own: dict[str, int] = {}
        for key_node, value_node in node.value:
            name, line = str(key_node.value), key_node.start_mark.line + 1
            if name in own:
                lines = f"lines {own[name]} and {line}"
                fix = "keep one of them, or put what both hold together"
                problems.append(ConfigError(f"key {section}{name} stands twice, in {lines}", file.path, fix))
            own.setdefault(name, line)
            file.lines.setdefault(section + name, line)
            problems += _note_keys(value_node, f"{section}{name}.", file, seen)
    return problems
