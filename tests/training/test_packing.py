"""Runs with packed rows: the same training as with a row each, and an exact resume at any size."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from itertools import batched, count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vlm.data.collate import MicroBatch, collate
from megatron_vlm.data.measure_rows import Chunk, measure_chunk
from megatron_vlm.data.packing import best_fit_decreasing
from megatron_vlm.data.row_lengths import ARRAYS
from megatron_vlm.data.rows import RowReader, reader_for
from megatron_vlm.families import registry
from megatron_vlm.model.trainable import Trainable
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.simulate import simulated_rank
from megatron_vlm.planning.flops import ModelFlops
from tests.data.rows import assistant, row, user, write_jsonl
from tests.families.gemma3 import GEMMA3
from tests.families.gemma4 import GEMMA4
from tests.families.parameters import each_layout
from tests.families.qwen3_vl import QWEN3_VL
from tests.families.tiny_family import TinyFamily
from tests.parity.layouts import TestLayout
from tests.ranks import run_ranks
from tests.sizes import full
from tests.training.loop_run import Place, build_place, read_lines, start_torchrun, train_here
from tests.training.test_one_step import check_step, multimodal_step, train_one_step
from tests.training.test_resume import Runs, check_equal_bits
from tests.training.tiny_run_config import TinyFiles, read_metrics, tiny_config, train_on_rank
from tests.training.transformers_reference import load_multimodal

FilesOf = Callable[[TinyFamily], TinyFiles]
LOSS_TOLERANCE = 1e-6
STEPS, STOP_AFTER = 10, 7


@cache
def reader_of(files: TinyFiles) -> RowReader:
    config = tiny_config(files, Path("nowhere"), {})
    family, model_config = model_of(files)
    return reader_for(config, config.data.train, family.prompt_rules(model_config))


def model_of(files: TinyFiles) -> tuple[registry.Family, Any]:
    hf_config = registry.load_hf_config(str(files.model))
    family = registry.detect(hf_config)
    return family, family.config_from_hf(hf_config, False, files.family.settings.get("model.image_mask"))


@cache
def seq_length_for(files: TinyFiles, num_packs: int) -> int:
    """The shortest rows that hold all rows of the data in so many."""
    reader = reader_of(files)
    lengths = np.array([len(reader.read(0, number).sample.input_ids) for number in range(len(files.rows))])
    return next(
        length for length in count(int(lengths.max())) if len(best_fit_decreasing(lengths, length)) <= num_packs
    )


def packed(files: TinyFiles, num_packs: int, global_batch_size: int) -> dict[str, Any]:
    return {
        "data.packing": True,
        "data.seq_length": seq_length_for(files, num_packs),
        "train.global_batch_size": global_batch_size,
    }


@pytest.mark.parametrize(("family", "layout"), each_layout("packed_step"))
def test_step_of_packed_rows(family: TinyFamily, layout: str, multimodal_of: FilesOf, tmp_path: Path) -> None:
    """Eight rows in four: the step that transformers takes on the eight, each for itself."""
    files, ranks = multimodal_of(family), family.tables.packed_step[layout]
    export = train_one_step(files, tmp_path, ranks, **packed(files, 4, 4))
    check_step(tmp_path, load_multimodal(files.family, export), multimodal_step(files))
    (record,) = read_metrics(tmp_path / "run")
    assert (record["step_samples"], record["batch_rows"], record["samples"], record["epoch"]) == (8, 4, 8, 1)
    kinds = [part["type"] for row in files.rows for message in row["messages"] for part in message["content"]]
    assert (record["images"], record["videos"]) == (kinds.count("image"), kinds.count("video"))
    data_size = ranks.world_size // (ranks.tensor * ranks.context * ranks.pipeline)
    assert ("straggler_ratio_predicted" in record) == (data_size > 1)
    if data_size > 1:
        assert 1 <= record["straggler_ratio_predicted"] <= record["straggler_ratio_predicted_in_order"]


@pytest.mark.parametrize(
    ("family", "tolerance"),
    # What tokens of an image see ahead is not predicted, nor where the last token of a clip is part of one only.
    [(QWEN3_VL, 0), full(GEMMA3, 0.005), full(GEMMA4, 0.005)],
    ids=str,
)
def test_predicted_cost_is_that_of_the_model(family: TinyFamily, tolerance: float, multimodal_of: FilesOf) -> None:
    """The FLOPs of a step, counted on its micro-batch, from the lengths of its rows alone."""
    files = multimodal_of(family)
    reader, (found, model_config) = reader_of(files), model_of(files)
    rows = [reader.read(0, number) for number in range(len(files.rows))]
    batch = collate([rows[:3], rows[3:5], rows[5:]], reader.builder.rules, reader.builder.padding_token_id)
    lengths = measure_chunk(reader.measuring(), Chunk(0, 0, len(rows), 0))
    with simulated_rank(0, Layout()) as groups:
        flops = ModelFlops(found, model_config, Trainable([]), groups)
        costs = flops.token_costs().of(*(lengths[name].astype(np.int64) for name in list(ARRAYS)[:4]))
        expected = flops.of(flops.lengths(batch))
    assert costs.sum() == (pytest.approx(expected, rel=tolerance) if tolerance else expected)


Tokens = list[tuple[int, int, int]]
"""Place in the row, document, id."""


def tokens_of(batch: MicroBatch) -> list[Tokens]:
    """Of each row of a micro-batch, or of a context rank's shard of it."""
    shape = batch.input_ids.shape
    places = torch.arange(shape[1]).expand(shape) if batch.context is None else batch.context.positions
    tokens = torch.stack((places, batch.document_ids, batch.input_ids), dim=-1)
    return [[(*token,) for token in row if token[1] >= 0] for row in tokens.tolist()]


