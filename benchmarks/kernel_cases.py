"""Cases that `benchmarks/kernels.py` times: each operator at the sizes of real models, beside other implementations.

A case builds its inputs and the sides that compute one result from them: ours, torch's operations one by one, and where
they exist Liger's kernels, FlexAttention, or nothing but the matmuls. Sizes are those of Qwen3-VL 8B and 30B-A3B and
of Gemma 3 27B with 8,192 tokens; tiny sizes, of which few are multiples of a kernel's vector, are for tests.

Shapes: T tokens, H hidden, F columns of gate and up, N query heads, G key heads, D head dim, R rotated elements or rows
of experts, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch.nn import functional

from benchmarks.kernel_expert_cases import (
    SUMMED,
    chunks_problem,
    grouped_gradient_problem,
    permute_problem,
    router_problem,
)
from benchmarks.kernel_problem import (
    FLEX,
    GIB,
    LIGER,
    OURS,
    PRODUCTS,
    TOKENS,
    TORCH,
    Case,
    Floor,
    Problem,
    Setting,
    Target,
    Tensors,
    liger,
    of_floor,
)
from benchmarks.kernel_product_cases import Attention, attention_problem, loss_problem
from vlm_kernels.gated import Activation, gated, gated_halves
from vlm_kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_add, rms_norm_add_rms_norm
from vlm_kernels.rope import qk_norm_rope

EPS = 1e-6


# RMS norms


def torch_norm(x: torch.Tensor, weight: torch.Tensor | None, zero_centered: bool) -> torch.Tensor:
    """RMS norm as transformers' modules compute it: Gemma's for weights around 0, Llama's for those around 1."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    if weight is None:
        return normed.to(x.dtype)
    return (normed * (1 + weight.float())).to(x.dtype) if zero_centered else weight * normed.to(x.dtype)


def liger_norm(x: torch.Tensor, weight: torch.Tensor, zero_centered: bool, in_place: bool = True) -> torch.Tensor:
    """Liger's RMS norm; with `in_place` its backward pass writes over the incoming gradient."""
    offset, casting = (1.0, "gemma") if zero_centered else (0.0, "llama")
    return liger("LigerRMSNormFunction")(x, weight, EPS, offset, casting, in_place)


def liger_add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, zero_centered: bool) -> Tensors:
    """Liger's fused residual addition and norm, as (sum, norm of the sum)."""
    offset, casting = (1.0, "gemma") if zero_centered else (0.0, "llama")
    normed, total = liger("LigerFusedAddRMSNormFunction")(x, residual, weight, EPS, offset, casting)
    return total, normed


def norm_sides(kind: str, zero_centered: bool) -> dict[str, Callable[..., Any]]:
    """Return our, torch's and Liger's implementation of one of the four operators."""
    norm, other = partial(torch_norm, zero_centered=zero_centered), partial(liger_norm, zero_centered=zero_centered)
    other_add = partial(liger_add_norm, zero_centered=zero_centered)
    match kind:
        case "rms_norm":
            ours: Callable[..., Any] = rms_norm
            theirs: tuple[Callable[..., Any], ...] = (norm, other)
        case "add_rms_norm":
            ours = add_rms_norm
            theirs = (lambda x, residual, weight: ((total := residual + x), norm(total, weight)), other_add)
        case "rms_norm_add":
            ours = rms_norm_add
            theirs = (
                lambda x, residual, weight: residual + norm(x, weight),
                lambda x, residual, weight: residual + other(x, weight, in_place=False),
            )
        case _:
            ours = rms_norm_add_rms_norm
            theirs = (
                lambda x, residual, post, weight: ((total := residual + norm(x, post)), norm(total, weight)),
                lambda x, residual, post, weight: other_add(other(x, post, in_place=False), residual, weight),
            )
    return {OURS: lambda *inputs: ours(*inputs, EPS, zero_centered), TORCH: theirs[0], LIGER: theirs[1]}


# Tensors of x's size that are read or written: forward, backward.
NORM_PASSES = {"rms_norm": (2, 3), "add_rms_norm": (4, 4), "rms_norm_add": (3, 3), "rms_norm_add_rms_norm": (4, 6)}
NORM_TARGETS = of_floor(0.8, Target("backward", 1.5, LIGER))


def norm_problem(kind: str, hidden: int, zero_centered: bool, setting: Setting) -> Problem:
    """Build the problem of one of the four operators."""
    rows, hidden = setting.size(TOKENS, 6), setting.size(hidden, 37)
    num_activations = 1 if kind == "rms_norm" else 2
    num_weights = 2 if kind == "rms_norm_add_rms_norm" else 1
    inputs = [setting.randn(rows, hidden) for _ in range(num_activations)]
    forward, backward = (Floor(passes * inputs[0].nbytes) for passes in NORM_PASSES[kind])
    inputs += [setting.randn(hidden) for _ in range(num_weights)]
    floors = {"forward": forward, "backward": backward}
    return Problem(inputs, norm_sides(kind, zero_centered), floors, f"{rows} x {hidden}")


