"""Progress of work that goes through many bytes: a bar on a terminal, elsewhere a plain line now and then.

Both go to standard error, and only the first rank of a job shows them. Work that ends soon shows nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from megatron_vlm.output import EnduringStream

BAR_AFTER_SECONDS, BAR_EVERY_SECONDS = 0.5, 0.1
LINE_AFTER_SECONDS, LINE_EVERY_SECONDS = 5.0, 10.0
RATE_SECONDS = 30.0  # over which the rate is taken: files that are in memory come first and fast
LABEL_COLUMNS = 45  # the figures take 54 of a line's 100


class Progress:
    """Context of the work; tell it how far the work has come.

    Nothing it does can end the work. It runs no thread, so that processes may be forked meanwhile.

    Args:
        label: what is being done, such as "loading weights"; shortened where it is long.
        total_bytes: bytes in all.
        done_bytes: bytes done before.
        stream: where it shows; standard error when None.
        clock: gives seconds.
    """

    def __init__(
        self,
        label: str,
        total_bytes: int,
        done_bytes: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label = _shortened(label)
        self.total_bytes, self.done_bytes = total_bytes, done_bytes
        self._stream, self._clock = EnduringStream(stream or sys.stderr), clock
        self._console = _terminal(self._stream)
        self._bar: RichProgress | None = None
        self.is_shown = os.environ.get("RANK", "0") == "0" and total_bytes > 0
        self._began = (clock(), done_bytes)
        self._marks = deque([self._began])
        """Times and bytes of what was shown in the last `RATE_SECONDS`."""
        self._due = self._began[0] + (LINE_AFTER_SECONDS if self._console is None else BAR_AFTER_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is None:
            return
        if error is None:
            self.done_bytes = self.total_bytes
            self._draw(self._final_figures(self._clock()))
        self._bar.stop()

    def advance(self, num_bytes: int) -> None:
        """So many more bytes are done."""
        self.update(self.done_bytes + num_bytes)

    def update(self, done_bytes: int) -> None:
        """So many bytes are done in all."""
        self.done_bytes = done_bytes
        if self.is_due:
            self._show(self._clock())

    @property
    def is_due(self) -> bool:
        """Whether the next update shows; for those to whom it costs something to know how far the work is."""
        return self.is_shown and self._clock() >= self._due

    def _show(self, now: float) -> None:
        self._marks.append((now, self.done_bytes))
        while now - self._marks[1][0] >= RATE_SECONDS:
            self._marks.popleft()
        if self._console is None:
            self._due = now + LINE_EVERY_SECONDS
            print(f"{self._encodable(self.label)}: {self._figures(now)}", file=self._stream, flush=True)
            return
        self._due = now + BAR_EVERY_SECONDS
        if self._bar is None:
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[figures]}", markup=False, table_column=Column(no_wrap=True, min_width=44)),
                console=self._console,
                auto_refresh=False,
                redirect_stdout=sys.stdout.isatty(),  # what is printed to a file stays there
            )
            self._bar.add_task(self._encodable(self.label), total=self.total_bytes, figures="")
            self._draw(self._figures(now))
            self._bar.start()
        self._draw(self._figures(now))

    def _draw(self, figures: str) -> None:
        assert self._bar is not None
        self._bar.update(self._bar.task_ids[0], completed=self.done_bytes, figures=figures, refresh=True)

    def _figures(self, now: float) -> str:
        """Amount, rate and time left."""
        left_bytes = max(0, self.total_bytes - self.done_bytes)
        part = f"{_amount(self.done_bytes)} of {_amount(self.total_bytes)}"
        rate = _rate(self._marks[0], (now, self.done_bytes))
        share = min(100, 100 * self.done_bytes // self.total_bytes)
        left = f", {_duration(left_bytes / rate)} left" if rate else ""
        return f"{part} ({share}%), {_amount(rate)}/s{left}"

    def _final_figures(self, now: float) -> str:
        """Amount, time and rate of all of it."""
        seconds, rate = now - self._began[0], _rate(self._began, (now, self.done_bytes))
        return f"{_amount(self.total_bytes)} in {_duration(seconds)}, {_amount(rate)}/s"

    def _encodable(self, text: str) -> str:
        """Names of files may have characters that the stream refuses."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)


class _Console(Console):
    def show_cursor(self, show: bool = True) -> bool:
        """Leave the cursor alone: a run that is killed would leave it hidden."""
        return False


def _terminal(stream: EnduringStream) -> Console | None:
    """Return a console where the stream is a terminal on which lines can be drawn again."""
    if not stream.isatty():  # rich takes anything for one where FORCE_COLOR is set
        return None
    console = _Console(file=stream)  # type: ignore[arg-type]
    return console if console.is_terminal and not console.is_dumb_terminal else None


def _shortened(label: str) -> str:
    """Take out the middle of a long label, which is that of a path."""
    if len(label) <= LABEL_COLUMNS:
        return label
    start = LABEL_COLUMNS // 3
    return f"{label[:start]}...{label[len(label) - LABEL_COLUMNS + start + 3 :]}"


def _rate(first: tuple[float, int], last: tuple[float, int]) -> float:
    """Return the bytes per second between two marks."""
    return (last[1] - first[1]) / max(last[0] - first[0], 1e-6)


def _amount(num_bytes: float) -> str:
    """Format bytes with three digits: 512 MB, 1.02 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.{_decimals(num_bytes)}f} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1000
    return f"{num_bytes:.{_decimals(num_bytes)}f} TB"


def _decimals(number: float) -> int:
    """Return the digits behind the point of three."""
    return 2 if number < 9.995 else 1 if number < 99.95 else 0


def _duration(seconds: float) -> str:
    """Format a time as 2:34 or 1:02:34."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
