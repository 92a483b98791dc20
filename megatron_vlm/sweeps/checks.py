"""Checks of a sweep before anything is written or submitted: every point, all problems at once."""

from __future__ import annotations

import functools
import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlm.checkpoint.run_owner import find_owner
from megatron_vlm.cli import config_from, with_paths
from megatron_vlm.config import Config, changed_settings, to_dict
from megatron_vlm.errors import ConfigError, UserError, combine
from megatron_vlm.files.config_files import ConfigFile, read_config_file
from megatron_vlm.sweeps.manifest import Sweep, check_point_file, find_sweep, write_sweep
from megatron_vlm.sweeps.points import Draft, Point, digest_of, expand
from megatron_vlm.sweeps.sweep_file import Resources, read_sweep_file, sweep_folder

_MOST_CHANGES_NAMED = 3


@dataclass
class Problems:
    """What is wrong with points; the same problem of several points is one line that names them all."""

    found: dict[tuple[str, str | None, str | None], list[Point]] = field(default_factory=dict)

    def add(self, point: Point, error: UserError) -> None:
        """Note the problems of a point."""
        for problem in error.problems or (error,):
            self.found.setdefault((problem.what, problem.where, problem.fix), []).append(point)

    def attempt(self, point: Point, check: Callable[[], object]) -> None:
        """Run a check of a point and note what it raises."""
        try:
            check()
        except UserError as error:
            self.add(point, error)

    def raise_if_any(self) -> None:
        """Raise one ConfigError that lists everything noted.

        Raises:
            ConfigError: something was noted.
        """
        if self.found:
            problems: list[UserError] = [
                ConfigError(f"{names_of(points)}: {what}", where, fix)
                for (what, where, fix), points in self.found.items()
            ]
            raise combine(ConfigError, problems)


def names_of(points: Sequence[Point]) -> str:
    """Name points: "point 3 (lr=0.1)", "points 0, 2-5 (lr=0.1, ...)"."""
    if len(points) == 1:
        return str(points[0])
    return f"points {index_ranges(point.index for point in points)} ({points[0].name}, ...)"


def index_ranges(indices: Iterable[int]) -> str:
    """Write indices as sbatch takes them: 0,2-5."""
    groups = itertools.groupby(enumerate(sorted(indices)), lambda pair: pair[1] - pair[0])
    runs = [[index for _, index in group] for _, group in groups]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


@dataclass(frozen=True)
class CheckedSweep:
    """A sweep whose points are valid.

    Attributes:
        sweep: what `make` is to write.
        configs: configurations by index.
        excluded: points that `exclude` left out.
        idle_excludes: expressions of `exclude` that leave none out.
        before: the sweep as it was made before, if it was.
    """

    sweep: Sweep
    configs: Mapping[int, Config]
    excluded: int
    idle_excludes: Sequence[str]
    before: Sweep | None

    def write(self) -> None:
        """Write its folder; points of a sweep that has begun stay as they are.

        Raises:
            CheckpointError: something cannot be written.
        """
        before = self.before
        kept = {point.index for point in before.points} if before is not None and before.has_begun else ()
        write_sweep(self.sweep, {index: self.configs[index] for index in self.configs if index not in kept}, before)


def check_sweep_file(path: str) -> CheckedSweep:
    """Expand a sweep file and check all its points; nothing is written.

    Args:
        path: the sweep file.

    Raises:
        ConfigError: points are invalid, meet in a folder, or do not fit to what was made or begun before.
        CheckpointError: the folder holds something else.
    """
    settings, file = read_sweep_file(path)
    if not os.path.exists(settings.base):
        what, fix = f"base {settings.base} does not exist", "paths are relative to where the command is started"
        raise ConfigError(what, file.where("base"), fix)
    base = read_config_file(settings.base)
    drafts, excluded, idle_excludes = expand(settings, file, base)
    folder = sweep_folder(settings)
    before = find_sweep(folder, path)
    begun = before if before is not None and before.has_begun else None
    points, configs = _configs(drafts, begun, file, base)
    sweep = Sweep(folder, settings, points, os.path.realpath(path))
    problems = Problems()
    _check_folders(sweep, configs, problems, file)
    if begun is not None:
        _check_kept(sweep, begun, problems)
    check_points(points, configs, settings.resources, problems)
    problems.raise_if_any()
    return CheckedSweep(sweep, configs, excluded, idle_excludes, before)


