"""The state of every point: what its run folder, its starts and Slurm say, put together."""

from __future__ import annotations

import itertools
import re
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import psutil

from megatron_vlm.errors import CheckpointError
from megatron_vlm.files.small_files import read_end
from megatron_vlm.report.run_record import divergence, read_run
from megatron_vlm.report.run_state import RunState, state_of
from megatron_vlm.sweeps.manifest import Sweep, read_lines
from megatron_vlm.sweeps.points import Point
from megatron_vlm.sweeps.slurm import Task, find_tasks

State = Literal["pending", "running", "waiting", "stopped", "failed", "done"]
STATES: dict[State, str] = {
    "done": "trained to its last step, exported if asked for",
    "running": "training now",
    "waiting": "has begun and goes on by itself: preempted, at its time limit, or crashed and to be tried again",
    "pending": "has not begun",
    "stopped": "has begun, was stopped or cancelled, and nothing continues it",
    "failed": "ended with an error",
}
START_MARK = "== start of point"  # begins what a start writes into the log
_TAIL_BYTES = 64 * 2**10
_LOG_TAIL_BYTES = 256 * 2**10
_ENDED_BY_SIGTERM = (-signal.SIGTERM, 128 + signal.SIGTERM)  # cancelled while it starts; later it saves
_SECONDS_APART = 1.0  # by which the same process's start may differ, read twice
# What stands before a line: the rank in srun's and torchrun's way, and in ours.
_PREFIX = r"(?:\d+: )?(?:\[(?:default)?\d+\]:? ?)?(?:\[rank ?\d+\]:? )?"
_OUR_ERROR = re.compile(
    _PREFIX + r"((?:Config|Data|Checkpoint|Save|Launch|Divergence)Error: .*"
    r"|rank \d+ on .* (?:hangs|was lost|has ended) at .*|a collective did not end within .*)"
)
_ANY_ERROR = re.compile(_PREFIX + r"((?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt)\b(?:: .*)?|slurmstepd: error: .*)")
_LISTED = re.compile(_PREFIX + r"(\(\d+\) .*)")  # a problem of several
_FOLLOWS = re.compile(r"ChildFailedError|SignalException|DistNetworkError|RendezvousConnectionError|CANCELLED AT")


@dataclass(frozen=True)
class PointStatus:
    """How a point is doing.

    Attributes:
        point: the point.
        state: one of `STATES`.
        step: last step that was logged or saved.
        train_iters: steps of the whole run; None if nothing says so yet.
        detail: where it runs, why it waits or stopped, or its last error.
        has_job: whether Slurm is going to run it, or runs it.
    """

    point: Point
    state: State
    step: int = 0
    train_iters: int | None = None
    detail: str = ""
    has_job: bool = False


def status_of(sweep: Sweep) -> tuple[list[PointStatus], str]:
    """Return the status of every point, and a warning where Slurm could not be asked ("" without one)."""
    tasks, warning = find_tasks(sweep)
    return [point_status(sweep, point, tasks.get(point.index)) for point in sweep.points], warning


def point_status(sweep: Sweep, point: Point, task: Task | None = None) -> PointStatus:
    """Return the status of a point.

    Args:
        sweep: its sweep.
        point: the point.
        task: what Slurm knows about it.
    """
    attempts = read_lines(sweep.attempts_path(point))
    run, state = None, None
    try:
        run = read_run(point.run_dir, _TAIL_BYTES)
        state = state_of(run)
    except CheckpointError:
        pass  # no run folder yet
    word, detail = _judge(sweep, point, _Attempts(attempts), state, task)
    notes = [divergence(run), *run.problems] if run is not None else []
    detail = "; ".join(dict.fromkeys(filter(None, [detail, *notes])))
    has_job = task is not None and (task.waits or task.runs)
    return PointStatus(point, word, run.last_step if run else 0, run.train_iters if run else None, detail, has_job)


def count_states(statuses: Sequence[PointStatus]) -> str:
    """Return how many points are in each state: "3 done, 1 running"."""
    counts = Counter(status.state for status in statuses)
    return ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])


