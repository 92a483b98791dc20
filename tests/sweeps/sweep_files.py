"""Sweep files of tests, and run folders as training leaves them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_vlm.checkpoint.run_folder import step_folder
from megatron_vlm.sweeps.checks import check_sweep_file
from megatron_vlm.sweeps.manifest import Sweep
from megatron_vlm.sweeps.points import Point

LEARNING_RATES = [1e-3, 2e-3, 3e-3]


@dataclass(frozen=True)
class Files:
    """The folder of a test."""

    folder: Path

    def write(self, name: str = "sweep.yaml", **content: Any) -> str:
        """Write a sweep file over learning rates, changed by these; returns its path."""
        full = {"base": "base.yaml", "folder": "out", "grid": {"optimizer.lr": LEARNING_RATES}, **content}
        text = yaml.safe_dump({key: value for key, value in full.items() if value is not None}, sort_keys=False)
        (self.folder / name).write_text(text)
        return name

    def make(self, **content: Any) -> Sweep:
        """Write a sweep file and make it."""
        path = self.write(**content)
        checked = check_sweep_file(path)
        checked.write()
        return checked.sweep


def leave_run(
    sweep: Sweep, point: Point, steps: int, saved: int | None = None, losses: Sequence[float] = (), **files: Any
) -> Path:
    """Write a run folder of a point that has logged some steps, with a checkpoint and further files of JSON."""
    run_dir = point.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(sweep.config_path(point).read_text())
    values = losses or [5.0 / number for number in range(1, steps + 1)]
    rows = [
        {"step": number, "train_iters": 4, "loss": loss, "grad_norm": 1.0, "tokens": 10, "step_seconds": 0.5}
        for number, loss in enumerate(values, 1)
    ]
    write_lines(run_dir / "metrics.jsonl", rows)
    if saved is not None:
        step_folder(run_dir / "checkpoints", saved).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (run_dir / name.replace("_json", ".json")).write_text(json.dumps(content))
    return run_dir


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
