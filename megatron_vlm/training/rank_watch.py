"""Ranks watch each other, because one that hangs or is killed leaves all others waiting.

A thread of each rank posts a counter and what the rank does to torch.distributed's store, and reads what the next rank
posts. The first to find a rank silent for the time-out, or the process of one on its own machine gone, names it in one
line; every rank that sees that leaves the process, because a collective cannot be left in another way. Collectives
time out `GRACE_SECONDS` later: their exceptions are about whoever was waited for, which is rarely the rank that hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType

import psutil
import torch.distributed

from megatron_vlm.errors import UserError
from megatron_vlm.training.rank_files import HEARTBEAT_SECONDS, dump_stacks, take_request, write_heartbeat

GRACE_SECONDS = 10.0
POST_SECONDS = 5.0
FIRST_RANK_SECONDS = 2.0  # in which it has the error that all ranks have
CLOCK_SECONDS = 60.0  # by which a machine's clock may be set while the job runs
FAILED_SECONDS = 30.0  # in which ranks end by themselves once another one has failed
RANKS_PER_POST_SECOND = 1000  # so that the store of a job of any size has little to do
_ALARM, _ENDED, _ERROR, _CULPRIT_ENDS, _DUMPS = (
    f"rank_watch/{name}" for name in ("alarm", "ended", "error", "culprit ends", "dumps")
)
_AGAIN = "starting again resumes from the last checkpoint"


@dataclass(frozen=True)
class _Process:
    """The process of a rank; `started` is in seconds since 1970, and tells it from a later process of its number."""

    pid: int
    started: int
    pid_namespace: str
    host: str

    @classmethod
    def current(cls) -> _Process:
        return cls(os.getpid(), int(psutil.Process().create_time()), _pid_namespace(), socket.gethostname())

    @classmethod
    def parse(cls, text: str) -> _Process:
        pid, started, namespace, host = text.split(" ", 3)
        return cls(int(pid), int(started), namespace, host)

    def __str__(self) -> str:
        return f"{self.pid} {self.started} {self.pid_namespace} {self.host}"

    @cached_property
    def is_here(self) -> bool:
        """Whether it is among the processes that this one can see."""
        return (self.pid_namespace, self.host) == (_pid_namespace(), socket.gethostname())

    def has_ended(self) -> bool:
        """Whether it is known to have ended."""
        if not self.is_here:
            return False
        try:
            process = psutil.Process(self.pid)
            is_another = abs(process.create_time() - self.started) > CLOCK_SECONDS
            return is_another or process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except psutil.NoSuchProcess:
            return True

    def end_after(self, seconds: float) -> None:
        """Let it show its stacks after this time, and end: torchrun waits long for a process that was stopped."""
        # Stopped, it gets the first signal when it is continued.
        signals = f"kill -QUIT {self.pid}; kill -CONT {self.pid}; sleep 1; kill -KILL {self.pid}"
        subprocess.Popen(["sh", "-c", f"sleep {seconds}; {signals}"], start_new_session=True, stderr=subprocess.DEVNULL)


class RankWatch:
    """Context in which the ranks of torch.distributed watch each other.

    Its thread also leaves signs of life in the run folder, and stacks that are asked for there. On SIGQUIT a rank shows
    its stacks and goes on. A rank whose threads cannot run shows its stacks and ends by itself, because on its machine
    there may be no other rank to end it.

    Args:
        timeout_seconds: a rank silent for so long hangs.
        post_seconds: time between two signs of life; None lets it grow with the number of ranks.
    """

    def __init__(self, timeout_seconds: float, post_seconds: float | None = None) -> None:
        self.timeout_seconds = timeout_seconds
        self.post_seconds = post_seconds or max(
            POST_SECONDS, torch.distributed.get_world_size() / RANKS_PER_POST_SECOND
        )
        self.activity: Callable[[], str] = lambda: "the start"
        """Says what this rank does, for the report."""
        self.run_dir: Path | None = None
        """The run's folder, once it belongs to the run."""
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        first = self.rank - int(os.environ.get("LOCAL_RANK", "0"))
        self._local_ranks = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self._stacks_dumped, self._heartbeat_due = 0, 0.0
        self._ended = threading.Event()
        self._showing = threading.Lock()
        self._error: Exception | None = None
        self._siblings: dict[int, _Process] = {}
        """Processes of ranks on this machine."""

    def __enter__(self) -> RankWatch:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # where standard error is no file
            faulthandler.enable()  # for the stacks when NCCL's own watchdog aborts the process
            faulthandler.register(signal.SIGQUIT, all_threads=True)
        self._store = _default_store()
        self._store.set(_process_key(self.rank), str(_Process.current()))
        self._thread = threading.Thread(target=self._watch, args=(_default_store(),), name="rank watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, UserError):
                error.is_reported_here = self._is_first_with(self._store, str(error))
            elif isinstance(error, Exception):
                self._explain(self._store, error)
            self._store.set(_left_key(self.rank), "")  # after the error, so that this is no death
        except RuntimeError:
            if isinstance(error, Exception) and _is_about_other_ranks(error):
                self._leave_without_store()
            # Otherwise every rank reports what it has.
        self._ended.set()
        self._thread.join(self.post_seconds)

    def _is_first_with(self, store: torch.distributed.Store, text: str) -> bool:
        """Whether no other rank failed with the same text before; the first rank is waited for."""
        end = time.monotonic() + FIRST_RANK_SECONDS
        while self.rank and time.monotonic() < end and not store.check([_ERROR]):
            time.sleep(0.05)
        first = _raise_alarm(store, _ERROR, f"{self.rank} {text}")
        return first == f"{self.rank} {text}" or first.partition(" ")[2] != text

    def _explain(self, store: torch.distributed.Store, error: Exception) -> None:
        """End the process where `error` only says that other ranks did not answer; the caller raises any other."""
        if not _is_about_other_ranks(error):
            _raise_alarm(store, _ERROR, f"{self.rank} {type(error).__name__}")
            return
        self._error = error
        silent = self._silent_ranks(store)
        if store.check([_ENDED]):
            self._show_and_leave(store)
        if store.check([_ERROR]):
            _leave()  # the rank that failed first reports why
        timed_out = "timed out" in str(error).lower() or "timeout" in str(error).lower()
        if silent:
            self._declare(store, silent[0], lambda: self._silence(store, silent[0], timed_out))
        elif timed_out:
            self._declare(store, None, lambda: self._mismatch(store))
        if store.check([_ENDED]):
            self._show_and_leave(store)

    def _silent_ranks(self, store: torch.distributed.Store) -> list[int]:
        """Return the ranks that post nothing while this waits; none as soon as the reason is known."""
        before = [self._post_of(store, rank) for rank in range(self.world_size)]
        end = time.monotonic() + 2 * self.post_seconds
        while time.monotonic() < end:
            if store.check([_ALARM]):
                return []
            time.sleep(0.1)
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
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _post_and_read(self, store: torch.distributed.Store) -> None:
        store.set_timeout(timedelta(seconds=self.timeout_seconds))
        watched = (self.rank + 1) % self.world_size
        count, last, changed = 0, "", time.monotonic()
        while not self._ended.wait(self.post_seconds):
            count += 1
            if self.world_size > 1:
                self._end_unless_called_again()
            store.set(_post_key(self.rank), f"{count} {self.activity()}")
            self._leave_signs(store)
            self._report_deaths(store)
            post = self._post_of(store, watched)
            now = time.monotonic()
            if post != last:
                last, changed = post, now
            if now - changed > self.timeout_seconds and watched != self.rank:
                self._declare(store, watched, lambda: self._silence(store, watched, timed_out=True))
            if store.check([_ALARM]):
                self._answer_alarm(store)

    def _end_unless_called_again(self) -> None:
        """End this process with its stacks once the others have named it; needs no interpreter, only a running process.

        A stopped process ends as soon as it is continued.
        """
        with contextlib.suppress(OSError, ValueError, AttributeError):  # where standard error is no file
            faulthandler.dump_traceback_later(self.timeout_seconds + GRACE_SECONDS, exit=True)

    def _answer_alarm(self, store: torch.distributed.Store) -> None:
        if store.check([_ENDED]):
            self._show_and_leave(store)
        if store.check([_ERROR]) and not self._ended.wait(FAILED_SECONDS):
            _leave()  # this rank waits for one that has failed, and has reported why
        asked = store.add(_DUMPS, 0)
        if self.run_dir is not None and asked > self._stacks_dumped:
            self._stacks_dumped = asked
            dump_stacks(self.run_dir, _text(store.get(_dump_key(asked))), self.rank, self.activity())

    def _leave_signs(self, store: torch.distributed.Store) -> None:
        """Show in the run folder that this node lives, and pass on to all ranks what is asked for there."""
        now = time.monotonic()
        if self.run_dir is None or self.rank != self._local_ranks[0] or (self.rank and now < self._heartbeat_due):
            return
        if now >= self._heartbeat_due:
            self._heartbeat_due = now + HEARTBEAT_SECONDS
            write_heartbeat(self.run_dir, self._local_ranks, self.activity())
        if self.rank == 0 and take_request(self.run_dir):
            number = store.add(_DUMPS, 0) + 1
            store.set(_dump_key(number), time.strftime("%Y%m%d_%H%M%S"))
            store.add(_DUMPS, 1)
            store.set(_ALARM, "")

    def _report_deaths(self, store: torch.distributed.Store) -> None:
        """Let all ranks leave if the process of one on this machine has ended, though its work has not."""
        for rank in self._local_ranks:
            if rank not in self._siblings and store.check([_process_key(rank)]):
                self._siblings[rank] = self._process_of(store, rank)
        for rank, process in self._siblings.items():
            if process.has_ended() and not store.check([_left_key(rank)]):
                self._declare(store, rank, partial(self._death, store, rank))

    def _mismatch(self, store: torch.distributed.Store) -> str:
        activities = ", ".join(f"rank {rank} at {self._activity_of(store, rank)}" for rank in range(self.world_size))
        return (
            f"a collective did not end within {self.timeout_seconds / 60:g} minutes although every rank gives signs of "
            f"life ({activities}) -- the stacks show what each waits for; parallel.distributed_timeout_minutes allows "
            "more"
        )

    def _death(self, store: torch.distributed.Store, rank: int) -> str:
        return (
            f"{self._name(store, rank)} has ended at {self._activity_of(store, rank)} without a word -- see whether it "
            f"was killed for want of memory (dmesg); {_AGAIN}"
        )

    def _silence(self, store: torch.distributed.Store, rank: int, timed_out: bool) -> str:
        activity = self._activity_of(store, rank)
        if timed_out:
            what = f"hangs at {activity}: the time-out of {self.timeout_seconds / 60:g} minutes is over"
        else:
            what = f"was lost at {activity}: its connections are closed"
        return (
            f"{self._name(store, rank)} {what}, and it gives no sign of life -- see whether its machine is up, out of "
            f"memory, or the process stopped or killed; {_AGAIN}"
        )

    def _declare(self, store: torch.distributed.Store, culprit: int | None, line: Callable[[], str]) -> None:
        """Let all ranks leave, for a rank or none in particular; the first rank that asks for it prints the line."""
        mine = f"{self.rank} {'' if culprit is None else culprit}"
        if not store.check([_ERROR]) and _raise_alarm(store, _ENDED, mine) == mine:
            print(line(), file=sys.stderr, flush=True)

    def _show_and_leave(self, store: torch.distributed.Store) -> None:
        """Show where this rank is, or the exception that took it away from there, and end the process.

        Where another rank has died that would say nothing new. A process of this machine that hangs is ended too.
        """
        with self._showing:  # never released: the process ends
            culprit = _text(store.get(_ENDED)).partition(" ")[2]
            process = self._process_of(store, int(culprit)) if culprit else _Process.current()
            if not process.has_ended():
                print(f"rank {self.rank} at {self.activity()}:", file=sys.stderr, flush=True)
                if self._error is None:
                    faulthandler.dump_traceback(all_threads=True)
                else:
                    traceback.print_exception(self._error)
                if process.is_here and process.pid != os.getpid() and store.add(_CULPRIT_ENDS, 1) == 1:
                    process.end_after(self.post_seconds)  # all others have left then, and cannot go on with it
            _leave()

    def _leave_without_store(self) -> None:
        """End the process where the job's store is gone, which is in torchrun's agent or the process of rank 0."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            place = os.environ.get("MASTER_ADDR", "the first node")
            print(
                f"rank {self.rank} on {socket.gethostname()} at {self.activity()} lost the job: rank 0 or its torchrun "
                f"on {place} has ended or cannot be reached -- the reason is in the output of that node; {_AGAIN}",
                file=sys.stderr,
                flush=True,
            )
        _leave()

    def _name(self, store: torch.distributed.Store, rank: int) -> str:
        process = self._process_of(store, rank)
        return f"rank {rank} on {process.host} (process {process.pid})"

    def _process_of(self, store: torch.distributed.Store, rank: int) -> _Process:
        return _Process.parse(_text(store.get(_process_key(rank))))

    def _activity_of(self, store: torch.distributed.Store, rank: int) -> str:
        return self._post_of(store, rank).partition(" ")[2]

    def _post_of(self, store: torch.distributed.Store, rank: int) -> str:
        """Return what a rank posted last, without waiting for its first."""
        key = _post_key(rank)
        return _text(store.get(key)) if store.check([key]) else "0 the start"


def collective_timeout(minutes: float) -> timedelta:
    """Return the time-out of collectives: a little more than that of silent ranks, which are reported by name."""
    return timedelta(minutes=minutes, seconds=GRACE_SECONDS)


def _default_store() -> torch.distributed.Store:
    """Return a connection of its own to the job's store: one that waits would hold up every other thread."""
    return torch.distributed.distributed_c10d._get_default_store().clone()


def _is_about_other_ranks(error: Exception) -> bool:
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def _raise_alarm(store: torch.distributed.Store, key: str, text: str) -> str:
    """Set a key unless it is set, and let all ranks look at it; returns its value."""
    value = _text(store.compare_set(key, "", text))
    store.set(_ALARM, "")
    return value


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _leave() -> None:
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(1)


def _post_key(rank: int) -> str:
    return f"rank_watch/post/{rank}"


def _process_key(rank: int) -> str:
    return f"rank_watch/process/{rank}"


def _dump_key(number: int) -> str:
    return f"rank_watch/dump/{number}"


def _left_key(rank: int) -> str:
    return f"rank_watch/left/{rank}"


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
