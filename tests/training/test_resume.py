"""A run that stops and starts again goes on as if it had not stopped: bit for bit in one layout, at fp32 in another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.checkpoint.run_folder import find_checkpoint
from megatron_vlm.checkpoint.torch_dist import TorchDistReader
from tests import ranks
from tests.families import FAMILIES
from tests.families.mistral3 import MISTRAL3
from tests.families.parameters import each_layout
from tests.families.tiny_family import TinyFamily
from tests.parity.layouts import TestLayout
from tests.ranks import run_ranks
from tests.sizes import full
from tests.training.tiny_run_config import TinyFiles, read_metrics, tiny_config, train_on_rank
from tests.training.transformers_reference import without_key_bias

STEPS, STOP_AFTER = 5, 2
# Eight rows and four per step: the third step begins the second pass, in another order.
SETTINGS = {
    "train.train_iters": STEPS,
    "train.global_batch_size": 4,
    "data.shuffle": True,
    "optimizer.lr": 1e-3,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_iters": 2,
    "optimizer.lr_multipliers": {"vision_tower": 0.5},
    "checkpoint.async_save": True,
}
ONE_RANK = TestLayout(distributed_optimizer=True)
TENSOR = TestLayout(2, tensor=2, distributed_optimizer=True)
PIPELINE = TestLayout(2, pipeline=2, distributed_optimizer=True)
# What a step's line says about the step; the rest is time and memory.
COUNTS = ("tokens", "label_tokens", "images", "videos")
FIGURES = ("step", "loss", "grad_norm", "lr", "lr_by_part", *COUNTS, "source_losses")
EXPERT_FIGURES = ("expert_tokens_min", "expert_tokens_max", "dead_experts")  # of models with experts
# Layouts sum in different orders, and AdamW passes on what that changes of the smallest gradients. Seen: losses 1e-7,
# parameters 1e-7 and moments 1e-6 of the tensor's norm; one wrong row or moment shows in the second digit.
LOSS_TOLERANCE = 1e-5
TENSOR_TOLERANCE = 1e-4
# Least difference that counts in a first moment. One is as small as 5e-6 (`per_dim_scale` of Gemma 4's second audio
# layer): tensor ranks change it by 9e-10 in six steps, as AdamW scales up what a first step differs by, 6e-6 at most of
# any tensor's norm; other micro-batches or stages change it by 5e-11. A wrong moment is off by its whole norm.
MOMENT_FLOOR = 1e-9


FilesOf = Callable[[TinyFamily], TinyFiles]


class Runs:
    """Starts of runs on one set of files."""

    def __init__(self, files: TinyFiles, folder: Path) -> None:
        self.files, self.folder = files, folder

    def start(
        self, name: str, layout: TestLayout, *settings: dict[str, Any], new_processes: bool = False
    ) -> list[set[str]]:
        """Start or resume a run; returns the rows of each step over all ranks."""
        if new_processes:  # so that nothing but the run's folder is left of an earlier start
            ranks._close()
        merged = SETTINGS | layout.settings()
        for more in settings:
            merged |= more
        config = tiny_config(self.files, self.folder / name, merged)
        by_rank = run_ranks(layout.world_size, train_on_rank, config)
        return [{row for rank in step for row in rank} for step in zip(*by_rank, strict=True)]

    def figures(self, name: str) -> list[dict[str, Any]]:
        lines = read_metrics(self.folder / name)
        return [{key: line.get(key) for key in FIGURES + EXPERT_FIGURES} for line in lines]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Every parameter and every tensor of the optimizer in the newest checkpoint."""
        reader = TorchDistReader(find_checkpoint(self.folder / name))
        shapes = {key: entry.size for key, entry in reader.tensors.items()}
        tensors = {key: reader.read_rows(key, 0, size[0] if size else 1) for key, size in shapes.items()}
        reader.close()
        return tensors


@pytest.fixture
def runs(multimodal: TinyFiles, tmp_path: Path) -> Runs:
    return Runs(multimodal, tmp_path)


def check_equal_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [key for key in ours if ours[key].dtype != theirs[key].dtype or not torch.equal(ours[key], theirs[key])]
    assert not different


@pytest.mark.parametrize(("family", "name"), each_layout("continued"))
def test_same_layout_continues_bit_for_bit(
    family: TinyFamily, name: str, multimodal_of: FilesOf, tmp_path: Path
) -> None:
    runs, layout = Runs(multimodal_of(family), tmp_path), family.tables.continued[name]
    rows = runs.start("straight", layout)
    stopped = runs.start("resumed", layout, {"train.exit_interval": STOP_AFTER})
    assert (runs.folder / "resumed" / "stopped.json").exists()
    before = runs.tensors("resumed")
    resumed = runs.start("resumed", layout, new_processes=True)

    assert stopped + resumed == rows
    assert runs.figures("resumed") == runs.figures("straight")
    after = runs.tensors("resumed")
    check_equal_bits(after, runs.tensors("straight"))
    moments = [key for key in after if ".exp_avg_sq." in key]
    trained = {name for name, gradient in family.expected("mixed").gradients.items() if gradient.any()}
    assert {key.partition(".exp_avg_sq.")[2] for key in moments} == trained
    assert any(not torch.equal(before[key], after[key]) for key in moments)


