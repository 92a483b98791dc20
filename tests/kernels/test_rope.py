"""Norm and rotation of queries and keys: the reference against complex numbers in fp64 and against transformers."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, apply_rotary_pos_emb

import vlm_kernels.rope as module
from tests.kernels.rope_cases import EPS, Case, Inputs, make
from vlm_kernels.rope import qk_norm_rope

CASES = {
    "plain weights": Case(strided=True),
    "one plus weights": Case(zero_centered=True),
    "norms without weights": Case(weights=False),
    "no norms": Case(eps=None, weights=False),
    "scaled queries": Case(scaled=True),
    "scaled, no norms": Case(scaled=True, eps=None, weights=False),
    "partial": Case(rotated=6),
    "two sections": Case(sections=2, head_dim=12, rotated=12),
    "two sections, partial": Case(sections=2, head_dim=12, rotated=8, zero_centered=True),
    "queries alone": Case(heads=(3, 0)),
    "packed": Case(tokens=(7,), heads=(3, 3), head_dim=6, rotated=6, packed=True, weights=False, eps=None),
    "packed with norms": Case(tokens=(7,), heads=(4, 1), packed=True),
}


def leaves(inputs: Inputs) -> Inputs:
    """Those that have gradients as leaves, in the same layout."""
    names = ("q", "k", "q_weight", "k_weight")
    given = {name: getattr(inputs, name) for name in names}
    return replace(inputs, **{key: x if x is None else x.detach().requires_grad_() for key, x in given.items()})


def gradients(inputs: Inputs) -> list[torch.Tensor]:
    return [x.grad for x in (inputs.q, inputs.k, inputs.q_weight, inputs.k_weight) if x is not None]


def settings(case: Case) -> dict[str, Any]:
    return {"eps": case.eps, "zero_centered": case.zero_centered, "sections": case.sections}


def call(inputs: Inputs, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return qk_norm_rope(
        inputs.q,
        inputs.k,
        (inputs.cosine, inputs.sine),
        q_weight=inputs.q_weight,
        k_weight=inputs.k_weight,
        query_scale=inputs.query_scale,
        **settings(case),
    )


def by_complex_numbers(x: torch.Tensor, weight: torch.Tensor | None, inputs: Inputs, case: Case) -> torch.Tensor:
    """One head's elements as points of a plane that turn, pair after pair."""
    if case.eps is not None:
        x = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=case.eps)
    if weight is not None:
        x = x * (weight + case.zero_centered)
    out = x.clone()
    half = case.rotated // 2 // case.sections
    for pair in range(case.rotated // 2):
        first = pair // half * 2 * half + pair % half
        turned = torch.complex(x[..., first], x[..., first + half])
        turned = turned * torch.complex(inputs.cosine[..., pair], inputs.sine[..., pair])[..., None]
        out[..., first], out[..., first + half] = turned.real, turned.imag
    return out


def expected(inputs: Inputs, case: Case) -> list[torch.Tensor]:
    q = by_complex_numbers(inputs.q, inputs.q_weight, inputs, case)
    k = by_complex_numbers(inputs.k, inputs.k_weight, inputs, case)
    return [q if inputs.query_scale is None else q * inputs.query_scale[..., None, None], k]


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_in_fp64(name: str) -> None:
    case = CASES[name]
    ours, theirs = (leaves(make(case)) for _ in range(2))
    for found, right in zip(call(ours, case), expected(theirs, case), strict=True):
        assert found.is_contiguous()
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    grads = (ours.q_grad, ours.k_grad)
    torch.autograd.backward(call(ours, case), grads)
    torch.autograd.backward(expected(theirs, case), grads)
    for mine, its in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    case = replace(CASES[name], tokens=(2,) if len(CASES[name].tokens) == 1 else (2, 1), heads=(2, 1))
    inputs = leaves(make(case))
    names = [field.name for field in fields(Inputs) if getattr(getattr(inputs, field.name), "requires_grad", False)]
    assert len(names) == (4 if case.weights else 2)

    def run(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return call(replace(inputs, **dict(zip(names, given, strict=True))), case)

    assert torch.autograd.gradcheck(run, [getattr(inputs, name) for name in names])


@pytest.mark.parametrize("name", ["one plus weights", "scaled, no norms", "packed with norms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_are_well_defined(name: str, dtype: torch.dtype) -> None:
    """Schemas, shapes without data, and that gradients can be traced."""
    case = replace(CASES[name], dtype=dtype, table_dtype=torch.float32)
    x = leaves(make(case))
    shared = (x.q_weight, x.k_weight, x.cosine, x.sine, x.query_scale)
    forward = (x.q, x.k, *shared, case.eps, case.zero_centered, case.sections)
    torch.library.opcheck(torch.ops.vlm_kernels.qk_norm_rope.default, forward)
    with torch.no_grad():
        rstd = module._forward(*forward)[2:]
    backward = (x.q_grad, x.k_grad, x.q, x.k, *rstd, *shared, case.zero_centered, case.sections)
    torch.library.opcheck(module._backward, backward, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_compiled_and_checkpointed(how: str) -> None:
    case = Case(zero_centered=True, scaled=True, dtype=torch.float32, table_dtype=torch.float32)
    run = torch.compile(call, backend="aot_eager", fullgraph=True) if how == "compiled" else call
    plain, other = (leaves(make(case)) for _ in range(2))
    right = call(plain, case)
    found = checkpoint(run, other, case, use_reentrant=False) if how == "checkpointed" else run(other, case)
    for results in (right, found):
        (results[0].square().sum() + results[1].sum()).backward()
    for mine, its in zip((*found, *gradients(other)), (*right, *gradients(plain)), strict=True):
        assert torch.equal(mine, its)


def test_frozen_and_unused_inputs() -> None:
    """Only keys used, and only the weight of queries trained: others have no gradient."""
    case = Case(dtype=torch.float32, table_dtype=torch.float32)
    inputs = make(case)
    inputs.k.requires_grad_()
    call(inputs, case)[1].sum().backward()
    assert inputs.k.grad.abs().sum() > 0 and inputs.q.grad is None and inputs.q_weight.grad is None
    inputs.q_weight.requires_grad_()
    call(replace(inputs, k=inputs.k.detach()), case)[0].sum().backward()
    assert inputs.q_weight.grad.abs().sum() > 0 and inputs.q.grad is None and inputs.k_weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_where_transformers_rounds(dtype: torch.dtype) -> None:
    """Bit for bit Gemma 3's norm, rotation and a scale one after the other."""
    case = Case(
        tokens=(64, 2), head_dim=32, rotated=32, zero_centered=True, scaled=True, dtype=dtype, table_dtype=dtype
    )
    inputs = make(case)
    normed = []
    for x, weight in ((inputs.q, inputs.q_weight), (inputs.k, inputs.k_weight)):
        norm = Gemma3RMSNorm(32, EPS).to(dtype)
        norm.weight.data.copy_(weight)
        normed.append(norm(x))
    cosine, sine = (torch.cat((part, part), dim=-1) for part in (inputs.cosine, inputs.sine))
    right_q, right_k = apply_rotary_pos_emb(*normed, cosine, sine, unsqueeze_dim=2)
    found_q, found_k = call(inputs, case)
    assert torch.equal(found_q, right_q * inputs.query_scale[..., None, None])
    assert torch.equal(found_k, right_k)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_bf16_are_as_close_as_autograds(table_dtype: torch.dtype) -> None:
    """To fp64: the chain of operations rounds every gradient on the way, one pass rounds the last."""
    case = Case(tokens=(200, 2), head_dim=32, rotated=32, dtype=torch.bfloat16, table_dtype=table_dtype)
    ours, chain = (leaves(make(case)) for _ in range(2))
    wide = {field.name: getattr(make(case), field.name) for field in fields(Inputs)}
    exact = leaves(Inputs(**{name: x if x is None else x.double() for name, x in wide.items()}))
    for inputs in (ours, exact):
        torch.autograd.backward(call(inputs, case), (inputs.q_grad, inputs.k_grad))
    cosine, sine = (torch.cat((part, part), dim=-1).unsqueeze(2) for part in (chain.cosine, chain.sine))
    for x, weight, grad in ((chain.q, chain.q_weight, chain.q_grad), (chain.k, chain.k_weight, chain.k_grad)):
        normed = torch.nn.functional.rms_norm(x.float(), (32,), weight.float(), EPS).bfloat16()
        turned = torch.cat((-normed[..., 16:], normed[..., :16]), dim=-1)
        (normed * cosine + turned * sine).bfloat16().backward(grad)
    for mine, its, right in zip(gradients(ours), gradients(chain), gradients(exact), strict=True):
        assert mine.dtype == torch.bfloat16
        error, their_error = ((other - right).norm() / right.norm() for other in (mine, its))
        assert error <= 1.02 * their_error
        assert error < 2.5e-3  # one rounding to 8 bits: 2^-9 / sqrt(3) to 2^-8 / sqrt(3)
