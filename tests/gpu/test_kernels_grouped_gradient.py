"""Weight gradients of experts on CUDA: our kernel, and torch's product that is added, against fp64."""

from __future__ import annotations

import pytest
import torch

from vlm_kernels.grouped_gradient import add_by_operator_, add_grouped_product_, reference

pytestmark = pytest.mark.usefixtures("poisoned")

# Rows of each expert, and columns: experts without rows, one row, tiles that end anywhere, sizes of real models.
CASES = {
    "some empty": ([5, 0, 9, 0], (48, 32)),
    "no rows at all": ([0, 0, 0], (48, 32)),
    "first has none": ([0, 300, 1, 64], (136, 200)),
    "gate and up of Qwen3-VL": ([700, 0, 31, 2048, 128], (1536, 2048)),
    "down of Gemma 4": ([513, 64, 0], (2816, 704)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_sums(name: str, dtype: torch.dtype) -> None:
    counts, columns = CASES[name]
    ends = torch.tensor(counts, device="cuda").cumsum(0).int()
    gradient, rows = (torch.randn(sum(counts), size, device="cuda").to(dtype) for size in columns)
    before = torch.randn(len(counts), *columns, device="cuda")
    exact = before.double()
    reference.add_grouped_product_(exact, gradient, rows, ends)
    largest, empty = exact.abs().amax(), ends.diff(prepend=ends.new_zeros(1)) == 0
    ours, again, added = (before.clone() for _ in range(3))
    add_by_operator_(ours, gradient, rows, ends)
    add_by_operator_(again, gradient, rows, ends)
    assert torch.equal(ours, again) and torch.equal(ours[empty], before[empty])
    assert (ours - exact).abs().max() <= 2e-6 * largest
    if dtype == torch.bfloat16:  # all that torch's product takes beside fp32
        add_grouped_product_(added, gradient, rows, ends)
        assert torch.equal(added[empty], before[empty])
        assert (added - exact).abs().max() <= 2**-8 * largest


def test_the_host_never_waits() -> None:
    ends = torch.tensor([5, 5, 14], dtype=torch.int32, device="cuda")
    gradient, rows = torch.randn(2, 14, 64, device="cuda").bfloat16().unbind(0)
    total = torch.zeros(3, 64, 64, device="cuda")
    add_by_operator_(total, gradient, rows, ends)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        add_by_operator_(total, gradient, rows, ends)
        if torch.cuda.get_device_capability()[0] >= 9:  # on older ones torch's product brings `ends` to the host
            add_grouped_product_(total, gradient, rows, ends)
    finally:
        torch.cuda.set_sync_debug_mode("default")
