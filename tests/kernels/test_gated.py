"""Gated activations: the reference against autograd of the formulas in fp64, and the kernels' bodies against it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.kernels.emulator.emulate import Edits, EmulatorError, Order, compile_kernels
from tests.kernels.marks import needs_extension
from vlm_kernels import gated as ops
from vlm_kernels.gated import ACTIVATIONS, Activation, gated, gated_halves

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


def call(activation: Activation, inputs: dict[str, torch.Tensor], consume: bool = False) -> torch.Tensor:
    return (gated_halves if "gate_up" in inputs else gated)(activation=activation, consume=consume, **inputs)


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
    torch.library.opcheck(torch.ops.vlm_kernels.gated.default, (*arguments, False))
    detached = [value.detach() if isinstance(value, torch.Tensor) else value for value in arguments]
    for operator in (ops._gated_backward, ops._gated_backward_in_place):
        torch.library.opcheck(operator, (torch.randn(TOKENS, WIDTH).bfloat16(), *detached))


def test_gradient_of_a_factor_is_contiguous_whatever_the_factor_is() -> None:
    gradient, gate, up = torch.randn(3, 2, 3, 8)
    arguments = (gradient, gate, up, torch.rand(3, 2).t(), ACTIVATIONS["silu"])
    for operator in (ops._gated_backward, ops._gated_backward_in_place):
        torch.library.opcheck(operator, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_recomputed_and_compiled(form: str, consume: bool) -> None:
    inputs = make_inputs(form, torch.float32)

    def run(*values: torch.Tensor) -> torch.Tensor:
        return call("silu", dict(zip(inputs, (value * 1 for value in values), strict=True)), consume)

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_lie_over_what_is_given_up(form: str, dtype: torch.dtype) -> None:
    """If the graph ends; the same numbers wherever they lie."""
    leaves = make_inputs(form, dtype)
    names = [name for name in leaves if name != "factor"]
    results, addresses = {}, {}
    for case, keeps in (("apart", None), ("kept", True), ("over", False)):
        inputs = leaves | {name: leaves[name] * 1 for name in names}
        of_inputs = {}
        for name in names:
            inputs[name].register_hook(lambda gradient, name=name, found=of_inputs: found.update({name: gradient}))
        memory = [inputs[name].data_ptr() for name in names]
        output = call("silu", inputs, consume=keeps is not None)
        gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        results[case] = torch.autograd.grad(output, list(leaves.values()), gradient, retain_graph=bool(keeps))
        addresses[case] = [of_inputs[name].data_ptr() for name in names] == memory
        if keeps:
            again = torch.autograd.grad(output, list(leaves.values()), gradient)
            assert all(torch.equal(a, b) for a, b in zip(again, results[case], strict=True))
    assert addresses == {"apart": False, "kept": False, "over": True}
    for case in ("kept", "over"):
        assert all(torch.equal(a, b) for a, b in zip(results[case], results["apart"], strict=True))


def test_leaves_are_not_written_over() -> None:
    inputs = make_inputs("halves, factor", torch.float32)
    before = inputs["gate_up"].detach().clone()
    call("silu", inputs, consume=True).sum().backward()
    assert torch.equal(inputs["gate_up"].detach(), before)
    gate, up = make_inputs("two tensors", torch.float32).values()
    before = up.detach().clone()
    gated(gate * 1, up, "silu", consume=True).sum().backward()
    assert torch.equal(up.detach(), before)


def test_others_that_read_what_was_given_up_fail() -> None:
    """Autograd sees it: the square saved the gate, and its turn comes after the product's."""
    inputs = make_inputs("two tensors", torch.float32)
    gate, up = (value * 1 for value in inputs.values())
    square = gate.square()
    total = (gated(gate, up, "silu", consume=True) + square).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


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


