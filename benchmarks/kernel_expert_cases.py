"""Cases of `benchmarks/kernels.py` for layers of experts: router, permutation, and weight gradients of all experts.

Shapes: T tokens, E experts, R rows of experts, M and N columns.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.nn.functional import grouped_mm

from benchmarks.kernel_problem import OURS, TOKENS, TORCH, Floor, Problem, Setting, Tensors
from vlm_kernels.grouped_gradient import add_by_operator_
from vlm_kernels.permute import chunk_permutation, expert_permutation, permute, unpermute
from vlm_kernels.router import choose_experts, route

SUMMED = "product and sum"
"""torch's grouped product in bf16, added to the gradient that exists."""


def router_problem(setting: Setting) -> Problem:
    """Build the router of Qwen3-VL 30B-A3B: 8 of 128 experts."""
    tokens, experts, top_k = setting.size(TOKENS, 9), setting.size(128, 40), setting.size(8, 3)
    logits = torch.randn(tokens, experts, device=setting.device).requires_grad_()
    is_real = torch.arange(tokens, device=setting.device) % 7 != 3

    def ours(logits: torch.Tensor) -> Tensors:
        weights, _, probabilities = route(logits, choose_experts(logits, top_k), is_real)
        return weights, probabilities

    def by_torch(logits: torch.Tensor) -> Tensors:
        largest, places = logits.topk(top_k)
        weights = torch.zeros_like(logits).scatter(1, places, largest.softmax(-1))
        return weights, is_real.float() @ logits.softmax(-1)

    values, choices = logits.nbytes, logits.numel()
    # The choice reads logits, the weights read them again with it; backward the gradient of weights too.
    floors = {"forward": Floor(3 * values + 2 * choices), "backward": Floor(3 * values + choices)}
    return Problem([logits], {OURS: ours, TORCH: by_torch}, floors, f"{tokens}, {top_k} of {experts}")


PermuteKind = Literal["permute", "unpermute", "unpermute weighted"]


def permute_problem(kind: PermuteKind, setting: Setting) -> Problem:
    """Build the permutation of Qwen3-VL 30B-A3B: 8 of 128 experts."""
    tokens, experts, chosen = setting.size(TOKENS, 9), setting.size(128, 6), setting.size(8, 2)
    hidden = setting.size(2048, 19)
    choice = torch.rand(tokens, experts, device=setting.device).topk(chosen).indices
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool, device=setting.device).scatter_(1, choice, True)
    permutation = expert_permutation(routing_map, tokens * chosen)
    entries = permutation.entry_of_row.long()
    token_of_row = entries // experts

    def torch_permute(x: torch.Tensor, probs: torch.Tensor) -> Tensors:
        return x.index_select(0, token_of_row), probs.flatten().index_select(0, entries)

    def torch_unpermute(y: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        y = (y * weights[0].unsqueeze(-1)).to(y.dtype) if weights else y
        return y.new_zeros((tokens, hidden)).index_add(0, token_of_row, y)

    x, y = setting.randn(tokens, hidden), setting.randn(tokens * chosen, hidden)
    if kind == "permute":
        inputs = [x, torch.rand(tokens, experts, device=setting.device).requires_grad_()]
        sides = {OURS: lambda x, probs: permute(x, permutation, probs), TORCH: torch_permute}
    else:
        weights = [torch.rand(tokens * chosen, device=setting.device).requires_grad_()]
        inputs = [y, *(weights if kind == "unpermute weighted" else [])]
        sides = {OURS: lambda y, *weights: unpermute(y, permutation, *weights), TORCH: torch_unpermute}
    # With weights, their gradient reads all rows again.
    backward = x.nbytes + y.nbytes * (2 if kind == "unpermute weighted" else 1)
    floors = {"forward": Floor(x.nbytes + y.nbytes), "backward": Floor(backward)}
    return Problem(inputs, sides, floors, f"{tokens} x {hidden}, {chosen} of {experts}")


def chunks_problem(setting: Setting) -> Problem:
    """Build the order by expert of rows of 8 ranks for 16 experts, the permutation itself included."""
    ranks, experts, size = setting.size(8, 2), setting.size(16, 3), setting.size(TOKENS // 16, 2)
    hidden, num_rows = setting.size(2048, 19), ranks * experts * size
    ends = ((torch.arange(2 * experts, dtype=torch.int32, device=setting.device) + 1) * size).repeat(ranks, 1)
    x = setting.randn(num_rows, hidden)
    order = torch.arange(num_rows, device=setting.device).view(ranks, experts, size).transpose(0, 1).flatten()
    sides = {
        OURS: lambda x: permute(x, chunk_permutation(ends, experts, experts, num_rows))[0],
        TORCH: lambda x: x.index_select(0, order),
    }
    floor = Floor(2 * x.nbytes)
    return Problem([x], sides, {"forward": floor, "backward": floor}, f"{num_rows} x {hidden}, {ranks} x {experts}")


class _Linear(torch.autograd.Function):
    """Experts' linear layer, whose weight gradient is all that the backward pass computes."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, ours: bool) -> torch.Tensor:
        ctx.save_for_backward(rows, ends)
        ctx.weight, ctx.ours = weight, ours
        return grouped_mm(rows, weight.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, ends = ctx.saved_tensors
        if ctx.ours:
            add_by_operator_(ctx.weight.main_grad, gradient, rows, ends)
        else:
            ctx.weight.main_grad.add_(grouped_mm(gradient.t(), rows, offs=ends))
        return None, None, None, None


def grouped_gradient_problem(rows_per_expert: int, setting: Setting) -> Problem:
    """Build gate and up of 16 experts of Qwen3-VL 30B-A3B; rows differ, and one expert has none."""
    experts, (out, hidden) = setting.size(16, 4), (setting.size(1536, 16), setting.size(2048, 8))
    size = setting.size(rows_per_expert, 5)
    counts = [size // 2, *[size] * (experts - 3), 0, size]
    num_rows = sum(counts)
    ends = torch.tensor(counts, device=setting.device).cumsum(0).int()
    rows = setting.randn(num_rows, hidden).detach()
    weight = setting.randn(experts, out, hidden)
    weight.main_grad = torch.zeros(weight.shape, device=setting.device)  # type: ignore[attr-defined]
    sides = {
        OURS: lambda weight: _Linear.apply(rows, weight, ends, True),
        SUMMED: lambda weight: _Linear.apply(rows, weight, ends, False),
        TORCH: lambda weight: grouped_mm(rows, weight.transpose(1, 2), offs=ends),
    }
    operations = 2 * num_rows * out * hidden
    floors = {
        "forward": Floor(weight.nbytes + rows.nbytes * (hidden + out) / hidden, operations),
        "backward": Floor(8 * weight.numel() + rows.nbytes * (hidden + out) / hidden, operations),
    }
    return Problem([weight], sides, floors, f"{num_rows}, {experts} x {out} x {hidden}", into_main=0)
