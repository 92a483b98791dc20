"""Measure the rows of data sources on all ranks together before training: each rank a slice, each node one copy.

What each rank found is exchanged as tensors, and one rank of a node stores it. Where some node has lengths from an
earlier start, the others get them from there.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed

from megatron_vlm import platform
from megatron_vlm.config import Config
from megatron_vlm.data.collate import LoadedSample
from megatron_vlm.data.row_lengths import (
    ARRAYS,
    LengthsFile,
    RowLengths,
    RowStatus,
    digest_of,
    find_row_lengths,
    lengths_files,
)
from megatron_vlm.data.rows import RowReader, reader_for
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.data.source_rows import SourceRows
from megatron_vlm.data.store_meeting import LOOK_SECONDS, StoreMeeting
from megatron_vlm.data.worker_processes import raise_if_killed, signals_blocked, start_fork_server, start_worker
from megatron_vlm.errors import DataError
from megatron_vlm.platform.agreement import is_any, share_first
from megatron_vlm.progress import Progress

ROW_COST_BYTES = 2048
"""A row takes as long as so many bytes of text, whatever is in it."""
CHUNK_ROWS, CHUNK_BYTES = 64, 2**18
"""Most rows, and bytes of their text unless it is a single row, that a worker measures at once."""
CHUNKS_AHEAD = 4
"""Chunks that are given to each worker ahead."""
FEWEST_ROWS_FOR_WORKERS = 256
"""Fewer are measured sooner than workers are ready."""
PIECE_ROWS = 2**20
"""Rows whose lengths are exchanged at once."""
Lengths = Mapping[str, np.ndarray]
"""Lengths of some rows, by the names in `ARRAYS`."""


class Chunk(NamedTuple):
    """Consecutive rows of a source: the first, the one after the last, and the bytes of their text."""

    source: int
    first: int
    end: int
    num_bytes: int


def measure_row_lengths(config: Config, rules: PromptRules, is_stopped: Callable[[], bool]) -> None:
    """Make sure that this node has the lengths of all rows of the run, and say what is known of them.

    Called on every rank, also those of later pipeline stages. Once some rank is stopped, it returns early on all.

    Args:
        config: the run's configuration.
        rules: the family's prompt rules.
        is_stopped: returns whether this rank received a signal.

    Raises:
        UserError: data or processor cannot be read, lengths cannot be kept, or there are bad or too long rows where
            these are to end the run; on every rank.
    """
    meeting = StoreMeeting("lengths of rows", is_stopped)
    found: dict[str, tuple[RowReader, list[LengthsFile]]] = {}

    def build() -> None:
        for key, sources in (("data.train", config.data.train), ("data.valid", config.data.valid)):
            if sources:
                reader = reader_for(config, sources, rules)
                found[key] = reader, lengths_files(reader)

    if not meeting.do(build):
        return
    for key, (reader, files) in found.items():
        _check_same(key, files)
        if not _complete(key, reader, files, config.data.num_workers, meeting):
            return
        if not meeting.do(partial(_report, key, reader) if meeting.rank == 0 else None):
            return


def _check_same(key: str, files: Sequence[LengthsFile]) -> None:
    """Make sure that all ranks would measure the same; called on every rank."""
    number = int(digest_of([file.facts for file in files]), 16) >> 33  # 63 bits
    if is_any(share_first(number) != number):
        raise DataError(
            f"the files of {key}, of model.hf_path or of this program are not the same on all nodes",
            fix="give all nodes the same files and packages, and start again once nobody writes to them",
        )


def _complete(
    key: str, reader: RowReader, files: Sequence[LengthsFile], num_workers: int, meeting: StoreMeeting
) -> bool:
    """Measure what no node has, and store on this node what it lacks; returns whether to go on."""
    device, world_size = platform.current().device, meeting.world_size
    found = [file.find() for file in files]
    has = torch.tensor([lengths is not None for lengths in found], device=device)
    owners = torch.where(has, meeting.rank, world_size)
    torch.distributed.all_reduce(owners, op=torch.distributed.ReduceOp.MIN)
    everywhere = has.int()
    torch.distributed.all_reduce(everywhere, op=torch.distributed.ReduceOp.MIN)
    parts: list[list[tuple[int, Lengths]]] = [[] for _ in files]
    lacking = [source for source, owner in enumerate(owners.tolist()) if owner == world_size]
    if lacking and not _measure(key, reader, lacking, num_workers, meeting, parts):
        return False
    for source, is_everywhere in enumerate(everywhere.tolist()):
        if is_everywhere:
            continue
        known = found[source]
        if known is not None and owners[source] == meeting.rank:
            parts[source].append((0, {name: getattr(known, name) for name in ARRAYS}))
        lengths = _exchange(files[source].num_rows, parts[source])
        store = partial(files[source].store, lengths) if os.environ.get("LOCAL_RANK", "0") == "0" else None
        if not meeting.do(store):
            return False
    return True


def _measure(
    key: str,
    reader: RowReader,
    sources: Sequence[int],
    num_workers: int,
    meeting: StoreMeeting,
    parts: list[list[tuple[int, Lengths]]],
) -> bool:
    """Add this rank's part of the rows of some sources to `parts`; returns whether to go on."""
    rows = {source: reader.sources[source] for source in sources}
    total_bytes = sum(int(each.row_bytes().sum()) for each in rows.values())

    def measure() -> None:
        chunks = slice_of_rank(rows, meeting.rank, meeting.world_size)
        for chunk, lengths in measure_chunks(reader.measuring(), chunks, num_workers, meeting.goes_on):
            parts[chunk.source].append((chunk.first, lengths))
            meeting.advance(chunk.num_bytes)

    with Progress(f"measuring rows of {key}", total_bytes) as progress:
        return meeting.do(measure, progress)


