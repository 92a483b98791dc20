"""One run owns a run folder: `run_dir/owner.json` names its process, and a thread keeps the file's time fresh.

A start that finds the file decides from it whether the owner lives. On the same machine the process table says so at
once. A requeued job is recognised by its number of restarts. Otherwise the file is watched: an owner that lives touches
it. Clocks of two machines are never compared. Only the first rank uses this class, but for `lost`.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_vlm.errors import CheckpointError, LaunchError

OWNER_NAME = "owner.json"
HEARTBEAT_SECONDS = 10.0
SILENCE_SECONDS = 45.0  # other ranks wait for the first in a collective, whose time-out is a minute or more
SETTLE_SECONDS = 1.0  # in which two starts that take over at the same moment see each other
POLL_SECONDS = 0.5


class RunOwner:
    """Context of one start of a run; `take` makes it the folder's owner, the end of the context releases it.

    Args:
        run_dir: the run folder.
        heartbeat_seconds: time between two signs of life.
        silence_seconds: an owner on another machine that gives none for so long has ended.
        environment: where the job and its number of restarts are read.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        silence_seconds: float = SILENCE_SECONDS,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / OWNER_NAME
        self.heartbeat_seconds, self.silence_seconds = heartbeat_seconds, silence_seconds
        self.content = {**describe_process(), **describe_job(environment), "token": secrets.token_hex(8)}
        self.lost: str | None = None
        """Why the folder is no longer this run's, or None; noticed by the heartbeat."""
        self._held = False
        self._made_folder = False
        self._ended = threading.Event()
        self._looking = threading.Lock()

    def __enter__(self) -> RunOwner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def take(self, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Become the owner, before anything in the folder is changed; nothing is, if that fails.

        Args:
            interrupted: asked while waiting; True gives up.

        Raises:
            LaunchError: another process owns the folder, or may own it and the wait was interrupted.
            OSError: the folder cannot be written.
        """
        self._made_folder = not self.run_dir.exists()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if not self._create():
            before = self._snapshot()
            found = _parse(before)
            if not self._ended_for_sure(found):
                self._wait_for_silence(found, before, interrupted)
            self._take_over(found)
        self._held = True
        threading.Thread(target=self._beat, name="run owner", daemon=True).start()

    def confirm(self) -> None:
        """Make sure that the folder is still this run's; call it before something in it is published or deleted.

        Raises:
            CheckpointError: it is not.
        """
        if self._held:
            with self._looking:
                self._look()
        if self.lost is not None:
            raise CheckpointError(
                self.lost, str(self.run_dir), "nothing more was saved; let only one job write to a run_dir at a time"
            )

    def release(self) -> None:
        """Give the folder back, if it is still this run's; an empty folder that `take` made is removed."""
        self._ended.set()
        if not self._held:
            return
        self._held = False
        with self._looking, contextlib.suppress(OSError):
            if _parse(self._snapshot()).get("token") == self.content["token"]:
                self.path.unlink()
            if self._made_folder:
                self.run_dir.rmdir()

    def _create(self) -> bool:
        """Write the file if there is none; return whether this process did."""
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(self.content) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        return True

    def _snapshot(self) -> tuple[int, str] | None:
        """Time of the last change and content of the file; None if it is gone. Opening it asks the file server."""
        try:
            with self.path.open(encoding="utf-8", errors="replace") as stream:
                return os.fstat(stream.fileno()).st_mtime_ns, stream.read()
        except FileNotFoundError:
            return None

    def _ended_for_sure(self, found: Mapping[str, Any]) -> bool:
        """Whether the owner is known to have ended.

        Raises:
            LaunchError: it is known to live.
        """
        mine = self.content
        for job, restarts in (("slurm_job", "slurm_restarts"), ("torchrun_job", "torchrun_restarts")):
            before, now = found.get(restarts), mine[restarts]
            if mine[job] is not None and found.get(job) == mine[job] and isinstance(before, int) and before < now:
                return True
        lives = _lives_here(found)
        if lives is not True:
            return lives is False
        raise self._refusal(found, "is used by")

    def _wait_for_silence(
        self, found: Mapping[str, Any], before: tuple[int, str] | None, interrupted: Callable[[], bool]
    ) -> None:
        """Watch the file for as long as an owner that lives may leave it untouched."""
        print(
            f"run_dir {self.run_dir} was last used by {_name(found)}, which cannot be seen from here; "
            f"watching {self.silence_seconds:.0f} s for a sign of life",
            flush=True,
        )
        end = time.monotonic() + self.silence_seconds
        while (left := end - time.monotonic()) > 0:
            if interrupted():
                raise self._refusal(found, "may be used by")
            time.sleep(min(POLL_SECONDS, left))
            now = self._snapshot()
            if now is None:
                return  # released
            if now != before:
                raise self._refusal(_parse(now) or found, "is used by")

    def _take_over(self, found: Mapping[str, Any]) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        if self._create():
            time.sleep(SETTLE_SECONDS)
        now = _parse(self._snapshot())
        if now.get("token") != self.content["token"]:
            raise self._refusal(now, "was taken over at the same moment by")
        print(f"run_dir {self.run_dir} is taken over from {_name(found)}, which has ended", flush=True)

    def _refusal(self, found: Mapping[str, Any], relation: str) -> LaunchError:
        return LaunchError(
            f"run_dir {relation} {_name(found)}", str(self.run_dir), "wait until that run has ended, or name another"
        )

    def _beat(self) -> None:
        while not self._ended.wait(self.heartbeat_seconds) and self.lost is None:
            # A file server may fail for a while.
            with self._looking, contextlib.suppress(OSError):
                if self._held:
                    self._look()
                if self._held and self.lost is None:
                    os.utime(self.path)

    def _look(self) -> None:
        """Set `lost` if the file is another's or the folder is gone. A file that was deleted alone is written anew."""
        now = self._snapshot()
        if now is None:
            try:
                if self._create():
                    print(f"{self.path} was deleted while the run goes on; written again", file=sys.stderr, flush=True)
                    return
            except FileNotFoundError:
                self.lost = "the run folder was deleted or moved while the run went on"
                return
            now = self._snapshot()
        found = _parse(now)
        if found and found.get("token") != self.content["token"]:
            self.lost = f"the run folder was taken over by {_name(found)}"


@dataclass(frozen=True)
class FoundOwner:
    """The owner that a run folder names.

    Attributes:
        name: process, machine and job, in words.
        lives: whether it is alive; of a process that cannot be seen from here, whether it gave a sign of life lately by
            this machine's clock.
    """

    name: str
    lives: bool


def find_owner(run_dir: Path) -> FoundOwner | None:
    """Look up who owns a run folder, without a wait; None if nobody does."""
    try:
        path = run_dir / OWNER_NAME
        found = _parse((path.stat().st_mtime_ns, path.read_text(encoding="utf-8", errors="replace")))
        silence_seconds = time.time() - path.stat().st_mtime
    except OSError:
        return None
    lives = _lives_here(found)
    return FoundOwner(_name(found), silence_seconds < SILENCE_SECONDS if lives is None else lives)


def _lives_here(found: Mapping[str, Any]) -> bool | None:
    """Return whether an owner of this machine lives; None if it is another machine's."""
    mine = describe_process()
    if any(found.get(key) is None or found.get(key) != mine[key] for key in ("host", "boot", "pid_namespace")):
        return None
    start = _start_of(found.get("pid"))
    return start is not None and start == found.get("process_start")


def describe_process() -> dict[str, Any]:
    """Return what tells this process from all others, on this machine and elsewhere."""
    return {
        "host": socket.gethostname(),
        "boot": _first_line("/proc/sys/kernel/random/boot_id"),
        "pid_namespace": _link("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "process_start": _start_of(os.getpid()),
    }


def describe_job(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the job of Slurm and of torchrun that this process belongs to, and how often each was restarted."""
    slurm = environment.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in environment:
        slurm = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment.get('SLURM_ARRAY_TASK_ID')}"
    torchrun = environment.get("TORCHELASTIC_RUN_ID")
    return {
        "slurm_job": slurm,
        "slurm_restarts": _count(environment.get("SLURM_RESTART_COUNT")),
        "torchrun_job": None if torchrun == "none" else torchrun,  # torchrun's default, the same for all
        "torchrun_restarts": _count(environment.get("TORCHELASTIC_RESTART_COUNT")),
    }


def _parse(snapshot: tuple[int, str] | None) -> dict[str, Any]:
    """Return the file's content, nothing if it is no description of an owner."""
    try:
        content = json.loads("" if snapshot is None else snapshot[1])
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _name(found: Mapping[str, Any]) -> str:
    if not found:
        return f"a process that {OWNER_NAME} does not name"
    job = f" (Slurm job {found['slurm_job']})" if found.get("slurm_job") else ""
    return f"process {found.get('pid')} on {found.get('host')}{job}"


def _start_of(pid: object) -> int | None:
    """Return when a process of this machine started, in its clock ticks; None if it is gone or a zombie."""
    line = _first_line(f"/proc/{pid}/stat") if isinstance(pid, int) else None
    if line is None:
        return None
    state, *fields = line.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])


def _first_line(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.readline().strip()
    except OSError:
        return None


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _count(text: str | None) -> int:
    return int(text) if text is not None and text.isdigit() else 0
