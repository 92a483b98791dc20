"""`scripts/torchrun_node.sh` on two nodes, simulated on this machine, and what happens when a rank of them fails."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from megatron_vlm.training.rank_watch import POST_SECONDS
from tests.training.loop_run import ROOT, Place, build_place, checkpoint_names, read_lines, signal_all

PATIENCE_SECONDS = 300.0
TIMEOUT_SECONDS = 60.0  # parallel.distributed_timeout_minutes=1


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return build_place(tmp_path_factory.mktemp("place"))


@dataclass
class Nodes:
    """The script's processes, one per node, and files of what they print."""

    processes: list[subprocess.Popen]
    logs: list[Path]
    run_dir: Path

    @property
    def text(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs)

    @property
    def steps(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return len(read_lines(path)) if path.exists() else 0

    def rank_of(self, node: int) -> int:
        """The process that trains there."""
        (rank,) = (
            child.pid
            for child in psutil.Process(self.processes[node].pid).children()
            if "pretrain_vlm.py" in child.cmdline()
        )
        return rank

    def wait_until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < end, self.text
            time.sleep(0.05)

    def exit_codes(self) -> list[int]:
        return [process.wait(PATIENCE_SECONDS) for process in self.processes]


@contextmanager
def two_nodes(place: Place, folder: Path, *overrides: str) -> Iterator[Nodes]:
    """One rank on each, tensor parallel over both."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    arguments = place.arguments(folder / "run", "parallel.tensor_model_parallel_size=2", *overrides)
    logs = [folder / f"node{node}.log" for node in (0, 1)]
    processes = []
    for node, log in enumerate(logs):
        environment = {
            **os.environ,
            "NODES": "2",
            "NODE_RANK": str(node),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANKS_PER_NODE": "1",
            "PYTHON": sys.executable,
            "RUN_IN": "env PYTHONUNBUFFERED=1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with log.open("wb") as output:
            command = [str(ROOT / "scripts" / "torchrun_node.sh"), *arguments]
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    nodes = Nodes(processes, logs, folder / "run")
    try:
        yield nodes
    finally:
        children = [
            child.pid
            for process in processes
            if process.poll() is None
            for child in psutil.Process(process.pid).children()
        ]
        signal_all([*children, *(process.pid for process in processes)], signal.SIGKILL)
        nodes.exit_codes()


LONG = ("train.train_iters=100000", "checkpoint.save_interval=5", "parallel.distributed_timeout_minutes=1")


def test_two_nodes_train(place: Place, tmp_path: Path) -> None:
    with two_nodes(place, tmp_path, "train.train_iters=2") as nodes:
        assert nodes.exit_codes() == [0, 0], nodes.text
    assert nodes.steps == 2 and "2 x CPU on 2 nodes" in nodes.text
    assert re.search(r"ranks by node: \S+ 0, \S+ 1\n +tensor +1 group  of +2 ranks, over 2 nodes\n", nodes.text)
    logs = sorted(path.name for path in (nodes.run_dir / "logs").iterdir())
    assert logs == [f"rank_{rank:05d}_{socket.gethostname()}.log" for rank in (0, 1)]


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_rank_ends_the_job_by_name(place: Place, tmp_path: Path, number: signal.Signals) -> None:
    """Within the time-out and half a minute, in one line; checkpoints stay, nothing is left over, and it goes on."""
    with two_nodes(place, tmp_path, *LONG) as nodes:
        nodes.wait_until(lambda: bool(checkpoint_names(nodes.run_dir)))
        time.sleep(2 * POST_SECONDS)  # both have said what they do
        lost = nodes.rank_of(1)
        began = time.monotonic()
        os.kill(lost, number)
        assert all(nodes.exit_codes()), nodes.text
        seconds = time.monotonic() - began
    saved, steps = checkpoint_names(nodes.run_dir), nodes.steps
    assert seconds < (30.0 if number == signal.SIGKILL else TIMEOUT_SECONDS + 30.0), seconds
    said = re.findall(
        r"rank 1 on \S+ \(process (\d+)\) (?:hangs|was lost|has ended) at (?:saving )?step \d+", nodes.text
    )
    assert said == [str(lost)], nodes.text
    assert not psutil.pid_exists(lost) or psutil.Process(lost).status() == psutil.STATUS_ZOMBIE
    began = time.monotonic()
    with two_nodes(place, tmp_path, f"train.train_iters={steps + 3}", *LONG[1:]) as nodes:
        nodes.wait_until(lambda: "resuming after step" in nodes.text)
        resumed = time.monotonic() - began
        assert nodes.exit_codes() == [0, 0], nodes.text
    assert f"resuming after step {int(saved[-1].removeprefix('step_'))} of {steps + 3}" in nodes.text
    print(f"ended after {seconds:.1f} s, resumed {resumed:.1f} s after the next start")
