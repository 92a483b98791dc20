"""Console output of the demo: numbered sections with their duration, progress, and a plain table."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Phases:
    """Prints a heading per phase and remembers how long each one took.

    Args:
        total: Number of phases, shown in the headings.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.seconds: dict[str, float] = {}

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Times what runs inside; a phase that fails is not counted."""
        print(f"\n[{len(self.seconds) + 1}/{self.total}] {name}", flush=True)
        start_seconds = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start_seconds
        print(f"      done in {self.seconds[name]:.1f} s", flush=True)

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def show_progress(done: int, total: int) -> None:
    """Rewrites one line on a terminal; elsewhere prints every quarter, so that logs stay short."""
    if sys.stdout.isatty():
        end = "\n" if done >= total else ""
        print(f"\r      {done:,} of {total:,}", end=end, flush=True)
    elif done >= total or done * 4 // total != (done - 1) * 4 // total:
        print(f"      {done:,} of {total:,}", flush=True)


def print_table(rows: Sequence[tuple[str, str]]) -> None:
    """Prints names to the left and values to the right; an empty name draws a rule."""
    left = max(len(name) for name, _ in rows)
    right = max(len(value) for _, value in rows)
    for name, value in rows:
        print(f"  {name:<{left}}  {value:>{right}}" if name else "  " + "─" * (left + right + 2))