def check_points(
    points: Sequence[Point], configs: Mapping[int, Config], resources: Resources, problems: Problems
) -> None:
    """Check what a start of each point would be refused for: layout, model, data, folders.

    Args:
        points: the points.
        configs: their configurations, by index.
        resources: what a point runs on.
        problems: receives what is wrong.
    """
    from megatron_vlm.checkpoint.run_folder import CHECKPOINTS_NAME, find_checkpoint, newest_complete
    from megatron_vlm.data.source_rows import check_source
    from megatron_vlm.families import registry
    from megatron_vlm.planning.preflight import check_export, check_layout, check_run_dir

    @functools.cache
    def model_of(hf_path: str, text_only: bool, image_mask: str | None) -> tuple[Any, list[str], Any]:
        hf_config = registry.load_hf_config(hf_path)
        family = registry.detect(hf_config)
        model_config = family.config_from_hf(hf_config, text_only, image_mask)
        weight_map = family.weight_map(model_config)
        return model_config, [name for name, _ in weight_map.items()], weight_map.buffers

    def check_model(config: Config) -> None:
        model = config.model
        model_config, names, buffers = model_of(model.hf_path, model.text_only, model.image_mask)
        check_layout(config, model_config, resources.world_size, names, buffers)

    def check_load(config: Config) -> None:
        load = config.checkpoint.load
        if load is not None and newest_complete(Path(config.run_dir) / CHECKPOINTS_NAME)[0] is None:
            find_weights(load)  # of a first start; a later one resumes

    find_data, find_weights = _once(check_source), _once(find_checkpoint)
    for point in points:
        config, owner = configs[point.index], find_owner(point.run_dir)
        if owner is not None and owner.lives:
            continue  # it was checked when it started, and may be exporting now
        for check in (check_model, check_run_dir, check_export, check_load):
            problems.attempt(point, functools.partial(check, config))
        for source in (*config.data.train, *config.data.valid):
            problems.attempt(point, functools.partial(find_data, source.path))
        problems.attempt(point, functools.partial(_check_belongs, point, config))


def _once(check: Callable[[str], object]) -> Callable[[str], None]:
    """Return a check of a path that looks once, however many points name the path, and answers all the same."""

    @functools.cache
    def error_of(path: str) -> UserError | None:
        try:
            check(path)
        except UserError as error:
            return error
        return None

    def checked(path: str) -> None:
        error = error_of(path)
        if error is not None:
            raise error

    return checked


def _configs(
    drafts: Sequence[Draft], before: Sweep | None, file: ConfigFile, base: ConfigFile
) -> tuple[list[Point], dict[int, Config]]:
    """Validate every draft and give it its index: the one that it had before, or the next."""
    known = {point.name: point.index for point in before.points} if before is not None else {}
    free = itertools.count(max(known.values(), default=-1) + 1)
    points, configs, problems = list[Point](), dict[int, Config](), Problems()
    taken = set[int]()
    for draft in drafts:
        index = known.get(draft.name, -1)
        index = next(free) if index < 0 or index in taken else index
        taken.add(index)
        point = Point(index, draft.name, draft.overrides, draft.run_dir, "")
        try:
            # A point trains the same wherever it is started.
            config = with_paths(config_from(draft.content, _places(draft, file, base)), os.path.abspath)
        except UserError as error:
            problems.add(point, error)
            continue
        points.append(Point(index, draft.name, draft.overrides, draft.run_dir, digest_of(config)))
        configs[index] = config
    problems.raise_if_any()
    return sorted(points, key=lambda point: point.index), configs


