"""The folder of a sweep: what `make` writes, and what its points leave there.

FOLDER/sweep.yaml            the sweep file as it was made, for the resources
FOLDER/made.json             path of the sweep file
FOLDER/manifest.jsonl        one object per point: index, of (how many), name, overrides, run_dir, digest
FOLDER/points/0003.yaml      resolved configuration of point 3, which its job trains
FOLDER/runs/NAME/            its run folder
FOLDER/logs/0003.out         output of all its starts
FOLDER/attempts/0003.jsonl   begin and end of each start
FOLDER/jobs.jsonl            Slurm jobs, with their points
FOLDER/submitting.json       while points are submitted, and until it is known what became of it
FOLDER/owner.json            likewise: who submits them
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.config import Config, to_yaml
from megatron_vlm.errors import CheckpointError, ConfigError
from megatron_vlm.files.config_files import read_config_file
from megatron_vlm.files.small_files import read_small, replace_durably
from megatron_vlm.sweeps.points import Point, digest_of
from megatron_vlm.sweeps.sweep_file import SweepFile, read_sweep_file

MANIFEST_NAME = "manifest.jsonl"
SWEEP_NAME = "sweep.yaml"
MADE_NAME = "made.json"
JOBS_NAME = "jobs.jsonl"
NOTE_NAME = "submitting.json"


@dataclass(frozen=True)
class Sweep:
    """A sweep that was made.

    Attributes:
        folder: its folder, absolute.
        settings: contents of its file.
        points: in the order of their indices.
        made_from: path of its file, absolute.
    """

    folder: Path
    settings: SweepFile
    points: Sequence[Point]
    made_from: str

    @property
    def name(self) -> str:
        """Name of its jobs and of its report."""
        return self.settings.name or self.folder.name

    def config_path(self, point: Point) -> Path:
        """File with the point's resolved configuration."""
        return self.folder / "points" / f"{point.index:04}.yaml"

    def log_path(self, point: Point) -> Path:
        """File with the output of all its starts."""
        return self.folder / "logs" / f"{point.index:04}.out"

    def attempts_path(self, point: Point) -> Path:
        """File with begin and end of each start."""
        return self.folder / "attempts" / f"{point.index:04}.jsonl"

    @property
    def has_begun(self) -> bool:
        """Whether points were submitted or started."""
        submitted = any((self.folder / name).exists() for name in (JOBS_NAME, NOTE_NAME))
        return submitted or any((self.folder / "attempts").glob("*.jsonl"))


