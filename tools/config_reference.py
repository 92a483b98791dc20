"""Print every configuration key with its type, default and meaning, as Markdown; docs/config.md is this output.

python tools/config_reference.py > docs/config.md
"""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import docstring_parser

from megatron_vlm.config import Config

HEADING = """# Configuration keys

Written by `python tools/config_reference.py > docs/config.md` from `megatron_vlm/config.py`; a test compares the two.
Every key may stand in the YAML file or on the command line (`--train.seed 7`). Keys without a default are required.

A key that is unknown, empty (`null` where the type does not say so) or twice in one file is refused, with the line; for
the name that another stack gives to a setting (`learning_rate`, `sequence_len`, ...) the error has ours. The command
line wins over files, later files over earlier ones. `1e-4` is a number; `1:30` and `010`, which YAML 1.1 reads as 90
and 8, are none.
"""


def reference() -> str:
    """Return the full document."""
    sections = [HEADING, *_table(Config, "", skip_sections=True)]
    for name, kind in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            sections += [f"\n## {name}\n", *_table(kind, f"{name}.")]
    return "\n".join(sections) + "\n"


def _table(settings: Any, prefix: str, skip_sections: bool = False) -> Iterator[str]:
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    meanings = {entry.arg_name: entry.description for entry in docstring_parser.parse_from_object(settings).params}
    kinds = typing.get_type_hints(settings)
    for entry in dataclasses.fields(settings):
        kind = kinds[entry.name]
        if skip_sections and dataclasses.is_dataclass(kind):
            continue
        meaning = " ".join((meanings[entry.name] or "").split())
        yield f"| `{prefix}{entry.name}` | {_kind(kind)} | {_default(entry)} | {meaning.replace('|', chr(92) + '|')} |"


def _kind(kind: Any) -> str:
    """Describe a type in words."""
    held = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in held)
    if type(None) in held:
        return f"{_kind(held[0])} or null"
    if dataclasses.is_dataclass(kind):
        return "{" + ", ".join(entry.name for entry in dataclasses.fields(kind)) + "}"
    if typing.get_origin(kind) in (list, tuple):
        return f"list of {_kind(held[0])}"
    if typing.get_origin(kind) is dict:
        return f"{_kind(held[0])} to {_kind(held[1])}"
    return str(kind.__name__)


def _default(entry: dataclasses.Field[Any]) -> str:
    """Return a default as YAML writes it; empty where there is none."""
    if entry.default_factory is not dataclasses.MISSING:
        return f"`{entry.default_factory()}`"
    if entry.default is dataclasses.MISSING:
        return ""
    value = list(entry.default) if isinstance(entry.default, tuple) else entry.default
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


if __name__ == "__main__":
    print(reference(), end="")
