"""Packs: rows of the data that share a row of a batch, as a pure function of the order of rows and of their lengths.

The order of rows (`SamplePlan`) is cut into windows of a fixed number of rows. Inside a window rows are packed by
best-fit decreasing, and its packs come in an order of their own, so that every window can be packed without any other.
Global batch k is the k-th G packs, across windows. Nothing depends on ranks or workers, so a run resumes exactly at any
size from (window, pack).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_vlm.data.balance import TokenCosts
from megatron_vlm.data.plan import (
    Pack,
    Position,
    RowReference,
    SamplePlan,
    changed_order,
    hash_of,
    permute,
    saved_number,
)
from megatron_vlm.data.row_lengths import RowLengths

WINDOW_ROWS = 4096
"""Rows packed together. The last packs of a window stay partly empty, which costs less the more packs it has: rows with
a median of 600 tokens fill 99.9 % of packs of 4,096 tokens and 98.6 % of 131,072, and a window takes about 10 ms.
Another number would be another order of the data, so it is part of the fingerprint."""
WINDOWS_KEPT = 4
"""Windows kept in memory beside those of a global batch: a worker goes forward, and the loader itself is a few global
batches behind."""


class PackedPlan:
    """The endless sequence of packs that a run reads; a `BatchPlan`.

    Args:
        order: the order of rows.
        lengths: of each source, what its rows take.
        seq_length: most tokens of a pack; no row has more.
        token_costs: what tokens and patches cost, where packs are to be balanced over data ranks.
    """

    def __init__(
        self,
        order: SamplePlan,
        lengths: Sequence[RowLengths],
        seq_length: int,
        token_costs: TokenCosts | None = None,
    ) -> None:
        self.order, self.seq_length, self.token_costs = order, seq_length, token_costs
        self.sources, self.lengths = order.sources, lengths
        self.window_rows = min(WINDOW_ROWS, order.num_rows)
        self._num_positions = order.positions_of_one_pass() if order.one_pass else None
        """Rows of one pass; None is endless."""
        self._lengths_digest = _digest_of(lengths)
        self._windows: dict[int, list[Pack]] = {}
        self._most_taken = 0
        """Most windows that packs were taken from at a time."""

    @property
    def num_rows(self) -> int:
        return self.order.num_rows

    @property
    def samples_per_pack(self) -> float:
        packs = self.window(0)
        return sum(map(len, packs)) / len(packs)

    @property
    def fingerprint(self) -> str:
        return hash_of([self.order.fingerprint, self._settings])

    @property
    def _settings(self) -> dict[str, Any]:
        """What the packs depend on beside the order of rows."""
        return {"seq_length": self.seq_length, "window_rows": self.window_rows, "lengths": self._lengths_digest}

    def window(self, number: int) -> list[Pack]:
        """Return the packs of a window in the order in which they are read."""
        if number not in self._windows:
            while len(self._windows) >= WINDOWS_KEPT + self._most_taken:
                del self._windows[next(iter(self._windows))]
            self._windows[number] = self._pack_window(number)
        return self._windows[number]

    def _pack_window(self, number: int) -> list[Pack]:
        start, count = number * self.window_rows, self.window_rows
        if self._num_positions is not None:
            count = min(count, self._num_positions - start)
        rows = [row for row in self.order.rows(start, count) if not self.order.is_repeated(row)]
        packs = best_fit_decreasing(self._gather("tokens", rows), self.seq_length)
        places = np.arange(len(packs))
        if self.order.shuffle:
            places = permute(places, len(packs), (self.order.seed, number))
        return [[rows[item] for item in packs[place]] for place in places.tolist()]

    def _gather(self, name: str, rows: Sequence[RowReference]) -> np.ndarray:
        """Return one of the lengths of each row, int64."""
        sources, _, numbers = np.array(rows, np.int64).reshape(-1, 3).T
        values = np.zeros(len(rows), np.int64)
        for source in np.unique(sources).tolist():
            mine = sources == source
            values[mine] = getattr(self.lengths[source], name)[numbers[mine]]
        return values

    def packs(self, position: Position, count: int) -> list[Pack]:
        return self._take(position, count)[0]

    def advance(self, position: Position, count: int) -> Position:
        return self._take(position, count)[1]

    def _take(self, position: Position, count: int) -> tuple[list[Pack], Position]:
        """Return `count` packs, padding behind the end of one pass, and the position behind them."""
        taken: list[Pack] = []
        samples, window, pack = position
        while len(taken) < count and not self._is_end(window):
            packs = self.window(window)
            part = packs[pack : pack + count - len(taken)]
            taken += part
            samples, pack = samples + sum(map(len, part)), pack + len(part)
            if pack >= len(packs):
                window, pack = window + 1, 0
        self._most_taken = max(self._most_taken, window - position.window + 1)
        taken += [[] for _ in range(count - len(taken))]
        return taken, Position(samples, window, pack)

    def _is_end(self, window: int) -> bool:
        return self._num_positions is not None and window * self.window_rows >= self._num_positions

    def count_packs(self, at_most: int) -> int:
        count = window = 0
        while count < at_most and not self._is_end(window):
            count, window = count + len(self.window(window)), window + 1
        return min(at_most, count)

    def costs(self, packs: Sequence[Pack]) -> np.ndarray | None:
        if self.token_costs is None:
            return None
        rows = [row for pack in packs for row in pack]
        tokens, patches, patch_pairs, audio_frames = (
            self._gather(name, rows) for name in ("tokens", "patches", "patch_pairs", "audio_frames")
        )
        of_rows = self.token_costs.of(tokens, patches, patch_pairs, audio_frames)
        of_packs = np.zeros(len(packs), np.int64)
        np.add.at(of_packs, np.repeat(np.arange(len(packs)), list(map(len, packs))), of_rows)
        return of_packs

    def state(self, position: Position) -> dict[str, Any]:
        return self.order.state(position) | {
            "fingerprint": self.fingerprint,
            "packing": self._settings,
            "window": position.window,
            "pack": position.pack,
        }

    def check_state(self, state: dict[str, Any]) -> Position:
        if "packing" not in state:
            raise changed_order(["data.packing was false, now true"])
        if state["fingerprint"] != self.fingerprint:
            raise changed_order(self._changes(state))
        position = Position(*(saved_number(state, name) for name in ("consumed_samples", "window", "pack")))
        start = position.window * self.window_rows
        if not start <= position.samples < start + self.window_rows:
            raise ValueError(f"window is {position.window} after {position.samples} samples")
        packs = self.window(position.window)[: position.pack]
        if len(packs) != position.pack or start + sum(map(len, packs)) != position.samples:
            raise ValueError(f"pack is {position.pack} after {position.samples} samples")
        return position

    def _changes(self, state: dict[str, Any]) -> list[str]:
        changes, old, new = self.order.changes(state), state["packing"], self._settings
        if old["seq_length"] != new["seq_length"]:
            changes.append(f"data.seq_length was {old['seq_length']}, now {new['seq_length']}")
        if not changes and old["window_rows"] != new["window_rows"]:  # else it may follow from the number of rows
            changes.append(f"{old['window_rows']} rows were packed together, this version packs {new['window_rows']}")
        if not changes:
            # Whatever else changes the lengths of the same rows.
            changes.append(
                "rows have other lengths in tokens (model.hf_path, data.min_pixels, data.max_pixels, data.too_long or "
                "files of images, videos and audio changed)"
            )
        return changes


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack items, the longest first, each where it leaves the least room, in O(n log n).

    Args:
        lengths: integers in [1, capacity].
        capacity: most that the items of a pack have together.

    Returns:
        The items of each pack, ascending; packs in the order of their first items.
    """
    assert lengths.max(initial=1) <= capacity, "longer rows were left out or refused when they were measured"
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # what packs still hold, with their numbers, ascending
    sizes = lengths.tolist()
    for item in np.argsort(-lengths, kind="stable").tolist():
        best = bisect_left(rooms, (sizes[item], 0))
        if best < len(rooms):
            room, pack = rooms.pop(best)
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(item)
        if room > sizes[item]:
            insort(rooms, (room - sizes[item], pack))
    return sorted(sorted(pack) for pack in packs)


def samples_per_pack(lengths: Sequence[int], seq_length: int) -> float:
    """Estimate how many rows of the data a pack holds in the mean, from the lengths of some of them.

    Args:
        lengths: in tokens; those beyond `seq_length` are left out as they are in training, where they take one token.
        seq_length: most tokens of a pack.
    """
    tokens = np.array([1 if length > seq_length else length for length in lengths] or [seq_length])
    return WINDOW_ROWS / len(best_fit_decreasing(np.resize(tokens, WINDOW_ROWS), seq_length))


def _digest_of(lengths: Sequence[RowLengths]) -> str:
    """Return a hash of the rows' lengths in tokens, on which packs depend."""
    content = hashlib.blake2b(digest_size=16)
    for source in lengths:
        content.update(np.ascontiguousarray(source.tokens))
    return content.hexdigest()
