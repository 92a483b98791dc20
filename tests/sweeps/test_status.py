"""The state of points, from run folders, starts and Slurm's words, and the error line of their logs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_vlm.checkpoint.run_owner import OWNER_NAME, describe_process
from megatron_vlm.sweeps import slurm
from megatron_vlm.sweeps.manifest import Sweep, begin_attempt, end_attempt, record_job
from megatron_vlm.sweeps.points import Point
from megatron_vlm.sweeps.slurm import Task
from megatron_vlm.sweeps.status import START_MARK, last_error, point_status
from tests.sweeps.sweep_files import Files, leave_run
from tools import sweep as tool

RUNNING = Task("7_0", "RUNNING", "n1")
WAITS = Task("7_0", "PENDING", "", "BeginTime")
STOPPED = {"reason": "signal SIGUSR1", "step": 2}


@pytest.fixture
def sweep(files: Files) -> Sweep:
    return files.make()


@pytest.fixture
def point(sweep: Sweep) -> Point:
    return sweep.points[0]


def attempt(sweep: Sweep, point: Point, exit_code: int | None, identity: str = "a", **described: object) -> None:
    """Note a start of a point, and its end unless the exit code is None."""
    begin_attempt(sweep, point, {"id": identity, **described})
    if exit_code is not None:
        end_attempt(sweep, point, identity, exit_code)


def judged(sweep: Sweep, point: Point, task: Task | None = None) -> tuple[str, int, str]:
    status = point_status(sweep, point, task)
    return status.state, status.step, status.detail


def test_a_point_without_a_start(sweep: Sweep, point: Point) -> None:
    assert judged(sweep, point) == ("pending", 0, "")
    assert judged(sweep, point, WAITS) == ("pending", 0, "job 7_0 waits (BeginTime)")
    assert judged(sweep, point, RUNNING) == ("running", 0, "job 7_0 on n1")
    assert judged(sweep, point, Task("7_0", "CANCELLED")) == ("pending", 0, "job 7_0 ended: CANCELLED")
    assert judged(sweep, point, Task("7_0", "BOOT_FAIL")) == ("failed", 0, "job 7_0 ended: BOOT_FAIL")
    sweep.log_path(point).write_text(f"{START_MARK} 0\nConfigError: the point was edited\n")
    refused = "job 7_0 ended: FAILED; ConfigError: the point was edited"
    assert judged(sweep, point, Task("7_0", "FAILED")) == ("failed", 0, refused)


def test_a_point_that_is_done(sweep: Sweep, point: Point) -> None:
    attempt(sweep, point, 1, "first")
    attempt(sweep, point, 0, "second")
    leave_run(sweep, point, 4, saved=4)
    for task in (None, Task("7_0", "COMPLETED"), Task("7_0", "COMPLETING", "n1")):
        assert judged(sweep, point, task) == ("done", 4, "")


def test_the_last_step_without_its_save_is_not_done(sweep: Sweep, point: Point) -> None:
    attempt(sweep, point, 2)
    run_dir = leave_run(sweep, point, 4)
    (run_dir / "user_error_7.txt").write_text("SaveError: no space left\n")
    assert judged(sweep, point) == ("failed", 4, "SaveError: no space left")


def test_a_point_that_trains(sweep: Sweep, point: Point) -> None:
    me = psutil.Process()
    attempt(sweep, point, None, host="here", pid=me.pid, process_start=me.create_time())
    run_dir = leave_run(sweep, point, 2)
    assert judged(sweep, point) == ("running", 2, f"process {me.pid} on here")
    attempt(sweep, point, 2, "refused: the folder has an owner")
    assert judged(sweep, point)[0] == "running", "a second start ended, the first goes on"
    (sweep.attempts_path(point)).unlink()
    (run_dir / OWNER_NAME).write_text(json.dumps(describe_process()))
    assert judged(sweep, point) == ("running", 2, f"process {os.getpid()} on {os.uname().nodename}"), "started by hand"


def test_a_point_that_was_killed(sweep: Sweep, point: Point) -> None:
    attempt(sweep, point, None, host="here", pid=os.getpid(), process_start=1.0)  # the number was given to another
    leave_run(sweep, point, 2)
    assert judged(sweep, point) == ("failed", 2, "killed, or its machine was lost")
    timeout = Task("7_0", "NODE_FAIL")
    assert judged(sweep, point, timeout) == ("failed", 2, "job 7_0 ended: NODE_FAIL; killed, or its machine was lost")
    assert judged(sweep, point, WAITS)[0] == "waiting"


def test_a_point_that_was_stopped(sweep: Sweep, point: Point) -> None:
    attempt(sweep, point, 0)
    leave_run(sweep, point, 2, saved=2, stopped_json=STOPPED)
    assert judged(sweep, point) == ("stopped", 2, "signal SIGUSR1")
    assert judged(sweep, point, WAITS) == ("waiting", 2, "signal SIGUSR1; job 7_0 waits (BeginTime)")
    attempt(sweep, point, 1, "b")
    sweep.log_path(point).write_text(f"{START_MARK} 0\nRuntimeError: it broke\n")
    assert judged(sweep, point) == ("failed", 2, "RuntimeError: it broke"), "the start after it crashed"


def test_a_start_that_left_nothing(sweep: Sweep, point: Point) -> None:
    attempt(sweep, point, -signal.SIGKILL)
    assert judged(sweep, point) == ("failed", 0, "ended by SIGKILL")
    attempt(sweep, point, 77, "b")
    assert judged(sweep, point) == ("failed", 0, "exit code 77")
    attempt(sweep, point, 0, "c")
    gone = "no run folder: stopped before its first step, or the folder was deleted"
    assert judged(sweep, point) == ("stopped", 0, gone)


@pytest.mark.parametrize("code", [143, -signal.SIGTERM])
def test_a_start_that_was_cancelled_early(sweep: Sweep, point: Point, code: int) -> None:
    """Before it could save. Slurm forgets the job later; a crash of a rank has the others ended in the same way."""
    attempt(sweep, point, code, "7_0.0")
    sweep.log_path(point).write_text(f"{START_MARK} 0\nloading\nTerminated\n")
    assert judged(sweep, point) == ("stopped", 0, "ended by SIGTERM before it could save")
    assert judged(sweep, point, Task("7_0", "CANCELLED")) == ("stopped", 0, "ended by SIGTERM before it could save")
    sweep.log_path(point).write_text(f"{START_MARK} 0\nRuntimeError: it broke\nTerminated\n")
    assert judged(sweep, point) == ("failed", 0, "RuntimeError: it broke")
    cancelled = ("stopped", 0, "job 7_0 was cancelled; RuntimeError: it broke")
    assert judged(sweep, point, Task("7_0", "CANCELLED")) == cancelled
    attempt(sweep, point, None, "7_0.1")
    assert judged(sweep, point, Task("7_0", "CANCELLED")) == cancelled, "killed, so that no end was noted"
    assert judged(sweep, point, Task("6_0", "CANCELLED"))[0] == "failed", "an earlier job was"


def test_a_zombie_trains_nothing(sweep: Sweep, point: Point) -> None:
    process = subprocess.Popen(["true"])
    try:
        attempt(sweep, point, None, pid=process.pid, process_start=psutil.Process(process.pid).create_time())
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert judged(sweep, point)[0] == "failed"
    finally:
        process.wait()


def test_what_the_run_folder_does_not_say_is_said(sweep: Sweep, point: Point) -> None:
    """Losses that are not finite, which training writes as null, and damaged lines."""
    attempt(sweep, point, 0)
    run_dir = leave_run(sweep, point, 4, saved=4)
    path = run_dir / "metrics.jsonl"
    *lines, last = path.read_text().splitlines()
    path.write_text("\n".join([*lines, "{damaged", json.dumps({**json.loads(last), "loss": None})]) + "\n")
    said = "its loss is not finite at step 4; 1 damaged line of metrics.jsonl"
    assert judged(sweep, point) == ("done", 4, said)


def test_lines_that_are_no_starts(sweep: Sweep, point: Point) -> None:
    """Valid JSON that nobody of ours wrote."""
    rows = [7, [], {"event": "begin"}, {"event": "begin", "id": []}, {"event": "end", "id": "a", "exit_code": "0"}]
    sweep.attempts_path(point).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert judged(sweep, point)[0] == "stopped"


def test_slurm_is_asked_for_our_jobs(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A squeue that prints what Slurm 22.05 prints; real ones answer in tests/slurm."""
    lines = [
        f"{row}|/s/sweep.sbatch /out python"
        for row in (
            "7|0|FAILED||NonZeroExitCode",
            "7|1|CANCELLED||None",
            "9|1|PENDING||Priority",
            "8|2|RUNNING|n2|None",
        )
    ]
    command = tmp_path / "squeue"
    command.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert slurm.find_tasks(sweep) == ({}, ""), "nothing was submitted"
    record_job(sweep, "7", [0, 1, 2])
    record_job(sweep, "9", [1])
    tasks, warning = slurm.find_tasks(sweep)
    assert warning == "" and set(tasks) == {0, 1}, "job 8 is another's"
    assert (tasks[0].state, tasks[1].name, tasks[1].state) == ("FAILED", "9_1", "PENDING")
    command.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1\n")
    assert slurm.find_tasks(sweep)[1].startswith("squeue failed: slurm_load_jobs error: Unable to contact")


