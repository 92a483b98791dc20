"""Time and memory of the kernels on one GPU, against torch, torch.compile, Liger and FlexAttention in the same run.

    python benchmarks/kernels.py [--operators rms_norm ...] [--cases NAME ...] [--rounds 15] [--no_compile]
        [--measure_only] [--output FILE.json]
    python benchmarks/kernels.py --tiny      # every step of it at tiny sizes, also where there is no GPU

For each case of `benchmarks/kernel_cases.py`, forward and backward, it prints the median seconds of every side, others'
times as multiples of ours, how much of our time is unavoidable (the floor: bytes at the speed of a copy, or FLOPs at
the speed of a matmul, both measured here), and the targets. Results are compared first. Sides take turns in every
round, the one that begins changes, and before each turn the caches are filled with other data. The GPU sleeps until the
host has queued a turn, so that no time of the host counts.

Liger takes part where it is installed (`pip install '.[bench]'`). Figures go to benchmarks/results/kernels_DEVICE.json,
with the versions, the commit and a hash of the kernels' sources: tests/test_kernel_benchmark.py fails when the sources
differ from those that were measured. The exit code is 1 where a target is missed or a side of ours fails.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.metadata
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

REPOSITORY = Path(__file__).resolve().parent.parent
if sys.path[0] == str(REPOSITORY / "benchmarks"):
    sys.path[0] = str(REPOSITORY)  # or `kernels` would be this file

import torch  # noqa: E402

from benchmarks import figures  # noqa: E402
from benchmarks.kernel_cases import CASES  # noqa: E402
from benchmarks.kernel_problem import COMPILED, GIB, LIGER, OURS, TORCH, Case, Problem, Setting, Target  # noqa: E402
from megatron_vlm import platform  # noqa: E402
from vlm_kernels.library import STRICT_VARIABLE  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results"
KERNELS = REPOSITORY / "kernels" / "vlm_kernels"
SOURCE_ENDINGS = (".py", ".cu", ".cuh", ".h")
WARM_UPS = 3
FLUSH_BYTES = 512 * 2**20  # of other data: several times any L2 cache
COPY_BYTES = 2**30
PRODUCT_SIZE = 8192
SLEEP_CYCLES = 3_000_000  # 1.5 ms and more: longer than the host takes to queue a turn
# Norm of the difference over that of the result: bf16 keeps 8 bits, and sides round different intermediate results.
MAX_DIFFERENCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}

Seconds = dict[str, dict[str, float]]
"""Median seconds by side and direction."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit code."""
    options = _parse(arguments)
    platform.initialize()
    if not options.tiny and not torch.cuda.is_available():
        print("no GPU: nothing is measured (--tiny runs every step at tiny sizes on the host)")
        return 0
    # The flag alone decides where nothing is measured: tests run it on the host of a machine with a GPU too.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = Setting(device, torch.float32 if options.tiny else torch.bfloat16, options.tiny)
    torch.manual_seed(0)
    clock = Clock(device)
    speeds = measure_speeds(clock, options.tiny)
    print(f"copy {speeds['copy_bytes_per_second'] / 1e12:.2f} TB/s, ", end="")
    print(f"matrix product {speeds['operations_per_second'] / 1e12:.0f} TFLOP/s", flush=True)
    if not _version("liger-kernel"):
        print("Liger is not installed and takes no part (pip install '.[bench]')")
    path = options.output or (None if options.tiny else RESULTS / f"kernels_{_slug(_device_name(device))}.json")
    found = environment(device) | {"tiny": options.tiny, "rounds": options.rounds} | speeds
    rows: list[dict[str, Any]] = []
    # Strict mode: references would be measured where the kernels were not built.
    with patch.dict(os.environ, {STRICT_VARIABLE: "1"}):
        for case in CASES:
            if case.operator in (options.operators or [case.operator]) and case.name in (options.cases or [case.name]):
                rows += run_case(case, setting, clock, speeds, options)
                release_memory()
                if path is not None:  # after each case: time on a GPU may end before the last
                    figures.write(path, found | {"rows": rows})
    if path is not None:
        print(f"written to {path}")
    missed = [row for row in rows if "error" in row or not all(target["reached"] for target in row["targets"])]
    print(f"{len(rows) - len(missed)} of {len(rows)} rows reach their targets")
    if options.measure_only:
        missed = [row for row in missed if "error" in row]
    return 1 if missed and not options.tiny else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    operators = sorted({case.operator for case in CASES})
    parser.add_argument("--operators", nargs="+", choices=operators, help="only these (default: all)")
    parser.add_argument("--cases", nargs="+", choices=sorted({case.name for case in CASES}), help="only these")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--no_compile", action="store_true", help="leave torch.compile out, which takes most of the time"
    )
    parser.add_argument("--measure_only", action="store_true", help="a missed target is no failure")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, whose figures mean nothing and are not kept")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/kernels_DEVICE.json")
    return parser.parse_args(arguments)


