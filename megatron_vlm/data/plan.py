"""The order of training rows as a pure function of (data, seed, position).

Position n of the endless row sequence belongs to one source (blending by largest deficit, no random numbers), to one
epoch of that source, and to one of its rows (a Feistel permutation per source and epoch, so nothing is stored). Global
batch k is positions [k*G, (k+1)*G); under packing (`packing.py`) the k-th G packs of rows. Nothing depends on ranks or
workers, so a run resumes exactly at any size from its `Position`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from megatron_vlm.errors import DataError

if TYPE_CHECKING:
    from megatron_vlm.data.row_lengths import RowLengths

LONGEST_BLEND_CYCLE = 65_536
"""Weights are kept exactly if their ratio fits a cycle of this many rows, else rounded to 1/65536."""
FEISTEL_ROUNDS = 6


@dataclass(frozen=True)
class PlannedSource:
    """The facts about one data source that the order depends on."""

    path: str
    num_rows: int
    digest: str
    weight: float = 1.0


class RowReference(NamedTuple):
    """One position of the plan: which source, which pass over it (from 0), which row (from 0)."""

    source: int
    epoch: int
    row: int


Pack = list[RowReference]
"""Rows of the data that make one row of a batch, as its documents; without any it is padding."""


class Position(NamedTuple):
    """How far a run is in its plan.

    Attributes:
        samples: rows of the data before it.
        window: of a packed plan, the window of its next pack.
        pack: how many packs of that window come before it.
    """

    samples: int = 0
    window: int = 0
    pack: int = 0


START = Position()


class BatchPlan(Protocol):
    """What a loader reads: an endless sequence of packs, of which each global batch is the next G.

    Attributes:
        sources: the data sources in the order of the configuration.
    """

    sources: tuple[PlannedSource, ...]

    @property
    def lengths(self) -> Sequence[RowLengths] | None:
        """Of each source, what its rows take; None where the order does not depend on it."""

    @property
    def num_rows(self) -> int:
        """Rows of all sources together."""

    @property
    def samples_per_pack(self) -> float:
        """Rows of the data in a pack, in the mean."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the order depends on; paths do not count, so data may move."""

    def packs(self, position: Position, count: int) -> list[Pack]:
        """Return the next `count` packs from a position."""

    def advance(self, position: Position, count: int) -> Position:
        """Return the position `count` packs later."""

    def count_packs(self, at_most: int) -> int:
        """Return the packs of one pass over the data, of a plan for one pass; counts no further than `at_most`."""

    def costs(self, packs: Sequence[Pack]) -> np.ndarray | None:
        """Return the predicted cost of each pack, int64, in any unit; None where it is not known."""

    def state(self, position: Position) -> dict[str, Any]:
        """Return plain values from which `check_state` recognises the same plan and the position in it."""

    def check_state(self, state: dict[str, Any]) -> Position:
        """Check that `state` belongs to this plan and return the position that it holds.

        Raises:
            DataError: the data, their weights, the seed, the shuffling or the packing changed since it was saved.
            ValueError: the position is damaged.
        """