def slice_of_rank(sources: Mapping[int, SourceRows], rank: int, world_size: int) -> list[Chunk]:
    """Return the rows that a rank measures, in chunks: a part of all rows of some sources that takes as long as others.

    Args:
        sources: the rows of each source, by its number.
        rank: of `world_size`.
        world_size: number of ranks.
    """
    chunks: list[Chunk] = []
    bytes_of = {source: rows.row_bytes() for source, rows in sources.items()}
    total_cost = sum(int(each.sum()) + ROW_COST_BYTES * len(each) for each in bytes_of.values())
    low, high = total_cost * rank // world_size, total_cost * (rank + 1) // world_size
    cost_before = 0
    for source, row_bytes in bytes_of.items():
        costs = np.cumsum(row_bytes + ROW_COST_BYTES) + cost_before  # of all rows up to and with each
        first, end = np.searchsorted(costs, [low, high], side="right").tolist()
        cost_before = int(costs[-1])
        ends = np.cumsum(row_bytes)
        while first < end:
            before = int(ends[first - 1]) if first else 0
            fits = int(np.searchsorted(ends, before + CHUNK_BYTES, side="right"))
            last = min(max(fits, first + 1), first + CHUNK_ROWS, end)
            chunks.append(Chunk(source, first, last, int(ends[last - 1]) - before))
            first = last
    return chunks


def measure_chunks(
    reader: RowReader, chunks: Sequence[Chunk], num_workers: int, goes_on: Callable[[], bool]
) -> Iterator[tuple[Chunk, Lengths]]:
    """Measure rows, in this process or by workers; yields chunks in order, until all are done or `goes_on` is false.

    Args:
        reader: see `RowReader.measuring`.
        chunks: of rows.
        num_workers: processes that measure.
        goes_on: asked several times a second.

    Raises:
        UserError: see `RowReader.read`; or a worker was killed.
    """
    if num_workers == 0 or sum(chunk.end - chunk.first for chunk in chunks) < FEWEST_ROWS_FOR_WORKERS:
        for chunk in chunks:
            if not goes_on():
                return
            yield chunk, measure_chunk(reader, chunk)
        return
    others = {*multiprocessing.active_children()}
    pool = ProcessPoolExecutor(num_workers, start_fork_server(), _start_measuring, (reader,))
    try:
        yield from _results(pool, chunks, num_workers * CHUNKS_AHEAD, goes_on)
    except BrokenProcessPool:
        raise_if_killed({*multiprocessing.active_children()} - others)
        raise
    finally:
        for worker in {*multiprocessing.active_children()} - others:
            worker.kill()  # it may hang in a read, and has SIGTERM blocked
        pool.shutdown(wait=False, cancel_futures=True)


def _results(
    pool: ProcessPoolExecutor, chunks: Sequence[Chunk], most_ahead: int, goes_on: Callable[[], bool]
) -> Iterator[tuple[Chunk, Lengths]]:
    """Yield what workers find, until all chunks are done (when they have ended) or `goes_on` is false."""
    waiting: deque[tuple[Chunk, Future[Lengths]]] = deque()
    remaining = iter(chunks)
    while True:
        for chunk in islice(remaining, most_ahead - len(waiting)):
            with signals_blocked():  # the first ones start workers
                waiting.append((chunk, pool.submit(_measure_in_worker, chunk)))
        if not waiting:
            pool.shutdown()
            return
        chunk, future = waiting.popleft()
        if not _await(future, goes_on):
            return
        yield chunk, future.result()


