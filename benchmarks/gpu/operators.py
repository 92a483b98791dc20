"""Every operator once, forward and backward, in bf16 at tiny sizes, compared with torch: does anything run at all?

python -m benchmarks.gpu.operators [--dry] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_cases import CASES
from benchmarks.kernel_problem import OURS, TORCH, Setting
from benchmarks.kernels import MAX_DIFFERENCE, largest_difference, run
from megatron_vlm import platform
from vlm_kernels import library
from vlm_kernels.gated import gated, gated_halves


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on the host, where references run")
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    platform.initialize()
    device = torch.device("cpu" if options.dry else "cuda")
    torch.manual_seed(0)
    figures: dict[str, Any] = {"seconds_to_import": round(time.perf_counter() - began, 1)}
    if not options.dry:
        figures |= describe_device()
    called, errors = run_all(Setting(device, torch.bfloat16, is_tiny=True))
    if missing := sorted(set(library.operators()) - called):
        errors["operators"] = f"never called: {', '.join(missing)}"
    if not options.dry and not figures["expandable_segments"]:
        errors["allocator"] = "segments are not expandable; is PYTORCH_ALLOC_CONF set?"
    figures |= {"operators": sorted(called), "errors": errors}
    for name, error in errors.items():
        print(f"{name}: {error}", file=sys.stderr)
    print(f"{len(called)} operators called, {len(errors)} errors")
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1))
    return 1 if errors else 0


def run_all(setting: Setting) -> tuple[set[str], dict[str, str]]:
    """Names of the operators that ran, and what went wrong by case."""
    errors: dict[str, str] = {}
    activities = [torch.profiler.ProfilerActivity.CPU]  # calls, on whatever device and thread
    with torch.profiler.profile(activities=activities) as profile:
        for case in CASES:
            problem = case.build(setting)
            try:
                run(problem, problem.sides[OURS])
                sides = {side: problem.sides[side] for side in (OURS, TORCH)}
                difference = largest_difference(problem, sides)
                if not difference <= MAX_DIFFERENCE[setting.dtype]:
                    errors[f"{case.operator}, {case.name}"] = f"differs from torch by {difference:.1e} of the norm"
            except Exception as error:  # whatever comes: the next operator is tried all the same
                errors[f"{case.operator}, {case.name}"] = f"{type(error).__name__}: {error}"
        consume_inputs(setting)
    prefix = f"{library.NAMESPACE}::"
    return {event.key.removeprefix(prefix) for event in profile.key_averages() if event.key.startswith(prefix)}, errors


def consume_inputs(setting: Setting) -> None:
    """Gradients of gated activations over their inputs, as layers ask for them."""
    gate, up = setting.randn(5, 32), setting.randn(5, 32)
    (
        gated(gate * 1, up * 1, "silu", consume=True).sum() + gated_halves(gate * 1, "silu", consume=True).sum()
    ).backward()


def describe_device() -> dict[str, Any]:
    """What later figures depend on."""
    properties = torch.cuda.get_device_properties(0)
    settings = torch.cuda.memory._snapshot()["allocator_settings"]
    return {
        "device": properties.name,
        "compute_capability": [properties.major, properties.minor],
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "expandable_segments": settings["expandable_segments"],
        "extension": library.BUILD_LOG.read_text().partition("\n")[0],
    }


if __name__ == "__main__":
    sys.exit(main())
