"""Span attention's Triton kernels without a GPU: results in Triton's interpreter, and the machine code they become."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels.span_compile import KERNELS, SHARED_BYTES, TENSOR_MEMORY_COLUMNS, compile_kernel

ROOT = Path(__file__).parents[2]
# Relative to the largest value. fp32 on one side, fp64 on the other: sums of up to 512 terms; measured 5.4e-7.
FP32_ERROR = 2e-6
# Every stored value and every operand of a second product is rounded to 11 bits (4.9e-4 at most); measured 5.6e-4.
FP16_ERROR = 2e-3
# Smallest effect of a mutant on the result that it touches most; measured 0.49.
MUTANT_ERROR = 0.05


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, list[float]]]:
    """Errors by case and by mutant; the interpreter is chosen in a process of its own, before any import."""
    finished = subprocess.run(
        [sys.executable, "-m", "tests.kernels.span_interpreter"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    results: dict[str, dict[str, list[float]]] = {"case": {}, "mutant": {}}
    for line in map(json.loads, finished.stdout.splitlines()):
        for kind in results.keys() & line.keys():
            results[kind][line[kind]] = line["errors"]
    return results


def test_kernels_equal_the_reference(interpreted: dict[str, dict[str, list[float]]]) -> None:
    """Output, logarithms and every gradient: windows, images, documents, groups of heads, tails, every head dim."""
    assert len(interpreted["case"]) == 17
    for name, errors in interpreted["case"].items():
        assert max(errors) < (FP16_ERROR if name.startswith("fp16") else FP32_ERROR), (name, errors)


def test_mutants_are_noticed(interpreted: dict[str, dict[str, list[float]]]) -> None:
    """The comparison can fail: a change of one line shows."""
    assert len(interpreted["mutant"]) == 12
    for name, errors in interpreted["mutant"].items():
        assert max(errors) > MUTANT_ERROR, (name, errors)
        assert not any(math.isnan(error) for error in errors)


# Every kernel of one head dim on each GPU, and what is most demanding; `python -m tests.kernels.span_compile` does all.
COMPILED = [(128, 8, KERNELS), (128, 9, KERNELS), (256, 9, ["backward_keys"]), (512, 9, KERNELS), (512, 10, KERNELS)]
COMPILED += [(72, 9, ["forward"]), (64, 9, ["backward_keys"])]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("head_dim", "major", "kernel"), [(dim, major, kernel) for dim, major, kernels in COMPILED for kernel in kernels]
)
def test_machine_code(head_dim: int, major: int, kernel: str) -> None:
    code = compile_kernel(kernel, head_dim, major)
    assert code.stack == code.spills == 0, code
    assert code.shared <= SHARED_BYTES[major] and code.tensor_memory <= TENSOR_MEMORY_COLUMNS, code
    assert code.tensor_core >= 16 and code.vectors >= 5, code
