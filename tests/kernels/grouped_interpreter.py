"""Run by `test_grouped_gradient.py` in a process of its own, in Triton's interpreter: the kernel against the reference.

The interpreter must be chosen before the kernel is imported. Prints one line per case, as JSON: the largest error over
the largest value, and infinity where a group without rows was touched. Mutants, each a change of one line of the
source, follow in the same form: their errors must be large.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from vlm_kernels.grouped_gradient import launch, reference, triton_kernels


class Case(NamedTuple):
    """Rows of each group, columns of either side, and the size of tiles and steps."""

    counts: tuple[int, ...]
    columns: tuple[int, int] = (40, 24)
    blocks: tuple[int, int, int] = (16, 32, 16)
    dtype: torch.dtype = torch.float32


CASES = {
    "groups of any size": Case((5, 0, 33, 16, 0)),
    "the first has none": Case((0, 3, 20)),
    "no rows": Case((0, 0)),
    "one group": Case((50,), (16, 32)),
    "whole tiles": Case((32, 16), (32, 64)),
    "fp16": Case((5, 0, 33, 16), dtype=torch.float16),
    "fp16, whole tiles": Case((48, 16), (32, 64), dtype=torch.float16),
}
MUTANTS = {
    "rows of the next group": ("(row < end)[:, None] & ", "(row < end + 1)[:, None] & "),
    "columns past the last": ("& (column < columns)[None, :]", "& (column < columns - 1)[None, :]"),
    "from the first row": ("for first in range(begin,", "for first in range(0,"),
    "no sum": ("tl.load(pointers, mask=inside, other=0.0) + sums", "sums"),
    "the group before": ("tl.load(ends + group)", "tl.load(ends + group - 1, mask=group > 0, other=0)"),
    "one step": ("range(begin, end, BLOCK_T)", "range(begin, begin + 1, BLOCK_T)"),
    "tiles exchanged": ("first_m = tile // tiles_n", "first_m = tile // tiles_m"),
    "empty groups written": (
        "tl.store(pointers, tl.load(pointers, mask=inside, other=0.0) + sums",
        "tl.store(pointers + 1, sums",
    ),
}


def check(case: Case) -> float:
    """Return the largest error of totals that hold other gradients already."""
    generator = torch.Generator().manual_seed(1)
    columns_m, columns_n = case.columns
    num_rows = sum(case.counts)
    # Rows past the last group are not read.
    gradient, rows = (
        torch.randn(num_rows + 3, columns, generator=generator).to(case.dtype) for columns in case.columns
    )
    gradient[num_rows:] = rows[num_rows:] = torch.nan
    total = torch.randn(len(case.counts), columns_m, columns_n, generator=generator)
    expected, before = total.double(), total.clone()
    ends = torch.tensor(case.counts).cumsum(0).int()
    reference.add_grouped_product_(expected, gradient, rows, ends)
    blocks = launch.Blocks(*case.blocks, warps=4, stages=1)
    launch.add_grouped_product_(total, gradient, rows, ends, major=9, blocks=blocks, upcast=True)
    empty = torch.tensor(case.counts) == 0
    if not torch.equal(total[empty], before[empty]):
        return float("inf")
    return ((total - expected).abs().max() / expected.abs().max()).nan_to_num(float("inf")).item()


def error_of(old: str, new: str) -> float:
    """Return the largest error over the cases with a text of the kernel's source replaced."""
    text = Path(triton_kernels.__file__).read_text()
    assert text.count(old) == 1, old
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "mutant.py")
        path.write_text(text.replace(old, new))
        specification = importlib.util.spec_from_file_location("mutant", path)
        module = sys.modules["mutant"] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        launch.triton_kernels = module
        try:
            return max(check(CASES[name]) for name in ("groups of any size", "the first has none"))
        finally:
            launch.triton_kernels = triton_kernels


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, case in CASES.items():
        print(json.dumps({"case": name, "error": check(case)}), flush=True)
    for name, replaced in MUTANTS.items():
        print(json.dumps({"mutant": name, "error": error_of(*replaced)}), flush=True)