class _Attempts:
    """Starts of a point.

    Args:
        lines: begin and end of each, in their order.
    """

    def __init__(self, lines: Sequence[dict[str, Any]]) -> None:
        events = [line for line in lines if line.get("event") in ("begin", "end") and isinstance(line.get("id"), str)]
        ended = {line["id"] for line in events if line["event"] == "end"}
        self.open = [line for line in events if line["event"] == "begin" and line["id"] not in ended]
        """Starts whose end was not noted: they go on, or were killed."""
        last = events[-1] if events else {}
        self.last_is_open = last.get("event") == "begin"
        code = last.get("exit_code")
        self.last_exit_code = code if type(code) is int else None
        self.any = bool(events)
        self._last_id: str = last.get("id", "")

    def last_is_of(self, job: str) -> bool:
        """Return whether the last start is one of a Slurm job; scripts/sweep.sbatch names them JOB.RESTARTS."""
        return self._last_id.rpartition(".")[0] == job

    def living(self) -> dict[str, Any] | None:
        """Return a start of this machine whose process lives."""
        for line in self.open:
            try:
                process = psutil.Process(line["pid"])
                is_it = abs(process.create_time() - line["process_start"]) < _SECONDS_APART
                if is_it and process.status() != psutil.STATUS_ZOMBIE:
                    return line
            except (KeyError, TypeError, ValueError, psutil.Error):
                continue  # of a Slurm job, damaged, or ended
        return None


def _judge(
    sweep: Sweep, point: Point, attempts: _Attempts, run: RunState | None, task: Task | None
) -> tuple[State, str]:
    """Return a point's state and the detail."""
    finished = run is not None and run.word == "finished"
    if finished and attempts.last_exit_code in (None, 0):
        return "done", ""
    living = attempts.living()
    if living is not None:
        return "running", f"process {living['pid']} on {living.get('host')}"
    if task is not None and task.runs:
        return "running", f"job {task.name} on {task.nodes or 'no node yet'}"
    if run is not None and run.word == "running":
        return "running", run.detail
    word, detail = _ended(sweep, point, attempts, run)
    if task is not None and task.waits:
        queued = f"job {task.name} waits ({task.reason})"
        return ("pending", queued) if word == "pending" else ("waiting", f"{detail}; {queued}")
    if task is not None and word == "pending" and task.state not in ("CANCELLED", "COMPLETED"):
        word, detail = "failed", last_error(sweep, point)
    if task is not None and word == "failed" and task.state == "CANCELLED" and attempts.last_is_of(task.name):
        error = last_error(sweep, point, only_errors=True)
        return "stopped", f"job {task.name} was cancelled" + (f"; {error}" if error else "")
    if task is not None and (not attempts.any or attempts.last_is_open):
        detail = f"job {task.name} ended: {task.state}" + (f"; {detail}" if detail else "")
    return word, detail


def _ended(sweep: Sweep, point: Point, attempts: _Attempts, run: RunState | None) -> tuple[State, str]:
    """Return the state and the detail of a point that nothing trains now."""
    code = attempts.last_exit_code
    if code in _ENDED_BY_SIGTERM and (run is None or run.word != "failed"):
        error = last_error(sweep, point, only_errors=True)
        return ("failed", error) if error else ("stopped", "ended by SIGTERM before it could save")
    if code not in (None, 0):
        error = run.detail if run is not None and run.word == "failed" else last_error(sweep, point, code < 0)
        return "failed", error or _exit_words(code)
    if run is not None and run.word in ("stopped", "failed"):
        return ("stopped" if run.word == "stopped" else "failed"), run.detail
    if attempts.last_is_open or (run is not None and run.word == "killed"):
        return "failed", last_error(sweep, point, only_errors=True) or "killed, or its machine was lost"
    if run is None:
        gone = "no run folder: stopped before its first step, or the folder was deleted"
        return ("stopped", gone) if attempts.any else ("pending", "")
    return "failed", "ended before its last step"


def _exit_words(code: int) -> str:
    """Describe an exit code; Python's are negative after a signal, a shell's above 128."""
    number = -code if code < 0 else code - 128
    return f"ended by {signal.Signals(number).name}" if number in {*signal.Signals} else f"exit code {code}"


def last_error(sweep: Sweep, point: Point, only_errors: bool = False) -> str:
    """Return the line of a point's log that says why its last start ended; "" if there is none.

    Args:
        sweep: its sweep.
        point: the point.
        only_errors: whether to return nothing, and not the last line, where none looks like an error.
    """
    try:
        text = read_end(sweep.log_path(point), _LOG_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.rpartition(START_MARK)[2].splitlines()[1:] if line.strip()]
    for pattern in (_OUR_ERROR, _ANY_ERROR):
        for number in reversed(range(len(lines))):
            match = pattern.fullmatch(lines[number])
            if match and not _FOLLOWS.search(lines[number]):
                listed = itertools.takewhile(bool, map(_LISTED.fullmatch, lines[number + 1 :]))
                return " ".join([match[1], *(each[1] for each in listed if each)])
    return lines[-1] if lines and not only_errors else ""
