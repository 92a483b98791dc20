"""What a start, steps, saves and an export cost that depends on the number of ranks, counted on eight of them.

    python benchmarks/startup_counts.py [--before CHECKOUT] [--megabytes 200] [--rounds 3] [--output FILE.json]

A tiny model trains for three steps in PP4 x TP2 on a JSONL file of the given size, saves after every step and exports.
Counted are the bytes of data files that are hashed, the bytes of their index that each process holds, images
that are opened on each pipeline stage, collectives that carry objects and the bytes that they send to rank 0, and the
bytes that each rank writes of an export. `--before` does the same with the code of another checkout, in turn, and
compares the exports tensor by tensor. Figures of more ranks are these counts times ranks, not measurements.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY))  # behind the checkout whose code is counted

from benchmarks import figures  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "startup_counts.json"
RANKS, TENSOR, PIPELINE = 8, 2, 4
LARGER = {"1,024 ranks, TP8 x PP16": (1024, 8, 16), "16,384 ranks, TP8 x PP16": (16_384, 8, 16)}
NODE_RANKS = 8
ROW_CHARACTERS = 1000


def main() -> int:
    """Count on one or two checkouts, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--before", type=Path, help="another checkout, whose code is counted too")
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"results (default: {RESULTS.name})")
    options = parser.parse_args()
    sides = {"before": options.before.resolve()} if options.before else {}
    sides["after"] = REPOSITORY
    with tempfile.TemporaryDirectory() as folder:
        run_side(REPOSITORY, "prepare", Path(folder), str(options.megabytes))
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for number in range(options.rounds):
            for name, checkout in sides.items():
                counted = run_side(checkout, "train", Path(folder), f"{name}{number}")
                assert Path(counted["code"]) == checkout, f"{counted['code']} was counted for {checkout}"
                rounds[name].append(counted)
        exports_are_equal = None
        if options.before:
            exports_are_equal = run_side(REPOSITORY, "compare", Path(folder), "before0", "after0")["equal"]
    results: dict[str, Any] = {"commit": figures.commit(), "machine": platform.machine(), "cores": os.cpu_count()}
    results |= {"layout": f"PP{PIPELINE} x TP{TENSOR}", "megabytes": options.megabytes}
    results |= {name: summary(counted) for name, counted in rounds.items()}
    results["exports_are_equal"] = exports_are_equal
    print(json.dumps(results, indent=1))
    figures.write(options.output, results)
    return 1 if exports_are_equal is False else 0


def run_side(checkout: Path, *arguments: Any) -> dict[str, Any]:
    """Run a part of this program with the code of a checkout, but with the tests and benchmarks of this one."""
    with tempfile.TemporaryDirectory() as links:
        Path(links, "megatron_vlm").symlink_to(checkout / "megatron_vlm")
        Path(links, "vlm_kernels").symlink_to(checkout / "kernels" / "vlm_kernels")
        environment = {**os.environ, "PYTHONPATH": f"{links}:{REPOSITORY}", "OMP_NUM_THREADS": "1"}
        environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-m", "benchmarks.startup_ranks", *map(str, arguments)]
        done = subprocess.run(command, env=environment, cwd=links, stdout=subprocess.PIPE, text=True, check=True)
    content: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return content


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of the first round, which are those of every round, and medians of times."""
    ranks = rounds[0]["ranks"]
    stages = [ranks[first : first + TENSOR] for first in range(0, RANKS, TENSOR)]
    found: dict[str, Any] = {
        "seconds of a start, of the slowest rank": median(rounds, "setup_seconds"),
        "seconds of indexing and loaders in it": median(rounds, "loader_seconds"),
        "seconds of the same in a second start": median(rounds, "second_loader_seconds"),
        "bytes hashed on the node": sum(rank["hashed_bytes"] for rank in ranks),
        "bytes hashed on the node in a second start": sum(rank["second_hashed_bytes"] for rank in ranks),
        "index bytes in the memory of each process": [rank["index_bytes"] for rank in ranks],
        "bytes pickled to each data worker": max(rank["pickled_bytes"] for rank in ranks),
        "images opened, by pipeline stage": [sum(rank["images"] for rank in stage) for stage in stages],
        "object collectives of all ranks in each step": most(ranks, "step_calls"),
        "object collectives of all ranks in each save": most(ranks, "save_calls"),
        "object bytes sent between all ranks in each save": [
            sum(counts) for counts in zip(*(rank["save_bytes"] for rank in ranks), strict=True)
        ],
        "bytes of weights written, by rank": [rank["written_bytes"] for rank in ranks],
    }
    hashing_ranks = found["bytes hashed on the node"] / rounds[0]["data_bytes"]
    opening_stages = sum(count > 0 for count in found["images opened, by pipeline stage"])
    later_bytes = found["object bytes sent between all ranks in each save"][-1] / RANKS
    found["projected, not measured"] = {
        name: {
            "ranks of each node that hash its data files": round(hashing_ranks / RANKS * NODE_RANKS),
            "ranks that decode each image": tensor * (pipeline if opening_stages > 1 else 1),
            "object bytes sent between all ranks in a later save": round(later_bytes * count),
        }
        for name, (count, tensor, pipeline) in LARGER.items()
    }
    return found


def median(rounds: list[dict[str, Any]], name: str) -> float:
    """Return the median over rounds of the slowest rank's time."""
    return round(statistics.median(max(rank[name] for rank in counted["ranks"]) for counted in rounds), 2)


def most(ranks: list[dict[str, Any]], name: str) -> list[int]:
    """Return the largest count over ranks, by step or save."""
    return [max(counts) for counts in zip(*(rank[name] for rank in ranks), strict=True)]


if __name__ == "__main__":
    sys.exit(main())
