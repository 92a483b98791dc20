"""What a call of our operators costs the host: as torch registers gradients, and as models call them.

    python benchmarks/operator_host_cost.py [--output FILE.json]

Both ways reach the same kernels and compute the same gradients. Each kernel is replaced by one that only allocates its
results, so what is left is the way to it and back: forward, and forward and backward with `torch.autograd.grad`'s own
cost. Functions entered, in Python and from Python in C, are counted on one call and depend on no machine; times are the
least of several rounds in turn. Exit code 1 if what a forward call costs beyond its kernel is not halved.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.library import Library
from torch.utils._python_dispatch import TorchDispatchMode

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]

from benchmarks.figures import commit, write  # noqa: E402
from vlm_kernels import gated, permute, rms_norm, rope  # noqa: E402
from vlm_kernels.library import NAMESPACE  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "operator_host_cost.json"
ROWS, SIZE = 4, 64
ROUNDS, CALLS = 15, 400
WAYS = ("registered", "models")

Call = Callable[..., Any]


def cases() -> dict[str, tuple[Call, tuple[Any, ...]]]:
    """Return the function that models call and its arguments, by the name of its operator."""
    x, residual, gate, up, rows = (torch.randn(ROWS, SIZE, requires_grad=True) for _ in range(5))
    weight = torch.randn(SIZE, requires_grad=True)
    heads = [torch.randn(ROWS, count, SIZE, requires_grad=True) for count in (4, 2)]
    table = torch.randn(2, ROWS, SIZE // 2).unbind()
    index = permute.expert_permutation(torch.ones(ROWS, 1, dtype=torch.bool), ROWS)
    parts = (index.entry_of_row, index.rows, index.starts, index.num_experts)
    return {
        "rms_norm": (rms_norm._rms_norm, (x, weight, 1e-6, False)),
        "add_rms_norm": (rms_norm._add_rms_norm, (x, residual, weight, 1e-6, False)),
        "rms_norm_add_rms_norm": (rms_norm._rms_norm_add_rms_norm, (x, residual, weight, weight, 1e-6, True)),
        "qk_norm_rope": (rope._forward, (*heads, weight, weight, *table, None, 1e-6, False, 1)),
        "gated": (gated._gated, (gate, up, None, 0, False)),
        "permute": (permute._permute, (x, None, *parts)),
        "unpermute": (permute._unpermute, (rows, None, *parts)),
    }


class Kernels(Library):
    """Kernels that allocate their results and do nothing else, in place of the references on a CPU."""

    def __init__(self) -> None:
        super().__init__(NAMESPACE, "IMPL")
        self.replaced: set[str] = set()

    def replace(self, call: Call) -> None:
        """Replace the kernel of every operator that a call dispatches to."""
        with _Results() as found:
            call()
        for name, result in found.results.items():
            if name in self.replaced:
                continue
            self.replaced.add(name)
            is_tensor = isinstance(result, torch.Tensor)

            def kernel(*_: Any, result: Any = result, is_tensor: bool = is_tensor) -> Any:
                return torch.empty_like(result) if is_tensor else type(result)(map(torch.empty_like, result))

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a kernel is replaced
                self.impl(name, kernel, "CPU", allow_override=True)


class _Results(TorchDispatchMode):
    """Keeps what this package's operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[str, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace == NAMESPACE:
            self.results[function._opname] = result
        return result


def forward_and_backward(call: Call) -> Call:
    """Return a function that also passes gradients of ones back."""

    def run(*arguments: Any) -> None:
        results = call(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        inputs = [argument for argument in arguments if isinstance(argument, torch.Tensor) and argument.requires_grad]
        outputs = [result for result in results if result.requires_grad]
        torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])

    return run


def functions_entered(call: Call) -> int:
    """Return how many functions one call enters, in Python and from Python in C."""
    entered = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal entered
        entered += event in ("call", "c_call")

    call()
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


def least_microseconds(calls: dict[str, Call]) -> dict[str, float]:
    """Return the least time of each call over several rounds, in which they take turns."""
    best = dict.fromkeys(calls, math.inf)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / CALLS * 1e6)
    return {name: round(value, 2) for name, value in best.items()}


def compare(operator: Call, models: Call, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Return functions entered and microseconds, of forward, and of forward and backward together."""
    without = [each.detach() if isinstance(each, torch.Tensor) else each for each in arguments]
    results: dict[str, Any] = {
        "kernel_microseconds": least_microseconds({"kernel": partial(operator, *without)})["kernel"]
    }
    for what, wrap in (("forward", lambda call: call), ("forward_backward", forward_and_backward)):
        calls = {name: partial(wrap(call), *arguments) for name, call in zip(WAYS, (operator, models), strict=True)}
        entered = {name: functions_entered(call) for name, call in calls.items()}
        results[what] = {"functions": entered, "microseconds": least_microseconds(calls)}
    return results


def main() -> int:
    """Count, measure, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"results (default: {RESULTS.name})")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kernels, operators = Kernels(), {}
    for name, (models, arguments) in cases().items():
        kernels.replace(partial(forward_and_backward(models), *arguments))
        operators[name] = compare(getattr(getattr(torch.ops, NAMESPACE), name).default, models, arguments)
    print(f"{'registered -> models call':40s} {'functions entered':>17s} {'microseconds':>18s}")
    is_halved = True
    for name, found in operators.items():
        for what in ("forward", "forward_backward"):
            entered, times = ([found[what][unit][way] for way in WAYS] for unit in ("functions", "microseconds"))
            print(f"{name:22s} {what:17s} {entered[0]:8d} -> {entered[1]:5d} {times[0]:9.1f} -> {times[1]:5.1f}")
        before, after = (found["forward"]["microseconds"][way] - found["kernel_microseconds"] for way in WAYS)
        is_halved &= after <= before / 2
    write(options.output, {"torch": torch.__version__, "commit": commit(), "operators": operators})
    return 0 if is_halved else 1


if __name__ == "__main__":
    sys.exit(main())
