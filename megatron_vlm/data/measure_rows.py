"""Measure rows of data sources: in chunks, by worker processes."""

from __future__ import annotations

import math
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import numpy as np

from megatron_vlm.data.collate import LoadedSample
from megatron_vlm.data.row_lengths import (
    ARRAYS,
    RowStatus,
)
from megatron_vlm.data.rows import RowReader
from megatron_vlm.data.source_rows import SourceRows
from megatron_vlm.data.store_meeting import LOOK_SECONDS
from megatron_vlm.data.worker_processes import raise_if_killed, signals_blocked, start_fork_server, start_worker

ROW_COST_BYTES = 2048
"""A row takes as long as so many bytes of text, whatever is in it."""
CHUNK_ROWS, CHUNK_BYTES = 64, 2**18
"""Most rows, and bytes of their text unless it is a single row, that a worker measures at once."""
CHUNKS_AHEAD = 4
"""Chunks that are given to each worker ahead."""
FEWEST_ROWS_FOR_WORKERS = 256
"""Fewer are measured sooner than workers are ready."""
Lengths = Mapping[str, np.ndarray]
"""Lengths of some rows, by the names in `ARRAYS`."""


class Chunk(NamedTuple):
    """Consecutive rows of a source: the first, the one after the last, and the bytes of their text."""

    source: int
    first: int
    end: int
    num_bytes: int


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
    workers: set[BaseProcess] = set()
    pool = ProcessPoolExecutor(num_workers, start_fork_server(), _start_measuring, (reader,))
    try:
        yield from _results(pool, chunks, num_workers, workers, goes_on)
    except BrokenProcessPool:
        raise_if_killed(workers)
        raise
    finally:
        for worker in workers:
            worker.kill()  # it may hang in a read, and has SIGTERM blocked
        pool.shutdown(wait=False, cancel_futures=True)


def _results(
    pool: ProcessPoolExecutor,
    chunks: Sequence[Chunk],
    num_workers: int,
    workers: set[BaseProcess],
    goes_on: Callable[[], bool],
) -> Iterator[tuple[Chunk, Lengths]]:
    """Yield what workers find until all is done, and they have ended, or `goes_on` is false; they join `workers`."""
    others = {*multiprocessing.active_children()}
    waiting: deque[tuple[Chunk, Future[Lengths]]] = deque()
    remaining = iter(chunks)
    while True:
        for chunk in islice(remaining, num_workers * CHUNKS_AHEAD - len(waiting)):
            with signals_blocked():  # the first ones start workers
                waiting.append((chunk, pool.submit(_measure_in_worker, chunk)))
            if len(workers) < num_workers:
                workers |= {*multiprocessing.active_children()} - others
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
