"""What a run folder says about its run: figures, evaluations, starts, settings, and how it ended.

Any of it may be missing, incomplete or damaged: the run may still be writing, may have been killed, or be of an earlier
version. What cannot be read is left out and counted.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vlm.errors import CheckpointError, ConfigError
from megatron_vlm.files.config_files import read_config_file
from megatron_vlm.files.small_files import read_end, read_small

USER_ERROR_PATTERN = "user_error_*.txt"  # of scripts/job.sh, one for each job
MAX_LOG_BYTES = 4 * 2**30
_RECENT_ROWS = 100  # over which a speed is taken
_LARGEST_INTEGER = 10**300  # larger ones are no floats
_CHECKPOINT = re.compile(r"step_(\d{8,})")
Record = Mapping[str, Any]


@dataclass
class RunRecord:
    """Contents of a run folder.

    Attributes:
        run_dir: the folder.
        steps: logged steps, ascending; of steps that were repeated after a resume the last.
        evaluations: likewise.
        starts: starts of the run in their order.
        config: settings of the last start; empty if they cannot be read.
        config_yaml: the same as the file has them.
        stopped: reason and step of an early stop; empty if there was none.
        exported: where the model was exported to; empty if it was not.
        checkpoints: steps that were saved.
        user_error: the message with which the last start was refused; empty if it was not.
        problems: what was left out.
    """

    run_dir: Path
    steps: Sequence[Record] = ()
    evaluations: Sequence[Record] = ()
    starts: Sequence[Record] = ()
    config: Record = field(default_factory=dict)
    config_yaml: str = ""
    stopped: Record = field(default_factory=dict)
    exported: Record = field(default_factory=dict)
    checkpoints: Sequence[int] = ()
    user_error: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The last step that was logged or saved; 0 before the first."""
        return max([0, *(row["step"] for row in self.steps[-1:]), *self.checkpoints])

    @property
    def train_iters(self) -> int | None:
        """Steps of the whole run, None if nothing says so."""
        rows = [*(self.steps[-1:]), section(self.config, "train")]
        found = [number(row, "train_iters") for row in rows]
        return next((int(value) for value in found if value is not None), None)


def read_run(run_dir: Path, most_log_bytes: int | None = None) -> RunRecord:
    """Read a run folder.

    Args:
        run_dir: the folder.
        most_log_bytes: read only so much of the end of each log, for the last step alone; None reads everything.

    Raises:
        CheckpointError: it is no run folder, or a file in it cannot be read.
    """
    fix = "give the run_dir of a run"
    if not run_dir.is_dir():
        raise CheckpointError("no such folder" if not run_dir.exists() else "not a folder", str(run_dir), fix)
    if not any((run_dir / name).exists() for name in ("config.yaml", "metrics.jsonl")):
        above = next((folder for folder in run_dir.absolute().parents[:2] if (folder / "config.yaml").is_file()), None)
        raise CheckpointError(
            "not a run folder: it has neither config.yaml nor metrics.jsonl",
            str(run_dir),
            f"{fix}, such as {above}" if above else fix,
        )
    run = RunRecord(run_dir)
    try:
        run.steps = _steps(run, "metrics.jsonl", most_log_bytes)
        run.evaluations = _steps(run, "evaluations.jsonl", most_log_bytes)
        run.starts = _lines(run, "starts.jsonl", most_log_bytes, lambda row: True)
        run.stopped, run.exported = _object(run, "stopped.json"), _object(run, "exported.json")
        run.config, run.config_yaml = _config(run)
        run.user_error = _user_error(run_dir)
        folders = (run_dir / "checkpoints").iterdir() if (run_dir / "checkpoints").is_dir() else ()
        run.checkpoints = sorted(int(match[1]) for path in folders if (match := _CHECKPOINT.fullmatch(path.name)))
    except OSError as error:
        where = str(error.filename or run_dir)
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where, "make it readable") from None
    return run


