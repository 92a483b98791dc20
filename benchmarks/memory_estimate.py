"""CPU time of counting the memory, FLOPs and communication of every recipe's model by a trace.

    python benchmarks/memory_estimate.py [--output FILE.json]

Each recipe of `configs` is counted at its own layout, with rows full of images, in one process on one core, as the dry
run does; so is the largest at 1,024 ranks.

Limits: 30 seconds for one, 60 for all recipes together; the exit code is 1 beyond them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]

from megatron_vlm.planning.memory import estimate_memory  # noqa: E402
from megatron_vlm.planning.preflight import check_layout  # noqa: E402
from tests.test_recipes import SIZES, images_of_a_full_row, recipe, record  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "memory_estimate.json"
MAX_SECONDS, MAX_SECONDS_IN_ALL = 30.0, 60.0
LARGEST, RANKS = "qwen3_vl_235b_a22b", 1024


def main() -> int:
    """Count, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"results (default: {RESULTS.name})")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds = {name: _seconds(name) for name in SIZES}
    in_all = sum(seconds.values())
    seconds[f"{LARGEST} on {RANKS} ranks"] = _seconds(LARGEST, RANKS)
    for name, spent in seconds.items():
        print(f"{name:35s} {spent:6.1f} s")
    print(f"{'all recipes':35s} {in_all:6.1f} s, at most {MAX_SECONDS_IN_ALL:.0f}; one at most {MAX_SECONDS:.0f}")
    results = {"torch": torch.__version__, "cores": os.cpu_count(), "cpu_seconds": seconds, "all_recipes": in_all}
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if in_all <= MAX_SECONDS_IN_ALL and max(seconds.values()) <= MAX_SECONDS else 1


def _seconds(name: str, num_ranks: int | None = None) -> float:
    family, model_config, _ = record(name)
    config, layout, _ = recipe(name)
    if num_ranks is not None:
        layout = check_layout(config, model_config, num_ranks)
    began = time.process_time()
    estimate_memory(config, family, model_config, layout, images_of_a_full_row(family))
    return time.process_time() - began


if __name__ == "__main__":
    sys.exit(main())
