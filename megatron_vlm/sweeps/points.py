"""From a sweep file to its points: every combination, drawn samples, derived values, names and run folders."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import random
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.config import Config, to_dict
from megatron_vlm.config_keys import type_hints
from megatron_vlm.errors import ConfigError, UserError, combine
from megatron_vlm.files.config_files import ConfigFile
from megatron_vlm.sweeps.distributions import draw
from megatron_vlm.sweeps.expressions import evaluate
from megatron_vlm.sweeps.sweep_file import MOST_POINTS, SweepFile, leaf_keys, sweep_folder

_LONGEST_NAME = 200  # bytes; a file name may have 255
_UNSAFE = re.compile(r"[^\w.,=+-]+", re.ASCII)
Overrides = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """One configuration of a sweep.

    Attributes:
        index: its number in the sweep, and in the Slurm array.
        name: name of its run folder below the sweep's folder.
        overrides: what differs from the base, by dotted key.
        run_dir: its run folder, absolute.
        digest: SHA-256 of the resolved configuration.
    """

    index: int
    name: str
    overrides: Overrides
    run_dir: Path
    digest: str

    def __str__(self) -> str:
        return f"point {self.index} ({self.name})"


@dataclass(frozen=True)
class Draft:
    """A point whose configuration has not been checked.

    Attributes:
        name: name of its run folder below the sweep's folder.
        overrides: what differs from the base, by dotted key.
        run_dir: its run folder, absolute.
        content: the configuration's sections and keys.
    """

    name: str
    overrides: Overrides
    run_dir: Path
    content: dict[str, Any]


def expand(sweep: SweepFile, file: ConfigFile, base: ConfigFile) -> tuple[list[Draft], int, list[str]]:
    """Return the points of a sweep, how many were left out by `exclude`, and what of it leaves none out.

    Args:
        sweep: the sweep.
        file: its file.
        base: the base configuration.

    Raises:
        ConfigError: expressions or names do not work; all such problems are listed.
    """
    varied = _combinations(sweep, file)
    shown = list(dict.fromkeys(key for overrides in varied for key in overrides))
    drafts, excluded, problems = list[Draft](), 0, list[UserError]()
    idle = dict.fromkeys(sweep.exclude, True)
    for overrides in varied:
        try:
            draft = _draft({**leaf_keys(sweep.set), **overrides}, shown, sweep, file, base)
            with_defaults = _with_defaults(draft.content)
            is_out = [bool(evaluate(text, with_defaults, file.where("exclude"))) for text in sweep.exclude]
        except ConfigError as error:
            problems += error.problems or (error,)
            continue
        idle |= {text: False for text, is_true in zip(sweep.exclude, is_out, strict=True) if is_true}
        excluded += any(is_out)
        drafts += [] if any(is_out) else [draft]
    if problems:
        distinct = {(problem.what, problem.where): problem for problem in problems}
        raise combine(ConfigError, list(distinct.values()))
    if not drafts:
        raise ConfigError(f"exclude leaves out all {excluded} points", file.where("exclude"), "leave some in")
    return drafts, excluded, [text for text in idle if idle[text]]


def digest_of(config: Config) -> str:
    """Return the SHA-256 of a resolved configuration."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode(errors="backslashreplace")).hexdigest()


