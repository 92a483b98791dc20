"""Ranks that share rows and read them differently end together, with the row's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed

from megatron_vlm.data.conversation import Conversation
from megatron_vlm.errors import DataError
from megatron_vlm.training.loop import Trainer
from tests.parity.layouts import TestLayout
from tests.ranks import run_ranks
from tests.training.loop_run import Outcome, Place, build_place, train_here

FAILING_ROW = 5  # in the second step


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return build_place(tmp_path_factory.mktemp("place"))


def unreadable_on_last_rank(trainer: Trainer) -> None:
    """One of the rows, as when a file server does not answer one machine."""
    if torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
        return
    media = trainer.run_state.train_loader._loader.dataset.reader.media  # type: ignore[attr-defined]
    load = media.load

    def failing(conversation: Conversation) -> Any:
        if conversation.row_name.endswith(f":{FAILING_ROW + 1}"):
            raise DataError("the image cannot be read (Stale file handle)", conversation.row_name)
        return load(conversation)

    media.load = failing


def train(arguments: list[str]) -> Outcome:
    return train_here(arguments, unreadable_on_last_rank)


@pytest.mark.parametrize("layout", [TestLayout(2, context=2), TestLayout(2, tensor=2)], ids=str)
def test_a_row_that_one_rank_cannot_read(layout: TestLayout, place: Place, tmp_path: Path) -> None:
    settings = [f"{key}={value}" for key, value in layout.settings().items() if key.endswith("_parallel_size")]
    for outcome in run_ranks(2, train, place.arguments(tmp_path, *settings, "data.max_bad_fraction=1")):
        assert outcome.error is not None and "\n" not in outcome.error
        assert outcome.error.startswith(
            "DataError: ranks 0 and 1, which share their rows, have read different things: on rank 1 alone: bad row: "
            "the image cannot be read (Stale file handle)"
        )
        assert f":{FAILING_ROW + 1}]" in outcome.error
        assert [line["step"] for line in outcome.metrics] in ([], [1])
