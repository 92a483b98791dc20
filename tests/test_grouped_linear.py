"""Weight gradients of grouped linears: in `main_grad` what autograd would have given, and each micro-batch's once."""

from __future__ import annotations

from functools import partial
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_vlm.layers.grouped_linear import grouped_linear
from megatron_vlm.layers.operands import Operand
from vlm_kernels import grouped_gradient

COUNTS = [[5, 0, 9], [0, 3, 4]]
IN, OUT = 16, 8


def make(dtype: torch.dtype, seed: int) -> torch.nn.Parameter:
    weight = torch.randn(3, 2, OUT // 2, IN, generator=torch.Generator().manual_seed(seed))
    return torch.nn.Parameter(weight.to(dtype))


def run(weight: torch.nn.Parameter, micro_batch: int, recompute: bool) -> None:
    generator = torch.Generator().manual_seed(micro_batch)
    counts = COUNTS[micro_batch]
    x = torch.randn(sum(counts), IN, generator=generator).to(weight.dtype).requires_grad_()
    ends = torch.tensor(counts).cumsum(0).int()
    function = partial(checkpoint, grouped_linear, use_reentrant=False) if recompute else grouped_linear
    output = function(x, Operand(weight), ends)
    output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))


def main_gradient(weight: torch.nn.Parameter, recompute: bool) -> torch.Tensor:
    """As megatron-core's data parallelism adds what is not there yet."""
    weight.main_grad = torch.ones(weight.shape)
    for micro_batch in range(len(COUNTS)):
        weight.grad_added_to_main_grad = False
        run(weight, micro_batch, recompute)
        assert weight.grad_added_to_main_grad and weight.grad is not None
        assert weight.grad.shape == weight.shape and weight.grad.dtype == weight.dtype
        assert weight.grad.untyped_storage().data_ptr() == weight.main_grad.untyped_storage().data_ptr()
        weight.grad = None
    return weight.main_grad - 1


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_summed_in_fp32(dtype: torch.dtype, recompute: bool) -> None:
    exact, weight = make(dtype, 1), make(dtype, 1)
    exact.data = exact.data.float()
    for micro_batch in range(len(COUNTS)):
        inputs = torch.Generator().manual_seed(micro_batch)
        x = torch.randn(sum(COUNTS[micro_batch]), IN, generator=inputs).to(dtype).float()
        gradient = torch.randn(len(x), OUT, generator=inputs).to(dtype).float()
        parts = zip(exact, x.split(COUNTS[micro_batch]), strict=True)
        torch.cat([rows @ matrix.flatten(0, 1).t() for matrix, rows in parts]).backward(gradient)
    assert exact.grad is not None
    found = main_gradient(weight, recompute)
    # Of the gradient's own bits, not of bf16's.
    torch.testing.assert_close(found, exact.grad, rtol=1e-5, atol=1e-5)


def test_a_gpu_without_the_kernel_adds_torchs_product() -> None:
    """What runs there until the kernel is proven, with the host in its place: equal up to bf16's rounding."""
    expected = main_gradient(make(torch.bfloat16, 1), False)
    operator = mock.Mock(side_effect=AssertionError("not proven"))
    with (
        mock.patch.object(grouped_gradient, "is_on_gpu", lambda _: True),
        mock.patch.object(grouped_gradient, "add_by_operator_", operator),
    ):
        found = main_gradient(make(torch.bfloat16, 1), False)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-2)


def test_without_main_gradients_autograd_gets_the_gradient() -> None:
    weight = make(torch.float32, 1)
    for micro_batch in range(len(COUNTS)):
        run(weight, micro_batch, False)
    torch.testing.assert_close(weight.grad, main_gradient(make(torch.float32, 1), False), rtol=1e-6, atol=1e-6)


def test_a_frozen_weight_keeps_no_rows() -> None:
    """Its gradient alone needs them."""
    weight = make(torch.float32, 1).requires_grad_(False)
    x = torch.randn(14, IN).requires_grad_()
    output = grouped_linear(x, Operand(weight), torch.tensor([5, 5, 14], dtype=torch.int32))
    assert output.grad_fn is not None and output.grad_fn.saved_tensors[0] is None
    output.sum().backward()
    assert x.grad is not None and weight.grad is None
