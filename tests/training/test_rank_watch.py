"""A rank that hangs ends the job with its name and everybody's stacks; an error is reported once, by who has it."""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch.distributed import TCPStore

from megatron_vlm import error_report
from megatron_vlm.errors import DataError, UserError
from megatron_vlm.training import rank_watch
from megatron_vlm.training.rank_watch import RankWatch

RANKS = 3
# On a busy machine a thread may not run for half a second.
POST_SECONDS, LONG = 0.6, 300.0
SCENARIOS = (
    *("stopped", "stopped late", "deadlocked", "killed", "mismatch", "own error", "same error", "crash"),
    *("asked for stacks", "no interference"),
)
# Seconds until a silent rank is reported, and until a collective ends by an exception.
TIMEOUTS = {"stopped": (4.0, LONG), "deadlocked": (4.0, LONG), "stopped late": (LONG, 6.0), "mismatch": (LONG, 6.0)}


@dataclass
class Result:
    """Exit codes and stderr of the ranks of one scenario."""

    codes: list[int | None]
    stderr: list[str]

    def lines_with(self, text: str) -> list[str]:
        return [line for part in self.stderr for line in part.splitlines() if text in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Result]:
    """Another process does for the ranks of every scenario what torchrun does: it hosts their store.

    Not this one, because stores run threads, beside which ranks cannot be forked safely.
    """
    context, processes = multiprocessing.get_context("fork"), {}
    pipe, other_end = context.Pipe()
    host = context.Process(target=host_stores, args=(other_end,))
    host.start()
    ports = pipe.recv()
    gc.collect()
    for scenario, port in zip(SCENARIOS, ports, strict=True):
        (folder / scenario).mkdir()
        arguments = [(rank, port, scenario, folder / f"{scenario} {rank}") for rank in range(RANKS)]
        processes[scenario] = [context.Process(target=rank_main, args=each) for each in arguments]
    for ranks in processes.values():  # one scenario after another, so that no thread starves
        try:
            for process in ranks:
                process.start()
            for process in ranks:
                process.join(120)  # far more than the time-outs of a few seconds
        finally:
            for process in ranks:
                process.kill()
    host.kill()
    return {
        scenario: Result(
            [process.exitcode for process in processes[scenario]],
            [(folder / f"{scenario} {rank}").read_text() for rank in range(RANKS)],
        )
        for scenario in SCENARIOS
    }


def host_stores(pipe: multiprocessing.connection.Connection) -> None:
    """Make a store for every scenario, send their ports, and stay."""
    stores = [TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in SCENARIOS]
    pipe.send([store.port for store in stores])
    time.sleep(3600)


