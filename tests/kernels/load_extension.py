"""Show that the built extension serves the torch that runs this, and record it in benchmarks/results/extension.json.

    PYTHONPATH=. python tests/kernels/load_extension.py [--record]

Needs torch and numpy only, so that an environment with another version is quickly made. Without a GPU, calls go through
the dispatcher and torch's stable ABI up to the launch, with tensors of no rows.
"""

from __future__ import annotations

import importlib
import json
import platform
import re
import sys
from pathlib import Path

import torch

from vlm_kernels import library

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks/results/extension.json"
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def registered() -> list[str]:
    """Operators that the .cu files implement."""
    names = set()
    for path in library.BINARY.parent.glob("*/*.cu"):
        names |= set(re.findall(r'm\.impl\("(\w+)"', path.read_text()))
        importlib.import_module(f"vlm_kernels.{path.parent.name}")
    return sorted(names)


def kernel_of(name: str) -> str | None:
    """Source file of what runs on CUDA, None for the reference."""
    found = re.search(
        r"^CUDA: registered at .*?(\w+\.cu):", torch._C._dispatch_dump(f"{library.NAMESPACE}::{name}"), re.M
    )
    return found[1] if found else None


def check_calls() -> None:
    """What kernels of RMS norms return for no rows, and what they say to a weight of another size."""
    importlib.import_module("vlm_kernels.rms_norm")
    operators = torch.ops.vlm_kernels
    rows, weight = torch.empty(0, 8), torch.randn(8)
    normed = operators.rms_norm.default.redispatch(CUDA, rows, None, 1e-6, True)
    gradients = operators.rms_norm_add_rms_norm_backward.default.redispatch(
        CUDA, rows, rows, rows, rows, weight, None, 1e-6, True, True
    )
    assert [tuple(tensor.shape) for tensor in (normed, *gradients)] == [(0, 8), (0, 8), (0, 8), (8,), (0,)]
    try:
        operators.rms_norm.default.redispatch(CUDA, torch.randn(2, 8), torch.randn(9), 1e-6, True)
    except RuntimeError as error:
        assert "one element for each of a row" in str(error), error
    else:
        raise AssertionError("a weight of another size was accepted")


def main() -> None:
    """Print one JSON object; add it to the record where asked to."""
    operators = {name: kernel_of(name) for name in registered()}
    check_calls()
    result = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sources": library.BUILD_LOG.read_text().splitlines()[1],
        "operators": operators,
    }
    print(json.dumps(result, indent=2))
    if missing := [name for name, source in operators.items() if source is None]:
        raise SystemExit(f"no kernel for {', '.join(missing)}")
    if "--record" in sys.argv:
        before = json.loads(RECORD.read_text()) if RECORD.exists() else []
        kept = [entry for entry in before if entry["torch"] != result["torch"]]
        RECORD.write_text(json.dumps(sorted([*kept, result], key=lambda entry: entry["torch"]), indent=2) + "\n")


if __name__ == "__main__":
    main()