@pytest.mark.parametrize(
    "lines, expected",
    [
        (["step 1/4", "DataError: no rows [a.jsonl] -- add some", "E1130 torch ChildFailedError: "], 1),
        (
            [
                "[rank 3] ConfigError: no such folder",
                "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:",
            ],
            0,
        ),
        (["[rank1]: Traceback", "[rank1]: torch.OutOfMemoryError: CUDA out of memory.", "ValueError"], 2),
        (["0: [rank0]: RuntimeError: shapes", "1: torch.distributed.DistNetworkError: lost"], 0),
        (["rank 1 on n2 (process 9) hangs at step 3: it gives no sign of life", "RuntimeError: timeout"], 0),
        (["step 3/4", "Segmentation fault (core dumped)"], 1),
        (["slurmstepd: error: Detected 1 oom-kill event(s) in StepId=3.0.", "done"], 0),
    ],
)
def test_the_line_that_says_why(sweep: Sweep, point: Point, lines: list[str], expected: int) -> None:
    before = f"{START_MARK} 0\nConfigError: of an earlier start\n"
    sweep.log_path(point).write_text(before + f"{START_MARK} 0\n" + "\n".join(lines) + "\n")
    found = last_error(sweep, point)
    assert lines[expected].endswith(found) and found


def test_several_problems_are_one_line(sweep: Sweep, point: Point) -> None:
    sweep.log_path(point).write_text(f"{START_MARK} 0\nConfigError: 2 problems:\n  (1) a -- b\n  (2) c -- d\nmore\n")
    assert last_error(sweep, point) == "ConfigError: 2 problems: (1) a -- b (2) c -- d"


def test_the_table(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, _ = sweep.points
    attempt(sweep, first, 0)
    leave_run(sweep, first, 4, saved=4)
    attempt(sweep, second, 2)
    (leave_run(sweep, second, 3) / "user_error_7.txt").write_text("DataError: row 7 is broken\n")
    assert tool.main(["status", "out"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "0 lr=0.001 done 4/4",
        "1 lr=0.002 failed 3/4 DataError: row 7 is broken",
        "2 lr=0.003 pending -",
        "1 done, 1 pending, 1 failed",
    ]


def test_the_job_script_is_told(sweep: Sweep, files: Files) -> None:
    """As its own process, which needs no torch: it answers in every task of an array."""
    script = Path(tool.__file__)
    code = f"import sys; sys.argv = ['sweep.py', 'state', 'out', '1']; sys.path.insert(0, {str(script.parent)!r})"
    code += "\nimport sweep\nassert sweep.main(sys.argv[1:]) == 0 and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    point = sweep.points[1]
    assert done.stdout.splitlines() == ["pending", str(sweep.config_path(point))]