def rank_main(rank: int, port: int, scenario: str, stderr: Path) -> None:
    """Do three steps, of which the last does not come about."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(RANKS)}
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = os.fdopen(2, "w")
    torch.set_num_threads(1)
    if scenario == "deadlocked" and rank == 1:  # alone on its machine
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        socket.gethostname = lambda: "elsewhere"
        rank_watch.GRACE_SECONDS = 2.0
    silence, timeout = TIMEOUTS.get(scenario, (LONG, LONG))
    store = TCPStore("localhost", port, is_master=False)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=timeout)
    )
    store.set(f"ready {rank}", "")
    store.wait([f"ready {each}" for each in range(RANKS)], timedelta(seconds=LONG))
    try:
        with RankWatch(silence, POST_SECONDS) as watch:
            watch.run_dir = stderr.with_name(scenario)
            for step in range(3):
                watch.activity = lambda step=step: f"step {step}"
                if step == 2:
                    interfere(rank, scenario, watch.run_dir)
                torch.distributed.all_reduce(torch.ones(1))
    except UserError as error:
        error_report.report(error)
        sys.exit(2)


def interfere(rank: int, scenario: str, run_dir: Path) -> None:
    """Do what the scenario says."""
    if scenario == "asked for stacks":
        wait_for_stacks(rank, run_dir)
    if scenario == "same error":
        raise DataError("all ranks read the same")
    if scenario in ("asked for stacks", "no interference") or rank != 1:
        return
    if scenario == "own error":
        raise DataError("only rank 1 read this")
    if scenario == "crash":
        raise ValueError("only rank 1 crashed")
    if scenario == "mismatch":
        wait_for_something_else()
    time.sleep(5 * POST_SECONDS)  # its step is known
    if scenario == "deadlocked":
        ctypes.PyDLL(None).sleep(600)  # keeps the interpreter to itself
    os.kill(os.getpid(), signal.SIGKILL if scenario == "killed" else signal.SIGSTOP)


def wait_for_stacks(rank: int, run_dir: Path) -> None:
    """Ask for them, and wait until all ranks have written theirs."""
    if rank == 0:
        (run_dir / "dump_stacks").touch()
    end = time.monotonic() + 60
    while len(list(run_dir.glob("stacks/*/*.txt"))) < RANKS and time.monotonic() < end:
        time.sleep(0.05)


def wait_for_something_else() -> None:
    """The stacks must show this name."""
    time.sleep(600)


@pytest.mark.parametrize("scenario", ["stopped", "stopped late"])
def test_a_stopped_rank_is_named(results: dict[str, Result], scenario: str) -> None:
    """Also when a collective ends by an exception before the rank was silent for long enough."""
    result = results[scenario]
    assert result.codes in ([1, -signal.SIGKILL, 1], [1, 1, 1])  # once continued, it may see that all others have left
    (line,) = result.lines_with("hangs")
    assert line.startswith(f"rank 1 on {socket.gethostname()} (process ") and "at step 2" in line and " -- " in line
    for rank in (0, 2):  # where it waits: as a stack that was dumped, or a traceback
        assert "in all_reduce" in result.stderr[rank]
    # Where it was before it is killed, or where it came to, once continued.
    assert "in interfere" in result.stderr[1] or (result.codes[1] == 1 and "in all_reduce" in result.stderr[1])


def test_a_rank_whose_threads_cannot_run_ends_by_itself(results: dict[str, Result]) -> None:
    result = results["deadlocked"]
    assert result.codes == [1, 1, 1]
    (line,) = result.lines_with("hangs")
    assert line.startswith("rank 1 on elsewhere (process ") and "at step 2" in line
    assert "Timeout (0:00:06)!" in result.stderr[1] and "in interfere" in result.stderr[1]


def test_a_killed_rank_is_named(results: dict[str, Result]) -> None:
    """In one line, without the stacks of those who waited for it."""
    result = results["killed"]
    assert result.codes == [1, -signal.SIGKILL, 1]
    (line,) = [line for part in result.stderr for line in part.splitlines()]
    assert line.startswith(f"rank 1 on {socket.gethostname()} (process ") and "has ended at step 2" in line


def test_ranks_that_wait_for_different_things(results: dict[str, Result]) -> None:
    result = results["mismatch"]
    assert result.codes == [1, 1, 1]
    (line,) = result.lines_with("a collective did not end")
    assert "rank 0 at step 2, rank 1 at step 2, rank 2 at step 2" in line
    assert "wait_for_something_else" in result.stderr[1] and "in all_reduce" in result.stderr[0]


def test_errors_are_reported_once(results: dict[str, Result]) -> None:
    own = results["own error"]
    assert own.codes == [1, 2, 1]
    assert own.stderr[0] == own.stderr[2] == "" and own.stderr[1] == "[rank 1] DataError: only rank 1 read this\n"
    same = results["same error"]
    assert same.codes == [2, 2, 2]
    assert len(same.lines_with("all ranks read the same")) == 1
    crash = results["crash"]
    assert crash.codes == [1, 1, 1]
    assert crash.stderr[0] == crash.stderr[2] == ""
    assert "Traceback" in crash.stderr[1] and "only rank 1 crashed" in crash.stderr[1]


def test_nothing_happens_to_ranks_that_work(results: dict[str, Result]) -> None:
    assert results["no interference"] == Result([0, 0, 0], ["", "", ""])


def test_stacks_that_are_asked_for(results: dict[str, Result], folder: Path) -> None:
    """Every rank writes its own into the run folder and goes on; the request is gone, and the node lives."""
    run_dir, host = folder / "asked for stacks", socket.gethostname()
    assert results["asked for stacks"] == Result([0, 0, 0], ["", "", ""])
    assert not (run_dir / "dump_stacks").exists()
    (stacks,) = (run_dir / "stacks").iterdir()
    assert sorted(path.name for path in stacks.iterdir()) == [f"rank_{rank:05d}_{host}.txt" for rank in range(RANKS)]
    text = (stacks / f"rank_00002_{host}.txt").read_text()
    assert text.startswith(f"rank 2 on {host}, process ") and "at step 2" in text and "in wait_for_stacks" in text
    heartbeat = json.loads((run_dir / "heartbeats" / f"{host}.json").read_text())
    assert heartbeat["ranks"] == [0, 2] and abs(heartbeat["time"] - time.time()) < 600
