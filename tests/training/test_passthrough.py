"""A run carries tensors through that no model has: from its first start to its export, whatever becomes of their files.

No family here has such tensors yet, so Gemma 3's weight map is given a pattern, in the process of the rank.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlm.cli import load_config
from megatron_vlm.families.gemma3 import weights
from megatron_vlm.planning.dry_run import dry_run
from tests.ranks import run_ranks
from tests.training.loop_run import Place, build_place, checkpoint_names, train_here

DRAFT = {"mtp.fc.weight": torch.arange(6.0).view(2, 3).bfloat16(), "mtp.count": torch.tensor(5)}
LINE = "2 tensors are carried through as they are, untrained: mtp.count, mtp.fc.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = build_place(tmp_path_factory.mktemp("place"))
    file = place.model / "model.safetensors"
    save_file(load_file(file) | DRAFT, file, metadata={"format": "pt"})
    return place


@contextmanager
def pattern_declared() -> Iterator[None]:
    weight_map = weights.weight_map
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "weight_map", lambda config: replace(weight_map(config), passthrough=(r"^mtp\.",)))
        yield


def train_with_pattern(arguments: list[str]) -> list[str]:
    """On a rank: one start of a run; returns what it prints."""
    printed: list[str] = []
    with pattern_declared(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        error = train_here(arguments).error
    assert error is None, error
    return printed


def check_export(directory: Path) -> None:
    exported = load_file(directory / "model.safetensors")
    for name, tensor in DRAFT.items():
        assert exported[name].dtype == tensor.dtype and exported[name].equal(tensor), name


def test_a_run_exports_what_came_with_its_weights(place: Place, tmp_path: Path) -> None:
    """Stopped, resumed without the files that it began with, and followed by a run from its checkpoint."""
    bare = tmp_path / "bare"
    shutil.copytree(place.model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    saving = ["train.train_iters=2", "checkpoint.save_interval=1", "checkpoint.keep_last=1"]
    first, later = tmp_path / "first", tmp_path / "later"
    starts = [
        place.arguments(first, *saving, "train.exit_interval=1"),
        place.arguments(first, *saving, f"model.hf_path={bare}", f"checkpoint.export_hf={tmp_path}/first_export"),
        place.arguments(
            later,
            *saving,
            f"model.hf_path={bare}",
            f"checkpoint.load={first}",
            f"checkpoint.export_hf={tmp_path}/later_export",
            "parallel.tensor_model_parallel_size=2",
        ),
    ]
    for ranks, arguments in zip((1, 1, 2), starts, strict=True):
        printed, *of_others = run_ranks(ranks, train_with_pattern, arguments)
        assert (LINE in printed) == ("export_hf" in str(arguments))
        assert not any(of_others)
    for run_dir, export in ((first, "first_export"), (later, "later_export")):
        assert checkpoint_names(run_dir) == ["passthrough", "step_00000002"]
        check_export(tmp_path / export)


def test_the_dry_run_names_them(place: Place, tmp_path: Path) -> None:
    said: list[str] = []
    with pattern_declared():
        assert dry_run(load_config(place.arguments(tmp_path)), said.append) == 0
    assert LINE in "\n".join(said)
