"""Steps and saves send no objects between all ranks: such a collective costs time in proportion to their number."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.training.loop import Trainer
from tests.object_collectives import counted
from tests.ranks import run_ranks
from tests.sizes import full
from tests.training.loop_run import Place, build_place, checkpoint_names, train_here

RANKS, STEPS = 4, 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return build_place(tmp_path_factory.mktemp("place"))


def count_in_training(arguments: list[str]) -> tuple[str | None, list[Counter[Any]], list[Counter[Any]]]:
    """On a pool rank: the object collectives of each step, and of each save with its end."""
    steps, saves = [], []

    def interfere(trainer: Trainer) -> None:
        step, save, finalize = trainer._step, trainer._save, trainer.run_state.checkpoints.finalize

        def counted_step() -> int:
            with counted() as calls:
                request = step()
            steps.append(calls)
            return request

        def counted_save() -> None:
            with counted() as calls:
                save()
                finalize(blocking=True)
            saves.append(calls)

        trainer._step, trainer._save = counted_step, counted_save  # type: ignore[method-assign]

    outcome = train_here(arguments, interfere)
    return outcome.error, steps, saves


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.pipeline_model_parallel_size=2", "parallel.tensor_model_parallel_size=2"),
        full(("parallel.tensor_model_parallel_size=2", "parallel.use_distributed_optimizer=true")),
        full(("parallel.pipeline_model_parallel_size=2", "train.precision=bf16")),
    ],
)
def test_no_objects_between_all_ranks(place: Place, tmp_path: Path, layout: Any) -> None:
    arguments = place.arguments(tmp_path / "run", "checkpoint.save_interval=1", *layout)
    results = run_ranks(RANKS, count_in_training, arguments)
    assert checkpoint_names(tmp_path / "run") != []
    for error, steps, saves in results:
        assert error is None and len(steps) == len(saves) == STEPS
        # The next batch goes from stage to stage as plain bytes.
        assert steps == [Counter()] * STEPS
        assert any(ranks == RANKS for _, ranks in saves[0]), "nothing is counted"
        assert saves[1:] == [Counter()] * (STEPS - 1)
