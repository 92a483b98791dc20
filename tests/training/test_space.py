"""Room on the disk, checked before anything is built."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_vlm.checkpoint.torch_dist import TorchDistReader
from megatron_vlm.cli import load_config
from megatron_vlm.config import Config
from megatron_vlm.errors import ConfigError
from megatron_vlm.families import registry
from megatron_vlm.model.weight_map import WeightMap
from megatron_vlm.planning import preflight
from tests.ranks import run_ranks
from tests.training.loop_run import Place, build_place, checkpoint_names, train_here

UNSHARDED = "parallel.use_distributed_optimizer=false"
VALUE_BYTES = {"fp32": 4, "bf16": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return build_place(tmp_path_factory.mktemp("place"))


def weight_map_of(config: Config) -> WeightMap:
    hf_config = registry.load_hf_config(config.model.hf_path)
    family = registry.detect(hf_config)
    return family.weight_map(family.config_from_hf(hf_config, config.model.text_only, config.model.image_mask))


@pytest.mark.parametrize(
    ("precision", "settings"),
    [
        ("fp32", ["model.freeze=[vision_tower]"]),
        ("bf16", []),
        ("fp32", [UNSHARDED]),
        ("bf16", ["optimizer.name=sgd", UNSHARDED]),
    ],
    ids=["fp32, frozen tower", "bf16", "fp32, unsharded", "bf16, sgd"],
)
def test_size_of_a_checkpoint(place: Place, tmp_path: Path, precision: str, settings: list[str]) -> None:
    """As many bytes as the tensors have that a run writes."""
    arguments = place.arguments(tmp_path, "train.train_iters=1", f"train.precision={precision}", *settings)
    (outcome,) = run_ranks(1, train_here, arguments)
    assert outcome.error is None
    with TorchDistReader(tmp_path / "checkpoints" / checkpoint_names(tmp_path)[-1]) as reader:
        written = sum(
            _size(shape) * (4 if name.startswith("optimizer.") else VALUE_BYTES[precision])
            for name, shape in reader.shapes.items()
        )
    config = load_config(arguments)
    assert preflight.checkpoint_bytes(config, weight_map_of(config)) == written


def _size(shape: Any) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def test_no_room(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line names the folders and what is missing; two folders of one disk share its room."""
    config = load_config(place.arguments(tmp_path / "run", f"checkpoint.export_hf={tmp_path / 'export'}"))
    weight_map = weight_map_of(config)
    checkpoint = preflight.checkpoint_bytes(config, weight_map)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=checkpoint))
    with pytest.raises(ConfigError, match=r"a checkpoint and the export take .* are free") as refusal:
        preflight.check_space(config, weight_map)
    assert str(tmp_path / "run") in str(refusal.value) and str(tmp_path / "export") in str(refusal.value)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * checkpoint))
    assert "per checkpoint" in preflight.check_space(config, weight_map)
    assert not (tmp_path / "run").exists()