def number(row: Record, key: str) -> float | None:
    """Return a finite number of a record, None where it has another value or none."""
    value = row.get(key)
    if type(value) is float:
        return value if math.isfinite(value) else None
    return float(value) if type(value) is int and abs(value) < _LARGEST_INTEGER else None


def series(rows: Sequence[Record], key: str, factor: float = 1.0) -> list[tuple[int, float]]:
    """Return steps and values, times a factor, of the rows of steps that have a number there."""
    return [(row["step"], value * factor) for row in rows if (value := number(row, key)) is not None]


def unfinite_steps(rows: Sequence[Record], key: str = "loss") -> list[int]:
    """Return the steps whose number was not finite; training writes null in its place."""
    return [row["step"] for row in rows if key in row and number(row, key) is None]


def divergence(run: RunRecord) -> str:
    """Return which loss of a run is not finite at its last step, in words; "" if none."""
    losses = {"loss": run.steps, "held-out loss": run.evaluations}
    return "; ".join(
        f"its {name} is not finite at step {rows[-1]['step']}"
        for name, rows in losses.items()
        if unfinite_steps(rows[-1:])
    )


def recent(rows: Sequence[Record], key: str) -> float | None:
    """Return the median over the last rows; one slow step does not count."""
    values = [value for row in rows[-_RECENT_ROWS:] if (value := number(row, key)) is not None]
    return statistics.median(values) if values else None


def section(row: Record, key: str) -> Record:
    """Return a dictionary of a record, an empty one where it has another value or none."""
    value = row.get(key)
    return value if isinstance(value, Mapping) else {}


def _steps(run: RunRecord, name: str, most_bytes: int | None) -> list[Record]:
    """Read records of steps; a start that went back replaces everything from there on."""
    kept: list[Record] = []
    for row in _lines(run, name, most_bytes, lambda row: type(row.get("step")) is int and row["step"] >= 0):
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return kept


def _lines(run: RunRecord, name: str, most_bytes: int | None, is_usable: Callable[[Record], bool]) -> list[Record]:
    """Read a file of JSON lines, which may not exist; what is no usable object is left out.

    A last line without its line break is being written, or was cut short by a kill, which is no damage.
    """
    path = run.run_dir / name
    if not path.exists():
        return []
    content = read_small(path, MAX_LOG_BYTES) if most_bytes is None else read_end(path, most_bytes)
    *lines, last = content.split(b"\n")
    rows = [row for line in lines if (row := _parsed(line)) is not None and is_usable(row)]
    damaged = sum(bool(line.strip()) for line in lines) - len(rows)
    if damaged:
        run.problems.append(f"{damaged} damaged {'lines' if damaged > 1 else 'line'} of {name}")
    row = _parsed(last)
    return [*rows, row] if row is not None and is_usable(row) else rows


def _user_error(run_dir: Path) -> str:
    """Return the message of ranks that were refused, in one line; nothing if the run was started again since."""
    newest = max(run_dir.glob(USER_ERROR_PATTERN), key=lambda path: path.stat().st_mtime_ns, default=None)
    starts = run_dir / "starts.jsonl"
    if newest is None or (starts.exists() and starts.stat().st_mtime_ns > newest.stat().st_mtime_ns):
        return ""
    return " ".join(read_small(newest).decode(errors="replace").split())


def _parsed(text: bytes) -> Record | None:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _object(run: RunRecord, name: str) -> Record:
    """Read a file with one JSON object, which may not exist."""
    path = run.run_dir / name
    if not path.exists():
        return {}
    row = _parsed(read_small(path))
    if row is None:
        run.problems.append(f"{name}, which is damaged")
    return row or {}


def _config(run: RunRecord) -> tuple[Record, str]:
    """Return the settings of the last start, as values and as text."""
    path = run.run_dir / "config.yaml"
    if not path.exists():
        return {}, ""
    text = read_small(path).decode(errors="replace")
    try:
        return read_config_file(str(path)).content, text
    except ConfigError:
        run.problems.append("config.yaml, which is damaged")
        return {}, text