def _await(future: Future[Lengths], goes_on: Callable[[], bool]) -> bool:
    """Wait for a result; return whether it came before `goes_on` was false."""
    while goes_on():
        if wait([future], LOOK_SECONDS).done:
            return True
    return False


_reader: RowReader | None = None
"""Of a worker."""


def _start_measuring(reader: RowReader) -> None:
    global _reader
    start_worker()
    _reader = reader


def _measure_in_worker(chunk: Chunk) -> Lengths:
    assert _reader is not None
    return measure_chunk(_reader, chunk)


def measure_chunk(reader: RowReader, chunk: Chunk) -> Lengths:
    """Return the lengths of the rows of a chunk; errors are those of `RowReader.read`."""
    rows = [_figures(reader.read(chunk.source, row)) for row in range(chunk.first, chunk.end)]
    return {name: np.array(column, ARRAYS[name]) for name, column in zip(ARRAYS, zip(*rows, strict=True), strict=True)}


def _figures(loaded: LoadedSample) -> tuple[int, int, int, int, RowStatus]:
    """Return what a row takes, in the order of `ARRAYS`."""
    sample = loaded.sample
    grids = [medium.grid for medium in sample.media if medium.kind != "audio"]
    status = RowStatus.TRUNCATED if loaded.truncated else RowStatus.OK
    if loaded.bad or loaded.too_long:
        status = RowStatus.BAD if loaded.bad else RowStatus.TOO_LONG
    elif not sample.trained.any():
        status = RowStatus.EMPTY
    return (
        len(sample.input_ids),
        sum(math.prod(grid) for grid in grids),
        sum(frames * (height * width) ** 2 for frames, height, width in grids),
        sum(medium.grid[0] for medium in sample.media if medium.kind == "audio"),
        status,
    )


def _exchange(num_rows: int, parts: Sequence[tuple[int, Lengths]]) -> dict[str, np.ndarray]:
    """Return the lengths of all rows of a source, of which each rank has some; called on every rank.

    Args:
        num_rows: rows of the source.
        parts: first row and lengths of what this rank has.
    """
    lengths = {name: np.empty(num_rows, kind) for name, kind in ARRAYS.items()}
    for start in range(0, num_rows, PIECE_ROWS):
        end = min(start + PIECE_ROWS, num_rows)
        piece = np.zeros((len(ARRAYS), end - start), np.int64)
        for first, part in parts:
            low, high = max(first, start), min(first + len(part["tokens"]), end)
            if low < high:
                piece[:, low - start : high - start] = [part[name][low - first : high - first] for name in ARRAYS]
        summed = torch.from_numpy(piece).to(platform.current().device)
        torch.distributed.all_reduce(summed)
        for name, values in zip(ARRAYS, summed.cpu().numpy(), strict=True):
            lengths[name][start:end] = values
    return lengths


def _report(key: str, reader: RowReader) -> None:
    """Print one line on the lengths of a reader's rows.

    Raises:
        DataError: there are bad or too long rows, and they are to end the run.
    """
    lengths = find_row_lengths(reader)
    if reader.settings.strict:
        _refuse(reader, lengths, RowStatus.BAD, "bad")
    if reader.settings.too_long == "error":
        _refuse(reader, lengths, RowStatus.TOO_LONG, "too long")
    rows = sum(len(each.tokens) for each in lengths)
    tokens = sum(int(each.tokens.sum(where=each.tokens > 1, dtype=np.int64)) for each in lengths)
    bad, too_long, cut = (
        sum(each.count(status) for each in lengths)
        for status in (RowStatus.BAD, RowStatus.TOO_LONG, RowStatus.TRUNCATED)
    )
    print(
        f"lengths   {key}: {tokens:,} tokens in {rows:,} rows, of which {bad:,} are bad, {too_long:,} too long and "
        f"{cut:,} cut at a turn",
        flush=True,
    )


def _refuse(reader: RowReader, lengths: Sequence[RowLengths], status: RowStatus, word: str) -> None:
    """Raise the error of the first row with a status, if there is one, with their number."""
    count = sum(each.count(status) for each in lengths)
    if not count:
        return
    source = next(source for source, each in enumerate(lengths) if each.count(status))
    row = int(np.argmax(lengths[source].status == status))
    measuring = reader.measuring()
    measuring.settings = reader.settings
    try:
        problem = measuring.read(source, row).problem
        error = DataError(f"{problem or 'it was so when lengths were measured'}", reader.sources[source].name(row))
    except DataError as raised:
        error = raised
    num_rows = sum(len(each.status) for each in lengths)
    raise DataError(f"{count:,} of {num_rows:,} rows are {word}; the first: {error.what}", error.where, error.fix)
