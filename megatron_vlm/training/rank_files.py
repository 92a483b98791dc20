"""What a rank leaves in the run folder for those who watch a run: its log, signs of life, and stacks on request.

logs/rank_00012_HOST.log      everything that the rank printed, and lines of its own about when and where it ran
heartbeats/HOST.json          of each node, every half minute: the time, its ranks, and what the first of them does
stacks/TIME/rank_00012_HOST.txt   after a file `dump_stacks` was put into the run folder, which is removed again
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

LOGS_NAME, HEARTBEATS_NAME, STACKS_NAME, REQUEST_NAME = "logs", "heartbeats", "stacks", "dump_stacks"
HEARTBEAT_SECONDS = 30.0


class RankLog:
    """Context that copies what this process prints from Python into a file, once that is known.

    Nothing it does can end the run: without the file, output is where it was.

    Args:
        rank: this rank.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._file: TextIO | None = None
        self._before = f"{_now()} rank {rank} on {socket.gethostname()}, process {os.getpid()}\n"
        self._streams: tuple[TextIO, TextIO] | None = None

    def __enter__(self) -> RankLog:
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (_Copied(stream, self) for stream in self._streams)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.write("".join(traceback.format_exception(error)))
        self.write(f"{_now()} ended\n")
        if self._streams is not None:
            sys.stdout, sys.stderr = self._streams
        if self._file is not None:
            self._file.close()

    def open(self, run_dir: Path) -> None:
        """Append what was printed so far, and from now on, to the rank's file in the run folder."""
        path = run_dir / LOGS_NAME / f"{_rank_name(self.rank)}.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        except OSError as error:
            print(f"warning: rank {self.rank} keeps no log: {error}", file=sys.stderr, flush=True)
        before, self._before = self._before, ""
        self.write(before)

    def write(self, text: str) -> None:
        """Add text to the file, or keep it for the file."""
        if self._file is None:
            self._before += text
            return
        try:
            self._file.write(text)
        except (OSError, ValueError):
            return  # a full disk: the console has the text


class _Copied:
    """A stream whose text a log gets too; everything else is that stream's."""

    def __init__(self, stream: TextIO, log: RankLog) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        self._log.write(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def write_heartbeat(run_dir: Path, ranks: range, activity: str) -> None:
    """Say that this node lives and what it does; a folder that cannot be written is left as it is.

    Args:
        run_dir: the run's folder.
        ranks: the node's ranks.
        activity: what the first of them does.
    """
    host = socket.gethostname()
    path = run_dir / HEARTBEATS_NAME / f"{host}.json"
    content = {"host": host, "ranks": [ranks[0], ranks[-1]], "time": time.time(), "activity": activity}
    try:
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".partial")
        temporary.write_text(json.dumps(content) + "\n")
        temporary.replace(path)
    except OSError:
        return


def take_request(run_dir: Path) -> bool:
    """Return whether stacks were asked for, and remove the request."""
    try:
        (run_dir / REQUEST_NAME).unlink()
    except OSError:
        return False
    return True


def dump_stacks(run_dir: Path, name: str, rank: int, activity: str) -> None:
    """Write the stacks of all threads of this rank.

    Args:
        run_dir: the run's folder.
        name: of the folder for the stacks of all ranks.
        rank: this rank.
        activity: what it does.
    """
    folder = run_dir / STACKS_NAME / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{_rank_name(rank)}.txt").open("w") as file:
            file.write(f"rank {rank} on {socket.gethostname()}, process {os.getpid()}, at {activity}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
    except OSError as error:
        print(f"warning: rank {rank} cannot write its stacks: {error}", file=sys.stderr, flush=True)


def _rank_name(rank: int) -> str:
    return f"rank_{rank:05d}_{socket.gethostname()}"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
