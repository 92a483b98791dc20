"""CPU time of the planner: a search, single layouts of up to 16,384 ranks, and checks of their ranks.

    python benchmarks/planner.py [--output FILE.json]

In one process on one core. The search is that of the largest recipe's layouts on 256 GPUs. For the largest recipes of
every family, layouts of 64, 1,024 and 16,384 ranks are planned, and sampled ranks build their groups and stages and are
compared with each other.

Limits: 120 seconds for the search, 20 for a plan, 60 for the checks of a layout; the exit code is 1 beyond them.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]

from benchmarks import figures  # noqa: E402
from megatron_vlm import platform  # noqa: E402
from megatron_vlm.planning.hardware import GPUS  # noqa: E402
from megatron_vlm.planning.plan import Request, make_plan  # noqa: E402
from megatron_vlm.planning.planner import search_layouts  # noqa: E402
from megatron_vlm.planning.simulated_ranks import RankChecks, sample_ranks  # noqa: E402
from tests.planning.test_simulated_ranks import LARGEST, scaled  # noqa: E402
from tests.test_recipes import images_of_a_full_row, recipe, record  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "planner.json"
SEARCHED, NUM_GPUS = "qwen3_vl_235b_a22b", 256
MAX_SECONDS = {"search": 120.0, "plan": 20.0, "checks": 60.0}


def main() -> int:
    """Plan, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"results (default: {RESULTS.name})")
    options = parser.parse_args()
    torch.set_num_threads(1)
    platform.initialize("cpu")
    layouts = [_layout(name, size) for name, sizes in LARGEST.items() for size in sizes]
    searched = _search()
    results = {
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "commit": figures.commit(),
        "search": searched,
        "layouts": layouts,
        "most_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    figures.write(options.output, results)
    spent = [("search", searched["cpu_seconds"])]
    spent += [(kind, entry[f"{kind}_cpu_seconds"]) for entry in layouts for kind in ("plan", "checks")]
    return 0 if all(seconds <= MAX_SECONDS[kind] for kind, seconds in spent) else 1


def _search() -> dict[str, Any]:
    family, model_config, _ = record(SEARCHED)
    config, _, _ = recipe(SEARCHED)
    images = images_of_a_full_row(family)
    request = Request(config, family, model_config, GPUS["H100"], NUM_GPUS, images, 1.0, 0.1)
    began = time.process_time()
    result = search_layouts(request, {}, num_plans=5)
    spent = time.process_time() - began
    print(f"search of {NUM_GPUS} GPUs for {SEARCHED}: {spent:.1f} s, {result.num_estimated} layouts estimated")
    return {
        "model": SEARCHED,
        "gpus": NUM_GPUS,
        "cpu_seconds": spent,
        "estimated": result.num_estimated,
        "fitting": result.num_fitting,
        "best": str(result.plans[0].layout),
        "predicted_step_seconds": result.plans[0].step.total,
    }


def _layout(name: str, world_size: int) -> dict[str, Any]:
    family, model_config, _ = record(name)
    config, layout = scaled(name, world_size)
    request = Request(config, family, model_config, GPUS["H100"], world_size, images_of_a_full_row(family), 1.0, 0.1)
    began = time.process_time()
    plan = make_plan(request, config, layout)
    planned = time.process_time() - began
    checks = RankChecks(config, family, model_config, layout)
    checks.check(sample_ranks(layout.world_size))
    checked = time.process_time() - began - planned
    print(f"{name:20s} {world_size:6,} ranks: plan {planned:5.1f} s, checks {checked:5.1f} s, {checks.num_asked} asked")
    assert not checks.problems, checks.problems
    return {
        "model": name,
        "ranks": world_size,
        "layout": layout.sizes(),
        "plan_cpu_seconds": planned,
        "checks_cpu_seconds": checked,
        "ranks_asked": checks.num_asked,
        "most_gib": plan.most_bytes / 2**30,
    }


if __name__ == "__main__":
    sys.exit(main())