def read_sweep(folder: Path) -> Sweep:
    """Read a sweep that was made.

    Raises:
        CheckpointError: the folder holds none, or its manifest is damaged.
        ConfigError: its sweep file is damaged.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        fix = "make it first: tools/sweep.py make SWEEP.yaml"
        raise CheckpointError(f"no sweep: there is no {MANIFEST_NAME}", str(folder), fix)
    settings, _ = read_sweep_file(str(folder / SWEEP_NAME))
    try:
        made = json.loads(read_small(folder / MADE_NAME))
        lines = [*map(json.loads, read_small(path).splitlines())]
        counts = {line.pop("of") for line in lines}
        if counts != {len(lines)}:  # cut at the end of a line
            raise ValueError(f"it has {len(lines)} of {max(counts, default='its')} points")
        points = [Point(**{**line, "run_dir": Path(line["run_dir"])}) for line in lines]
        return Sweep(folder.absolute(), settings, points, str(made["sweep_file"]))
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        fix = "make it again in another folder"
        raise CheckpointError(f"the manifest is damaged: {error}", str(path), fix) from None


def find_sweep(folder: Path, sweep_file: str) -> Sweep | None:
    """Return the sweep that was made in a folder before; None if the folder is empty or not there.

    Args:
        folder: of the sweep.
        sweep_file: what is to be made there.

    Raises:
        CheckpointError: the folder holds something else: files of another kind, or another sweep.
    """
    fix = "give another folder, or move this one away"
    if not os.path.lexists(folder / MANIFEST_NAME):
        if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
            raise CheckpointError("the sweep's folder is not empty, and holds no sweep", str(folder), fix)
        return None
    before = read_sweep(folder)
    if before.made_from != os.path.realpath(sweep_file):
        raise CheckpointError(f"the folder holds the sweep of {before.made_from}", str(folder), fix)
    return before


def write_sweep(sweep: Sweep, configs: Mapping[int, Config], before: Sweep | None = None) -> None:
    """Write the folder of a sweep; the manifest comes last, and replaces one that was there.

    Args:
        sweep: what is to be there afterwards.
        configs: configurations by index; those of points that stay as they are are left out.
        before: what was made there before; files of its points that are no longer there are deleted.

    Raises:
        CheckpointError: something cannot be written.
    """
    try:
        for name in ("points", "logs", "attempts"):
            (sweep.folder / name).mkdir(parents=True, exist_ok=True)
        for point in sweep.points:
            if point.index in configs:
                replace_durably(sweep.config_path(point), to_yaml(configs[point.index]))
        replace_durably(sweep.folder / SWEEP_NAME, read_small(sweep.made_from).decode())
        replace_durably(sweep.folder / MADE_NAME, json.dumps({"sweep_file": sweep.made_from}) + "\n")
        count = len(sweep.points)
        lines = [{**vars(point), "of": count, "run_dir": str(point.run_dir)} for point in sweep.points]
        replace_durably(sweep.folder / MANIFEST_NAME, "".join(json.dumps(line) + "\n" for line in lines))
        kept = {point.index for point in sweep.points}
        for point in before.points if before is not None else ():
            if point.index not in kept:
                sweep.config_path(point).unlink(missing_ok=True)  # the same folder
    except OSError as error:
        what = f"the sweep cannot be written: {error.strerror or error}"
        raise CheckpointError(what, str(sweep.folder), "give another folder, or make room") from None


def check_point_file(sweep: Sweep, point: Point) -> Config:
    """Return the configuration that a point's job trains, as it was made.

    Raises:
        ConfigError: the file was changed since, or is not valid any more.
    """
    from megatron_vlm.cli import config_from

    path = sweep.config_path(point)
    file = read_config_file(str(path))
    config = config_from(file.content, file.where)
    if digest_of(config) != point.digest:
        what = f"the configuration of {point} is not the one that was made"
        raise ConfigError(what, str(path), "put it back, or make the sweep in another folder")
    return config


def begin_attempt(sweep: Sweep, point: Point, described: Mapping[str, Any]) -> None:
    """Note that a start of a point begins; `described` has its `id`."""
    _append(sweep.attempts_path(point), {"event": "begin", "time": time.time(), **described})


def end_attempt(sweep: Sweep, point: Point, attempt_id: str, exit_code: int) -> None:
    """Note that a start of a point has ended."""
    line = {"event": "end", "time": time.time(), "id": attempt_id, "exit_code": exit_code}
    _append(sweep.attempts_path(point), line)


def record_job(sweep: Sweep, job: str, indices: Iterable[int], user: int | None = None) -> None:
    """Note a Slurm job, the points that it trains, and the number of the user who submitted it (None: this one)."""
    line = {"job": job, "time": time.time(), "user": os.getuid() if user is None else user, "indices": [*indices]}
    _append(sweep.folder / JOBS_NAME, line)


def recorded_jobs(sweep: Sweep) -> list[dict[str, Any]]:
    """Return the Slurm jobs that were noted: job, user, and indices of each."""
    lines = read_lines(sweep.folder / JOBS_NAME)
    return [line for line in lines if isinstance(line.get("job"), str) and _names_points(line)]


def noted_submission(sweep: Sweep) -> dict[str, Any] | None:
    """Return the note of a submission of which the outcome is not known yet: mark, user, and indices."""
    lines = read_lines(sweep.folder / NOTE_NAME)
    return next((line for line in lines if isinstance(line.get("mark"), str) and _names_points(line)), None)


def _names_points(line: Mapping[str, Any]) -> bool:
    indices = line.get("indices")
    return type(line.get("user")) is int and isinstance(indices, list) and all(type(index) is int for index in indices)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines; a line that was cut short by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in read_small(path).splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows += [row] if isinstance(row, dict) else []
    return rows


def _append(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line in one write, after what a kill may have left of another."""
    with path.open("ab+") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 1))
        separator = b"" if size == 0 or stream.read(1) == b"\n" else b"\n"
        stream.write(separator + json.dumps(line).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
