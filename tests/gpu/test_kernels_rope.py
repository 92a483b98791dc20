"""Norm and rotation of queries and keys on CUDA against fp64: new inputs in every run, poisoned memory."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from tests.gpu.poison import poison
from tests.kernels.rope_cases import Case, Inputs, make
from tests.kernels.test_rope import call, expected, gradients, leaves
from tests.kernels.test_rope_emulated import CASES
from vlm_kernels.rope import qk_norm_rope, reference

HALF_UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Sizes of models, beside those that the host runs: Qwen3-VL 8B, its tower, Gemma 3 27B, Gemma 4, Mistral with a scale.
SIZES: dict[str, Case] = {
    "Qwen3-VL 8B": Case(tokens=(4099, 1), heads=(32, 8), head_dim=128, rotated=128),
    "vision tower": Case(tokens=(4096,), heads=(16, 16), head_dim=72, rotated=72, packed=True, eps=None, weights=False),
    "Gemma 3 27B, two rows": Case(tokens=(1000, 2), heads=(32, 16), head_dim=128, rotated=128, zero_centered=True),
    "heads of 256": Case(tokens=(513, 3), heads=(32, 16), head_dim=256, rotated=256, strided=True),
    "heads of 512, a quarter turns": Case(tokens=(300, 2), heads=(32, 4), head_dim=512, rotated=128),
    "two axes": Case(tokens=(4096,), heads=(16, 16), head_dim=72, rotated=72, sections=2, packed=True, weights=False),
    "scaled, no norms": Case(
        tokens=(2048, 2), heads=(8, 2), head_dim=128, rotated=128, scaled=True, eps=None, weights=False
    ),
}
ALL = {
    **{name: case for name, (case, _) in CASES.items()},
    **{
        f"{name}, tables of {str(table).removeprefix('torch.')}": replace(case, dtype=torch.bfloat16, table_dtype=table)
        for name, case in SIZES.items()
        for table in (torch.bfloat16, torch.float32)
    },
}


def on_gpu(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """In the same layout: a copy of a view alone would close its gaps and move it to the beginning of its memory."""

    def copied(x: torch.Tensor) -> torch.Tensor:
        memory = x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0).to("cuda", dtype)
        return memory.as_strided(x.shape, x.stride(), x.storage_offset())

    given = {field.name: getattr(inputs, field.name) for field in fields(Inputs)}
    return Inputs(**{name: None if x is None else copied(x) for name, x in given.items()})


@pytest.mark.parametrize("name", ALL)
def test_against_fp64(name: str) -> None:
    case = ALL[name]
    made = make(case, seed=torch.seed() % 2**31)
    ours, exact = leaves(on_gpu(made)), leaves(on_gpu(made, torch.float64))
    poison()
    found = call(ours, case)
    torch.autograd.backward(found, (ours.q_grad, ours.k_grad))
    right = expected(exact, case)
    torch.autograd.backward(right, (exact.q_grad, exact.k_grad))
    # A forward pass rounds up to four times on a way whose values are at most about twice the result's pair; a gradient
    # is rounded once. In fp32, sums of up to 512 terms.
    unit = HALF_UNIT[case.dtype]
    for mine, its in zip(found, right, strict=True):
        bound = 8 * unit * (its.abs() + its.abs().mean()) + 4e-6 * its.abs().max()
        assert ((mine.double() - its).abs() <= bound).float().mean() > 0.999
        assert (mine.double() - its).norm() <= (2 * unit + 1e-6) * its.norm()
    for mine, its in zip(gradients(ours), gradients(exact), strict=True):
        assert (mine.double() - its).norm() <= (0.6 * unit + 1e-6) * its.norm()
        bound = 1.01 * unit * its.abs() + 4e-6 * its.abs().max()
        assert ((mine.double() - its).abs() <= bound).all()


@pytest.mark.parametrize("name", ALL)
def test_rounds_as_the_reference(name: str) -> None:
    """The reference on a CPU, up to sums in another order, which tip few roundings by one unit."""
    case = ALL[name]
    if case.tokens[0] > 1000:
        case = replace(case, tokens=(257, *case.tokens[1:]))
    made = make(case, seed=torch.seed() % 2**31)
    poison()
    found = call(on_gpu(made), case)
    weights = (made.q_weight, made.k_weight, made.cosine, made.sine, made.query_scale)
    right = reference.forward(made.q, made.k, *weights, case.eps, case.zero_centered, case.sections)
    unit = 2 * HALF_UNIT[case.dtype]
    for mine, its in zip(found, right, strict=False):
        difference = (mine.cpu().double() - its.double()).abs()
        assert difference.max() <= max(2 * unit, 3e-6) * its.double().abs().max()
        if case.dtype != torch.float32:
            assert (difference > 0).double().mean() <= 0.02


def test_the_same_bits_again() -> None:
    case = replace(SIZES["Qwen3-VL 8B"], dtype=torch.bfloat16, table_dtype=torch.bfloat16)
    inputs = on_gpu(make(case))
    runs = []
    for _ in range(3):
        each = leaves(inputs)
        found = call(each, case)
        torch.autograd.backward(found, (each.q_grad, each.k_grad))
        runs.append([*found, *gradients(each)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_no_tokens() -> None:
    case = replace(SIZES["Qwen3-VL 8B"], tokens=(0, 1), dtype=torch.bfloat16, table_dtype=torch.bfloat16)
    inputs = leaves(on_gpu(make(case)))
    found = call(inputs, case)
    torch.autograd.backward(found, (inputs.q_grad, inputs.k_grad))
    assert found[0].shape == inputs.q.shape and not inputs.q_weight.grad.any()


@pytest.mark.kernels_only
def test_what_is_refused() -> None:
    x = torch.randn(3, 2, 16, device="cuda")
    table = (torch.randn(3, 8, device="cuda"),) * 2
    with pytest.raises(RuntimeError, match="at most 512"):
        qk_norm_rope(torch.randn(3, 2, 1024, device="cuda"), torch.randn(3, 2, 1024, device="cuda"), table)
    with pytest.raises(RuntimeError, match="same tokens"):
        qk_norm_rope(x, x, (table[0][:2], table[1][:2]))
    with pytest.raises(RuntimeError, match="one dtype"):
        qk_norm_rope(x, x.bfloat16(), table)