@needs_extension
def test_calls_reach_the_extension() -> None:
    """Up to the launch, which no rows need: results have the right shapes, errors come before it."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    gate, wide, factor = torch.empty(0, 8), torch.empty(0, 16), torch.empty(0)
    for given in ((gate, gate, None), (gate, gate, factor), (wide, None, factor), (wide, None, None)):
        assert torch.ops.vlm_kernels.gated.default.redispatch(cuda, *given, 1, True).shape == gate.shape
        gradients = ops._gated_backward.redispatch(cuda, gate, *given, 1)
        assert [result.shape for result in gradients] == [tensor.shape for tensor in given if tensor is not None]
        assert ops._gated_backward_in_place.redispatch(cuda, gate, *given, 1).shape == (0,)
    x = torch.randn(2, 16)
    for given, message in (
        ((x, x[:, :8], None, 0), "gate and up"),
        ((x, x, torch.randn(3), 0), "one for each row"),
        ((x[:, :15], None, None, 0), "odd number"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.vlm_kernels.gated.default.redispatch(cuda, *given, False)


# The kernels' bodies on the host

NAMES = {torch.float32: "float", torch.float16: "float16", torch.bfloat16: "bfloat16"}
ROW_WARPS = 2


def launchers(dtypes: Iterable[torch.dtype] = NAMES, activations: Iterable[Activation] = ACTIVATIONS) -> str:
    """For each type, vector and activation: {flat,flat_gradient,rows,rows_gradient}_{type}_{N}_{activation}."""
    text = ['#include "gated/gated.cuh"\nusing namespace kernels;']
    for dtype in dtypes:
        name, pointer = NAMES[dtype], f"const {NAMES[dtype]}*"
        for n in (1, 16 // dtype.itemsize):
            for activation in activations:
                suffix, types = f"{name}_{n}_{ACTIVATIONS[activation]}", f"{name}, {n}, {ACTIVATIONS[activation]}"
                text.append(f"""