@pytest.mark.full
def test_rows_read_ahead_are_not_skipped(runs: Runs) -> None:
    """A worker process has read later rows when the run stops; who reads does not matter."""
    rows = runs.start("straight", ONE_RANK)
    worker = {"data.num_workers": 1}
    resumed = runs.start("resumed", ONE_RANK, worker, {"train.exit_interval": STOP_AFTER})
    resumed += runs.start("resumed", ONE_RANK, worker)
    assert resumed == rows
    assert runs.figures("resumed") == runs.figures("straight")
    check_equal_bits(runs.tensors("resumed"), runs.tensors("straight"))


@pytest.mark.parametrize(
    "family",
    # For `make test`, tests/checkpoint does this with the others.
    [family if family is MISTRAL3 else full(family) for family in FAMILIES if family.tables.in_turn],
    ids=str,
)
def test_other_layouts_continue_at_fp32(family: TinyFamily, multimodal_of: FilesOf, tmp_path: Path) -> None:
    runs = Runs(multimodal_of(family), tmp_path)
    rows = runs.start("straight", ONE_RANK, {"train.train_iters": 6})
    resumed = []
    for layout, steps in family.tables.in_turn:
        resumed += runs.start("resumed", layout, {"train.train_iters": 6, "train.exit_interval": steps})
    assert resumed == rows
    ours, theirs = runs.figures("resumed"), runs.figures("straight")
    for mine, its in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(its["loss"], rel=LOSS_TOLERANCE)
        assert mine["grad_norm"] == pytest.approx(its["grad_norm"], rel=LOSS_TOLERANCE)
        for exact in ("step", "lr", *COUNTS, *EXPERT_FIGURES):
            assert mine[exact] == its[exact]
    expected = runs.tensors("straight")
    for key, tensor in runs.tensors("resumed").items():
        ours_part, its_part = without_key_bias(key, tensor), without_key_bias(key, expected[key])
        floor = MOMENT_FLOOR if ".exp_avg." in key else 0.0
        assert (ours_part - its_part).norm() <= TENSOR_TOLERANCE * its_part.norm() + floor, key


@pytest.mark.full
@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlapped"])
def test_a_stage_that_holds_nothing_but_layers_of_a_frozen_tower(runs: Runs, overlap: bool) -> None:
    """It has no optimizer state, and continues what one rank began."""
    frozen = {"model.freeze": ["vision_tower"], "optimizer.lr_multipliers": {}, "train.train_iters": 4}
    spread = TestLayout(2, pipeline=2, vision_pipeline_layout=(1, 1), distributed_optimizer=True, overlap=overlap)
    rows = runs.start("straight", ONE_RANK, frozen)
    resumed = runs.start("resumed", ONE_RANK, frozen, {"train.exit_interval": 1})
    for _ in range(2):
        resumed += runs.start("resumed", spread, frozen, {"train.exit_interval": 2})
    assert resumed == rows
    for mine, its in zip(runs.figures("resumed"), runs.figures("straight"), strict=True):
        assert mine["loss"] == pytest.approx(its["loss"], rel=LOSS_TOLERANCE)
        assert mine["grad_norm"] == pytest.approx(its["grad_norm"], rel=LOSS_TOLERANCE)
    ours, expected = runs.tensors("resumed"), runs.tensors("straight")
    assert ours.keys() == expected.keys()
    assert all((ours[key] - expected[key]).norm() <= TENSOR_TOLERANCE * expected[key].norm() for key in ours)


@pytest.mark.full
def test_loading_weights_starts_a_new_schedule(runs: Runs) -> None:
    """From a run's checkpoint as from its export: both hold its weights and nothing else."""
    export = runs.folder / "hf"
    first = runs.start("first", PIPELINE, {"checkpoint.export_hf": str(export)})
    for path in (export / "config.json", export / "processor_config.json"):
        assert path.exists()
    from_checkpoint = runs.start("from checkpoint", TENSOR, {"checkpoint.load": str(runs.folder / "first")})
    from_export = runs.start("from export", TENSOR, {"model.hf_path": str(export)})
    assert from_checkpoint == from_export == first
    loaded, exported, original = (runs.figures(name) for name in ("from checkpoint", "from export", "first"))
    assert loaded == exported
    assert [(line["step"], line["lr"]) for line in loaded] == [(line["step"], line["lr"]) for line in original]
    assert loaded[0]["loss"] < original[0]["loss"]
    check_equal_bits(runs.tensors("from checkpoint"), runs.tensors("from export"))