def hash_of(shards: Sequence[Tokens]) -> str:
    """Of a row: the ids of each of its documents."""
    documents: dict[int, list[int]] = {}
    for _, document, token in sorted(token for shard in shards for token in shard):
        documents.setdefault(document, []).append(token)
    return hashlib.sha256(repr([*documents.values()]).encode()).hexdigest()


def start(runs: Runs, name: str, layout: TestLayout, **settings: Any) -> list[list[str]]:
    """Start or resume a run whose windows have three packs, of which a step takes two; the rows of each step."""
    merged = {
        **packed(runs.files, 3, 2),
        "data.shuffle": True,
        "train.train_iters": STEPS,
        "optimizer.lr": 1e-3,
        "checkpoint.async_save": False,
        **layout.settings(),
        **settings,
    }
    by_rank = run_ranks(
        layout.world_size, train_on_rank, tiny_config(runs.files, runs.folder / name, merged), tokens_of
    )
    assert layout.tensor == 1, "context ranks are numbered next to each other"
    steps = []
    for of_ranks in zip(*by_rank, strict=True):
        of_data_ranks = batched(of_ranks, layout.context)
        rows = (hash_of(shards) for ranks in of_data_ranks for shards in zip(*ranks, strict=True))
        steps.append(sorted({*rows}))
    return steps


def test_resume_at_another_size(multimodal: TinyFiles, tmp_path: Path) -> None:
    """Stopped on one rank in the middle of a window, and continued by two, by a pipeline, and by context ranks."""
    runs, one = Runs(multimodal, tmp_path), TestLayout(distributed_optimizer=True)
    rows = start(runs, "straight", one)
    assert all(len(step) == 2 for step in rows)
    stopped = start(runs, "stopped", one, **{"train.exit_interval": STOP_AFTER})
    assert stopped == rows[:STOP_AFTER]
    straight = read_metrics(tmp_path / "straight")
    for name, layout in {
        "same": one,
        "DP2": TestLayout(2, distributed_optimizer=True),
        "PP2": TestLayout(2, pipeline=2, distributed_optimizer=True),
        "CP2xDP2": TestLayout(4, context=2, distributed_optimizer=True),
    }.items():
        shutil.copytree(tmp_path / "stopped", tmp_path / name)
        assert start(runs, name, layout) == rows[STOP_AFTER:], name
        resumed = read_metrics(tmp_path / name)
        counts = ("step", "samples", "step_samples", "tokens", "label_tokens", "images")
        assert [[line[key] for key in counts] for line in resumed] == [
            [line[key] for key in counts] for line in straight
        ]
        losses = [line["loss"] for line in straight]
        assert [line["loss"] for line in resumed] == (losses if name == "same" else pytest.approx(losses, rel=1e-6))
    check_equal_bits(runs.tensors("same"), runs.tensors("straight"))
    assert straight[-1]["samples"] > 5 * len(multimodal.rows)
    for name in ("DP2", "CP2xDP2"):
        balanced = [line for line in read_metrics(tmp_path / name) if "straggler_ratio_predicted" in line]
        assert [line["step"] for line in balanced] == list(range(STOP_AFTER + 1, STEPS + 1))


