"""RMS norms on CUDA against fp64: new inputs in every run, poisoned memory, sizes of models and odd ones."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.poison import poison
from tests.kernels.test_rms_norm import EPS, OPERATIONS, outputs
from vlm_kernels.rms_norm import reference, rms_norm, rms_norm_add_rms_norm

# Every variant of the kernels: 1, 2 and 4 vectors of a thread, re-read rows with and without vectors; rows that share a
# block; more rows than blocks that stay.
SHAPES = [
    (3, 1, 72),
    (1000, 128),
    (4099, 1024),
    (517, 2, 5376),
    (8192, 4096),
    (70, 10240),
    (33, 20480),
    (130, 4099),
    (1, 1),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make(operation, shape: tuple[int, ...], dtype: torch.dtype, zero_centered: bool) -> list[torch.Tensor]:
    num_rows, num_weights = OPERATIONS[operation]
    torch.manual_seed(torch.seed() % 2**31)
    rows = [torch.randn(shape, device="cuda").to(dtype) for _ in range(num_rows)]
    around = 0.0 if zero_centered else 1.0
    weights = [(around + 0.2 * torch.randn(shape[-1], device="cuda")).to(dtype) for _ in range(num_weights)]
    return [tensor.requires_grad_() for tensor in rows + weights]


@pytest.mark.parametrize("zero_centered", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_against_fp64(operation, shape: tuple[int, ...], dtype: torch.dtype, zero_centered: bool) -> None:
    arguments = make(operation, shape, dtype, zero_centered)
    poison()
    found = outputs(operation, arguments, zero_centered)
    upstream = [torch.randn_like(result) for result in found]
    poison()
    grads = torch.autograd.grad(found, arguments, upstream)
    name = operation.__name__
    exact = getattr(reference, name)(*(tensor.detach().double() for tensor in arguments), EPS, zero_centered)
    exact = exact if isinstance(exact, tuple) else (exact,)
    # In fp32, sums of thousands of terms count for more than roundings.
    unit = max(torch.finfo(dtype).eps, 4e-6)
    for mine, its in zip(found, exact, strict=True):
        # A norm and a sum are rounded to half a unit each, and so is the norm of their sum.
        torch.testing.assert_close(mine.double(), its, rtol=2 * unit, atol=4 * unit)
    wide = [tensor.detach().double().requires_grad_() for tensor in arguments]
    exact_grads = torch.autograd.grad(outputs(operation, wide, zero_centered), wide, [g.double() for g in upstream])
    for mine, its in zip(grads, exact_grads, strict=True):
        # Norms: single elements of a weight's gradient are sums of thousands of terms that cancel. All of it does in
        # rows of one element, whose norm does not depend on it.
        allowed = 3 * unit * its.norm() + (8 * unit * upstream[0].norm() if shape[-1] == 1 else 0)
        assert (mine.double() - its).norm() <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_as_the_reference(dtype: torch.dtype) -> None:
    """Up to sums in another order, which tip few roundings by one unit."""
    arguments = make(rms_norm_add_rms_norm, (64, 5376), dtype, True)
    poison()
    found = outputs(rms_norm_add_rms_norm, arguments, True)
    right = reference.rms_norm_add_rms_norm(*(tensor.detach() for tensor in arguments), EPS, True)
    unit = torch.finfo(dtype).eps
    for mine, its in zip(found, right, strict=True):
        torch.testing.assert_close(mine, its, rtol=2 * unit, atol=unit)
        if dtype is not torch.float32:
            assert (mine != its).float().mean() < 0.02


def test_unaligned_and_strided_inputs() -> None:
    memory = torch.randn(100 * 512 + 8, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(512, device="cuda", dtype=torch.bfloat16)
    for x in (memory[1 : 1 + 100 * 512].view(100, 512), memory[: 100 * 512].view(512, 100).t()):
        expected = reference.rms_norm(x, weight, EPS, False)
        torch.testing.assert_close(rms_norm(x, weight, EPS), expected, rtol=2**-7, atol=2**-7)


def test_no_weight_and_frozen_weights() -> None:
    x = torch.randn(300, 1152, device="cuda", requires_grad=True)
    weight = torch.randn(1152, device="cuda")
    for given in (None, weight):
        ours, theirs = rms_norm(x, given, EPS), reference.rms_norm(x, given, EPS, False)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        grad = torch.randn_like(x)
        torch.testing.assert_close(
            *(torch.autograd.grad(result, x, grad)[0] for result in (ours, theirs)), rtol=1e-4, atol=1e-5
        )


def test_gradients_of_weights_are_the_same_every_time() -> None:
    arguments = make(rms_norm_add_rms_norm, (4096, 2048), torch.bfloat16, True)
    grads = []
    for _ in range(3):
        found = outputs(rms_norm_add_rms_norm, arguments, True)
        grads.append(torch.autograd.grad(found, arguments, [torch.ones_like(result) for result in found]))
    for again in grads[1:]:
        assert all(a.equal(b) for a, b in zip(grads[0], again, strict=True))


def test_another_stream_and_no_rows() -> None:
    x, weight = torch.randn(64, 512, device="cuda"), torch.randn(512, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours = rms_norm(x.mul_(2), weight, EPS)
    stream.synchronize()
    torch.testing.assert_close(ours, reference.rms_norm(x, weight, EPS, False), rtol=1e-5, atol=1e-5)
    assert rms_norm(x[:0], weight, EPS).shape == (0, 512)
