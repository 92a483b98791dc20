"""Packed rows out of the loader: the documents of every row, on any number of ranks, again after a resume."""

from __future__ import annotations

import dataclasses
import json
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vlm.config import Config, DataSource
from megatron_vlm.data import packing
from megatron_vlm.data.balance import TokenCosts
from megatron_vlm.data.collate import MicroBatch, collate
from megatron_vlm.data.loader import BatchSharding, MicroBatchLoader, build_train_loader, build_valid_loader
from megatron_vlm.data.measure_rows import Chunk, measure_chunk
from megatron_vlm.data.packing import PackedPlan
from megatron_vlm.data.plan import START
from megatron_vlm.data.row_lengths import lengths_files
from megatron_vlm.data.rows import reader_for
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.errors import DataError
from tests.data.rows import assistant, image, numbered_rows, row, user, write_jsonl

Make = Callable[..., Config]
SEQ_LENGTH = 96
# An image costs far more than its tokens do.
COSTS = TokenCosts(token=10, pair=((None, 1),), patch=1000, patch_pair=0, audio_frame=0)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packing, "WINDOW_ROWS", 17)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def sources(folder: Path) -> list[DataSource]:
    rows = [*numbered_rows(20, "a"), "no row"]
    rows[5]["messages"][1] = assistant("a long answer " * 40)
    return [
        DataSource(write_jsonl(folder / "a.jsonl", rows), 2.0),
        DataSource(write_jsonl(folder / "b.jsonl", numbered_rows(9, "b")), 1.0),
    ]


@pytest.fixture
def config(make_config: Make, sources: list[DataSource]) -> Config:
    return make_config(sources, seq_length=SEQ_LENGTH, packing=True, global_batch_size=4)


def measure(config: Config, sources: list[DataSource], rules: PromptRules) -> None:
    """Keep the lengths of the rows of some sources, as the ranks of a run do."""
    reader = reader_for(config, sources, rules)
    for source, file in enumerate(lengths_files(reader)):
        file.store(measure_chunk(reader.measuring(), Chunk(source, 0, file.num_rows, 0)))


def loaders_of(
    config: Config,
    rules: PromptRules,
    ranks: int,
    micro: int,
    costs: TokenCosts | None = None,
    build: Callable[..., Any] = build_train_loader,
) -> list[MicroBatchLoader]:
    sources = config.data.train if build is build_train_loader else config.data.valid
    measure(config, sources, rules)
    shardings = [BatchSharding(4, micro, rank, ranks) for rank in range(ranks)]
    return [build(config, rules, sharding, token_costs=costs, report_problems=False) for sharding in shardings]


def rows_of(batch: MicroBatch) -> list[tuple[str, ...]]:
    """The names of the documents in each row of a micro-batch."""
    return [
        tuple(batch.document_names[document] for document in ids.unique().tolist() if document >= 0)
        for ids in batch.document_ids
    ]


def global_batch(loaders: list[MicroBatchLoader]) -> list[list[tuple[str, ...]]]:
    """The rows of the next global batch, of each rank."""
    return [[row for batch in loader.global_batch() for row in rows_of(batch)] for loader in loaders]


def in_any_order(batch: list[list[tuple[str, ...]]]) -> list[tuple[str, ...]]:
    return sorted(row for rank in batch for row in rank)


def test_rows_hold_several_samples(config: Config, rules: PromptRules, sources: list[DataSource]) -> None:
    """Every sample as the reader gives it, also those that cannot be used; no row beyond seq_length; the counts."""
    (loader,) = loaders_of(config, rules, 1, 2)
    reader = reader_for(config, config.data.train, rules)
    samples = {
        reader.sources[source].name(number): reader.read(source, number)
        for source, count in enumerate((21, 9))
        for number in range(count)
    }
    named: set[str] = set()
    for _ in range(4):
        for batch in loader.global_batch():
            rows = [[samples[name] for name in names] for names in rows_of(batch)]
            assert max(sum(len(sample.sample.input_ids) for sample in row) for row in rows) <= SEQ_LENGTH
            expected = collate(rows, rules, reader.builder.padding_token_id)
            assert torch.equal(batch.input_ids, expected.input_ids) and torch.equal(batch.labels, expected.labels)
            assert batch.counters == expected.counters
            assert batch.counters["samples"] == sum(map(len, rows)) > 2
            named.update(batch.document_names)
    assert loader.consumed_samples > len(samples) and named == {*samples}
    bad, too_long = ({name for name, sample in samples.items() if getattr(sample, key)} for key in ("bad", "too_long"))
    assert bad == {f"{sources[0].path}:21"} and too_long == {f"{sources[0].path}:6"}


