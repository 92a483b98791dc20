"""Runs in a line each, and two runs side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vlm.errors import CheckpointError
from megatron_vlm.report.run_record import Record, RunRecord, number, read_run, recent, series, unfinite_steps
from megatron_vlm.report.run_state import state_of

RUN_FILES = ("config.yaml", "metrics.jsonl")
_ABSENT = "-"
_TAIL_BYTES = 256 * 2**10
_STEPS_COMPARED = 8
_COLUMNS = ("run", "state", "step", "loss", "held-out", "tok/s", "ranks", "last start", "host")
_ENVIRONMENT = ("device", "ranks", "nodes", "commit", "driver", "versions")
Rows = list[list[str]]


def find_runs(folders: Sequence[Path], depth: int) -> list[Path]:
    """Return the run folders at or below folders, sorted; links are not followed, and runs hold no further runs.

    Args:
        folders: where to look.
        depth: levels of folders below them.

    Raises:
        CheckpointError: a folder does not exist, or there is no run.
    """
    for folder in folders:
        if not folder.is_dir():
            raise CheckpointError("no such folder", str(folder), "give folders that hold runs")
    found = [path for folder in folders for path in _runs_below(folder, depth)]
    if not found:
        where = ", ".join(map(str, folders))
        raise CheckpointError("no run folder", where, "give a folder that holds runs, or a larger --depth")
    return sorted({*found})


def describe_run(run_dir: Path) -> dict[str, str]:
    """Return what a list says about a run, by column; of long logs only the end is read."""
    try:
        run = read_run(run_dir, _TAIL_BYTES)
    except CheckpointError as error:  # deleted or unreadable meanwhile
        return dict.fromkeys(_COLUMNS, "") | {"run": str(run_dir), "state": error.what}
    last = run.starts[-1] if run.starts else {}
    total = f"/{run.train_iters}" if run.train_iters is not None else ""
    values = [
        str(run_dir),
        state_of(run).word,
        f"{run.last_step}{total}",
        _figure(_last(run.steps, "loss")),
        _figure(_last(run.evaluations, "loss")),
        _figure(recent(run.steps, "tokens_per_second")),
        str(last.get("ranks", _ABSENT)),
        str(last.get("time", _ABSENT))[:16].replace("T", " "),
        str(last.get("host", _ABSENT)),
    ]
    return dict(zip(_COLUMNS, values, strict=True))


def compare_runs(first: Path, second: Path) -> dict[str, Rows]:
    """Return tables of two runs: heading -> rows of a name and the two values.

    Raises:
        CheckpointError: one of them is no run folder, or cannot be read.
    """
    runs = read_run(first), read_run(second)
    settings = [{key: value for key, value in run.config.items() if key != "run_dir"} for run in runs]
    starts = [run.starts[-1] if run.starts else {} for run in runs]
    environments = [{key: start.get(key) for key in _ENVIRONMENT} for start in starts]
    return {
        "Settings that differ": list(_differences(settings[0], settings[1])),
        "Machines and versions that differ": list(_differences(environments[0], environments[1])),
        "Figures": _figures(*runs),
        "Loss": _losses(*(run.steps for run in runs)),
        "Held-out loss": _losses(*(run.evaluations for run in runs)),
    }


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    if any((folder / name).is_file() for name in RUN_FILES):
        yield folder
        return
    if depth > 0:
        try:
            below = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
        except OSError:
            return
        for path in below:
            yield from _runs_below(path, depth - 1)


def _differences(first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = "") -> Iterator[list[str]]:
    """Yield every key that differs, with both values."""
    for key in dict.fromkeys((*first, *second)):
        values = first.get(key), second.get(key)
        if isinstance(values[0], Mapping) and isinstance(values[1], Mapping):
            yield from _differences(values[0], values[1], f"{prefix}{key}.")
        elif values[0] != values[1]:
            texts = [_text(holder[key]) if key in holder else _ABSENT for holder in (first, second)]
            yield [f"{prefix}{key}", *texts]


def _figures(first: RunRecord, second: RunRecord) -> Rows:
    """Return headline figures side by side."""
    figures: dict[str, Callable[[RunRecord], str]] = {
        "state": lambda run: state_of(run).word,
        "steps": lambda run: f"{run.last_step} of {run.train_iters}",
        "starts": lambda run: str(len(run.starts)),
        "last loss": lambda run: _figure(_last(run.steps, "loss")),
        "lowest loss": lambda run: _figure(_lowest(run.steps)),
        "last held-out loss": lambda run: _figure(_last(run.evaluations, "loss")),
        "lowest held-out loss": lambda run: _figure(_lowest(run.evaluations)),
        "last gradient norm": lambda run: _figure(_last(run.steps, "grad_norm")),
        "tokens": lambda run: _figure(sum(number(row, "tokens") or 0 for row in run.steps)),
        "tokens per second": lambda run: _figure(recent(run.steps, "tokens_per_second")),
        "seconds per step": lambda run: _figure(recent(run.steps, "step_seconds")),
        "model FLOPs utilisation": lambda run: _figure(recent(run.steps, "mfu")),
        "peak memory of a rank, GiB": lambda run: _figure(_peak_gib(run)),
    }
    rows = [[name, of(first), of(second)] for name, of in figures.items()]
    return [row for row in rows if row[1:] != [_ABSENT, _ABSENT]]


def _losses(first: Sequence[Record], second: Sequence[Record]) -> Rows:
    """Return values at steps that both have logged, evenly spread, the last one too."""
    values = [dict(series(rows, "loss")) for rows in (first, second)]
    steps = sorted(values[0].keys() & values[1].keys())
    count = min(_STEPS_COMPARED, len(steps))
    chosen = sorted({steps[(len(steps) - 1) * part // max(1, count - 1)] for part in range(count)})
    return [[f"after step {step}", _figure(values[0][step]), _figure(values[1][step])] for step in chosen]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _figure(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.5g}"


def _last(rows: Sequence[Record], key: str) -> float | None:
    if unfinite_steps(rows[-1:], key):
        return math.nan
    return next((value for _, value in reversed(series(rows, key))), None)


def _lowest(rows: Sequence[Record]) -> float | None:
    return min((value for _, value in series(rows, "loss")), default=None)


def _peak_gib(run: RunRecord) -> float | None:
    return max((value for _, value in series(run.steps, "peak_memory_bytes", 2.0**-30)), default=None)
