"""The log that every rank keeps in the run folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_vlm.training.rank_files import RankLog


def test_everything_printed_is_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also what came before the folder was known, and the error that ended it; the console has the same text."""
    with pytest.raises(ValueError, match="oops"), RankLog(3) as log:
        print("early")
        log.open(tmp_path)
        print("late", file=sys.stderr)
        raise ValueError("oops")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("early\n", "late\n")
    (path,) = (tmp_path / "logs").iterdir()
    lines = path.read_text().splitlines()
    assert path.name.startswith("rank_00003_") and " rank 3 on " in lines[0]
    assert lines[1:3] == ["early", "late"] and lines[-2] == "ValueError: oops" and lines[-1].endswith(" ended")
    with RankLog(3) as log:
        log.open(tmp_path)
    assert path.read_text().startswith("\n".join(lines)) and len(path.read_text().splitlines()) == len(lines) + 2


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").write_text("in the way")
    with RankLog(0) as log:
        log.open(tmp_path)
        print("goes on")
    assert capsys.readouterr().out == "goes on\n"