@pytest.mark.parametrize("costs", [None, COSTS], ids=["in order", "balanced"])
@pytest.mark.parametrize(("ranks", "micro"), [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_global_batches_do_not_depend_on_ranks(
    config: Config, rules: PromptRules, ranks: int, micro: int, costs: TokenCosts | None
) -> None:
    loaders, alone = loaders_of(config, rules, ranks, micro, costs), loaders_of(config, rules, 1, 1)
    for _ in range(5):
        ours, expected = global_batch(loaders), global_batch(alone)
        assert in_any_order(ours) == in_any_order(expected)
        assert len({len(rank) for rank in ours}) == 1
        if costs is None or ranks == 1:
            step = [row for number in range(0, 4 // ranks, micro) for rank in ours for row in rank[number:][:micro]]
            assert step == expected[0]
    assert len({loader.consumed_samples for loader in (*loaders, *alone)}) == 1


def test_images_are_spread_over_ranks(make_config: Make, rules: PromptRules, folder: Path) -> None:
    """One pack of four has an image; in order one rank would take them all."""
    filling = "word " * 60
    rows = [row(user(*([image("0.png")] if n % 4 == 0 else [])), assistant(filling)) for n in range(16)]
    source = DataSource(write_jsonl(folder / "a.jsonl", rows))
    config = make_config([source], seq_length=150, packing=True, shuffle=False, global_batch_size=16)
    measure(config, [source], rules)
    shardings = [BatchSharding(16, 1, rank, 4) for rank in range(4)]
    loaders = [build_train_loader(config, rules, sharding, token_costs=COSTS) for sharding in shardings]
    images = [sum(batch.counters["images"] for batch in loader.global_batch()) for loader in loaders]
    assert images == [1, 1, 1, 1]
    assignment = loaders[2].last_assignment()
    assert assignment.straggler_ratio == pytest.approx(1, abs=1e-3)
    assert assignment.straggler_ratio_in_order is not None and assignment.straggler_ratio_in_order > 1.1


def test_resume_at_another_number_of_ranks(config: Config, rules: PromptRules) -> None:
    straight = loaders_of(config, rules, 1, 2)
    expected = [in_any_order(global_batch(straight)) for _ in range(9)]
    first = loaders_of(config, rules, 2, 1, COSTS)
    assert [in_any_order(global_batch(first)) for _ in range(5)] == expected[:5]
    next(first[0])  # a step that has begun does not count
    states = [json.loads(json.dumps(loader.state_dict())) for loader in first]
    assert states[0] == states[1] and states[0]["window"] > 0 and states[0]["pack"] > 0
    second = loaders_of(config, rules, 4, 1)
    for loader in second:
        loader.load_state_dict(states[0])
    assert second[0].consumed_samples == first[0].consumed_samples
    assert [in_any_order(global_batch(second)) for _ in range(4)] == expected[5:]


def test_workers_change_nothing(config: Config, rules: PromptRules) -> None:
    workers = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=2))
    here, there = (loaders_of(settings, rules, 2, 1, COSTS)[1] for settings in (config, workers))
    for _ in range(6):
        own, sent = here.global_batch(), there.global_batch()
        assert [rows_of(batch) for batch in own] == [rows_of(batch) for batch in sent]
        assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(own, sent, strict=True))
        assert here.position == there.position
    there.close()


def test_evaluation_reads_every_row_once(config: Config, rules: PromptRules, sources: list[DataSource]) -> None:
    object.__setattr__(config.data, "valid", sources)
    loaders = loaders_of(config, rules, 2, 1, build=build_valid_loader)
    num = loaders[0].num_global_batches
    assert num is not None
    for _ in range(2):
        read = [row for _ in range(num) for rank in global_batch(loaders) for row in rank]
        assert len(read) == 4 * num and () not in read[: -2 * 4]
        names = [name for row in read for name in row if name]
        expected = [
            f"{source.path}:{n + 1}" for source, count in zip(sources, (21, 9), strict=True) for n in range(count)
        ]
        assert sorted(names) == sorted(expected)
        for loader in loaders:
            loader.seek(START)
    object.__setattr__(config.train, "eval_iters", 1)
    assert loaders_of(config, rules, 2, 1, build=build_valid_loader)[0].num_global_batches == 1


def test_a_row_whose_image_was_replaced(make_config: Make, rules: PromptRules, folder: Path) -> None:
    """It would not fit where it was planned."""
    source = DataSource(write_jsonl(folder / "a.jsonl", numbered_rows(6)))
    config = make_config([source], seq_length=SEQ_LENGTH, packing=True, shuffle=False)
    measure(config, [source], rules)
    loader = build_train_loader(config, rules, BatchSharding(1, 1), report_problems=False)
    assert isinstance(loader.plan, PackedPlan)
    tokens = np.array([*loader.plan.lengths[0].tokens[:-1], 1], np.int32)
    loader.plan.lengths = [dataclasses.replace(loader.plan.lengths[0], tokens=tokens)]
    with pytest.raises(DataError, match=r"tokens, and had 1 when lengths were measured.*a.jsonl:6"):
        for _ in range(6):
            next(loader)


def test_changed_packing_is_refused_on_resume(config: Config, rules: PromptRules) -> None:
    (loader,) = loaders_of(config, rules, 1, 1)
    state = json.loads(json.dumps(loader.state_dict()))
    plain = dataclasses.replace(config, data=dataclasses.replace(config.data, packing=False))
    (unpacked,) = [build_train_loader(plain, rules, BatchSharding(4, 1), report_problems=False)]
    with pytest.raises(DataError, match=r"data.packing was true, now false --"):
        unpacked.load_state_dict(state)
    with pytest.raises(DataError, match=r"data.packing was false, now true --"):
        loader.load_state_dict(unpacked.state_dict())
    longer = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_length=128))
    with pytest.raises(DataError, match=r"data.seq_length was 96, now 128 --"):
        loaders_of(longer, rules, 1, 1)[0].load_state_dict(state)


def test_plan_on_a_node_with_another_temporary_directory(
    config: Config, rules: PromptRules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the first pipeline stage sends it to a later one, which has the same lengths in a folder of its own."""
    (loader,) = loaders_of(config, rules, 1, 1)
    sent, expected = pickle.dumps(loader.plan), loader.plan.packs(START, 20)
    assert len(sent) < 10_000
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "other"))
    measure(config, config.data.train, rules)
    assert isinstance(loader.plan, PackedPlan)
    for lengths in loader.plan.lengths:
        Path(lengths.stored_at).unlink()
    plan = pickle.loads(sent)
    assert plan.packs(START, 20) == expected and all("/other/" in lengths.stored_at for lengths in plan.lengths)
