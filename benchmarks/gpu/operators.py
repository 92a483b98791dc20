"""Runs every operator once, forward and backward, in bf16 at tiny sizes, and compares it with torch.

python -m benchmarks.gpu.operators [--dry] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import figures
from benchmarks.kernel_cases import CASES
from benchmarks.kernel_problem import OURS, TORCH, Case, Setting
from benchmarks.kernels import MAX_DIFFERENCE, largest_difference, run
from megatron_vlm import platform
from vlm_kernels import library
from vlm_kernels.gated import gated, gated_halves


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on the host, where references run")
    parser.add_argument("--uncounted", action="store_true", help="without the profiler, which checkers do not bear")
    parser.add_argument("--output", type=Path, help="JSON file of the figures")
    options = parser.parse_args(arguments)
    platform.initialize()
    torch.manual_seed(0)
    found: dict[str, Any] = {} if options.dry else describe_device()
    errors: dict[str, str] = {}

    def run_all() -> None:
        for name, call in calls(Setting(torch.device("cpu" if options.dry else "cuda"), torch.bfloat16, is_tiny=True)):
            try:
                call()
            except Exception as error:  # whatever it is, the next operator is tried all the same
                errors[name] = f"{type(error).__name__}: {error}"
                print(f"{name}: {errors[name]}", file=sys.stderr, flush=True)
            if options.output:
                figures.write(options.output, found | {"last": name, "errors": errors})

    called = set(library.operators())
    if options.uncounted:
        run_all()
    else:
        called = count(run_all)
        if missing := sorted(set(library.operators()) - called):
            errors["operators"] = f"never called: {', '.join(missing)}"
    print(f"{len(called)} operators called, {len(errors)} errors")
    if options.output:
        figures.write(options.output, found | {"operators": sorted(called), "errors": errors})
    return 1 if errors else 0


def calls(setting: Setting) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield every case of the benchmark, and the operators that it does not call."""
    for case in CASES:
        yield f"{case.operator}, {case.name}", partial(compare, case, setting)
    yield "inputs given up", partial(consume_inputs, setting)


def compare(case: Case, setting: Setting) -> None:
    """Run our side and torch's, forward and backward. Raises ValueError where they differ."""
    problem = case.build(setting)
    run(problem, problem.sides[OURS])
    difference = largest_difference(problem, {side: problem.sides[side] for side in (OURS, TORCH)})
    if not difference <= MAX_DIFFERENCE[setting.dtype]:
        raise ValueError(f"differs from torch by {difference:.1e} of the norm")


def count(action: Callable[[], None]) -> set[str]:
    """Return the names of the operators that an action calls, on whatever device and thread."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        action()
    prefix = f"{library.NAMESPACE}::"
    return {event.key.removeprefix(prefix) for event in profile.key_averages() if event.key.startswith(prefix)}


def consume_inputs(setting: Setting) -> None:
    """Run gated activations whose gradients overwrite their inputs, as layers call them."""
    gate, up = setting.randn(5, 32), setting.randn(5, 32)
    (
        gated(gate * 1, up * 1, "silu", consume=True).sum() + gated_halves(gate * 1, "silu", consume=True).sum()
    ).backward()


def describe_device() -> dict[str, Any]:
    """Return what later figures depend on: device, versions and settings."""
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
