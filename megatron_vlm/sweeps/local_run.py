"""Trains points on this machine, one after the other or several at a time, with the files that Slurm jobs use."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from megatron_vlm.checkpoint.run_owner import find_owner
from megatron_vlm.errors import LaunchError
from megatron_vlm.sweeps.manifest import Sweep, begin_attempt, end_attempt
from megatron_vlm.sweeps.points import Point
from megatron_vlm.sweeps.status import START_MARK, point_status

_POLL_SECONDS = 0.2
_ENTRY = Path(__file__).resolve().parents[2] / "pretrain_vlm.py"
_JOB_SETTINGS = ("PYTHON", "RANKS_PER_NODE", "SRUN_OPTIONS", "RUN_IN", "TORCHRUN_OPTIONS", "MAX_CRASHES")
"""What only scripts/job.sh reads."""
Command = Callable[[Sweep, Point], list[str]]


@dataclass
class _Started:
    """A point that trains."""

    point: Point
    process: subprocess.Popen
    log: IO[bytes]
    attempt_id: str
    slot: int
    began: float
    signals: int = 0


def training_command(sweep: Sweep, point: Point) -> list[str]:
    """Return the command that trains a point on this machine."""
    arguments = [str(_ENTRY), "--config", str(sweep.config_path(point))]
    ranks = sweep.settings.resources.ranks_per_node
    if ranks == 1:
        return [sys.executable, *arguments]
    # The agent leaves stop signals to the ranks, which save and exit with 0.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--signals-to-handle=SIGINT"]
    return [sys.executable, *launcher, f"--nproc-per-node={ranks}", *arguments]


class LocalRunner:
    """Trains points of a sweep here.

    Args:
        sweep: the sweep.
        at_once: points that train at the same time.
        say: called with every line of output.
        command: what trains a point.

    Raises:
        LaunchError: points take several nodes, or more devices than this machine has.
    """

    def __init__(
        self,
        sweep: Sweep,
        at_once: int,
        say: Callable[[str], None] = print,
        command: Command = training_command,
    ) -> None:
        resources = sweep.settings.resources
        if resources.nodes > 1:
            where = f"resources.nodes is {resources.nodes}"
            raise LaunchError("this machine alone cannot train points of several nodes", where, "submit the sweep")
        self.sweep, self.at_once, self.say, self.command = sweep, at_once, say, command
        self.devices = devices_of_slots(at_once, resources.gpus_per_node, os.environ | resources.environment)
        of_jobs = [name for name in resources.environment if name in _JOB_SETTINGS]
        if of_jobs:
            say(f"not used here, as settings of Slurm jobs: resources.environment {', '.join(of_jobs)}")
        self.running: list[_Started] = []
        self.signals = 0

    def run(self, points: Sequence[Point]) -> bool:
        """Train the points; returns whether all of them are done.

        SIGINT or SIGTERM stops: points that train save and end, and no further one starts. A second one ends at once.
        So does SIGHUP, of a terminal that is closed, unless nohup has it ignored.
        """
        waiting = list(points)
        heard = [signal.SIGINT, signal.SIGTERM]
        heard += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
        previous = {number: signal.signal(number, self._note) for number in heard}
        try:
            while self.running or (waiting and not self.signals):
                while waiting and len(self.running) < self.at_once and not self.signals:
                    self._start(waiting.pop(0))
                for started in self.running:
                    self._pass_on(started)
                for started in [each for each in self.running if each.process.poll() is not None]:
                    self._end(started)
                time.sleep(_POLL_SECONDS)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return all(point_status(self.sweep, point).state == "done" for point in points)

    def _start(self, point: Point) -> None:
        """Start a point, unless it was done or started elsewhere meanwhile."""
        before = point_status(self.sweep, point)
        if before.state in ("done", "running"):
            self._say(point, f"{before.state} already" + (f": {before.detail}" if before.detail else ""))
            return
        slot = min({*range(self.at_once)} - {each.slot for each in self.running})
        attempt_id = secrets.token_hex(8)
        path = self.sweep.log_path(point)
        log = path.open("ab")
        log.write(f"{START_MARK} {point.index} ({point.name}), {time.strftime('%F %T%z')}\n".encode())
        log.flush()
        own = self.sweep.settings.resources.environment
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **own, **self.devices[slot]}
        ranks = self.at_once * self.sweep.settings.resources.ranks_per_node
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
        # A group of its own, so that Ctrl-C reaches it once: through _pass_on.
        process = subprocess.Popen(
            self.command(self.sweep, point),
            cwd=_ENTRY.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_ignore_stop_signals,
        )
        described = {
            "id": attempt_id,
            "host": socket.gethostname(),
            "pid": process.pid,
            "process_start": psutil.Process(process.pid).create_time(),
        }
        begin_attempt(self.sweep, point, described)
        self.running.append(_Started(point, process, log, attempt_id, slot, time.monotonic()))
        begun = f"goes on after step {before.step}" if before.step else "started"
        self._say(point, f"{begun}, output in {path}")

    def _end(self, started: _Started) -> None:
        end_attempt(self.sweep, started.point, started.attempt_id, started.process.returncode)
        started.log.close()
        self.running.remove(started)
        status = point_status(self.sweep, started.point)
        detail = f": {status.detail}" if status.detail else ""
        at = f" at step {status.step}" if status.state != "done" else ""
        self._say(started.point, f"{status.state}{at} after {time.monotonic() - started.began:.0f} s{detail}")

    def _say(self, point: Point, text: str) -> None:
        self.say(f"{point}: {text}")

    def _note(self, number: int, frame: object) -> None:
        self.signals += 1

    def _pass_on(self, started: _Started) -> None:
        """Pass a stop on, once the ranks handle it: they do as soon as one owns the run folder."""
        if started.signals >= self.signals or started.process.poll() is not None:
            return
        owner = find_owner(started.point.run_dir)
        if owner is not None and owner.lives:
            os.killpg(started.process.pid, signal.SIGTERM)
            started.signals += 1
            self._say(started.point, "stops after the present step; a second signal ends it at once")
        elif self.signals > 1 and not started.signals:  # nothing was written yet
            os.killpg(started.process.pid, signal.SIGKILL)
            started.signals = self.signals


def devices_of_slots(at_once: int, gpus_per_point: int | None, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the variables that give each of the points that train at the same time its own devices.

    Args:
        at_once: number of such points.
        gpus_per_point: devices of each; None leaves all to all.
        environment: says which devices may be used.

    Raises:
        LaunchError: there are fewer devices.
    """
    if gpus_per_point is None:
        return [{} for _ in range(at_once)]
    named = environment.get("CUDA_VISIBLE_DEVICES")
    found = sorted(Path("/dev").glob("nvidia[0-9]*"), key=lambda path: int(path.name.removeprefix("nvidia")))
    devices = [str(number) for number in range(len(found))] if named is None else [d for d in named.split(",") if d]
    if len(devices) < at_once * gpus_per_point:
        what = f"{at_once} points of {gpus_per_point} GPUs at a time, and this machine has {len(devices)}"
        raise LaunchError(what, "resources.gpus_per_node", "give a smaller --at_once, or submit the sweep")
    slots = [devices[slot * gpus_per_point : (slot + 1) * gpus_per_point] for slot in range(at_once)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(slot)} for slot in slots]


def _ignore_stop_signals() -> None:
    """Before exec: what is ignored stays so in torchrun's agent; ranks install handlers of their own."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
