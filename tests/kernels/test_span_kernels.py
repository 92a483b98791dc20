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

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.kernels.span_compile import SHARED_BYTES, TENSOR_MEMORY_COLUMNS, compile_kernels
from tests.sizes import full
from tests.versions import needs_triton_3_9
from vlm_kernels.span_attention import launch

ROOT = Path(__file__).parents[2]
# Relative to the largest value. fp32 on one side, fp64 on the other: sums of up to 900 terms; measured 7.7e-7.
FP32_ERROR = 2e-6
# Every stored value and every operand of a second product is rounded to 11 bits (4.9e-4 at most); measured 5.6e-4.
FP16_ERROR = 2e-3
# Smallest effect of a mutant on the result that it touches most; measured 0.49.
MUTANT_ERROR = 0.05


Results = dict[str, dict[str, list[float]]]


def interpret(*arguments: str) -> Results:
    """Errors by case and by mutant; the interpreter is chosen in a process of its own, before any import."""
    finished = subprocess.run(
        [sys.executable, "-m", "tests.kernels.span_interpreter", *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    results: Results = {"case": {}, "mutant": {}}
    for line in map(json.loads, finished.stdout.splitlines()):
        for kind in results.keys() & line.keys():
            results[kind][line[kind]] = line["errors"]
    return results


@pytest.fixture(scope="module")
def interpreted() -> Results:
    return interpret()


@needs_triton_3_9
def test_kernels_equal_the_reference(interpreted: Results) -> None:
    """Output, logarithms and every gradient: windows, images, documents, shards, groups of heads, tails, head dims."""
    check_cases(interpreted, 19)


@needs_triton_3_9
@pytest.mark.full
def test_kernels_equal_the_reference_in_further_cases() -> None:
    check_cases(interpret("further"), 15)


def check_cases(results: Results, count: int) -> None:
    assert len(results["case"]) == count
    for name, errors in results["case"].items():
        assert max(errors) < (FP16_ERROR if name.startswith("fp16") else FP32_ERROR), (name, errors)


@needs_triton_3_9
def test_mutants_are_noticed(interpreted: Results) -> None:
    """The comparison can fail: a change of one line shows."""
    assert len(interpreted["mutant"]) == 17
    for name, errors in interpreted["mutant"].items():
        assert max(errors) > MUTANT_ERROR, (name, errors)
        assert not any(math.isnan(error) for error in errors)


@pytest.mark.parametrize(
    ("strides", "is_copied"),
    [
        ((2048, 64, 128, 1), False),
        ((5, 64, 128, 1), False),
        ((0, 64, 128, 1), False),
        ((3, 64, 132, 1), True),
        ((3, 0, 72, 1), True),
        ((1, 1, 2, 32), True),
    ],
)
def test_descriptors_take_any_strides(strides: tuple[int, ...], is_copied: bool) -> None:
    """Rows as they lie where descriptors take them, else copies; a dimension of size 1 may have any stride."""
    given = torch.randn(4096).as_strided((1, 2, 16, 64), strides)
    ready = launch._in_vectors(given)
    TensorDescriptor.from_tensor(ready, [1, 1, 16, 64])  # checks addresses and strides
    assert all(launch._strides(ready)) and torch.equal(ready, given)
    assert (ready.data_ptr() != given.data_ptr()) == is_copied
    # To a compiler, results lie as `empty_like` makes them; `attend` passes contiguous rows only.
    assert strides[3] != 1 or torch.empty_like(ready).stride()[1:] == torch.empty_like(given).stride()[1:]


# On Hopper, 72 is compiled like 64 to 128; `python -m tests.kernels.span_compile` does everything.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("head_dim", "major"), [full(72, 8), (72, 9), full(512, 9), (512, 10)])
def test_machine_code(head_dim: int, major: int) -> None:
    """No spills, tensor cores, loads in bulk or by 16 bytes, and memory that the GPU has; for shards the same code."""
    kernels = compile_kernels(head_dim, major)
    assert len(kernels) == 4
    for name, code in kernels.items():
        assert code.variants == 1, name
        assert code.stack == code.spills == 0, (name, code)
        assert code.shared <= SHARED_BYTES[major] and code.tensor_memory <= TENSOR_MEMORY_COLUMNS, (name, code)
        if name == "delta_of":
            assert code.wide >= 2, code
        else:
            assert code.tensor_core >= 16, (name, code)
            assert code.bulk >= 5 if major >= 9 else code.wide >= 16, (name, code)
