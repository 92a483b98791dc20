"""Measure the rows of data sources on all ranks together before training: each rank a slice, each node one copy.

What each rank found is exchanged as tensors, and one rank of a node stores it. Where some node has lengths from an
earlier start, the others get them from there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.distributed

from megatron_vlm import platform
from megatron_vlm.config import Config
from megatron_vlm.data.measure_rows import Lengths, measure_chunks, slice_of_rank
from megatron_vlm.data.row_lengths import (
    ARRAYS,
    LengthsFile,
    RowLengths,
    RowStatus,
    digest_of,
    find_row_lengths,
    lengths_files,
    measured_as_bad,
)
from megatron_vlm.data.rows import RowReader, reader_for
from megatron_vlm.data.rules import PromptRules
from megatron_vlm.data.store_meeting import StoreMeeting
from megatron_vlm.errors import DataError
from megatron_vlm.platform.agreement import is_any, share_first
from megatron_vlm.progress import Progress

PIECE_ROWS = 2**20
"""Rows whose lengths are exchanged at once."""


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
        for name, values in zip(ARRAYS, summed.numpy(force=True), strict=True):
            lengths[name][start:end] = values
    return lengths


def _report(key: str, reader: RowReader) -> None:
    """Print one line on the lengths of a reader's rows.

    Raises:
        DataError: there are bad or too long rows, and they are to end the run; or more of them than it may have.
    """
    lengths, settings = find_row_lengths(reader), reader.settings
    most_bad, most_too_long = settings.max_bad_fraction, settings.max_too_long_fraction
    if key != "data.train":
        most_bad = most_too_long = 1.0
    _refuse(reader, lengths, RowStatus.BAD, "bad", None if settings.strict else most_bad)
    _refuse(reader, lengths, RowStatus.TOO_LONG, "too long", None if settings.too_long == "error" else most_too_long)
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


def _refuse(reader: RowReader, lengths: Sequence[RowLengths], status: RowStatus, word: str, most: float | None) -> None:
    """Raise an error with the number of rows that have a status, and the first, where they are too many.

    Args:
        reader: of the rows.
        lengths: of its sources.
        status: of the rows in question.
        word: for it.
        most: fraction of the rows that a run sees, by the weights of their sources, that may have it; None: no row may.
    """
    counts = [each.count(status) for each in lengths]
    fractions = [count / len(each.status) for count, each in zip(counts, lengths, strict=True)]
    if not any(counts) or (most is not None and np.average(fractions, weights=reader.weights) <= most):
        return
    source = next(source for source, count in enumerate(counts) if count)
    row = int(np.argmax(lengths[source].status == status))
    error = _error_of(reader, source, row, lengths[source])
    what = f"{sum(counts):,} of {sum(len(each.status) for each in lengths):,} rows are {word}"
    fix = error.fix
    if most is not None:
        key = f"data.max_{word.replace(' ', '_')}_fraction"
        if status == RowStatus.TOO_LONG:
            cut = "" if reader.settings.too_long == "truncate" else ", set data.too_long to truncate"
            fix = f"raise data.seq_length{cut}"
        what, fix = f"{what}, more than {key} {most}", f"{fix or 'correct the rows'}; or raise {key}"
    raise DataError(f"{what}; the first: {error.what}", error.where, fix)


def _error_of(reader: RowReader, source: int, row: int, lengths: RowLengths) -> DataError:
    """Return what is wrong with a row that was bad or too long when it was measured."""
    measuring = reader.measuring()
    measuring.settings = replace(reader.settings, strict=True, too_long="error")
    try:
        measuring.read(source, row)
    except DataError as error:
        return error
    return measured_as_bad(reader.sources[source].name(row), lengths)