class Clock:
    """A clock that times one turn; on a GPU by CUDA events, after the caches were filled with other data."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        # It is read, not written: dirty cache lines would have to be written back during the timed kernel.
        self.other_data = torch.zeros(FLUSH_BYTES // 4 if self.on_cuda else 1, device=device)

    def seconds(self, action: Callable[[], Any]) -> tuple[float, Any]:
        """Return how long an action takes, and its result."""
        if not self.on_cuda:
            began = time.perf_counter()
            result = action()
            return time.perf_counter() - began, result
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(SLEEP_CYCLES)
        self.other_data.sum()
        start.record()
        result = action()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000, result

    def median(self, action: Callable[[], Any], rounds: int = 10) -> float:
        """Return the median seconds of several turns after a first one."""
        self.seconds(action)
        return statistics.median(self.seconds(action)[0] for _ in range(rounds))


def measure_speeds(clock: Clock, is_tiny: bool) -> dict[str, float]:
    """Return the bytes per second that a copy reads and writes together, and the FLOP/s of a matmul in bf16."""
    device = clock.other_data.device
    source = torch.zeros(COPY_BYTES // (4096 if is_tiny else 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_seconds = clock.median(lambda: target.copy_(source))
    size = 64 if is_tiny else PRODUCT_SIZE
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product_seconds = clock.median(lambda: left @ right)
    return {
        "copy_bytes_per_second": 2 * source.nbytes / copy_seconds,
        "operations_per_second": 2 * size**3 / product_seconds,
    }


def run_case(
    case: Case, setting: Setting, clock: Clock, speeds: dict[str, float], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measure a case, print a line for each direction, and return them as rows."""
    problem = case.build(setting)
    sides = dict(problem.sides)
    if case.operator != "span_attention" and not options.no_compile:
        # torch's dense attention is one kernel already; the compiled side of span attention is FlexAttention.
        sides[COMPILED] = torch.compile(sides[TORCH], dynamic=False, backend="eager" if setting.is_tiny else "inductor")
    if not _version("liger-kernel") or not clock.on_cuda:
        sides.pop(LIGER, None)
    name = f"{case.operator}, {case.name} ({problem.label})"
    failures = warm_up(problem, sides)
    for side, failure in failures.items():
        print(f"{name}: {side} fails: {failure}", flush=True)
        del sides[side]
    if OURS in failures:
        return [{"operator": case.operator, "case": case.name, "size": problem.label, "error": failures[OURS]}]
    difference = largest_difference(problem, sides) if TORCH in sides else None
    seconds = measure(problem, sides, options.rounds, clock)
    memory = {side: temporary_bytes(problem, sides[side]) for side in sides} if case.measures_memory else {}
    rows = []
    for direction in ("forward", "backward", "both"):
        row = describe(case, problem, direction, seconds, memory, speeds)
        row |= {"failures": failures, "difference": difference}
        if direction != "both" or row["targets"]:
            rows.append(row)
            print(f"{name}, {direction}: {line(row)}", flush=True)
    if difference is not None and not difference <= MAX_DIFFERENCE[setting.dtype]:
        rows[-1]["error"] = f"results differ by {difference:.1e} of their norm"
        print(f"{name}: {rows[-1]['error']}", flush=True)
    return rows


