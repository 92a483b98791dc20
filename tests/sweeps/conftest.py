"""A tiny model with its data, and a base configuration for sweeps over it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.sweeps.sweep_files import Files
from tests.training.loop_run import Place, build_place


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The model and its rows; nothing writes there."""
    return build_place(tmp_path_factory.mktemp("sweep_model"))


@pytest.fixture
def files(tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> Files:
    """A folder to work in, with the base configuration; sweeps are started there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_CONF", raising=False)
    base = {
        "run_dir": "unused",
        "device": "cpu",
        "model": {"hf_path": str(place.model)},
        "data": {"train": [{"path": str(place.data / "train.jsonl")}], "seq_length": 96, "num_workers": 0},
        "train": {"train_iters": 4, "global_batch_size": 4, "precision": "fp32"},
        "optimizer": {"lr": 1e-3, "schedule": "constant"},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    return Files(tmp_path)
