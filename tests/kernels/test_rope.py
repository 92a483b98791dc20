"""Norm and rotation of queries and keys: the reference against complex numbers in fp64 and against transformers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, apply_rotary_pos_emb

import kernels.rope as module
from kernels.rope import qk_norm_rope

EPS = 1e-5


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Case:
    """Sizes of one call, and what it does."""

    tokens: tuple[int, ...] = (5, 2)
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    rotated: int = 16
    sections: int = 1
    weights: bool = True
    eps: float | None = EPS
    zero_centered: bool = False
    scaled: bool = False
    packed: bool = False
    dtype: torch.dtype = torch.float64
    table_dtype: torch.dtype = torch.float64


CASES = {
    "plain weights": Case(),
    "one plus weights": Case(zero_centered=True),
    "norms without weights": Case(weights=False),
    "no norms": Case(eps=None, weights=False),
    "scaled queries": Case(scaled=True),
    "scaled, no norms": Case(scaled=True, eps=None, weights=False),
    "partial": Case(rotated=6),
    "two sections": Case(sections=2, head_dim=12, rotated=12),
    "two sections, partial": Case(sections=2, head_dim=12, rotated=8, zero_centered=True),
    "packed": Case(tokens=(7,), heads=(3, 3), head_dim=6, rotated=6, packed=True, weights=False, eps=None),
    "packed with norms": Case(tokens=(7,), heads=(4, 1), packed=True),
}


def make(case: Case, seed: int = 0) -> tuple[list[torch.Tensor | None], dict[str, Any]]:
    """q, k and weights (None without), which may have gradients, and the other arguments."""
    heads, wide = sum(case.heads), 3 * sum(case.heads) if case.packed else 0
    if case.packed:
        packed = random(*case.tokens, wide, case.head_dim, seed=seed, dtype=case.dtype)
        q, k = packed[..., : case.heads[0], :], packed[..., heads : heads + case.heads[1], :]
    else:
        q, k = (
            random(*case.tokens, count, case.head_dim, seed=seed + index, dtype=case.dtype)
            for index, count in enumerate(case.heads)
        )
    angles = random(*case.tokens, case.rotated // 2, seed=seed + 2, dtype=torch.float64)
    keywords: dict[str, Any] = {"eps": case.eps, "zero_centered": case.zero_centered, "sections": case.sections}
    keywords["table"] = tuple(part.to(case.table_dtype) for part in (angles.cos(), angles.sin()))
    if case.scaled:
        keywords["query_scale"] = 1 + random(*case.tokens, seed=seed + 3, dtype=case.table_dtype).abs()
    weights = [
        random(case.head_dim, seed=seed + 4 + index, dtype=case.dtype) if case.weights else None for index in range(2)
    ]
    return [q, k, *weights], keywords


def call(tensors: list[torch.Tensor | None], keywords: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, q_weight, k_weight = tensors
    return qk_norm_rope(q, k, q_weight=q_weight, k_weight=k_weight, **keywords)


def by_complex_numbers(
    x: torch.Tensor, weight: torch.Tensor | None, case: Case, keywords: dict[str, Any]
) -> torch.Tensor:
    """One head's elements as points of a plane that turn, pair after pair."""
    if case.eps is not None:
        x = torch.nn.functional.rms_norm(x, x.shape[-1:], eps=case.eps)
    if weight is not None:
        x = x * (weight + case.zero_centered)
    cosine, sine = keywords["table"]
    out = x.clone()
    half = case.rotated // 2 // case.sections
    for pair in range(case.rotated // 2):
        first = pair // half * 2 * half + pair % half
        turned = torch.complex(x[..., first], x[..., first + half])
        turned = turned * torch.complex(cosine[..., pair], sine[..., pair])[..., None]
        out[..., first], out[..., first + half] = turned.real, turned.imag
    return out


def expected(tensors: list[torch.Tensor | None], case: Case, keywords: dict[str, Any]) -> list[torch.Tensor]:
    q, k, q_weight, k_weight = tensors
    q, k = by_complex_numbers(q, q_weight, case, keywords), by_complex_numbers(k, k_weight, case, keywords)
    return [q * keywords["query_scale"][..., None, None] if case.scaled else q, k]


def leaves(tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_in_fp64(name: str) -> None:
    case = CASES[name]
    tensors, keywords = make(case)
    ours, theirs = leaves(tensors), leaves(tensors)
    grads = [random(*tensor.shape, seed=9, dtype=tensor.dtype) for tensor in tensors[:2]]
    for found, right in zip(call(ours, keywords), expected(theirs, case, keywords), strict=True):
        assert found.is_contiguous()
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    torch.autograd.backward(call(ours, keywords), grads)
    torch.autograd.backward(expected(theirs, case, keywords), grads)
    for mine, its in zip(ours, theirs, strict=True):
        assert (mine is None) == (its is None)
        if mine is not None:
            torch.testing.assert_close(mine.grad, its.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    case = replace(CASES[name], tokens=(2,) * len(CASES[name].tokens))
    tensors, keywords = make(case)
    given = [tensor for tensor in leaves(tensors) if tensor is not None]
    assert torch.autograd.gradcheck(lambda *changed: call([*changed, None, None][:4], keywords), given)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_are_well_defined(name: str, dtype: torch.dtype) -> None:
    """Schemas, shapes without data, and that gradients can be traced."""
    tensors, keywords = make(replace(CASES[name], dtype=dtype, table_dtype=torch.float32))
    q, k, q_weight, k_weight = leaves(tensors)
    cosine, sine = keywords["table"]
    scale, eps = keywords.get("query_scale"), keywords["eps"]
    rest = (q_weight, k_weight, cosine, sine, scale)
    torch.library.opcheck(module._forward, (q, k, *rest, eps, keywords["zero_centered"], keywords["sections"]))
    with torch.no_grad():
        out = module._forward(q, k, *rest, eps, keywords["zero_centered"], keywords["sections"])
        torch.library.opcheck(
            module._backward, (*out[:2], q, k, *out[2:], *rest, keywords["zero_centered"], keywords["sections"])
        )


@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_compiled_and_checkpointed(how: str) -> None:
    tensors, keywords = make(Case(zero_centered=True, scaled=True, dtype=torch.float32, table_dtype=torch.float32))
    run = torch.compile(call, backend="aot_eager", fullgraph=True) if how == "compiled" else call
    plain, other = leaves(tensors), leaves(tensors)
    right = call(plain, keywords)
    found = checkpoint(run, other, keywords, use_reentrant=False) if how == "checkpointed" else run(other, keywords)
    for results in (right, found):
        (results[0].square().sum() + results[1].sum()).backward()
    for mine, its in zip((*found, *(t.grad for t in other)), (*right, *(t.grad for t in plain)), strict=True):
        assert torch.equal(mine, its)


def test_frozen_and_unused_inputs() -> None:
    """Only keys used, and only the weight of queries trained: others have no gradient."""
    tensors, keywords = make(Case(dtype=torch.float32, table_dtype=torch.float32))
    q, k, q_weight, k_weight = tensors
    k.requires_grad_()
    qk_norm_rope(q, k, q_weight=q_weight, k_weight=k_weight, **keywords)[1].sum().backward()
    assert k.grad.abs().sum() > 0 and q.grad is None and q_weight.grad is None
    q_weight.requires_grad_()
    qk_norm_rope(q, k.detach(), q_weight=q_weight, k_weight=k_weight, **keywords)[0].sum().backward()
    assert q_weight.grad.abs().sum() > 0 and q.grad is None and k_weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_where_transformers_rounds(dtype: torch.dtype) -> None:
    """Bit for bit Gemma 3's norm, rotation and a scale one after the other."""
    case = Case(
        tokens=(64, 2), head_dim=32, rotated=32, zero_centered=True, scaled=True, dtype=dtype, table_dtype=dtype
    )
    (q, k, q_weight, k_weight), keywords = make(case)
    norms = []
    for weight in (q_weight, k_weight):
        norms.append(Gemma3RMSNorm(32, EPS).to(dtype))
        norms[-1].weight.data.copy_(weight)
    cosine, sine = (torch.cat((part, part), dim=-1) for part in keywords["table"])
    right_q, right_k = apply_rotary_pos_emb(norms[0](q), norms[1](k), cosine, sine, unsqueeze_dim=2)
    found_q, found_k = call([q, k, q_weight, k_weight], keywords)
    assert torch.equal(found_q, right_q * keywords["query_scale"][..., None, None])
    assert torch.equal(found_k, right_k)


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_bf16_are_as_close_as_autograds(table_dtype: torch.dtype) -> None:
    """To fp64: the chain of operations rounds every gradient on the way, one pass rounds the last."""
    case = Case(tokens=(200, 2), head_dim=32, rotated=32, dtype=torch.bfloat16, table_dtype=table_dtype)
    tensors, keywords = make(case)
    grads = [random(*tensor.shape, seed=9, dtype=torch.bfloat16) for tensor in tensors[:2]]
    exact_keywords = keywords | {"table": tuple(part.double() for part in keywords["table"])}
    exact, ours, chain = leaves([tensor.double() for tensor in tensors]), leaves(tensors), leaves(tensors)
    torch.autograd.backward(call(exact, exact_keywords), [grad.double() for grad in grads])
    torch.autograd.backward(call(ours, keywords), grads)
    for index in range(2):
        normed = torch.nn.functional.rms_norm(chain[index].float(), (32,), chain[2 + index].float(), EPS).bfloat16()
        cosine, sine = (torch.cat((part, part), dim=-1).unsqueeze(2) for part in keywords["table"])
        turned = torch.cat((-normed[..., 16:], normed[..., :16]), dim=-1)
        (normed * cosine + turned * sine).bfloat16().backward(grads[index])
    for mine, its, right in zip(ours, chain, exact, strict=True):
        assert mine.grad.dtype == torch.bfloat16
        error, their_error = ((other.grad - right.grad).norm() / right.grad.norm() for other in (mine, its))
        assert error <= 1.02 * their_error
        assert error < 2.5e-3  # half a unit in the last of 8 bits, spread evenly: 2^-9 / sqrt(3) to 2^-8 / sqrt(3)
