"""The example of the documentation: checked, trained two points at a time, one of them killed and retried, reported."""

from __future__ import annotations

import csv
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demo.dataset import write_dataset
from demo.recipes import RECIPES
from megatron_vlm.sweeps.checks import check_sweep_file
from megatron_vlm.sweeps.manifest import read_lines, read_sweep
from megatron_vlm.sweeps.status import status_of
from tests.report.parsed_page import ParsedPage
from tests.training.loop_run import ROOT
from tests.training.loop_run import read_lines as read_figures

EXAMPLE = ROOT / "examples" / "sweep.yaml"
TOOL = ROOT / "tools" / "sweep.py"
PATIENCE_SECONDS = 1800


@pytest.fixture
def demo_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the demo has been run, as far as the example needs it: its model and its data."""
    recipe = RECIPES["gemma3"]
    recipe.build(tmp_path / "demo_out/1/model", recipe.task.texts(), 1)
    write_dataset(tmp_path / "demo_out/1/data", recipe.task, 1, progress=lambda *_: None)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*arguments: object) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    text, _ = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, text


@pytest.mark.full
def test_the_example(demo_folder: Path) -> None:
    model = {hashlib.sha256(path.read_bytes()).digest() for path in Path("demo_out/1/model").iterdir()}
    running = command("run", EXAMPLE, "--at_once", 2)
    folder = demo_folder / "runs/learning_rates"
    victim = _kill_when_training(folder, running)
    code, said = finish(running)
    assert code == 1, said
    sweep = read_sweep(folder)
    statuses, _ = status_of(sweep)
    assert [status.state for status in statuses] == ["failed" if index == victim else "done" for index in range(6)], (
        said
    )
    assert statuses[victim].detail == "ended by SIGKILL" and 0 < statuses[victim].step < 40
    untouched = {
        path: path.read_bytes()
        for point in sweep.points
        if point.index != victim
        for path in point.run_dir.glob("*.jsonl")
    }

    code, said = finish(command("retry", folder, "--here"))
    assert code == 0 and said.endswith("6 done\n"), said
    assert "resuming after step" in sweep.log_path(sweep.points[victim]).read_text() or statuses[victim].step < 20
    assert {path: path.read_bytes() for path in untouched} == untouched, "what was done is not trained again"
    assert [len(read_lines(sweep.attempts_path(point))) for point in sweep.points].count(2) == 5
    code, said = finish(command("run", EXAMPLE))
    assert code == 0 and "started" not in said, said

    code, said = finish(command("report", folder))
    assert code == 0, said
    with (folder / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row, point in zip(rows, sweep.points, strict=True):
        heldout = [entry["loss"] for entry in read_figures(point.run_dir / "evaluations.jsonl")]
        assert row["state"] == "done" and float(row["heldout_loss_best"]) == min(heldout) and len(heldout) == 2
        assert min(heldout) < 2.5, "it learns: a guess among the answers' words costs more"
    ParsedPage((folder / "report.html").read_text())
    copies = [
        path for path in folder.rglob("*") if path.is_file() and hashlib.sha256(path.read_bytes()).digest() in model
    ]
    assert copies == [], "points read the model where it is"


def _kill_when_training(folder: Path, running: subprocess.Popen) -> int:
    """Kill the process of the first point that has logged a step; returns the point's index."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        assert running.poll() is None, running.communicate()[0]
        for path in folder.glob("runs/*/metrics.jsonl"):
            if not path.read_text():
                continue
            sweep = read_sweep(folder)
            point = next(point for point in sweep.points if point.run_dir == path.parent)
            os.kill(read_lines(sweep.attempts_path(point))[0]["pid"], signal.SIGKILL)
            return point.index
        time.sleep(0.1)
    raise AssertionError("no point has logged a step")


def test_the_example_is_in_order(demo_folder: Path) -> None:
    checked = check_sweep_file(str(EXAMPLE))
    assert len(checked.sweep.points) == 6 and checked.excluded == 2
    for config in checked.configs.values():
        assert config.optimizer.min_lr == pytest.approx(config.optimizer.lr / 10)
        assert (config.optimizer.warmup_iters, config.train.micro_batch_size) == (6, 16)
        assert not (config.optimizer.lr > 2e-3 and config.train.global_batch_size == 16)
