"""Real torchrun: requests to stop, a kill in the middle of a save, and what the console shows."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_vlm.checkpoint.run_owner import OWNER_NAME
from megatron_vlm.training.loop import Trainer
from tests.ranks import run_ranks
from tests.sizes import full
from tests.training.loop_run import (
    ROOT,
    Place,
    build_place,
    checkpoint_names,
    rank_pids,
    read_lines,
    signal_all,
    start_torchrun,
    train_here,
)

PATIENCE_SECONDS = 240.0  # a start takes 10 s on an idle machine
BANNER_LINE = re.compile(r"(megatron_vlm \d|(device|model|layout|groups|data|schedule|writes) +\S).*")
SAVED_LINE = re.compile(r"saved step \d+ in \d+\.\d s")
STEP_LINE = re.compile(r"step +\d+/\d+  loss [\d.]+  .*eta [\d:]+.*")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return build_place(tmp_path_factory.mktemp("place"))


class Job:
    """A torchrun of two tensor-parallel ranks that would train for long; ended with the test at the latest."""

    def __init__(self, place: Place, run_dir: Path, log: Path, *overrides: str) -> None:
        self.arguments = place.arguments(run_dir, "parallel.tensor_model_parallel_size=2", *overrides)
        self.log, self.process = log, start_torchrun(self.arguments, log)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exception: object) -> None:
        signal_all([*self.ranks(), self.process.pid], signal.SIGKILL)
        self.process.wait()

    def ranks(self) -> list[int]:
        return rank_pids(self.process.pid) if self.process.poll() is None else []

    def wait_until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.005)

    def exit_code(self) -> int:
        return self.process.wait(PATIENCE_SECONDS)


ENDLESS = ["train.train_iters=100000", "train.precision=bf16"]


# Of what `make test` leaves out, tests/data sends signals to workers, and tests/checkpoint kills ranks that save.
@pytest.mark.parametrize("everything", [False, full(True)], ids=["stop", "stop with workers, and kill"])
def test_stop_and_kill(place: Place, tmp_path: Path, everything: bool) -> None:
    """One run through starts that end by SIGTERM, by SIGKILL while saving, and by SIGUSR1 to one rank only."""
    run_dir = tmp_path / "run"

    def steps() -> list[int]:
        return [record["step"] for record in read_whole_lines(run_dir / "metrics.jsonl")]

    with Job(place, run_dir, tmp_path / "1.log", *ENDLESS, f"data.num_workers={int(everything)}") as job:
        job.wait_until(lambda: len(steps()) >= 3)
        ranks = job.ranks()
        assert len(ranks) == 2
        signal_all(ranks, signal.SIGTERM)
        assert job.exit_code() == 0, job.log.read_text()
    stopped = json.loads((run_dir / "stopped.json").read_text())
    first = stopped["step"]
    assert stopped == {"reason": "signal SIGTERM", "step": first}
    # The step that ran was finished, logged and saved, and none began after it.
    assert steps() == list(range(1, first + 1))
    assert checkpoint_names(run_dir) == [f"step_{first:08d}"]
    check_console(job.log, resumed_after=None)

    complete = kill_while_saving(place, run_dir, first) if everything else checkpoint_names(run_dir)
    last = int(complete[-1].removeprefix("step_"))
    (outcome, _) = run_ranks(2, train_here, [*job.arguments, "--data.num_workers=0"], _signal_the_last_rank)
    assert outcome.error is None
    assert checkpoint_names(run_dir) == [*complete, f"step_{last + 1:08d}"]
    assert [record["step"] for record in outcome.metrics] == list(range(1, last + 2))
    assert json.loads((run_dir / "stopped.json").read_text()) == {"reason": "signal SIGUSR1", "step": last + 1}


@pytest.mark.full
def test_ranks_end_when_their_agent_is_killed(place: Place, tmp_path: Path) -> None:
    """They finish the step and save, and leave no process behind; meanwhile and afterwards the folder is safe."""
    run_dir = tmp_path / "run"
    with Job(place, run_dir, tmp_path / "1.log", *ENDLESS, "data.num_workers=1") as job:
        job.wait_until(lambda: len(read_whole_lines(run_dir / "metrics.jsonl")) >= 2)
        owner = json.loads((run_dir / OWNER_NAME).read_text())
        assert owner["pid"] in job.ranks()
        second = subprocess.run(
            [sys.executable, "pretrain_vlm.py", *place.arguments(run_dir)], cwd=ROOT, capture_output=True, text=True
        )
        assert second.returncode == 2 and f"is used by process {owner['pid']} on" in second.stderr
        assert len(second.stderr.strip().splitlines()) == 1
        assert json.loads((run_dir / OWNER_NAME).read_text()) == owner

        below = psutil.Process(job.process.pid).children(recursive=True)
        steps = len(read_whole_lines(run_dir / "metrics.jsonl"))
        job.process.kill()
        _, alive = psutil.wait_procs(below, timeout=PATIENCE_SECONDS)
        assert not alive
    stopped = json.loads((run_dir / "stopped.json").read_text())
    assert stopped["reason"] == "signal SIGTERM" and stopped["step"] <= steps + 4
    assert checkpoint_names(run_dir) == [f"step_{stopped['step']:08d}"]
    assert not (run_dir / OWNER_NAME).exists()
    log = job.log.read_text()
    assert f"torchrun (process {job.process.pid}) has ended: stopping" in log and "Traceback" not in log


@pytest.mark.full
def test_a_stopped_rank_ends_the_job(place: Place, tmp_path: Path) -> None:
    """Within the time-out plus 30 s, with one line that names it and the stack of the other rank."""
    run_dir, timeout = tmp_path / "run", 60
    with Job(place, run_dir, tmp_path / "1.log", *ENDLESS, "parallel.distributed_timeout_minutes=1") as job:
        job.wait_until(lambda: len(read_whole_lines(run_dir / "metrics.jsonl")) >= 2)
        stopped = next(pid for pid in job.ranks() if psutil.Process(pid).environ()["RANK"] == "1")
        os.kill(stopped, signal.SIGSTOP)
        began = time.monotonic()
        assert job.exit_code() == 1
        seconds = time.monotonic() - began
    print(f"ended after {seconds:.0f} s")
    assert timeout < seconds < timeout + 30
    log = job.log.read_text()
    (line,) = [line for line in log.splitlines() if "gives no sign of life" in line]
    assert line.startswith("rank 1 on ") and f"(process {stopped})" in line
    assert "rank 0 at step" in log and "in _step" in log
    assert log.count("Traceback (most recent call last)") == 1, "torchrun's own is the only one"


def kill_while_saving(place: Place, run_dir: Path, resumed_after: int) -> list[str]:
    """Start again; the complete checkpoints, beside a half-written one."""
    # Without a worker, which takes as long to start as its rank; those of a killed rank are tests/data's.
    settings = [*ENDLESS, "checkpoint.save_interval=1", "data.num_workers=0"]
    with Job(place, run_dir, run_dir.with_name("2.log"), *settings) as job:

        def is_saving() -> bool:
            return any(".incomplete." in name for name in checkpoint_names(run_dir))

        job.wait_until(lambda: len(checkpoint_names(run_dir)) > 4 and is_saving())
        assert not (run_dir / "stopped.json").exists()
        check_console(job.log, resumed_after)
        signal_all(job.ranks(), signal.SIGKILL)
        assert job.exit_code() != 0
    names = checkpoint_names(run_dir)
    complete = [name for name in names if "." not in name]
    assert len(names) == len(complete) + 1, f"the kill left no half-written checkpoint: {names}"
    return complete


def _signal_the_last_rank(trainer: Trainer) -> None:
    """During the next step, one rank alone receives a signal."""
    read = trainer.run_state.train_loader.global_batch

    def read_and_receive() -> Any:
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            with trainer.requests:
                signal.raise_signal(signal.SIGUSR1)
        return read()

    trainer.run_state.train_loader.global_batch = read_and_receive  # type: ignore[method-assign]


def check_console(log: Path, resumed_after: int | None) -> None:
    """Nothing but what runs, how it goes on, and a line per step or save; the last line may not be complete yet."""
    lines = log.read_text().rpartition("\n")[0].splitlines()
    assert lines[0].startswith("run_dir ") or BANNER_LINE.fullmatch(lines[0]), lines[0]
    lines = [line for line in lines if not BANNER_LINE.fullmatch(line)]
    if resumed_after is not None:
        if lines[0].startswith("run_dir "):
            assert "is taken over" in lines.pop(0)
        assert lines.pop(0) == f"resuming after step {resumed_after} of 100000"
        changes = "data.num_workers 1 -> 0, checkpoint.save_interval null -> 1"
        assert lines.pop(0) == f"settings changed since the last start: {changes}"
    lines = [line for line in lines if not line.startswith("    wait ")]  # below a long line
    others = [line for line in lines if not STEP_LINE.fullmatch(line) and not SAVED_LINE.fullmatch(line)]
    assert lines and not others, "\n".join(others)


def read_whole_lines(path: Path) -> list[dict]:
    """The records of a file that is being written: a line may be cut short where reading met writing."""
    try:
        return read_lines(path)
    except json.JSONDecodeError:
        return []


def test_a_rank_notices_that_its_agent_has_ended() -> None:
    """The agent starts a rank and is killed; the rank, adopted by another process, sees a request."""
    rank = """
import time
from megatron_vlm.training.signals import StopRequests
requests = StopRequests()
print(requests.poll(), flush=True)
while not requests.poll():
    time.sleep(0.01)
print(int(requests.poll()), flush=True)
"""
    agent = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(600)"
    with subprocess.Popen(
        [sys.executable, "-c", agent, rank],
        cwd=ROOT,
        env={**os.environ, "TORCHELASTIC_RUN_ID": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "0\n"
        process.kill()
        assert process.stdout.readline() == f"{int(signal.SIGTERM)}\n"
        assert f"torchrun (process {process.pid}) has ended" in process.stderr.read()


def test_a_second_signal_ends_at_once() -> None:
    program = """
import signal
from megatron_vlm.training.signals import StopRequests
with StopRequests() as requests:
    signal.raise_signal(signal.SIGUSR2)
    assert requests.number == signal.SIGUSR2
    print("noted", flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("still here", flush=True)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, "noted\n")
