"""Progress: bars on a real pseudo-terminal, plain lines elsewhere, and nothing that could end the work."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_vlm.progress import LINE_AFTER_SECONDS, LINE_EVERY_SECONDS, Progress

GB = 10**9
CONTROL_SEQUENCE = re.compile(r"\x1b\[[?\d;]*[A-Za-z]")


class Clock:
    """Seconds that pass when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


def lines_of(total_seconds: int, total_bytes: int, label: str = "loading weights") -> list[tuple[float, str]]:
    """When which line is printed by work at an even pace that reports every half second."""
    stream, clock, times, end = io.StringIO(), Clock(), list[float](), 0
    with Progress(label, total_bytes, stream=stream, clock=clock) as progress:
        for half in range(1, 2 * total_seconds + 1):
            clock.now += 0.5
            progress.update(total_bytes * half // (2 * total_seconds))
            if stream.tell() > end:
                times.append(half / 2)
                end = stream.tell()
    assert stream.tell() == end, "something was printed at the end"
    return list(zip(times, stream.getvalue().splitlines(), strict=True))


def test_plain_lines_are_few_and_have_rate_and_time_left() -> None:
    found = lines_of(60, 60 * GB)
    assert [line for _, line in found[:2]] == [
        "loading weights: 5.00 GB of 60.0 GB (8%), 1.00 GB/s, 0:55 left",
        "loading weights: 15.0 GB of 60.0 GB (25%), 1.00 GB/s, 0:45 left",
    ]
    times = [seconds for seconds, _ in found]
    assert times[0] >= LINE_AFTER_SECONDS
    assert all(later - earlier >= LINE_EVERY_SECONDS for earlier, later in pairwise(times))


def test_short_work_prints_nothing() -> None:
    assert lines_of(int(LINE_AFTER_SECONDS) - 1, 60 * GB) == []


@pytest.mark.parametrize("total_bytes", [1, 999, 10**5, 999_999_999, 3 * 10**12, 10**16])
def test_lines_fit_into_a_hundred_columns(total_bytes: int) -> None:
    label = "indexing /a/folder/of/folders/with/a/long/name/and/more/train-00001-of-00999.jsonl"
    found = lines_of(20_000 if total_bytes > 10**12 else 100, total_bytes, label)
    assert found and all(len(line) <= 100 for _, line in found)
    assert all(line.startswith("indexing /a/fol...") and "-00999.jsonl: " in line for _, line in found)


def test_the_rate_is_that_of_the_last_half_minute() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress("loading weights", 100 * GB, stream=stream, clock=clock) as progress:
        for second in range(1, 91):
            clock.now += 1
            progress.advance(GB if second <= 30 else GB // 10)  # memory, then the disk
    assert stream.getvalue().splitlines()[-1].endswith("100 MB/s, 10:45 left")


def test_what_was_done_before_counts_for_no_rate() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress("saving", 10 * GB, 4 * GB, stream=stream, clock=clock) as progress:
        clock.now += 6
        progress.advance(3 * GB)
    assert stream.getvalue() == "saving: 7.00 GB of 10.0 GB (70%), 500 MB/s, 0:06 left\n"


def test_work_that_stands_still_has_no_time_left() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress("saving", 10 * GB, stream=stream, clock=clock) as progress:
        clock.now += 6
        progress.advance(0)
    assert stream.getvalue() == "saving: 0 B of 10.0 GB (0%), 0 B/s\n"


def test_other_ranks_and_empty_work_print_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of(60, 0) == []
    monkeypatch.setenv("RANK", "1")
    assert lines_of(60, GB) == []


def test_an_error_passes_through() -> None:
    with pytest.raises(KeyError), Progress("loading", GB, stream=io.StringIO()):
        raise KeyError


WORK = """
import sys, time
from megatron_vlm import output, progress
if sys.argv[1] == "endures":
    output.endure()
progress.LINE_AFTER_SECONDS = progress.LINE_EVERY_SECONDS = progress.BAR_AFTER_SECONDS = 0.0
sys.stdin.readline()  # until the reader has gone
with progress.Progress("indexing \\u00e9\\udce9.jsonl", 1000) as shown:
    for step in range(4):
        shown.advance(250)
        print("step", step, flush=True)
        time.sleep(0.15)
print("done")
"""


def work(*arguments: str) -> list[str]:
    return [sys.executable, "-c", WORK, *arguments]


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1", "TERM": "xterm"}], ids=["", "FORCE_COLOR"])
def test_without_a_terminal_lines_are_plain(environment: dict[str, str]) -> None:
    done = subprocess.run(work(""), input="\n", capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["step 0", "step 1", "step 2", "step 3", "done"]
    lines = done.stderr.splitlines()
    assert len(lines) == 4 and "\x1b" not in done.stderr
    assert lines[0].startswith("indexing \u00e9\\udce9.jsonl: 250 B of 1.00 kB (25%), ")


@pytest.mark.parametrize("how", ["", "endures"])
def test_output_that_is_gone_ends_nothing(how: str, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(work(how), input="\n", stdout=subprocess.PIPE, stderr=full, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "done")
    process = subprocess.Popen(
        work(how), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    process.stderr.close()
    process.stderr = None
    printed, _ = process.communicate("\n", timeout=60)
    assert (process.returncode, printed.splitlines()[-1]) == (0, "done")


def on_terminal(stdout: int | None = None, **environment: str) -> str:
    """What the work writes to a pseudo-terminal of 80 columns; its standard output too unless it goes elsewhere."""
    controller, terminal = pty.openpty()
    with subprocess.Popen(
        work("endures"),
        stdin=subprocess.PIPE,
        stdout=terminal if stdout is None else stdout,
        stderr=terminal,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "80", **environment},
    ) as process:
        os.close(terminal)
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        text = b"".join(_read(controller)).decode()
    os.close(controller)
    assert process.returncode == 0, text
    return text


def _read(descriptor: int) -> Iterator[bytes]:
    try:
        while block := os.read(descriptor, 65536):
            yield block
    except OSError:  # how Linux says that a terminal has no more writers
        return


def lines_left(text: str) -> list[str]:
    """The lines that are left on a terminal after everything was drawn."""
    drawn = CONTROL_SEQUENCE.sub("", text.replace("\x1b[2K", "")).replace("\r\n", "\n")
    return [line.rsplit("\r", 1)[-1].rstrip() for line in drawn.removesuffix("\n").split("\n")]


def test_on_a_terminal_there_is_a_bar_below_what_is_printed() -> None:
    text = on_terminal(PYTHONUTF8="1")
    *before, bar, last = lines_left(text)
    assert before == ["step 0", "step 1", "step 2", "step 3"] and last == "done"
    assert re.fullmatch(r"indexing é\\udce9\.jsonl ━+ 1\.00 kB in 0:01, \d\.\d\d kB/s", bar), bar
    assert "\x1b[?25l" not in text, "the cursor is hidden, and a kill would leave it so"
    assert re.search(r"500 B of 1\.00 kB \(50%\), \d\.\d\d kB/s, 0:0\d left", text)


def test_what_is_printed_to_a_file_stays_there(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        left = lines_left(on_terminal(log.fileno()))
    assert (tmp_path / "log").read_text().splitlines() == ["step 0", "step 1", "step 2", "step 3", "done"]
    assert len(left) == 1 and "1.00 kB in" in left[0]


def test_a_terminal_that_cannot_draw_gets_plain_lines() -> None:
    text = on_terminal(TERM="dumb")
    assert "\x1b" not in text and "(25%)" in text


def test_a_terminal_without_unicode_gets_ascii() -> None:
    text = on_terminal(PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert text.isascii() and "indexing \\xe9" in text
