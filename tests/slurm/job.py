"""Training jobs of a tiny model on the test's Slurm."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.slurm.cluster import Cluster
from tests.training.loop_run import ROOT, Place, read_lines

OPTIONS = ("--nodes=2", "--time=30")
PATIENCE_SECONDS = 240.0


@dataclass
class Job:
    """One job of `scripts/train.sbatch` with one rank on each of two nodes.

    Attributes:
        run_dir: the run's folder.
        output: file of what the job prints.
    """

    cluster: Cluster
    number: str
    run_dir: Path
    output: Path
    requeues_seen: int = 0

    @classmethod
    def submit(cls, cluster: Cluster, place: Place, run_dir: Path, *overrides: str, options: tuple = (), **env: str):  # type: ignore[no-untyped-def]
        """Submit it; later options and overrides win, and environment variables are added."""
        output = run_dir.parent / f"{run_dir.name}.out"
        settings = ("parallel.tensor_model_parallel_size=2", *overrides)
        environment = {
            "RANKS_PER_NODE": "1",  # the nodes have no GPUs
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            **env,
        }
        number = cluster.submit(
            ROOT,
            *(*OPTIONS, f"--output={output}", *options),
            *("scripts/train.sbatch", *place.arguments(run_dir, *settings)),
            environment=environment,
        )
        return cls(cluster, number, run_dir, output)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something while the job runs."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < end, f"no {what}: {self.cluster.job(self.number)}\n{self.printed()}"
            time.sleep(0.1)

    def wait_for_state(self, *states: str) -> str:
        """Wait until the job is in one of the states."""
        self.wait_until(lambda: self.state in states, f"state {states}")
        return self.state

    def wait_for_end(self) -> str:
        """Wait until the job has ended, or was requeued once more than before; returns its state, PENDING then."""

        def has_ended() -> bool:
            fields = self.cluster.job(self.number)
            if fields["JobState"] == "PENDING":
                return int(fields["Restarts"]) > self.requeues_seen
            return fields["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        self.wait_until(has_ended, "end")
        self.requeues_seen = self.restarts
        return self.state

    @property
    def state(self) -> str:
        """State of the job, in Slurm's words."""
        return self.cluster.job(self.number)["JobState"]

    @property
    def restarts(self) -> int:
        """How often it was requeued."""
        return int(self.cluster.job(self.number)["Restarts"])

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The logged steps."""
        path = self.run_dir / "metrics.jsonl"
        return read_lines(path) if path.exists() else []

    @property
    def losses(self) -> dict[int, float]:
        """Loss of every step; a step that was done again has the later one."""
        return {entry["step"]: entry["loss"] for entry in self.metrics}

    def stopped(self) -> dict[str, Any] | None:
        """What `stopped.json` says."""
        path = self.run_dir / "stopped.json"
        return json.loads(path.read_text()) if path.exists() else None

    def printed(self) -> str:
        """What the job has printed."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""