extern "C" void flat_{suffix}({pointer} gate, {pointer} up, {name}* out, int64_t num_vectors, int64_t blocks) {{
  emulator::launch(dim3(blocks), dim3(32), 0, [=] {{ gated_flat<{types}>(gate, up, out, num_vectors); }});
}}
extern "C" void flat_gradient_{suffix}({pointer} gradient, {pointer} gate, {pointer} up, {name}* grad_gate,
                                       {name}* grad_up, int64_t num_vectors, int64_t blocks) {{
  emulator::launch(dim3(blocks), dim3(32), 0, [=] {{
    gated_flat_gradient<{types}>(gradient, gate, up, grad_gate, grad_up, num_vectors);
  }});
}}
extern "C" void rows_{suffix}({pointer} gate, const float* factor, {name}* out, int64_t num_rows, int64_t width,
                              int64_t stride, int64_t blocks) {{
  emulator::launch(dim3(blocks), dim3(32, {ROW_WARPS}), 0, [=] {{
    gated_rows<{types}>(gate, gate + width, factor, out, num_rows, width / {n}, stride);
  }});
}}
extern "C" void rows_gradient_{suffix}({pointer} gradient, {pointer} gate, const float* factor, {name}* grad_gate,
                                       float* grad_factor, int64_t num_rows, int64_t width, int64_t stride,
                                       int64_t blocks) {{
  emulator::launch(dim3(blocks), dim3(32, {ROW_WARPS}), 0, [=] {{
    gated_rows_gradient<{types}>(gradient, gate, gate + width, factor, grad_gate, grad_gate + width, grad_factor,
                                 num_rows, width / {n}, stride);
  }});
}}""")
    return "\n".join(text)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


def check_kernels(
    form: str,
    activation: Activation,
    dtype: torch.dtype,
    shape: tuple[int, int],
    unaligned: bool = False,
    order: Order = Order.ASCENDING,
    edits: Edits | None = None,
) -> None:
    """Results of the kernels against the reference's, which are computed in fp64 and rounded."""
    run = compile_kernels(launchers([dtype], [activation]), edits) if edits else compile_kernels(launchers())
    inputs = {name: value.detach() for name, value in make_inputs(form, dtype, shape).items()}
    if unaligned:
        inputs = {name: shifted(value) if value.dtype == dtype else value for name, value in inputs.items()}
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    num_rows, width = shape
    per_row = width if "gate_up" in inputs else num_rows * width
    n = 1 if unaligned or per_row * dtype.itemsize % 16 else 16 // dtype.itemsize
    suffix = f"{NAMES[dtype]}_{n}_{ACTIVATIONS[activation]}"
    output = poisoned(*shape, dtype=dtype)
    if "gate_up" in inputs:
        whole, factor = inputs["gate_up"], inputs.get("factor")
        sizes = (num_rows, width, 2 * width, -(-num_rows // ROW_WARPS))
        run(f"rows_{suffix}", whole, factor, output, *sizes, order=order)
        gradients = [poisoned(num_rows, 2 * width, dtype=dtype)]
        gradients += [] if factor is None else [poisoned(num_rows)]
        grad_factor = None if factor is None else gradients[1]
        run(f"rows_gradient_{suffix}", gradient, whole, factor, gradients[0], grad_factor, *sizes, order=order)
    else:
        pair = inputs["gate"], inputs["up"]
        sizes = (num_rows * width // n, -(-num_rows * width // n // 64))
        run(f"flat_{suffix}", *pair, output, *sizes, order=order)
        gradients = [poisoned(*shape, dtype=dtype) for _ in pair]
        run(f"flat_gradient_{suffix}", gradient, *pair, *gradients, *sizes, order=order)
    wide = {name: value.double().requires_grad_() for name, value in inputs.items()}
    exact = formula(activation, wide)
    expected = [exact, *torch.autograd.grad(exact, list(wide.values()), gradient.double())]
    for result, wanted in zip([output, *gradients], expected, strict=True):
        bound = 2 * ROUNDING[result.dtype] * wanted.abs() + 2e-6 * wanted.abs().max()
        assert ((result.double() - wanted).abs() <= bound).all()


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers one element past an aligned address."""
    return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view_as(tensor)


# Widths of vectors: a whole batch of a warp, one and a half, a part of a warp; and no whole vectors.
SHAPES = [(5, 64 * 8), (3, 96 * 8), (7, 16), (3, 13)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("form", ["two tensors", "halves", "halves, factor"])
def test_kernels(form: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check_kernels(form, "silu", dtype, shape, order=Order.SHUFFLED)


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
@pytest.mark.parametrize("form", ["two tensors", "halves, factor"])
def test_kernels_of_other_activations(form: str, activation: Activation) -> None:
    for dtype in NAMES:
        check_kernels(form, activation, dtype, (7, 16))


@pytest.mark.parametrize("form", ["two tensors", "halves, factor"])
def test_kernels_at_any_address(form: str) -> None:
    check_kernels(form, "silu", torch.bfloat16, (3, 16), unaligned=True)


def test_results_may_lie_over_arguments() -> None:
    gate, up = (value.detach() for value in make_inputs("two tensors", torch.bfloat16, (4, 256)).values())
    gradient = torch.randn(4, 256).bfloat16()
    run, apart, over = compile_kernels(launchers()), [torch.empty_like(gate), torch.empty_like(up)], gate.clone()
    run("flat_gradient_bfloat16_8_0", gradient, gate, up, *apart, 128, 2)
    run("flat_bfloat16_8_0", gate, up, over, 128, 2)
    both = torch.stack((gate, up))
    run = compile_kernels(
        """
#include "gated/gated.cuh"
using namespace kernels;
extern "C" void over_arguments(const bfloat16* gradient, bfloat16* both, bfloat16* gate) {
  emulator::launch(dim3(2), dim3(32), 0, [=] {
    gated_flat_gradient<bfloat16, 8, 0>(gradient, both, both + 1024, both, both + 1024, 128);
  });
  emulator::launch(dim3(2), dim3(32), 0, [=] { gated_flat<bfloat16, 8, 0>(gate, gate + 1024, gate, 128); });
}"""
    )
    arguments = torch.stack((gate, up))
    run("over_arguments", gradient, both, arguments)
    assert torch.equal(both, torch.stack(apart)) and torch.equal(arguments[0], over)


# Each edit breaks one thing, in a way that would not stop the kernel from compiling.
MUTATIONS = {
    "vectors past the end": ("if (vector < end)", "if (vector <= end)", "two tensors", (3, 13)),
    "the last vector left out": ("if (vector < end)", "if (vector + 1 < end)", "two tensors", (5, 512)),
    "blocks that overlap": ("* block * GATED_BATCH", "* block", "two tensors", (5, 512)),
    "a row too many": ("if (row >= num_rows) return;", "", "halves, factor", (5, 16)),
    "no sum over the warp": ("sum = warp_reduce<Sum>(sum);", "", "halves, factor", (5, 512)),
    "the factor twice": ("+= gradient[i] * activated", "+= scaled * activated", "halves, factor", (5, 16)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_seen(name: str) -> None:
    old, new, form, shape = MUTATIONS[name]
    check_kernels(form, "silu", torch.float32, shape)
    with pytest.raises((AssertionError, EmulatorError)):
        check_kernels(form, "silu", torch.float32, shape, edits={"gated/gated.cuh": [(old, new)]})
