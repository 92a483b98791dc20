"""Ranks measure rows together: each its slice, one copy per node, one error for all, an early end where one stops."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed

from megatron_vlm.config import Config, DataSource
from megatron_vlm.data import lengths_on_ranks, measure_rows
from megatron_vlm.data.lengths_on_ranks import measure_row_lengths
from megatron_vlm.data.measure_rows import Chunk, measure_chunk, measure_chunks, slice_of_rank
from megatron_vlm.data.row_lengths import ARRAYS, find_row_lengths
from megatron_vlm.data.rows import RowReader, reader_for
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.data.store_meeting import StoreMeeting
from megatron_vlm.errors import ConfigError, DataError, UserError
from megatron_vlm.progress import Progress
from tests.data.rows import assistant, image, numbered_rows, row, user, write_jsonl
from tests.ranks import run_ranks

MakeConfig = Callable[..., Config]
Make = Callable[..., RowReader]
LONG, BAD = row(user("words " * 99), assistant("b")), row(user(image("nothing.png")), assistant("b"))


@dataclass
class Outcome:
    """What a rank saw.

    Attributes:
        arrays: of every source of data.train, in the order of ARRAYS; None where there are none.
        rows: that this rank measured, as (source, row).
        error: for the user.
    """

    arrays: list[list[np.ndarray]] | None
    rows: list[tuple[int, int]]
    error: str | None


def measure_here(config: Config, rules: PromptRules, folders: list[str], trouble: str = "") -> Outcome:
    """On a pool rank, whose node has the temporary directory that stands in its place in `folders`."""
    rank, kept, kept_rows = torch.distributed.get_rank(), tempfile.tempdir, measure_rows.CHUNK_ROWS
    measured: list[tuple[int, int]] = []
    stopped = False

    def counted(reader: RowReader, chunk: Chunk) -> Any:
        nonlocal stopped
        if trouble == "error on rank 1" and rank == 1:
            raise ConfigError("a package is not installed on this rank")
        if trouble == "stop on rank 1" and rank == 1:
            stopped = True
        if trouble:
            time.sleep(0.2)
        measured.extend((chunk.source, number) for number in range(chunk.first, chunk.end))
        return measure_chunk(reader, chunk)

    if trouble == "another model on rank 1" and rank == 1:
        config = replace(config, data=replace(config.data, seq_length=config.data.seq_length - 1))
    tempfile.tempdir = folders[rank % len(folders)]
    measure_rows.measure_chunk, measure_rows.CHUNK_ROWS = counted, 8 if trouble else kept_rows
    error, arrays = None, None
    try:
        measure_row_lengths(config, rules, lambda: stopped)
        files = lengths_on_ranks.lengths_files(reader_for(config, config.data.train, rules))
        if all(file.place.is_file() for file in files):
            found = find_row_lengths(reader_for(config, config.data.train, rules))
            arrays = [[np.array(getattr(each, name)) for name in ARRAYS] for each in found]
    except UserError as raised:
        error = str(raised)
    finally:
        measure_rows.measure_chunk, measure_rows.CHUNK_ROWS, tempfile.tempdir = measure_chunk, kept_rows, kept
    return Outcome(arrays, measured, error)


@pytest.fixture
def config(make_config: MakeConfig, folder: Path) -> Config:
    """Two sources, the first of which has rows of all kinds; and held-out rows."""
    first = [*numbered_rows(40), LONG, BAD, *numbered_rows(70, "b" * 40)]
    paths = [
        write_jsonl(folder / f"{name}.jsonl", rows)
        for name, rows in {"a": first, "b": numbered_rows(150), "valid": numbered_rows(3)}.items()
    ]
    config = make_config([DataSource(path) for path in paths[:2]])
    return replace(config, data=replace(config.data, valid=[DataSource(paths[2])]))


@pytest.fixture
def nodes(tmp_path: Path) -> list[str]:
    """Temporary directories of two nodes."""
    for number in range(2):
        (tmp_path / f"node{number}").mkdir()
    return [str(tmp_path / f"node{number}") for number in range(2)]


def equal(left: Outcome, right: Outcome) -> bool:
    assert left.arrays is not None and right.arrays is not None
    return all(
        np.array_equal(*pair) and pair[0].dtype == pair[1].dtype
        for arrays in zip(left.arrays, right.arrays, strict=True)
        for pair in zip(*arrays, strict=True)
    )


@pytest.mark.parametrize("world_size", [2, 4])
def test_each_rank_measures_its_slice(
    config: Config, rules: PromptRules, nodes: list[str], monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    """As one rank does alone; a second start measures nothing, and a node without lengths gets those of the other."""
    (alone,) = run_ranks(1, measure_here, config, rules, [tempfile.mkdtemp(dir=nodes[0])])
    together = run_ranks(world_size, measure_here, config, rules, nodes)
    assert all(equal(outcome, alone) and outcome.error is None for outcome in together)
    assert alone.arrays is not None and [len(source[0]) for source in alone.arrays] == [112, 150]
    measured = [item for outcome in together for item in outcome.rows]
    # The rows of both sources, and the three held-out ones, which are those of a source 0, too.
    assert len(measured) == 112 + 150 + 3 and sorted({*measured}) == sorted({*alone.rows})
    assert all(len(outcome.rows) > 265 // world_size // 2 for outcome in together)
    again = run_ranks(world_size, measure_here, config, rules, nodes)
    assert all(equal(outcome, alone) and not outcome.rows for outcome in again)
    for place in Path(nodes[1]).glob("*/*.lengths"):
        place.unlink()
    copied = run_ranks(world_size, measure_here, config, rules, nodes)
    assert all(equal(outcome, alone) and not outcome.rows for outcome in copied)


def test_damaged_file_of_one_source(config: Config, rules: PromptRules, nodes: list[str]) -> None:
    """Only that source is measured anew, where no other node has it."""
    first = run_ranks(2, measure_here, config, rules, nodes[:1])
    place = max(Path(nodes[0]).glob("*/*.lengths"), key=lambda place: place.stat().st_size)
    content = bytearray(place.read_bytes())
    content[-1000] ^= 1
    place.write_bytes(content)
    second = run_ranks(2, measure_here, config, rules, nodes[:1])
    assert all(map(equal, first, second))
    assert sorted(item for outcome in second for item in outcome.rows) == [(1, number) for number in range(150)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strict": True}, r"1 of 262 rows are bad; the first: image .*nothing.png does not exist \[.*a.jsonl:42\]"),
        ({"too_long": "error"}, r"1 of 262 rows are too long; the first: the row has \d+ tokens, .*a.jsonl:41\]"),
        (
            {"max_bad_fraction": 0.004},
            r"1 of 262 rows are bad, more than data.max_bad_fraction 0.004; the first: image .*nothing.png does not "
            r"exist \[.*a.jsonl:42\] -- restore the file or remove the row; or raise data.max_bad_fraction$",
        ),
        (
            {"max_too_long_fraction": 0.004},
            r"too long, more than data.max_too_long_fraction 0.004; the first: .*a.jsonl:41\] -- raise "
            r"data.seq_length, set data.too_long to truncate; or raise data.max_too_long_fraction$",
        ),
    ],
)
def test_rows_that_end_the_run(
    config: Config, rules: PromptRules, nodes: list[str], settings: dict[str, Any], message: str
) -> None:
    config = replace(config, data=replace(config.data, **settings))
    for outcome in run_ranks(2, measure_here, config, rules, nodes):
        assert outcome.error is not None
        assert re.search(message, outcome.error)


def test_rows_of_sources_are_counted_by_their_weights(config: Config, rules: PromptRules, nodes: list[str]) -> None:
    """One bad row of 112 in a source that is half, or a hundredth, of what the run sees."""
    for weight, refused in ((1.0, True), (0.01, False)):
        first, second = config.data.train
        data = replace(config.data, train=[replace(first, weight=weight), second], max_bad_fraction=0.004)
        (outcome,) = run_ranks(1, measure_here, replace(config, data=data), rules, nodes)
        assert (outcome.error is not None) == refused


def test_bad_row_that_was_repaired(config: Config, rules: PromptRules, nodes: list[str], folder: Path) -> None:
    """What was measured stands; the error says how to have it measured anew."""
    config = replace(config, data=replace(config.data, strict=True))
    run_ranks(1, measure_here, config, rules, nodes)
    shutil.copy(folder / "0.png", folder / "nothing.png")
    (outcome,) = run_ranks(1, measure_here, config, rules, nodes)
    assert outcome.error is not None and "1 of 262 rows are bad; the first: it could not be used when" in outcome.error
    (place,) = re.findall(r"a.jsonl:42\] -- delete (\S+) on every node, and start again", outcome.error)
    Path(place).unlink()
    (outcome,) = run_ranks(1, measure_here, config, rules, nodes)
    assert outcome.error is None


def test_error_of_one_rank_is_that_of_all(config: Config, rules: PromptRules, nodes: list[str]) -> None:
    outcomes = run_ranks(2, measure_here, config, rules, nodes, "error on rank 1")
    assert [outcome.error for outcome in outcomes] == ["a package is not installed on this rank"] * 2
    assert len(outcomes[0].rows) < 80, "the first rank measured all the same"


def test_stop_of_one_rank_ends_all(config: Config, rules: PromptRules, nodes: list[str]) -> None:
    for outcome in run_ranks(2, measure_here, config, rules, nodes, "stop on rank 1"):
        assert outcome.error is None and outcome.arrays is None and len(outcome.rows) < 80


def meet_here() -> list[str]:
    """On a pool rank: the second takes long, while the first, which is done, shows how far both are."""
    meeting, stream, seconds = StoreMeeting("a test", lambda: False), io.StringIO(), itertools.count(0, 10)
    with Progress("measuring", 100, stream=stream, clock=lambda: float(next(seconds))) as progress:

        def work() -> None:
            if meeting.rank == 0:
                meeting.advance(40)
            for _ in range(4 * meeting.rank):
                time.sleep(0.3)
                meeting.advance(15)

        assert meeting.do(lambda: meeting.advance(1000))
        assert meeting.do(work, progress)
    return stream.getvalue().splitlines()


def test_first_rank_shows_how_far_all_are() -> None:
    lines, _ = run_ranks(2, meet_here)
    shown = [int(line.removeprefix("measuring: ").split(" B of 100 B ")[0]) for line in lines]
    assert len(shown) > 1 and shown == sorted(shown) and shown[0] < 100, lines
    assert {*shown} <= {0, 15, 30, 40, 55, 70, 85, 100} and max(shown) > 40, lines


def test_ranks_that_would_measure_something_else(config: Config, rules: PromptRules, nodes: list[str]) -> None:
    for outcome in run_ranks(2, measure_here, config, rules, nodes, "another model on rank 1"):
        assert outcome.error and "are not the same on all nodes" in outcome.error and not outcome.rows


def test_slices_take_equally_long(make_reader: Make) -> None:
    """By their text and a cost for each row; together they are all rows, in order."""
    reader = make_reader([*numbered_rows(300), *(row(user("x" * 9000), assistant("b")) for _ in range(40))])
    rows = {0: reader.sources[0]}
    row_bytes = reader.sources[0].row_bytes()
    assert int(row_bytes.sum()) + len(row_bytes) == Path(reader.sources[0].path).stat().st_size
    for world_size in (1, 3, 7, 400):
        slices = [slice_of_rank(rows, rank, world_size) for rank in range(world_size)]
        chunks = [chunk for each in slices for chunk in each]
        assert [number for chunk in chunks for number in range(chunk.first, chunk.end)] == [*range(340)]
        assert all(chunk.num_bytes == row_bytes[chunk.first : chunk.end].sum() for chunk in chunks)
        if world_size < 10:
            costs = [sum(chunk.num_bytes + 2048 * (chunk.end - chunk.first) for chunk in each) for each in slices]
            assert max(costs) - min(costs) < 2 * 12_000
    assert all(chunk.end - chunk.first <= 64 for chunk in slices[0])


@pytest.fixture
def text_reader(make_reader: Make) -> RowReader:
    return make_reader([row(user(f"{number}?"), assistant("b" * (number % 50))) for number in range(600)])


def test_workers_find_what_this_process_finds(text_reader: RowReader) -> None:
    chunks = slice_of_rank({0: text_reader.sources[0]}, 0, 1)
    found = [[*measure_chunks(text_reader.measuring(), chunks, workers, lambda: True)] for workers in (0, 2)]
    for (left_chunk, left), (right_chunk, right) in zip(*found, strict=True):
        assert left_chunk == right_chunk
        assert all(np.array_equal(left[name], right[name]) for name in ARRAYS)


def test_workers_that_are_killed_or_stopped(text_reader: RowReader) -> None:
    others = {*multiprocessing.active_children()}
    chunks = slice_of_rank({0: text_reader.sources[0]}, 0, 1)

    def workers() -> list[Any]:
        return [*({*multiprocessing.active_children()} - others)]

    results = measure_chunks(text_reader.measuring(), chunks * 50, 1, lambda: True)
    next(results)
    (worker,) = workers()
    os.kill(worker.pid, signal.SIGTERM)  # a scheduler's, for the rank
    next(results)
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=rf"data worker {worker.pid} .* was ended by SIGKILL"):
        list(results)
    answers = iter([True, True, True, False])
    results = measure_chunks(text_reader.measuring(), chunks * 50, 1, lambda: next(answers))
    assert len(list(results)) < 4
    end = time.monotonic() + 10
    while workers() and time.monotonic() < end:
        time.sleep(0.05)
    assert not workers()
