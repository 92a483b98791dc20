"""The sweep file: a base configuration and what its points change in it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlm.config_keys import instance, nearest_key, section_problems, unknown_key, valid_keys
from megatron_vlm.errors import ConfigError, UserError, combine
from megatron_vlm.files.config_files import ConfigFile, read_config_file
from megatron_vlm.sweeps.distributions import distribution_problem

MOST_POINTS = 100_000
# Options of sbatch that the sweep gives: long name -> short one, and where its value belongs.
_SBATCH_OPTIONS = {
    "array": ("a", "leave it out: the points and concurrency make it"),
    "job-name": ("J", "set name"),
    "output": ("o", "leave it out: outputs are in the sweep's folder, below logs"),
    "chdir": ("D", "leave it out: jobs start in the checkout"),
    "parsable": ("", "leave it out: the sweep gives it"),
    "test-only": ("", "leave it out: check does the same"),
    "wrap": ("", "leave it out: jobs run scripts/sweep.sbatch"),
    "export": ("", "set resources.environment, which is added to yours"),
    "nodes": ("N", "set resources.nodes"),
    "gpus-per-node": ("", "set resources.gpus_per_node"),
    "cpus-per-task": ("c", "set resources.cpus_per_node"),
    "time": ("t", "set resources.time"),
    "partition": ("p", "set resources.partition"),
    "account": ("A", "set resources.account"),
}


@dataclass(frozen=True)
class RandomSamples:
    """Points drawn at random."""

    samples: int = 0
    """How many are drawn, before `exclude`."""
    seed: int = 0
    """More samples of the same seed keep those that were drawn before, and so do further keys."""
    keys: dict[str, object] = field(default_factory=dict)
    """Key -> {uniform: [LOW, HIGH]}, {log_uniform: [LOW, HIGH]}, {int: [LOW, HIGH]} or {choice: [VALUE, ...]}."""


@dataclass(frozen=True)
class Resources:
    """What one point runs on."""

    nodes: int = 1
    """Nodes of a point."""
    processes_per_node: int | None = None
    """Ranks on each node; null takes gpus_per_node, or 1."""
    gpus_per_node: int | None = None
    """GPUs asked of Slurm for each node."""
    cpus_per_node: int | None = None
    """Cores asked of Slurm for each node; null takes the cluster's default."""
    time: int | str | None = None
    """Time limit of a job, as sbatch takes it. A point that needs longer saves, and goes on in a further job."""
    partition: str | None = None
    account: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    """Settings of scripts/job.sh, such as SRUN_OPTIONS, RUN_IN, PYTHON and MAX_CRASHES."""
    sbatch_options: list[str] = field(default_factory=list)
    """Further options of sbatch, such as --constraint=h200."""

    @property
    def ranks_per_node(self) -> int:
        """Processes that torchrun starts on each node."""
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Ranks of a point."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class SweepFile:
    """Contents of a sweep file.

    Attributes:
        base: configuration file that all points start from.
        folder: where the sweep keeps everything, run folders too.
        name: name of the Slurm job and of the report; that of the folder when null.
        set: key -> value for all points.
        points: overrides of each point, listed.
        random: the same, drawn.
        grid: key -> values; of which every combination is taken, with every listed and every drawn point.
        derived: key -> expression over keys, in this order.
        exclude: expressions; a point is left out where one is true.
        point_name: name of a point's run folder, with {section.key} for values; null joins what differs.
        concurrency: most points that run at once under Slurm; null is no limit.
        resources: what one point runs on.
    """

    base: str
    folder: str
    name: str | None = None
    set: dict[str, object] = field(default_factory=dict)
    points: list[dict[str, object]] = field(default_factory=list)
    random: RandomSamples = field(default_factory=RandomSamples)
    grid: dict[str, list[object]] = field(default_factory=dict)
    derived: dict[str, object] = field(default_factory=dict)
    exclude: list[str] = field(default_factory=list)
    point_name: str | None = None
    concurrency: int | None = None
    resources: Resources = field(default_factory=Resources)


def sweep_folder(sweep: SweepFile) -> Path:
    """Return a sweep's folder, absolute."""
    return Path(os.path.abspath(os.path.expanduser(sweep.folder)))


