"""Limits that end a run whose data give it too little to train on.

A row here is a sample of the data, not a row of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_vlm.config import DataSettings
from megatron_vlm.data.packing import WINDOW_ROWS
from megatron_vlm.data.plan import PlannedSource
from megatron_vlm.errors import DataError

FEWEST_ROWS_FOR_FRACTION = 100
MOST_STEPS_WITHOUT_LABELS = 10


class RowLimits:
    """Counts what the steps of a run could use; every rank passes the same counts, so that all end together.

    A fraction is of the rows seen so far, but of no fewer than 100 (or all rows of smaller data sets), so that one bad
    row at the start does not end a run that is fine.

    Args:
        settings: the configuration's `data` section.
        sources: the training sources.
        names: their names.
    """

    def __init__(self, settings: DataSettings, sources: Sequence[PlannedSource], names: Sequence[str]) -> None:
        self.settings, self.sources, self.names = settings, sources, names
        self.rows_seen = self.bad_rows = self.too_long_rows = self.steps_without_labels = 0
        self.source_labels = [0] * len(sources)
        self.last_problem = ""
        self._rows_together = min(WINDOW_ROWS, self._num_rows) if settings.packing else 0
        """Rows that are packed together come in another order than theirs: bad ones, of one token each, where they fit
        best, which may be all of a window's in the first packs."""

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, for a checkpoint."""
        names = "rows_seen", "bad_rows", "too_long_rows", "steps_without_labels", "source_labels"
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[int]) -> None:
        """Continue with the counts of a checkpoint.

        Former ones have (bad rows, rows seen) and not the labels, of which the run is taken to have had some.
        """
        if isinstance(state, Sequence):
            bad_rows, rows_seen = state
            state = {"bad_rows": bad_rows, "rows_seen": rows_seen, "source_labels": [1] * len(self.sources)}
        for name, value in state.items():
            setattr(self, name, value)

    def update(self, counters: Mapping[str, int], source_labels: Sequence[float], problems: Sequence[str] = ()) -> None:
        """Count one step.

        Args:
            counters: `MicroBatch.counters` of the global batch.
            source_labels: label tokens of each source in the global batch.
            problems: descriptions of the bad and too long rows that this rank read.

        Raises:
            DataError: a limit is passed.
        """
        self.rows_seen += counters["samples"]
        self.bad_rows += counters["bad_rows"]
        self.too_long_rows += counters["too_long_rows"]
        self.steps_without_labels = 0 if counters["label_tokens"] else self.steps_without_labels + 1
        self.source_labels = [int(sum(pair)) for pair in zip(self.source_labels, source_labels, strict=True)]
        self.last_problem = problems[-1] if problems else self.last_problem
        self._check_fraction("bad", self.bad_rows, "max_bad_fraction", "repair the rows")
        self._check_fraction(
            f"longer than data.seq_length {self.settings.seq_length}",
            self.too_long_rows,
            "max_too_long_fraction",
            "raise data.seq_length, set data.too_long to truncate",
        )
        if self.steps_without_labels >= MOST_STEPS_WITHOUT_LABELS:
            raise self._error(f"the last {self.steps_without_labels} steps had no token to train")
        self._check_sources()

    def check_end(self) -> None:
        """Refuse a run that ends without having trained a token, however short it was."""
        if not any(self.source_labels):
            raise self._error(f"none of the {self.rows_seen} rows of this run had a token to train")

    @property
    def _num_rows(self) -> int:
        return sum(source.num_rows for source in self.sources)

    def _check_fraction(self, what: str, count: int, key: str, remedy: str) -> None:
        limit = getattr(self.settings, key)
        fewest = min(FEWEST_ROWS_FOR_FRACTION, self._num_rows)
        if count > limit * max(self.rows_seen + self._rows_together, fewest):
            raise self._error(
                f"{count} of {self.rows_seen} rows are {what}, more than data.{key} {limit}",
                f"{remedy}, or raise data.{key}",
            )

    def _check_sources(self) -> None:
        """Refuse a source all of whose rows came, in its weight's part of the rows seen, without a token to train."""
        total = sum(source.weight for source in self.sources)
        seen = self.rows_seen - self._rows_together
        for source, name, labels in zip(self.sources, self.names, self.source_labels, strict=True):
            if not labels and seen * source.weight / total >= source.num_rows + FEWEST_ROWS_FOR_FRACTION:
                raise self._error(f"no row of the source {name} ({source.path}) has a token to train")

    def _error(self, what: str, fix: str = "look at the rows with --dry_run or tools/inspect_data.py") -> DataError:
        last = f"; the last row left out that was seen here: {self.last_problem}" if self.last_problem else ""
        return DataError(f"{what}{last}", fix=fix)
