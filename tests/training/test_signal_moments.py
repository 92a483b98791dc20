"""A signal at a chosen moment of a real start, and a second one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.loop_run import ROOT, Place, build_place, checkpoint_names, read_lines

# Runs the entry point; the first call of a function comes with signals.
PROGRAM = """
import importlib, os, signal, sys
from unittest.mock import patch

from megatron_vlm import platform

platform.initialize("cpu")  # before megatron-core is imported, as the entry point does
module, _, name = sys.argv[1].rpartition(":")
owner = importlib.import_module(module)
*path, name = name.split(".")
for part in path:
    owner = getattr(owner, part)
original, left = getattr(owner, name), [int(sys.argv[2])]

def with_signals(*arguments, **settings):
    while left[0]:
        left[0] -= 1
        signal.raise_signal(signal.SIGINT)
    return original(*arguments, **settings)

import pretrain_vlm
signal.signal(signal.SIGINT, signal.SIG_DFL)
with patch.object(owner, name, with_signals):
    sys.exit(pretrain_vlm.main(sys.argv[3:]))
"""
INDEXING = "megatron_vlm.training.setup:build_train_loader"
WEIGHTS = "megatron_vlm.training.setup:load_hf_into_model"
SAVE = "megatron_vlm.platform.checkpointing:save_config"
EXPORT = "megatron_vlm.conversion.running_model:SafetensorsWriter.write"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return build_place(tmp_path_factory.mktemp("place"))


def start(place: Place, run_dir: Path, moment: str, num_signals: int) -> subprocess.CompletedProcess:
    arguments = place.arguments(run_dir, "train.train_iters=6", "checkpoint.save_interval=2", "data.num_workers=1")
    command = [sys.executable, "-c", PROGRAM, moment, str(num_signals), *arguments]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": f"{ROOT}:{ROOT}/kernels",
    }
    export = f"--checkpoint.export_hf={run_dir}/export"
    return subprocess.run([*command, export], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.full
@pytest.mark.parametrize(
    ("moment", "stopped_at"), [(INDEXING, 0), (WEIGHTS, 0), (SAVE, 5)], ids=["indexing", "loading weights", "saving"]
)
def test_a_signal_ends_the_run_after_what_is_under_way(
    place: Place, tmp_path: Path, moment: str, stopped_at: int
) -> None:
    """The save of step 2 is published during one of the next steps."""
    result = start(place, tmp_path, moment, 1)
    assert result.returncode == 0 and not result.stderr.strip(), result.stderr
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    step = stopped["step"]
    assert stopped["reason"] == "signal SIGINT" and step <= stopped_at and (step > 2 or not stopped_at)
    assert [record["step"] for record in read_lines(tmp_path / "metrics.jsonl")] == list(range(1, step + 1))
    assert checkpoint_names(tmp_path) == [f"step_{saved:08d}" for saved in sorted({2, 4, step} - {0}) if saved <= step]
    assert not (tmp_path / "export").exists()


def test_a_signal_lets_an_export_finish(place: Place, tmp_path: Path) -> None:
    result = start(place, tmp_path, EXPORT, 1)
    assert result.returncode == 0 and not result.stderr.strip(), result.stderr
    check_finished(tmp_path)


def check_finished(run_dir: Path) -> None:
    assert [record["step"] for record in read_lines(run_dir / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert checkpoint_names(run_dir) == ["step_00000002", "step_00000004", "step_00000006"]
    assert (run_dir / "exported.json").exists() and (run_dir / "export" / "config.json").exists()
    assert not (run_dir / "stopped.json").exists()


@pytest.mark.full
@pytest.mark.parametrize("moment", [WEIGHTS, SAVE, EXPORT], ids=["loading weights", "saving", "exporting"])
def test_a_second_signal(place: Place, tmp_path: Path, moment: str) -> None:
    """It ends at once, without a word or a broken file; the next start goes on and leaves nothing of it."""
    result = start(place, tmp_path, moment, 2)
    assert result.returncode == -signal.SIGINT and not result.stderr.strip(), result.stderr
    assert not (tmp_path / "export").exists() and not (tmp_path / "exported.json").exists()
    assert ("step_00000006" in checkpoint_names(tmp_path)) == (moment == EXPORT)
    result = start(place, tmp_path, moment, 0)
    assert result.returncode == 0 and not result.stderr.strip(), result.stderr
    check_finished(tmp_path)