def release_memory() -> None:
    """Free the memory of a case, whose inputs are part of reference cycles."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def warm_up(problem: Problem, sides: dict[str, Callable[..., Any]]) -> dict[str, str]:
    """Run each side so that everything is compiled; return the first line of each failing side's error."""
    failures = {}
    for name, function in sides.items():
        try:
            for _ in range(WARM_UPS):
                run(problem, function)
        except Exception as error:  # whatever another package raises
            failures[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
        if name in failures:
            release_memory()
    return failures


def run(problem: Problem, function: Callable[..., Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Run one side forward and backward; return its results and gradients."""
    problem.restore()
    outputs = results(function(*problem.inputs))
    return outputs, list(gradients(problem, outputs, upstream(outputs)))


def results(output: Any) -> list[torch.Tensor]:
    """Return a side's outputs, one or several, that require a gradient."""
    return [output] if isinstance(output, torch.Tensor) else [part for part in output if part.requires_grad]


def upstream(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return gradients of the results, the same for every side; new tensors, since some sides write over them."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return [
        torch.randn(out.shape, device=out.device, dtype=out.dtype, generator=generator)
        if out.dim()
        else out.detach() * 0 + 1
        for out in outputs
    ]


def gradients(
    problem: Problem, outputs: list[torch.Tensor], of_outputs: list[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of all inputs; None where the side adds it to `main_grad` instead of returning it."""
    return torch.autograd.grad(outputs, problem.inputs, of_outputs, allow_unused=True)


def largest_difference(problem: Problem, sides: dict[str, Callable[..., Any]]) -> float:
    """Return the largest difference of our results and gradients from torch's, relative to the norm of each."""
    main = None if problem.into_main is None else problem.inputs[problem.into_main].main_grad  # type: ignore[attr-defined]
    if main is not None:
        main.zero_()
    found = []
    for name in (OURS, TORCH):
        outputs, grads = run(problem, sides[name])
        if name == OURS and main is not None:
            grads[problem.into_main] = main  # type: ignore[index]
        found.append([*outputs, *grads])
    differences = [
        (ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-12)
        for ours, theirs in zip(*found, strict=True)
    ]
    return torch.stack(differences).max().item()  # NaN if any of them is NaN


def measure(problem: Problem, sides: dict[str, Callable[..., Any]], rounds: int, clock: Clock) -> Seconds:
    """Time all sides in turn and return their median seconds."""
    taken: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in sides}
    names = list(sides)
    for number in range(rounds):
        begin = number % len(names)
        for name in names[begin:] + names[:begin]:
            problem.restore()
            forward, output = clock.seconds(lambda name=name: sides[name](*problem.inputs))  # type: ignore[misc]
            outputs = results(output)
            del output
            of_outputs = upstream(outputs)
            backward, grads = clock.seconds(lambda a=outputs, b=of_outputs: gradients(problem, a, b))  # type: ignore[misc]
            del outputs, of_outputs, grads
            taken[name]["forward"].append(forward)
            taken[name]["backward"].append(backward)
    medians = {
        name: {direction: statistics.median(values) for direction, values in of_side.items()}
        for name, of_side in taken.items()
    }
    for of_side in medians.values():
        of_side["both"] = of_side["forward"] + of_side["backward"]
    return medians


def temporary_bytes(problem: Problem, function: Callable[..., Any]) -> int | None:
    """Return the peak memory of both directions beyond the inputs, the results and their gradients."""
    if not torch.cuda.is_available() or not problem.inputs[0].is_cuda:
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    kept = run(problem, function)
    torch.cuda.synchronize()
    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del kept
    return peak - after


def describe(
    case: Case,
    problem: Problem,
    direction: str,
    seconds: Seconds,
    memory: dict[str, int | None],
    speeds: dict[str, float],
) -> dict[str, Any]:
    """Return one direction's figures."""
    ours = seconds[OURS][direction]
    floor = None
    if case.floor_side is not None:
        floor = seconds.get(case.floor_side, {}).get(direction)
    elif direction in problem.floors:
        of_direction = problem.floors[direction]
        floor = of_direction.num_bytes / speeds["copy_bytes_per_second"]
        floor += of_direction.num_operations / speeds["operations_per_second"]
    row: dict[str, Any] = {
        "operator": case.operator,
        "case": case.name,
        "size": problem.label,
        "direction": direction,
        "seconds": {name: of_side[direction] for name, of_side in seconds.items()},
        "times_ours": {name: of_side[direction] / ours for name, of_side in seconds.items() if name != OURS},
        "floor_seconds": floor,
        "floor_share": None if floor is None else floor / ours,
        "temporary_bytes": memory if direction == "both" else {},
    }
    applying = [target for target in case.targets if target.direction == direction]
    row["targets"] = [found for target in applying if (found := judge(target, case, row)) is not None]
    return row


def judge(target: Target, case: Case, row: dict[str, Any]) -> dict[str, Any] | None:
    """Return a target with what was found; None where its side took no part or published figures are of another GPU."""
    if target.against == "memory":
        found = row["temporary_bytes"].get(OURS)
        return (
            None if found is None else _judged(target, found, found < target.limit, f"< {target.limit / GIB:.0f} GiB")
        )
    if target.against == "floor":
        share = row["floor_share"]
        wanted = f">= {target.limit:.0%} of the floor"
        return None if share is None else _judged(target, share, share >= target.limit, wanted)
    if target.against == "published":
        is_comparable = torch.cuda.is_available() and "H200" in torch.cuda.get_device_name()
        ratio = case.published[row["direction"]] / row["seconds"][OURS] if is_comparable else None
    else:
        ratio = row["times_ours"].get(target.against)
    return (
        None
        if ratio is None
        else _judged(target, ratio, ratio >= target.limit, f">= {target.limit:.2f}x {target.against}")
    )


def _judged(target: Target, found: float, reached: bool, wanted: str) -> dict[str, Any]:
    return {"against": target.against, "limit": target.limit, "found": found, "reached": reached, "text": wanted}


def line(row: dict[str, Any]) -> str:
    """Return the line that is printed for a row."""
    parts = [f"{row['seconds'][OURS] * 1e6:,.0f} us"]
    if row["floor_share"] is not None:
        parts.append(f"{row['floor_share']:.0%} of the floor")
    parts += [f"{name} {ratio:.2f}x" for name, ratio in row["times_ours"].items()]
    parts += [f"{name} {size / GIB:.2f} GiB" for name, size in row["temporary_bytes"].items() if size is not None]
    parts += [f"[{target['text']}: {'ok' if target['reached'] else 'MISS'}]" for target in row["targets"]]
    return ", ".join(parts)


def kernel_hash(folder: Path = KERNELS) -> str:
    """Return a hash of the paths and contents of all source files of the kernels."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in SOURCE_ENDINGS):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def environment(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on: device, versions, sources and commit."""
    on_cuda = device.type == "cuda"
    return {
        "device": _device_name(device),
        "compute_capability": list(torch.cuda.get_device_capability()) if on_cuda else None,
        "kernel_hash": kernel_hash(),
        "commit": figures.commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "liger": _version("liger-kernel"),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "host"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


if __name__ == "__main__":
    sys.exit(main())