def test_balanced_ranks_train_the_same(multimodal: TinyFiles, tmp_path: Path) -> None:
    """Packs that change ranks change nothing but the order of sums."""
    runs = Runs(multimodal, tmp_path)
    # A little less than the rows need: every window has a pack with a single row.
    batch = {"data.seq_length": seq_length_for(multimodal, 3) - 1, "train.global_batch_size": 8, "train.train_iters": 4}
    expected = start(runs, "one", TestLayout(), **batch)
    assert start(runs, "two", TestLayout(2), **batch) == expected
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    for key, tolerance in (("loss", LOSS_TOLERANCE), ("grad_norm", 1e-5)):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=tolerance)
    ratios = [(line["straggler_ratio_predicted"], line["straggler_ratio_predicted_in_order"]) for line in two]
    assert all(balanced <= in_order for balanced, in_order in ratios)
    assert sum(balanced + 0.05 < in_order for balanced, in_order in ratios) >= 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return build_place(tmp_path_factory.mktemp("place"))


def test_changed_packing_is_refused_on_resume(place: Place, tmp_path: Path) -> None:
    on = ("data.packing=true", "train.global_batch_size=2")

    def error_of(*settings: str) -> str | None:
        return run_ranks(1, train_here, place.arguments(tmp_path / "run", *settings))[0].error

    assert error_of(*on, "train.exit_interval=1") is None
    for settings, change in (
        ((*on, "data.seq_length=120"), "data.seq_length was 96, now 120"),
        (("data.packing=false",), "data.packing was true, now false"),
    ):
        error = error_of(*settings)
        assert error is not None and "\n" not in error
        assert error.startswith(f"DataError: the data order is not the one this run was trained with: {change} -- ")
    assert error_of(*on) is None


def test_a_row_that_fits_into_no_pack(place: Place, tmp_path: Path) -> None:
    path = place.data / "long.jsonl"
    write_jsonl(path, [row(user("Short."), assistant("Yes.")), row(user("? " * 200), assistant("!"))])
    settings = (f"data.train=[{{path: {path}}}]", "data.packing=true", "data.too_long=error")
    error = run_ranks(1, train_here, place.arguments(tmp_path, *settings))[0].error
    assert error is not None and error.startswith("DataError: ") and "\n" not in error
    assert "1 of 2 rows are too long; the first: " in error and f"more than data.seq_length 96 [{path}:2]" in error
    assert "set data.too_long to drop or truncate" in error


@pytest.mark.parametrize("micro_batch_size", [1, full(2)])
def test_real_run(place: Place, tmp_path: Path, micro_batch_size: int) -> None:
    """torchrun with two data ranks, workers and held-out rows: the losses of a run without packing on the same rows."""
    size = 2 * micro_batch_size
    length = seq_length_for(TinyFiles(GEMMA3, place.model, place.data / "train.jsonl"), size)
    valid = f"data.valid=[{{path: {place.data / 'train.jsonl'}}}]"
    common = (valid, "train.train_iters=2", f"data.seq_length={length}")
    (expected,) = run_ranks(1, train_here, place.arguments(tmp_path / "plain", *common, "train.global_batch_size=8"))
    batch = (f"train.global_batch_size={size}", f"train.micro_batch_size={micro_batch_size}")
    packing = ("data.packing=true", "data.num_workers=1", *batch)
    log = tmp_path / "log"
    assert start_torchrun(place.arguments(tmp_path / "packed", *common, *packing), log).wait(timeout=240) == 0
    records = read_metrics(tmp_path / "packed")
    for ours, plain in zip(records, expected.metrics, strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], rel=LOSS_TOLERANCE)
        for key in ("label_tokens", "tokens", "samples", "step_samples", "epoch"):
            assert ours[key] == plain[key]
        assert (ours["batch_rows"], plain["batch_rows"]) == (size, 8)
        assert ours["padding_share"] == pytest.approx(1 - ours["tokens"] / (ours["tokens"] + ours["padded_tokens"]))
    (evaluation,) = read_lines(tmp_path / "packed" / "evaluations.jsonl")
    assert evaluation["loss"] == pytest.approx(expected.evaluations[0]["loss"], rel=LOSS_TOLERANCE)
    lines = log.read_text()
    assert f"2 steps of {size} packed rows of {8 / size:.1f} samples in the mean = about 2.00 passes" in lines
    step = next(line for line in lines.replace("\n    ", "  ").splitlines() if line.startswith("step 2/2"))
    assert f"8 samples in {size} rows  padding {records[1]['padding_share']:.1%}  straggler 1." in step
