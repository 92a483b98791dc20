"""Later pipeline stages open no image and read no row, and see what the first stage has read, bad rows included."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

from megatron_vlm.data import images, index_cache, media_loading
from megatron_vlm.data.loader import BatchSharding
from megatron_vlm.data.plan import PlannedSource, SamplePlan
from megatron_vlm.data.stage_loader import Stages, build_on_stages
from megatron_vlm.errors import DataError
from megatron_vlm.training.rank_checks import check_same_data
from tests.data.rows import assistant, image, row, user, write_jsonl
from tests.ranks import run_ranks
from tests.sizes import full
from tests.training.loop_run import Place, build_place, sample_rows, train_here


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = build_place(tmp_path_factory.mktemp("place"))
    bad = [*sample_rows()[:2], row(user(image("gone.png"), "?"), assistant("Nothing.")), *sample_rows()[3:8]]
    write_jsonl(place.data / "bad.jsonl", bad)
    return place


@dataclass
class Seen:
    """What a rank did in one start of a run."""

    calls: Counter[str]
    losses: list[float]
    bad_rows: list[int]
    evaluations: list[Any]
    error: str | None


def train_counting(arguments: list[str]) -> Seen:
    """On a pool rank: count files that are opened and indexed during a start of a run."""
    calls = Counter[str]()
    kept = images.load_image, index_cache.build_index

    def load_image(*given: Any) -> Any:
        calls["images"] += 1
        return kept[0](*given)

    def build_index(*given: Any) -> Any:
        calls["indexes"] += 1
        return kept[1](*given)

    media_loading.load_image, index_cache.build_index = load_image, build_index  # type: ignore[assignment]
    try:
        outcome = train_here(arguments)
    finally:
        media_loading.load_image, index_cache.build_index = kept
    lines = outcome.metrics
    losses, bad_rows = [line["loss"] for line in lines], [line.get("bad_rows", 0) for line in lines]
    return Seen(calls, losses, bad_rows, outcome.evaluations, outcome.error)


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.tensor_model_parallel_size=2",),
        full(("parallel.virtual_pipeline_model_parallel_size=2", "train.micro_batch_size=1")),
    ],
)
def test_images_are_opened_on_the_first_stage_only(place: Place, tmp_path: Path, layout: Any) -> None:
    valid = (f"data.valid=[{{path: {place.data / 'train.jsonl'}}}]", "train.eval_iters=2")
    plain = run_ranks(1, train_counting, place.arguments(tmp_path / "plain", *valid))[0]
    settings = ("parallel.pipeline_model_parallel_size=2", *layout)
    ranks = run_ranks(4, train_counting, place.arguments(tmp_path / "stages", *valid, *settings))
    assert [seen.error for seen in ranks] == [None] * 4
    first, later = ranks[:2], ranks[2:]
    assert sum(seen.calls["images"] for seen in first) > 0 and [seen.calls["indexes"] for seen in first] == [2, 2]
    assert [seen.calls for seen in later] == [Counter()] * 2
    assert ranks[0].losses == pytest.approx(plain.losses, rel=1e-5)
    assert ranks[0].evaluations[0]["loss"] == pytest.approx(plain.evaluations[0]["loss"], rel=1e-5)


def test_bad_rows_are_the_same_on_every_stage(place: Place, tmp_path: Path) -> None:
    """A file that is missing is found out on the first stage; all stages give the row no weight, or refuse it."""
    data = f"data.train=[{{path: {place.data / 'bad.jsonl'}}}]"
    stages = ("parallel.pipeline_model_parallel_size=2", "data.max_bad_fraction=0.5", data)
    plain = run_ranks(1, train_counting, place.arguments(tmp_path / "plain", *stages[1:]))[0]
    for seen in run_ranks(2, train_counting, place.arguments(tmp_path / "stages", *stages)):
        assert seen.error is None and seen.losses == pytest.approx(plain.losses, rel=1e-5)
        assert seen.bad_rows == plain.bad_rows == [1, 0, 1, 0]
    refused = run_ranks(2, train_counting, place.arguments(tmp_path / "strict", *stages, "data.strict=true"))
    assert len({seen.error for seen in refused}) == 1 and "gone.png" in str(refused[0].error)
    limit = place.arguments(tmp_path / "limit", *stages, "data.max_bad_fraction=0.01")
    refused = run_ranks(2, train_counting, limit)
    assert len({seen.error for seen in refused}) == 1 and "max_bad_fraction" in str(refused[0].error)


def test_missing_file_is_refused_on_every_stage(place: Place, tmp_path: Path) -> None:
    settings = (f"data.train=[{{path: {place.data / 'none.jsonl'}}}]", "parallel.pipeline_model_parallel_size=2")
    refused = run_ranks(2, train_counting, place.arguments(tmp_path / "run", *settings))
    assert len({seen.error for seen in refused}) == 1 and "none.jsonl does not exist" in str(refused[0].error)


def differing_data(odd_rank: int) -> str | None:
    """On a pool rank: what is said where a rank has a file with other contents."""
    digest = "b" if torch.distributed.get_rank() == odd_rank else "a"
    plans = {
        "data.train": SamplePlan([PlannedSource("rows.jsonl", 8, digest)], 0, shuffle=True),
        "data.valid": SamplePlan([PlannedSource("valid.jsonl", 8, "a")], 0, shuffle=False),
    }
    try:
        check_same_data(plans)
    except DataError as error:
        return str(error)
    return None


def test_data_that_differ_between_nodes_are_refused() -> None:
    said = run_ranks(4, differing_data, 2)
    assert said == [said[0]] * 4 and str(said[0]).startswith("the files of data.train are not the same on rank 2 as")
    assert run_ranks(2, differing_data, 2) == [None] * 2


def wait_for_slow_sender() -> str:
    """On a pool rank: what is said of a file that the sender has looked at for longer than a collective may take."""
    group = torch.distributed.new_group([0, 1], timeout=timedelta(seconds=0.3))
    assert isinstance(group, torch.distributed.ProcessGroup)

    def build() -> Any:
        time.sleep(1)
        raise DataError("found after a while")

    try:
        build_on_stages(
            build, BatchSharding(2, 1), Stages(group, [()] * group.size(), torch.device("cpu")), pin_memory=False
        )
    except DataError as error:
        return str(error)
    return "nothing"


def test_indexing_may_take_longer_than_a_collective() -> None:
    assert run_ranks(2, wait_for_slow_sender) == ["found after a while"] * 2