class SamplePlan:
    """The endless sequence of rows that a run reads; as a `BatchPlan` each row is a pack of its own.

    Args:
        sources: the data sources in the order of the configuration.
        seed: seed of the shuffle.
        shuffle: false reads every source in file order.
        one_pass: leave out rows that come a second time, as evaluation does.
    """

    def __init__(self, sources: Sequence[PlannedSource], seed: int, shuffle: bool, *, one_pass: bool = False) -> None:
        assert sources and all(source.num_rows > 0 for source in sources)
        self.sources = tuple(sources)
        self.seed = seed
        self.shuffle = shuffle
        self.one_pass = one_pass
        shares = blend_shares([source.weight for source in sources])
        self._shares = np.array(shares)
        self._cycle = blend_cycle(shares)
        # How many rows of the same source come before each position of the cycle.
        self._rank_in_cycle = np.empty(len(self._cycle), np.int64)
        for source, share in enumerate(shares):
            self._rank_in_cycle[self._cycle == source] = np.arange(share)

    @property
    def lengths(self) -> Sequence[RowLengths] | None:
        return None

    @property
    def num_rows(self) -> int:
        return sum(source.num_rows for source in self.sources)

    @property
    def samples_per_pack(self) -> float:
        return 1.0

    def packs(self, position: Position, count: int) -> list[Pack]:
        return [[] if self.is_repeated(row) else [row] for row in self.rows(position.samples, count)]

    def is_repeated(self, row: RowReference) -> bool:
        """Whether a row is left out because it came before."""
        return self.one_pass and row.epoch > 0

    def advance(self, position: Position, count: int) -> Position:
        return Position(position.samples + count)

    def count_packs(self, at_most: int) -> int:
        return min(at_most, self.positions_of_one_pass())

    def costs(self, packs: Sequence[Pack]) -> np.ndarray | None:
        return None

    def rows(self, start: int, count: int) -> list[RowReference]:
        """Return the rows at positions [start, start + count)."""
        positions = np.arange(start, start + count)
        cycles, places = np.divmod(positions, len(self._cycle))
        chosen = self._cycle[places]
        draws = cycles * self._shares[chosen] + self._rank_in_cycle[places]
        sizes = np.array([source.num_rows for source in self.sources])[chosen]
        epochs, rows = np.divmod(draws, sizes)
        if self.shuffle:
            for source, epoch in {*zip(chosen.tolist(), epochs.tolist(), strict=True)}:
                mine = (chosen == source) & (epochs == epoch)
                rows[mine] = permute(rows[mine], self.sources[source].num_rows, (self.seed, source, epoch))
        return [RowReference(*item) for item in zip(chosen.tolist(), epochs.tolist(), rows.tolist(), strict=True)]

    def positions_of_one_pass(self) -> int:
        """Return the number of positions after which every row of every source has come at least once."""
        longest = 0
        for source, planned in enumerate(self.sources):
            full_cycles, rest = divmod(planned.num_rows - 1, int(self._shares[source]))
            place = np.flatnonzero(self._cycle == source)[rest]
            longest = max(longest, full_cycles * len(self._cycle) + int(place) + 1)
        return longest

    @property
    def fingerprint(self) -> str:
        facts = [[source.digest, source.num_rows, source.weight] for source in self.sources]
        return hash_of([facts, self.seed if self.shuffle else None, self.shuffle])

    def state(self, position: Position) -> dict[str, Any]:
        return {
            "consumed_samples": position.samples,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "sources": [vars(source) for source in self.sources],
        }

    def check_state(self, state: dict[str, Any]) -> Position:
        if "packing" in state:
            raise changed_order(["data.packing was true, now false"])
        if state["fingerprint"] != self.fingerprint:
            raise changed_order(self.changes(state))
        return Position(saved_number(state, "consumed_samples"))

    def changes(self, state: dict[str, Any]) -> list[str]:
        """Return what differs from the plan that `state` was saved from, in words."""
        changes = [
            f"{key} was {state[name]}, now {getattr(self, name)}"
            for name, key in (("seed", "train.seed"), ("shuffle", "data.shuffle"))
            if state[name] != getattr(self, name)
        ]
        old_sources = [PlannedSource(**source) for source in state["sources"]]
        if len(old_sources) != len(self.sources):
            before, now = ([source.path for source in group] for group in (old_sources, self.sources))
            return [*changes, f"the sources were {before}, now {now}"]
        for old, new in zip(old_sources, self.sources, strict=True):
            if old.weight != new.weight:
                changes.append(f"the weight of {new.path} was {old.weight}, now {new.weight}")
            if old.num_rows != new.num_rows:
                changes.append(f"{new.path} had {old.num_rows} rows, now {new.num_rows}")
            elif old.digest != new.digest:
                changes.append(f"the content of {new.path} changed")
        return changes


def changed_order(changes: Sequence[str]) -> DataError:
    """Return the refusal to go on with another order of data, which names what changed."""
    return DataError(
        f"the data order is not the one this run was trained with: {'; '.join(changes)}",
        fix="restore it, or start a new run_dir with checkpoint.load",
    )


def saved_number(state: dict[str, Any], name: str) -> int:
    """Return a number of a plan's state.

    Raises:
        ValueError: it is damaged.
    """
    number = state[name]
    if type(number) is not int or not 0 <= number < 2**62:
        raise ValueError(f"{name} is {number!r}")
    return number


def hash_of(facts: Any) -> str:
    """Return a hash of plain values."""
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def blend_shares(weights: Sequence[float]) -> list[int]:
    """Return the rows of each source in one cycle of the blend, in the ratio of the weights and at least one each."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    shares = [int(weight * scale) for weight in exact]
    divisor = gcd(*shares)
    shares = [share // divisor for share in shares]
    if sum(shares) > LONGEST_BLEND_CYCLE:
        total = sum(exact)
        shares = [max(1, round(weight / total * LONGEST_BLEND_CYCLE)) for weight in exact]
    return shares


def blend_cycle(shares: Sequence[int]) -> np.ndarray:
    """Order the sources by largest deficit over one cycle, after which every deficit is zero again.

    Args:
        shares: rows of each source in one cycle.

    Returns:
        [sum(shares)] int64, the source at each position of the cycle.
    """
    length = sum(shares)
    if len(shares) == 1:
        return np.zeros(length, np.int64)
    cycle = np.empty(length, np.int64)
    wanted = np.array(shares, np.int64)
    # Deficit of each source in units of 1/length rows: due so far minus given so far. Ties go to the earlier source.
    deficit = np.zeros(len(shares), np.int64)
    for place in range(length):
        deficit += wanted
        source = int(deficit.argmax())
        deficit[source] -= length
        cycle[place] = source
    return cycle


def permute(values: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Map `values` by a pseudo-random permutation of range(size), without storing it.

    A balanced Feistel network permutes the next power of four; values that land outside are sent through again.

    Args:
        values: int64 array of integers in [0, size).
        size: length of the range.
        key: integers that select the permutation.
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8 * FEISTEL_ROUNDS).digest()
    round_keys = np.frombuffer(digest, np.uint64)
    result = _feistel(values.astype(np.uint64), half_bits, round_keys)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], half_bits, round_keys)
    return result.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: int, round_keys: np.ndarray) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = values >> shift, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """Mix 64 bits: every output bit depends on every input bit. Source: splitmix64 (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