def read_sweep_file(path: str) -> tuple[SweepFile, ConfigFile]:
    """Read a sweep file and check what can be said without its base.

    Returns:
        The sweep, and the file, which knows the line of every key.

    Raises:
        ConfigError: the file is no sweep; all problems are listed.
    """
    if not os.path.exists(path):
        raise ConfigError("the sweep file does not exist", path, "give the path of a sweep file, or a sweep's folder")
    file = read_config_file(path)
    problems: list[UserError] = list(section_problems(file.content, SweepFile, "", file.where, _unknown))
    problems += _no_text_keys(file.content, file)
    for entry in dataclasses.fields(SweepFile):
        if entry.default is entry.default_factory is dataclasses.MISSING and entry.name not in file.content:
            problems.append(ConfigError(f"{entry.name} is missing", path, f"add {entry.name}: to the sweep file"))
    if problems:
        raise combine(ConfigError, problems)
    sweep: SweepFile = instance(file.content, SweepFile)
    problems += [*_value_problems(sweep, file), *_key_problems(sweep, file)]
    if problems:
        raise combine(ConfigError, problems)
    return sweep, file


def _no_text_keys(content: object, file: ConfigFile, above: str = "") -> Iterator[ConfigError]:
    """Find keys that YAML does not read as text, such as numbers."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if not isinstance(key, str):
                yield ConfigError(f"{key!r} is no key", file.where(above), "write keys as section.key")
            yield from _no_text_keys(value, file, f"{above}.{key}" if above else str(key))
    for item in content if isinstance(content, list) else ():
        yield from _no_text_keys(item, file, above)


def _unknown(key: str, where: str) -> ConfigError:
    """Describe a key that a sweep file does not have."""
    keys = valid_keys(SweepFile)
    nearest = nearest_key(key, keys)
    section = key.rpartition(".")[0]
    names = [name for name in keys if name.rpartition(".")[0] == section]
    if key in valid_keys():
        fix = f"keys of the configuration stand below set, grid, points, random.keys or derived: set: {{{key}: ...}}"
    elif nearest in keys:
        fix = f"did you mean {nearest}?"
    else:
        fix = f"a sweep file has {', '.join(names)}"
    return ConfigError(f"unknown key {key}", where, fix)


def _value_problems(sweep: SweepFile, file: ConfigFile) -> Iterator[ConfigError]:
    """Check numbers and lists."""
    resources = sweep.resources
    for name, number in (
        ("concurrency", sweep.concurrency),
        ("resources.nodes", resources.nodes),
        ("resources.processes_per_node", resources.processes_per_node),
        ("resources.gpus_per_node", resources.gpus_per_node),
        ("resources.cpus_per_node", resources.cpus_per_node),
    ):
        if number is not None and number < 1:
            yield ConfigError(f"{name} is {number}", file.where(name), "give a number of at least 1")
    yield from _option_problems(resources.sbatch_options, file.where("resources.sbatch_options"))
    if not sweep.points and not sweep.random.samples and not sweep.grid:
        yield ConfigError("the sweep has no points", file.path, "add grid, points, or random")
    if bool(sweep.random.samples) != bool(sweep.random.keys):
        yield ConfigError("random needs samples and keys", file.where("random"), "give both, or leave random out")
    if not 0 <= sweep.random.samples <= MOST_POINTS:
        where = file.where("random.samples")
        yield ConfigError(f"random.samples is {sweep.random.samples}", where, f"give 0 to {MOST_POINTS}")
    for key, values in sweep.grid.items():
        if not values:
            yield ConfigError(f"grid.{key} is empty", file.where(f"grid.{key}"), "list its values, or remove it")
    for key, described in sweep.random.keys.items():
        problem = distribution_problem(described)
        if problem:
            yield ConfigError(f"random.keys.{key} {problem[0]}", file.where(f"random.keys.{key}"), problem[1])


def _option_problems(options: Sequence[str], where: str) -> Iterator[ConfigError]:
    """Check options of sbatch: those of the sweep would be overridden by them, also if they are shortened."""
    for option in options:
        name = option.partition("=")[0]
        if not option.startswith("-"):
            what = f"resources.sbatch_options has {option!r}, which sbatch would take for the script"
            yield ConfigError(what, where, "write options with their values, such as --constraint=h200")
        for long_name, (short, fix) in _SBATCH_OPTIONS.items():
            is_long = name.startswith("--") and f"--{long_name}".startswith(name) and name != "--gpus"
            if is_long or (short and option.startswith(f"-{short}")):
                yield ConfigError(f"resources.sbatch_options has {option!r}, which the sweep sets", where, fix)
                break


def _key_problems(sweep: SweepFile, file: ConfigFile) -> Iterator[ConfigError]:
    """Check that keys exist, and that none is given in two ways, whole or in part."""
    givers = [("set", f"set.{key}", {*leaf_keys({key: value})}) for key, value in sweep.set.items()]
    in_points = set[str]()
    for point in sweep.points:
        given = [("one of points", "points", {*leaf_keys({key: value})}) for key, value in point.items()]
        yield from _given_twice(given, file)
        in_points |= {leaf for _, _, leaves in given for leaf in leaves}
    givers.append(("points", "points", in_points))
    givers += [("random.keys", f"random.keys.{key}", {key}) for key in sweep.random.keys]
    for key, values in sweep.grid.items():
        givers.append(("grid", f"grid.{key}", {leaf for value in values for leaf in leaf_keys({key: value})}))
    givers += [("derived", f"derived.{key}", {*leaf_keys({key: value})}) for key, value in sweep.derived.items()]
    keys = valid_keys()
    for _, place, leaves in givers:
        for leaf in sorted(leaves):
            if leaf == "run_dir":
                yield ConfigError("run_dir is set by the sweep", file.where(place), "use folder and point_name")
            elif leaf not in keys and leaf.rpartition(".")[0] not in _mapping_keys(keys):
                yield unknown_key(leaf, file.where(place))
    yield from _given_twice(givers, file)


def _given_twice(givers: Sequence[tuple[str, str, Set[str]]], file: ConfigFile) -> Iterator[ConfigError]:
    """Yield keys that two of several give, or of which one gives a part of what another gives whole.

    Args:
        givers: group, place, and keys of each.
        file: the sweep file.
    """
    whole, parts = dict[str, str](), dict[str, tuple[str, str]]()  # key -> group; what is above a key -> group, key
    for group, place, leaves in givers:
        for leaf in sorted(leaves):
            for above in _with_sections(leaf):
                if above in whole:
                    yield _twice(leaf, group, above, whole[above], file.where(place))
            if leaf in parts:
                part_group, part = parts[leaf]
                yield _twice(leaf, group, part, part_group, file.where(place))
        for leaf in leaves:
            whole[leaf] = group
            parts |= dict.fromkeys(_with_sections(leaf)[1:], (group, leaf))


def _twice(key: str, group: str, other: str, other_group: str, where: str) -> ConfigError:
    """Describe a key that two give."""
    if key == other:
        places = f"in {other_group} and in {group}" if group != other_group else f"twice in {group}"
        return ConfigError(f"{key} stands {places}", where, "keep one of them")
    what = f"{other} stands in {other_group} and {key} in {group}, and one is a part of the other"
    return ConfigError(what, where, "keep one of them")


def _with_sections(key: str) -> list[str]:
    """Return a key and everything above it: a.b.c, a.b, a."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _mapping_keys(keys: Mapping[str, Any]) -> set[str]:
    """Return keys whose values are mappings with names of their own, such as optimizer.lr_multipliers."""
    return {key for key, kind in keys.items() if getattr(kind, "__origin__", None) is dict}


def leaf_keys(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Write out sections: {parallel: {tensor_model_parallel_size: 2}} is {parallel.tensor_model_parallel_size: 2}."""
    keys = valid_keys()
    leaves: dict[str, Any] = {}
    for key, value in overrides.items():
        if dataclasses.is_dataclass(keys.get(key)) and isinstance(value, Mapping):
            leaves |= {f"{key}.{name}": item for name, item in value.items()}
        else:
            leaves[key] = value
    return leaves
