"""Sums of grouped products: the reference against a loop, the Triton kernel in the interpreter and as machine code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.versions import needs_triton_3_9
from vlm_kernels import grouped_gradient as ops
from vlm_kernels.grouped_gradient import add_grouped_product_

ROOT = Path(__file__).parents[2]
# Relative to the largest value: fp32 on one side, fp64 on the other; operands are rounded before.
ERROR = 2e-6
MUTANT_ERROR = 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [[5, 0, 9, 0], [0, 0], [0, 3, 4]], ids=str)
def test_reference_is_a_loop(counts: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    gradient, rows = (torch.randn(sum(counts), size, generator=generator).to(dtype) for size in (8, 16))
    total = torch.randn(len(counts), 8, 16, generator=generator)
    expected, ends = total.double(), torch.tensor(counts).cumsum(0).int()
    for group, (left, right) in enumerate(zip(gradient.split(counts), rows.split(counts), strict=True)):
        expected[group] += left.double().t() @ right.double()
    add_grouped_product_(total, gradient, rows, ends)
    assert (total - expected).abs().max() <= ERROR * expected.abs().max()


def test_operator_is_registered_correctly() -> None:
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    torch.library.opcheck(ops.add_by_operator_, (torch.randn(3, 8, 16), torch.randn(5, 8), torch.randn(5, 16), ends))


def test_the_kernel_runs_where_it_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not in fp32, nor on another GPU."""
    called: list[torch.dtype] = []
    monkeypatch.setattr(ops, "is_on_gpu", lambda _: True)
    monkeypatch.setattr(ops, "compute_capability", lambda _: (9, 0))
    monkeypatch.setattr(ops, "add_by_operator_", lambda total, gradient, *_: called.append(gradient.dtype))
    ends = torch.tensor([2, 4], dtype=torch.int32)
    for proven in (ops.PROVEN, frozenset({(10, 0)}), frozenset({(9, 0)})):
        monkeypatch.setattr(ops, "PROVEN", proven)
        for dtype in (torch.float32, torch.bfloat16):
            add_grouped_product_(torch.zeros(2, 8, 8), *torch.ones(2, 4, 8, dtype=dtype).unbind(0), ends)
    assert called == [torch.bfloat16]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    """Errors by case and by mutant; the interpreter is chosen in a process of its own, before any import."""
    pytest.importorskip("triton")
    finished = subprocess.run(
        [sys.executable, "-m", "tests.kernels.grouped_interpreter"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    results: dict[str, dict[str, float]] = {"case": {}, "mutant": {}}
    for line in map(json.loads, finished.stdout.splitlines()):
        for kind in results.keys() & line.keys():
            results[kind][line[kind]] = line["error"]
    return results


@needs_triton_3_9
def test_kernel_equals_the_reference(interpreted: dict[str, dict[str, float]]) -> None:
    assert len(interpreted["case"]) == 7
    for name, error in interpreted["case"].items():
        assert error < ERROR, name


@needs_triton_3_9
def test_mutants_are_noticed(interpreted: dict[str, dict[str, float]]) -> None:
    """The comparison can fail: a change of one line shows."""
    assert len(interpreted["mutant"]) == 8
    for name, error in interpreted["mutant"].items():
        assert error > MUTANT_ERROR, name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("major", [8, 9, 10])
def test_machine_code(major: int) -> None:
    """No spills, tensor cores, loads of 16 bytes, memory that the GPU has; one code for all sizes of experts."""
    pytest.importorskip("triton")
    from tests.kernels.span_compile import SHARED_BYTES, TENSOR_MEMORY_COLUMNS, compiled_by
    from vlm_kernels.grouped_gradient import launch

    def run() -> None:
        for columns_m, columns_n in ((1536, 2048), (2048, 768), (1408, 2816), (96, 64)):
            total = torch.zeros(2, columns_m, columns_n)
            gradient, rows = (torch.zeros(8, columns, dtype=torch.bfloat16) for columns in (columns_m, columns_n))
            launch.add_grouped_product_(total, gradient, rows, torch.zeros(2, dtype=torch.int32), major)

    (code,) = compiled_by(run, major).values()
    assert code.variants == 1 and code.stack == code.spills == 0, code
    assert code.shared <= SHARED_BYTES[major] and code.tensor_memory <= TENSOR_MEMORY_COLUMNS, code
    # On Hopper and later an instruction multiplies 64 rows or more.
    assert code.tensor_core >= (32 if major == 8 else 4) and code.wide >= 16, code