def nested(overrides: Overrides, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Put dotted keys into a copy of a configuration's mapping."""
    result: dict[str, Any] = copy.deepcopy(dict(content or {}))
    for key, value in overrides.items():
        section, (*above, last) = result, key.split(".")
        for name in above:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        section[last] = value
    return result


def _combinations(sweep: SweepFile, file: ConfigFile) -> list[dict[str, Any]]:
    """Return the overrides of every listed or drawn point with every point of the grid."""
    drawn = list(_samples(sweep))
    grid = [[leaf_keys({key: value}) for value in values] for key, values in sweep.grid.items()]
    number = max(1, len(sweep.points)) * max(1, len(drawn))
    for values in grid:
        number *= len(values)
    if number > MOST_POINTS:
        raise ConfigError(f"the sweep has {number:,} points", file.path, f"make it at most {MOST_POINTS:,}")
    parts = [[leaf_keys(point) for point in sweep.points] or [{}], drawn or [{}], *grid]
    return [{key: value for part in parts for key, value in part.items()} for parts in itertools.product(*parts)]


def _samples(sweep: SweepFile) -> Iterator[dict[str, Any]]:
    """Draw the samples; each key has a generator of its own, so that one more changes nothing of the others."""
    generators = {key: random.Random(f"{sweep.random.seed} {key}") for key in sweep.random.keys}
    for _ in range(sweep.random.samples):
        drawn = {key: draw(described, generators[key]) for key, described in sweep.random.keys.items()}  # type: ignore[arg-type]
        yield leaf_keys(drawn)


def _draft(
    overrides: dict[str, Any], shown: Sequence[str], sweep: SweepFile, file: ConfigFile, base: ConfigFile
) -> Draft:
    content = nested(overrides, base.content)
    name = _name(overrides, shown, sweep, file, content)
    run_dir = sweep_folder(sweep) / "runs" / name
    content["run_dir"] = str(run_dir)
    for key, expression in sweep.derived.items():
        where = file.where(f"derived.{key}")
        value = evaluate(expression, _with_defaults(content), where) if isinstance(expression, str) else expression
        overrides[key] = value
        content = nested({key: value}, content)
    return Draft(name, overrides, run_dir, content)


def _name(
    overrides: Overrides, shown: Sequence[str], sweep: SweepFile, file: ConfigFile, content: Mapping[str, Any]
) -> str:
    """Return the name of a point's run folder."""
    where = file.where("point_name")
    if sweep.point_name is None:
        short = short_keys(shown)
        parts = [f"{short[key]}={value_text(overrides[key])}" for key in shown if key in overrides]
        name = ",".join(_UNSAFE.sub("-", part) for part in parts)
    else:
        try:
            name = _Template(_with_defaults(content)).format(sweep.point_name)
        except (ValueError, LookupError, TypeError, OverflowError, MemoryError) as error:
            fix = "write {section.key} or {section.key:FORMAT}, such as lr{optimizer.lr:g}"
            raise ConfigError(
                f"point_name {sweep.point_name!r} does not work: {str(error) or 'it is too long'}", where, fix
            ) from None
    pieces = name.split("/")
    if not all(pieces) or {".", ".."} & {*pieces} or not name.isprintable():
        raise ConfigError(f"{name!r} is no name of a folder", where, "give another point_name")
    if max(len(piece.encode()) for piece in pieces) > _LONGEST_NAME:
        fix = "set point_name, such as lr{optimizer.lr:g}"
        raise ConfigError(f"{name[:80]!r}... is too long for a folder's name", where, fix)
    return name


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Return the last parts of keys, and the whole key where two have the same."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)}


def value_text(value: Any) -> str:
    """Return a value as people write it: 0.001, true, null, [1, 2]."""
    return value if isinstance(value, str) else json.dumps(value)


class _Template(string.Formatter):
    """Fills {section.key} in; values cannot put slashes or blanks into names."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        """Look a key up; a template reaches nothing else."""
        value: Any = self.content
        for name in field_name.split("."):
            if not isinstance(value, Mapping) or name not in value:
                raise LookupError(f"{field_name or '{}'} is no key with a value")
            value = value[name]
        return value, field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        """Format a value, made safe as a part of a name."""
        text = format(value, format_spec) if format_spec else value_text(value)
        return _UNSAFE.sub("-", text)


def _with_defaults(content: Mapping[str, Any], settings: type = Config) -> dict[str, Any]:
    """Return sections and keys with the defaults of those that are not given."""
    kinds = type_hints(settings)
    full = dict(content)
    for entry in dataclasses.fields(settings):
        kind, given = kinds[entry.name], content.get(entry.name)
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            full[entry.name] = _with_defaults(given if isinstance(given, Mapping) else {}, kind)
        elif entry.name not in content and entry.default is not dataclasses.MISSING:
            full[entry.name] = entry.default
        elif entry.name not in content and entry.default_factory is not dataclasses.MISSING:
            full[entry.name] = entry.default_factory()
    return full
