"""Gated activations on CUDA against fp64: new inputs in every run, memory that is NaN before a kernel writes it."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_gated import FORMULAS, ROUNDING
from vlm_kernels.gated import ACTIVATIONS, Activation, gated, gated_halves

pytestmark = pytest.mark.usefixtures("poisoned")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(shape, device="cuda")).to(dtype).requires_grad_()


def check(ours: torch.Tensor, exact: torch.Tensor, inputs: list[torch.Tensor], wide: list[torch.Tensor]) -> None:
    gradient = torch.randn_like(ours)
    results = [ours, *torch.autograd.grad(ours, inputs, gradient)]
    expected = [exact, *torch.autograd.grad(exact, wide, gradient.double())]
    for result, wanted in zip(results, expected, strict=True):
        # Rounding once; sums of a row and approximate exponentials are off by a few bits of fp32.
        bound = 2 * ROUNDING[result.dtype] * wanted.abs() + 2e-6 * wanted.abs().max()
        assert ((result.double() - wanted).abs() <= bound).all()


# Whole vectors, and none: odd widths, and one element past an aligned address.
@pytest.mark.parametrize("shape", [(257, 12288), (3, 21504), (64, 13)], ids=str)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_two_tensors(activation: Activation, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    inputs = [random(*shape, dtype=dtype), random(*shape, dtype=dtype)]
    wide = [value.detach().double().requires_grad_() for value in inputs]
    check(gated(*inputs, activation), FORMULAS[activation](wide[0]) * wide[1], inputs, wide)


@pytest.mark.parametrize("with_factor", [True, False])
@pytest.mark.parametrize("shape", [(4099, 768), (130, 704), (33, 2048), (64, 13), (0, 768)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_halves(activation: Activation, shape: tuple[int, int], with_factor: bool) -> None:
    inputs = [random(shape[0], 2 * shape[1], dtype=torch.bfloat16)] + [random(shape[0])] * with_factor
    wide = [value.detach().double().requires_grad_() for value in inputs]
    gate, up = wide[0].chunk(2, dim=-1)
    exact = FORMULAS[activation](gate) * up * (wide[1][:, None] if with_factor else 1.0)
    if shape[0]:
        check(gated_halves(inputs[0], activation, *inputs[1:]), exact, inputs, wide)
    else:
        assert gated_halves(inputs[0], activation, *inputs[1:]).shape == exact.shape


def test_any_address() -> None:
    inputs = [random(1 + 5 * 64, dtype=torch.bfloat16) for _ in range(2)]
    wide = [value.detach().double().requires_grad_() for value in inputs]
    ours, exact = (
        gated(*(value[1:].view(5, 64) for value in inputs), "silu"),
        (FORMULAS["silu"](wide[0]) * wide[1])[1:].view(5, 64),
    )
    check(ours, exact, inputs, wide)


def test_the_same_bits_again() -> None:
    inputs = [random(1000, 1536, dtype=torch.bfloat16), random(1000)]
    gradient = torch.randn(1000, 768, device="cuda").bfloat16()
    runs = []
    for _ in range(3):
        output = gated_halves(inputs[0], "silu", inputs[1])
        runs.append([output, *torch.autograd.grad(output, inputs, gradient)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("halves", [True, False])
def test_gradients_over_what_is_given_up(halves: bool) -> None:
    leaves = [random(300, 1536, dtype=torch.bfloat16) for _ in range(1 if halves else 2)]
    factor = [random(300)] if halves else []
    results = []
    for consume in (False, True):
        given = [leaf * 1 for leaf in leaves]
        if halves:
            output = gated_halves(*given, "gelu_tanh", *factor, consume=consume)
        else:
            output = gated(*given, "gelu_tanh", consume=consume)
        gradient = torch.ones_like(output)
        results.append(torch.autograd.grad(output, [*leaves, *factor], gradient))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