def _places(draft: Draft, file: ConfigFile, base: ConfigFile) -> Callable[[str], str]:
    """Return where a key of a point stands: in the sweep file, or in its base."""

    def where(key: str) -> str:
        if key not in draft.overrides:
            return base.where(key)
        sections = ("derived", "grid", "random.keys", "set", "points")
        found = next((f"{section}.{key}" for section in sections if f"{section}.{key}" in file.lines), "")
        section = key.partition(".")[0]
        return file.where(found or (f"grid.{section}" if f"grid.{section}" in file.lines else "points"))

    return where


def _check_folders(sweep: Sweep, configs: Mapping[int, Config], problems: Problems, file: ConfigFile) -> None:
    """Note points that would write into the same folder."""
    by_folder, by_export = defaultdict[Path, list[Point]](list), defaultdict[Path, list[Point]](list)
    for point in sweep.points:
        by_folder[point.run_dir].append(point)
        export = configs[point.index].checkpoint.export_hf
        if export is not None:
            by_export[Path(export).absolute()].append(point)
    for folder, points in by_folder.items():
        if len(points) > 1:
            keys = {key for point in points for key in point.overrides}
            differing = [key for key in sorted(keys) if len({repr(each.overrides.get(key)) for each in points}) > 1]
            fix = "they are the same: remove all but one, or draw from more values"
            if differing:  # in characters that folders' names do not get, where the name has the key already
                new = [key for key in differing if sweep.settings.point_name and key not in sweep.settings.point_name]
                fix = f"put {{{new[0]}}} into point_name" if new else "set a point_name in which they differ"
            error = ConfigError(f"the same run folder {folder}", file.where("point_name"), fix)
            for point in points:
                problems.add(point, error)
    for folder, points in by_export.items():
        if len(points) > 1:
            fix = "add derived: {checkpoint.export_hf: run_dir + '/export'}, or set: {checkpoint.export_hf: null}"
            for point in points:
                problems.add(point, ConfigError(f"the same checkpoint.export_hf {folder}", file.path, fix))


def _check_kept(sweep: Sweep, before: Sweep, problems: Problems) -> None:
    """Note points that were made before and are not there any more, or not the same; the sweep has begun."""
    now = {point.index: point for point in sweep.points}
    fix = "undo the change (points may be added), or give another folder"
    for old in before.points:
        new = now.get(old.index)
        if new is None:
            problems.add(old, ConfigError("no longer in the sweep file, which has begun", str(before.folder), fix))
        elif new.digest != old.digest and not (new.run_dir / "config.yaml").is_file():  # which says what differs
            problems.add(old, ConfigError("not the same as when it was made", str(before.folder), fix))
        else:
            problems.attempt(old, functools.partial(check_point_file, before, old))


def _check_belongs(point: Point, config: Config) -> None:
    """Make sure that a run folder which is there is one of this configuration.

    Raises:
        ConfigError: it is another's.
    """
    path = point.run_dir / "config.yaml"
    if not path.is_file():
        return
    file = read_config_file(str(path))
    try:
        found = to_dict(config_from(file.content, file.where))
    except UserError:  # of another version
        found = file.content
    changes = list(_differences(found, to_dict(config)))
    if changes:
        more = f" and {len(changes) - _MOST_CHANGES_NAMED} more" if len(changes) > _MOST_CHANGES_NAMED else ""
        what = f"its run folder belongs to another configuration: {', '.join(changes[:_MOST_CHANGES_NAMED])}{more}"
        raise ConfigError(what, str(point.run_dir), "move that folder away, or give another folder or point_name")


def _differences(found: Mapping[str, object], wanted: Mapping[str, object]) -> Iterator[str]:
    """Yield settings that differ; run_dir may be written in another way."""
    return changed_settings({**found, "run_dir": None}, {**wanted, "run_dir": None})