# Norm and rotation of queries and keys


@dataclass(frozen=True)
class Heads:
    """Sizes of a rotation; `norm` is the norm that heads pass through before it."""

    tokens: int
    queries: int
    keys: int
    head_dim: int
    norm: Literal["none", "plain", "zero_centered"] = "none"
    sections: int = 1


def rotate(x_TND: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor], sections: int) -> torch.Tensor:
    """Rotate pairs of elements that are half a section apart, by torch's operations."""
    parts = x_TND.unflatten(-1, (sections, 2, -1))
    cosine, sine = (values.unflatten(-1, (sections, -1)).unsqueeze(-3) for values in table)
    first, second = parts.unbind(-2)
    turned = torch.stack((first * cosine - second * sine, second * cosine + first * sine), dim=-2)
    return turned.flatten(-3)


def rope_problem(heads: Heads, setting: Setting) -> Problem:
    """Build a rotation of queries and keys that are views of one projection, as in vision towers."""
    if setting.is_tiny:
        heads = replace(heads, tokens=5, queries=4, keys=min(heads.keys, 2), head_dim=12 * heads.sections)
    tokens, head_dim, is_normed = heads.tokens, heads.head_dim, heads.norm != "none"
    packed = torch.randn(tokens, heads.queries + 2 * heads.keys, head_dim, device=setting.device, dtype=setting.dtype)
    counts = [heads.queries, heads.keys, heads.keys]
    q, k = (part.detach().requires_grad_() for part in packed.split(counts, dim=1)[:2])
    angles = torch.rand(tokens, head_dim // 2, device=setting.device) * 6
    table = (angles.cos().to(setting.dtype), angles.sin().to(setting.dtype))
    weights = [setting.randn(head_dim) for _ in range(2 * is_normed)]
    zero_centered = heads.norm == "zero_centered"

    def ours(q: torch.Tensor, k: torch.Tensor, *weights: torch.Tensor) -> Tensors:
        of_norm = {"q_weight": weights[0], "k_weight": weights[1], "eps": EPS} if weights else {}
        return qk_norm_rope(q, k, table, zero_centered=zero_centered, sections=heads.sections, **of_norm)

    def by_torch(q: torch.Tensor, k: torch.Tensor, *weights: torch.Tensor) -> Tensors:
        if weights:
            q, k = torch_norm(q, weights[0], zero_centered), torch_norm(k, weights[1], zero_centered)
        return rotate(q, table, heads.sections), rotate(k, table, heads.sections)

    def by_liger(q: torch.Tensor, k: torch.Tensor, *weights: torch.Tensor) -> Tensors:
        q, k = (liger_norm(x, weight, zero_centered) for x, weight in zip((q, k), weights, strict=True))
        whole = (torch.cat((values, values), dim=-1).unsqueeze(0) for values in table)
        turned = liger("LigerRopeFunction")(*(x.transpose(0, 1).unsqueeze(0) for x in (q, k)), *whole)
        return [x.squeeze(0).transpose(0, 1) for x in turned]

    sides: dict[str, Callable[..., Any]] = {OURS: ours, TORCH: by_torch}
    if is_normed:  # Liger's rotation without a norm would write over the projection
        sides[LIGER] = by_liger
    size = q.nbytes + k.nbytes
    floors = {"forward": Floor(2 * size), "backward": Floor((3 if is_normed else 2) * size)}
    return Problem([q, k, *weights], sides, floors, f"{tokens} x {heads.queries}/{heads.keys} x {head_dim}")


# Gated activations


def torch_gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Compute activation(gate) * up."""
    return (functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")) * up


def gated_problem(activation: Activation, columns: int, setting: Setting) -> Problem:
    """Build a gated activation of gate and up in separate tensors."""
    rows, columns = setting.size(TOKENS, 5), setting.size(columns, 29)
    gate, up = setting.randn(rows, columns), setting.randn(rows, columns)
    sides = {
        OURS: partial(gated, activation=activation),
        TORCH: partial(torch_gated, activation=activation),
        LIGER: liger("LigerSiLUMulFunction" if activation == "silu" else "LigerGELUMulFunction"),
    }
    floors = {"forward": Floor(3 * gate.nbytes), "backward": Floor(5 * gate.nbytes)}
    return Problem([gate, up], sides, floors, f"{rows} x {columns}")


def gated_experts_problem(columns: int, setting: Setting) -> Problem:
    """Build a gated activation of gate and up in one tensor, with a factor of each row, which has a gradient too."""
    rows, columns = setting.size(8 * TOKENS, 7), setting.size(columns, 22)
    gate_up, factor = setting.randn(rows, 2 * columns), torch.rand(rows, device=setting.device).requires_grad_()

    def by_torch(gate_up: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return (torch_gated(gate, up, "silu") * factor.unsqueeze(-1)).to(gate_up.dtype)

    sides = {OURS: lambda gate_up, factor: gated_halves(gate_up, "silu", factor), TORCH: by_torch}
    size = gate_up.nbytes / 2
    floors = {"forward": Floor(3 * size), "backward": Floor(5 * size)}
    return Problem([gate_up, factor], sides, floors, f"{rows} x {columns}")


# All cases


def against(side: str, ratio: float) -> tuple[Target, ...]:
    """Targets of at least this ratio of a side's time to ours in both directions."""
    return (Target("forward", ratio, side), Target("backward", ratio, side))


# Published by ffpa-attn 0.2 for its CuTe kernels on an H200: causal, 8,192 tokens, 32 heads of 512.
FFPA_SECONDS = {"forward": 6.34e-3, "backward": 25.4e-3}
LOSS_TARGETS = (Target("both", 0.8, "floor"), Target("both", 1.0 * GIB, "memory"))  # 0.8 is 1 / 1.25


def _norm(kind: str, hidden: int, zero_centered: bool = False) -> Case:
    name = f"{kind} {hidden}" + " around 0" * zero_centered
    return Case("rms_norm", name, partial(norm_problem, kind, hidden, zero_centered), NORM_TARGETS)


def _rope(name: str, *sizes: Any) -> Case:
    return Case("rope", name, partial(rope_problem, Heads(*sizes)), of_floor(0.75))


def _attention(name: str, targets: tuple[Target, ...], *sizes: Any, **published: dict[str, float]) -> Case:
    return Case("span_attention", name, partial(attention_problem, Attention(*sizes)), targets, **published)


CASES = (
    _norm("rms_norm", 4096),
    _norm("rms_norm", 5376, True),
    _norm("add_rms_norm", 4096),
    _norm("rms_norm_add", 5376, True),
    _norm("rms_norm_add_rms_norm", 5376, True),
    _rope("Qwen3-VL 8B", TOKENS, 32, 8, 128, "plain"),
    _rope("Gemma 3 27B", TOKENS, 32, 16, 128, "zero_centered"),
    _rope("heads of 256", TOKENS, 32, 16, 256, "plain"),
    _rope("vision, two axes", 2 * TOKENS, 16, 16, 72, "none", 2),
    Case("gated", "SwiGLU 12288", partial(gated_problem, "silu", 12288), of_floor(0.85)),
    Case("gated", "GeGLU 21504", partial(gated_problem, "gelu_tanh", 21504), of_floor(0.85)),
    Case("gated", "SwiGLU of experts 768", partial(gated_experts_problem, 768), of_floor(0.85)),
    Case("permute", "permute", partial(permute_problem, "permute"), of_floor(0.75)),
    Case("permute", "unpermute", partial(permute_problem, "unpermute"), of_floor(0.75)),
    Case("permute", "unpermute weighted", partial(permute_problem, "unpermute weighted"), of_floor(0.75)),
    Case("permute", "chunks of ranks", chunks_problem, of_floor(0.75)),
    Case("router", "8 of 128", router_problem, against(TORCH, 2.0)),
    *(
        Case(
            "grouped_gradient",
            f"{rows} rows",
            partial(grouped_gradient_problem, rows),
            (Target("backward", 1.0, SUMMED),),
        )
        for rows in (128, 2048)
    ),
    *(
        Case(
            "linear_cross_entropy",
            name,
            partial(loss_problem, softcap),
            LOSS_TARGETS,
            floor_side=PRODUCTS,
            measures_memory=True,
        )
        for name, softcap in (("plain", None), ("capped at 30", 30.0))
    ),
    _attention("64, images", against(FLEX, 1 / 1.3), 32, 8, 64, None),
    _attention("128, images, window 1024", against(FLEX, 1 / 1.3), 32, 16, 128, 1024),
    _attention("128, images", against(FLEX, 1 / 1.3), 32, 16, 128, None),
    _attention("256, images, window 1024", against(FLEX, 1 / 1.3), 32, 16, 256, 1024),
    _attention("512, images", against(TORCH, 2.0), 32, 4, 512, None),
    _attention(
        "512, causal",
        (*against(TORCH, 2.0), *against("published", 1 / 1.5)),
        32,
        4,
        512,
        None,
        0,
        published=FFPA_SECONDS,
    ),
)
