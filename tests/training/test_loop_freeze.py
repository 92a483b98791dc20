"""Frozen parts: nothing of them changes, nothing is held for them, and the rest trains as in every other layout."""

from __future__ import annotations

from pathlib import Path

import pytest

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
}


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


def check_changes(results: list[Outcome], frozen: list[str]) -> None:
    for outcome in results:
        for part in frozen:
            assert not outcome.changed(part)
        # A key bias moves all scores of a query alike: its gradient is zero but for rounding.
        still = {name for name in outcome.trainable if name.endswith("k_proj.bias")}
        moved = {name for part in PARTS for name in outcome.changed(part)}
        assert outcome.trainable - still <= moved
        assert all(name.partition(".")[0] not in frozen for name in outcome.trainable)


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
    ("language model", "DP2, plain"),
    ("language model", "TP2xPP2+SP, overlapped"),
    ("all but projector", "PP2"),
    full("all but projector", "DP2, overlapped"),
    full("towers", "PP2"),
    ("towers", "DP2, overlapped"),
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
