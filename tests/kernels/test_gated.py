"""Gated activations: the reference against autograd of the formulas in fp64, and the kernels' bodies against it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels import gated as ops
from kernels.gated import ACTIVATIONS, Activation, gated, gated_halves

TOKENS, WIDTH = 5, 7

FORMULAS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
}
FORMS = ("two tensors", "halves", "two tensors, factor", "halves, factor")


def make_inputs(form: str, dtype: torch.dtype, shape: tuple[int, ...] = (TOKENS, WIDTH), seed: int = 1) -> dict:
    """Keyword arguments of `call`; values up to 12, where activations are flat and exponentials large."""
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int, of: torch.dtype = dtype) -> torch.Tensor:
        values = torch.randn(sizes, generator=generator, dtype=torch.float64) * 3
        return values.to(of).requires_grad_()

    inputs = {"gate": random(*shape), "up": random(*shape)}
    if form.startswith("halves"):
        inputs = {"gate_up": random(*shape[:-1], 2 * shape[-1])}
    if form.endswith("factor"):
        inputs["factor"] = random(*shape[:-1], of=torch.promote_types(dtype, torch.float32))
    return inputs


def call(activation: Activation, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return (gated_halves if "gate_up" in inputs else gated)(activation=activation, **inputs)


def formula(activation: Activation, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    gate, up = inputs["gate_up"].chunk(2, dim=-1) if "gate_up" in inputs else (inputs["gate"], inputs["up"])
    product = FORMULAS[activation](gate) * up
    return product * inputs["factor"][..., None] if "factor" in inputs else product


# One rounding of the result: half of the last bit; fp32 sums and functions add a few of theirs.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_formula(activation: Activation, form: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(form, dtype)
    wide = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    ours, exact = call(activation, inputs), formula(activation, wide)
    assert ours.dtype == dtype and ours.is_contiguous()
    gradient = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    results = [ours, *torch.autograd.grad(ours, list(inputs.values()), gradient)]
    expected = [exact, *torch.autograd.grad(exact, list(wide.values()), gradient.double())]
    for result, wanted in zip(results, expected, strict=True):
        # Relative to each number; those near zero come from cancellation, and are compared with the largest.
        bound = ROUNDING[result.dtype] * wanted.abs() + 1e-6 * wanted.abs().max()
        assert ((result.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation: Activation, form: str) -> None:
    inputs = make_inputs(form, torch.float64, (2, 3))
    names = list(inputs)
    assert torch.autograd.gradcheck(
        lambda *values: call(activation, dict(zip(names, values, strict=True))), tuple(inputs.values())
    )


@pytest.mark.parametrize("form", FORMS)
def test_operators_are_registered_correctly(form: str) -> None:
    inputs = make_inputs(form, torch.bfloat16)
    gate, up = inputs.get("gate", inputs.get("gate_up")), inputs.get("up")
    arguments = (gate, up, inputs.get("factor"), ACTIVATIONS["gelu_tanh"])
    torch.library.opcheck(ops._gated, arguments)
    detached = [value.detach() if isinstance(value, torch.Tensor) else value for value in arguments]
    torch.library.opcheck(ops._gated_backward, (torch.randn(TOKENS, WIDTH).bfloat16(), *detached))


@pytest.mark.parametrize("form", FORMS)
def test_recomputed_and_compiled(form: str) -> None:
    inputs = make_inputs(form, torch.float32)

    def run(*values: torch.Tensor) -> torch.Tensor:
        return call("silu", dict(zip(inputs, values, strict=True)))

    results = []
    for variant in (
        run,
        lambda *values: checkpoint(run, *values, use_reentrant=False),
        torch.compile(run, backend="aot_eager", fullgraph=True),
    ):
        output = variant(*inputs.values())
        results.append([output, *torch.autograd.grad(output.square().sum(), list(inputs.values()))])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_only_gate_and_up_are_kept() -> None:
    inputs = make_inputs("two tensors, factor", torch.float32)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call("gelu_tanh", inputs)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in inputs.values()}


def test_strided_inputs_and_expanded_gradients() -> None:
    gate, up = (value.detach().t().requires_grad_() for value in make_inputs("two tensors", torch.float32).values())
    output = gated(gate, up, "silu")
    ours = torch.autograd.grad(output.sum(), (gate, up))  # the gradient of a sum is one number, expanded
    exact = formula("silu", {"gate": gate.double(), "up": up.double()})
    theirs = torch.autograd.grad(exact.sum(), (gate, up))
    for a, b in zip([output, *ours], [exact.float(), *theirs], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


def test_no_rows() -> None:
    inputs = make_inputs("halves, factor", torch.float32, (0, WIDTH))
    output = call("silu", inputs)
    assert output.shape == (0, WIDTH)
    for name, gradient in zip(inputs, torch.autograd.grad(output.sum(), list(inputs.values())), strict=True):
        assert gradient.shape == inputs[name].shape
