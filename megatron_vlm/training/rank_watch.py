"""Ranks watch each other, because a rank that hangs (stopped, swapped out, its node gone) leaves all others waiting.

A thread of each rank posts a counter and the step to torch.distributed's store and reads those of the next rank only.
The first to find a rank silent for the time-out names it in one line; every rank that sees that prints its stacks and
leaves the process, because a collective cannot be left in another way. Collectives time out `GRACE_SECONDS` later:
their exceptions are about whoever was waited for, which is rarely the rank that hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

import psutil
import torch.distributed

from megatron_vlm.errors import UserError

GRACE_SECONDS = 10.0
POST_SECONDS = 5.0
FIRST_RANK_SECONDS = 2.0  # in which it has the error that all ranks have
_HUNG, _ERROR = "rank_watch/hung", "rank_watch/error"


class RankWatch:
    """Context in which the ranks of torch.distributed watch each other; it does nothing for a single rank.

    Args:
        timeout_seconds: a rank silent for so long hangs.
        post_seconds: time between two signs of life.
    """

    def __init__(self, timeout_seconds: float, post_seconds: float = POST_SECONDS) -> None:
        self.timeout_seconds, self.post_seconds = timeout_seconds, post_seconds
        self.progress: Callable[[], int] = lambda: 0
        """Gives the step that this rank is at, for the report."""
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._store: torch.distributed.Store | None = None
        self._ended = threading.Event()
        self._showing = threading.Lock()
        self._error: Exception | None = None

    def __enter__(self) -> RankWatch:
        if self.world_size > 1:
            faulthandler.enable()  # for the stacks when NCCL's own watchdog aborts the process
            self._store = _default_store()
            self._store.set(_identity_key(self.rank), f"{os.getpid()} {socket.gethostname()}")
            self._thread = threading.Thread(
                target=self._watch, args=(_default_store(),), name="rank watch", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store is None:
            return
        try:
            if isinstance(error, UserError):
                error.is_reported_here = self._is_first_with(self._store, str(error))
            elif isinstance(error, Exception):
                self._explain(self._store, error)
        except RuntimeError:
            pass  # without the store every rank reports what it has
        self._ended.set()
        self._thread.join(self.post_seconds)

    def _is_first_with(self, store: torch.distributed.Store, text: str) -> bool:
        """Whether no other rank failed with the same text before; the first rank is waited for."""
        end = time.monotonic() + FIRST_RANK_SECONDS
        while self.rank and time.monotonic() < end and not store.check([_ERROR]):
            time.sleep(0.05)
        first = _text(store.compare_set(_ERROR, "", f"{self.rank} {text}"))
        return first == f"{self.rank} {text}" or first.partition(" ")[2] != text

    def _explain(self, store: torch.distributed.Store, error: Exception) -> None:
        """End the process where `error` only says that other ranks did not answer; the caller raises any other."""
        if not _is_about_other_ranks(error):
            store.compare_set(_ERROR, "", f"{self.rank} {type(error).__name__}")
            return
        self._error = error
        if "timed out" in str(error).lower() or "timeout" in str(error).lower():
            silent = self._silent_ranks(store)
            if silent:
                self._report_silence(store, silent[0])
            else:
                self._declare(store, lambda: self._mismatch(store))
        if store.check([_HUNG]):
            self._show_and_leave()
        if store.check([_ERROR]):
            _leave()  # the rank that failed first reports why

    def _mismatch(self, store: torch.distributed.Store) -> str:
        steps = ", ".join(f"rank {rank} at step {self._step_of(store, rank)}" for rank in range(self.world_size))
        return (
            f"a collective did not end within {self.timeout_seconds / 60:g} minutes although every rank gives signs of "
            f"life ({steps}) -- the stacks show what each waits for; parallel.distributed_timeout_minutes allows more"
        )

    def _silent_ranks(self, store: torch.distributed.Store) -> list[int]:
        """Return the ranks that post nothing while this waits; asked when a collective timed out, of all ranks."""
        before = [self._post_of(store, rank) for rank in range(self.world_size)]
        time.sleep(2 * self.post_seconds)
        return [rank for rank, post in enumerate(before) if self._post_of(store, rank) == post]

    def _watch(self, store: torch.distributed.Store) -> None:
        """Post and watch until the context ends or the store does (with torchrun, which then ends the run)."""
        try:
            self._post_and_read(store)
        except RuntimeError as error:
            if not self._ended.is_set() and "timeout" in str(error):
                print(
                    f"rank {self.rank} can no longer reach the job's store and does not watch other ranks any more",
                    file=sys.stderr,
                    flush=True,
                )

    def _post_and_read(self, store: torch.distributed.Store) -> None:
        store.set_timeout(timedelta(seconds=self.timeout_seconds))
        watched = (self.rank + 1) % self.world_size
        count, last, changed = 0, "", time.monotonic()
        while not self._ended.wait(self.post_seconds):
            count += 1
            store.set(_post_key(self.rank), f"{count} {self.progress()}")
            if store.check([_HUNG]):
                self._show_and_leave()
            post = self._post_of(store, watched)
            now = time.monotonic()
            if post != last:
                last, changed = post, now
            elif now - changed > self.timeout_seconds:
                self._report_silence(store, watched)
                self._show_and_leave()

    def _report_silence(self, store: torch.distributed.Store, silent: int) -> None:
        pid, _, host = _text(store.get(_identity_key(silent))).partition(" ")
        self._declare(
            store,
            lambda: (
                f"rank {silent} on {host} (process {pid}) hangs at step {self._step_of(store, silent)}: it gives no "
                f"sign of life, and the time-out of {self.timeout_seconds / 60:g} minutes is over -- see whether its "
                "machine is up, out of memory, or the process stopped; starting again resumes from the last checkpoint"
            ),
        )
        if host == socket.gethostname():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(int(pid))
                if process.ppid() == os.getppid():  # surely a rank of this job
                    # torchrun would wait half a minute for a process that no signal but this one reaches.
                    process.kill()

    def _declare(self, store: torch.distributed.Store, line: Callable[[], str]) -> None:
        """Let all ranks leave; the first rank that asks for it prints the line."""
        if _text(store.compare_set(_HUNG, "", str(self.rank))) == str(self.rank):
            print(line(), file=sys.stderr, flush=True)

    def _show_and_leave(self) -> None:
        """Show where this rank is, or the exception that took it away from there, and end the process."""
        with self._showing:  # never released: the process ends
            print(f"rank {self.rank} at step {self.progress()}:", file=sys.stderr, flush=True)
            if self._error is None:
                faulthandler.dump_traceback(all_threads=True)
            else:
                traceback.print_exception(self._error)
            _leave()

    def _step_of(self, store: torch.distributed.Store, rank: int) -> str:
        return self._post_of(store, rank).partition(" ")[2]

    def _post_of(self, store: torch.distributed.Store, rank: int) -> str:
        """Return what a rank posted last, without waiting for its first."""
        key = _post_key(rank)
        return _text(store.get(key)) if store.check([key]) else "0 0"


def collective_timeout(minutes: int) -> timedelta:
    """Return the time-out of collectives: a little more than that of silent ranks, which are reported by name."""
    return timedelta(minutes=minutes, seconds=GRACE_SECONDS)


def _default_store() -> torch.distributed.Store:
    """Return a connection of its own to the job's store: one that waits would hold up every other thread."""
    return torch.distributed.distributed_c10d._get_default_store().clone()


def _is_about_other_ranks(error: Exception) -> bool:
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def _leave() -> None:
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(1)


def _post_key(rank: int) -> str:
    return f"rank_watch/post/{rank}"


def _identity_key(rank: int) -> str:
    return f"rank_watch/identity/{rank}"


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
