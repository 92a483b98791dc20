"""Frozen parts and layers: nothing of them changes, nothing is held for them, and the rest trains as in every other
layout."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_vlm.cli import load_config
from megatron_vlm.families import registry
from megatron_vlm.planning.memory import RankMemory, estimate_memory
from megatron_vlm.planning.preflight import check_layout
from tests.ranks import run_ranks
from tests.sizes import full
from tests.training.loop_run import PARTS, Outcome, Place, build_place, train_here

TENSOR, PIPELINE = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
SEQUENCE, PLAIN = "parallel.sequence_parallel=true", "parallel.use_distributed_optimizer=false"
OVERLAP = "parallel.overlap_grad_reduce=true"
GATHER = "parallel.overlap_param_gather=true"
LAYOUTS = {
    "TP2+SP": (2, [TENSOR, SEQUENCE]),
    "TP2, vision DP": (2, [TENSOR, "model.vision_parallelism=data"]),
    "PP2": (2, [PIPELINE]),
    "PP2xVPP2": (2, [PIPELINE, "parallel.virtual_pipeline_model_parallel_size=2"]),
    "DP2, overlapped": (2, [OVERLAP, GATHER]),
    "DP2, plain": (2, [PLAIN]),
    "TP2xPP2+SP, overlapped": (4, [TENSOR, PIPELINE, SEQUENCE, OVERLAP]),
}
FROZEN = {
    "language model": ["language_model"],
    "vision tower": ["vision_tower"],
    "projector": ["projector"],
    "towers": ["vision_tower", "projector"],
    "all but projector": ["language_model", "vision_tower"],
    "every second layer": ["'language_model.layers.*[02468].*'", "'vision_tower.encoder.layers.0.*'"],
}
EVERY_SECOND = "every second layer"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return build_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def alone(place: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of one rank."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        name: [record["loss"] for record in outcomes(place, folder / name, frozen, 1)[0].metrics]
        for name, frozen in FROZEN.items()
    }


def outcomes(place: Place, run_dir: Path, frozen: list[str], ranks: int, *overrides: str) -> list[Outcome]:
    # Clipped in every step, also where a stage has nothing to clip.
    settings = [f"model.freeze=[{', '.join(frozen)}]", "optimizer.clip_grad=0.001", *overrides]
    results: list[Outcome] = run_ranks(ranks, train_here, place.arguments(run_dir, *settings))
    assert not any(outcome.error for outcome in results), results[0].error
    return results


def is_frozen(name: str, frozen: list[str]) -> bool:
    return any(fnmatchcase(name, entry.strip("'")) or name.startswith(f"{entry}.") for entry in frozen)


def check_changes(results: list[Outcome], frozen: list[str]) -> None:
    for outcome in results:
        assert not any(is_frozen(name, frozen) for name in outcome.changed(""))
        # A key bias moves all scores of a query alike: its gradient is zero but for rounding.
        still = {name for name in outcome.trainable if name.endswith("k_proj.bias")}
        moved = {name for part in PARTS for name in outcome.changed(part)}
        assert outcome.trainable - still <= moved
        assert outcome.trainable == {name for name in outcome.after if not is_frozen(name, frozen)}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_what_is_held(place: Place, tmp_path: Path, frozen: list[str]) -> None:
    """One rank: gradients and two moments for every trainable number, and not one more."""
    (outcome,) = outcomes(place, tmp_path, frozen, 1, PLAIN)
    check_changes([outcome], frozen)
    trainable = sum(outcome.after[name].numel() for name in outcome.trainable)
    assert outcome.gradient_buffer_elements == trainable
    assert outcome.optimizer_elements == 2 * trainable


CASES = [
    full("language model", "TP2+SP"),
    ("language model", "TP2, vision DP"),
    full("language model", "PP2"),
    ("language model", "PP2xVPP2"),
    full("language model", "DP2, overlapped"),
    full("language model", "DP2, plain"),
    full("language model", "TP2xPP2+SP, overlapped"),
    ("all but projector", "PP2"),
    full("all but projector", "DP2, overlapped"),
    full("towers", "PP2"),
    full("towers", "DP2, overlapped"),
    full(EVERY_SECOND, "PP2xVPP2"),
    full(EVERY_SECOND, "DP2, overlapped"),
    (EVERY_SECOND, "TP2xPP2+SP, overlapped"),
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_layouts(place: Place, alone: dict[str, list[float]], tmp_path: Path, name: str, layout: str) -> None:
    """In every layout the losses of one rank, also where a stage has nothing to train.

    Rows with and without images take turns, so that one of two data ranks never has an image.
    """
    ranks, overrides = LAYOUTS[layout]
    frozen = FROZEN[name]
    results = outcomes(place, tmp_path, frozen, ranks, *overrides)
    check_changes(results, frozen)
    # fp32 sums in another order, over four steps; measured: at most 1e-7.
    assert [record["loss"] for record in results[0].metrics] == pytest.approx(alone[name], rel=1e-5)
    if PIPELINE in overrides and "language_model" in frozen:
        assert any(not outcome.trainable for outcome in results)
    for outcome in results:
        if not outcome.trainable:
            assert outcome.gradient_buffer_elements == outcome.optimizer_elements == 0


def estimated(arguments: list[str], ranks: int) -> list[RankMemory]:
    config = load_config(arguments)
    hf_config = registry.load_hf_config(config.model.hf_path)
    family = registry.detect(hf_config)
    model_config = family.config_from_hf(hf_config, text_only=False)
    return estimate_memory(config, family, model_config, check_layout(config, model_config, ranks))


@pytest.mark.parametrize(
    "overrides", [full([PLAIN]), full([PLAIN, TENSOR]), [PLAIN, PIPELINE]], ids=["one rank", "TP2", "PP2"]
)
def test_memory_is_estimated_exactly(place: Place, tmp_path: Path, overrides: list[str]) -> None:
    """Weights, gradients and moments of every rank, where every second layer is frozen."""
    ranks = 1 if len(overrides) == 1 else 2
    frozen = FROZEN[EVERY_SECOND]
    results = outcomes(place, tmp_path, frozen, ranks, *overrides)
    settings = [f"model.freeze=[{', '.join(frozen)}]", *overrides]
    memory = estimated(place.arguments(tmp_path, *settings), ranks)
    for rank, outcome in enumerate(results):
        expected = memory[rank if PIPELINE in overrides else 0]
        assert expected.parameter_bytes == 4 * sum(values.numel() for values in outcome.after.values())
        assert expected.gradient_bytes == 4 * outcome.gradient_buffer_elements
        assert expected.optimizer_bytes == 4 * outcome.optimizer_elements
    assert 0 < sum(entry.gradient_bytes for entry in memory) < sum(entry.parameter_bytes for entry in memory)


def test_resuming_and_exporting(place: Place, alone: dict[str, list[float]], tmp_path: Path) -> None:
    """Every second layer frozen: two steps in one layout, two in another, and frozen weights as they were, bit for
    bit."""
    frozen, target = FROZEN[EVERY_SECOND], tmp_path / "exported"
    settings = ["train.exit_interval=2", f"checkpoint.export_hf={target}"]
    outcomes(place, tmp_path / "run", frozen, 2, TENSOR, SEQUENCE, *settings)
    assert not target.exists()
    results = outcomes(place, tmp_path / "run", frozen, 2, PIPELINE, *settings)
    losses = [record["loss"] for record in results[0].metrics]
    assert losses == pytest.approx(alone[EVERY_SECOND], rel=1e-5)
    before, after = (load_file(folder / "model.safetensors") for folder in (place.model, target))
    assert before.keys() == after.keys()
    moved = {name for name, values in before.items() if not torch.equal(values, after[name])}
    frozen_layers = re.compile(r".*(language_model\.(model\.)?layers\.[02]|encoder\.layers\.0)\.")
    expected = {name for name in before if not frozen_layers.match(name)}
    assert moved <= expected and len(before) - len(expected) > 20
    assert all(name.endswith("k_proj.bias") for name in expected - moved)
