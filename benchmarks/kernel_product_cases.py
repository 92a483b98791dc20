"""Cases of `benchmarks/kernels.py` that are bound by matmuls: the loss and span attention.

Shapes: T tokens, H hidden, V vocabulary, S sequence, B batch, N query heads, G key heads, D head dim.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from benchmarks.kernel_problem import FLEX, LIGER, OURS, PRODUCTS, TOKENS, TORCH, Floor, Problem, Setting
from megatron_vlm.data.collate import spans as spans_of
from megatron_vlm.layers.vocab_parallel_loss import Head, linear_cross_entropy
from vlm_kernels.span_attention import Spans, flex, operators


@dataclass(frozen=True)
class Alone:
    """A process group of a single rank."""

    def size(self) -> int:
        """Return the number of ranks."""
        return 1

    def rank(self) -> int:
        """Return this rank's index."""
        return 0


class _Products(torch.autograd.Function):
    """The matmuls of our loss and nothing else, in the same chunks: logits of all chunks, in the backward pass again of
    all but the last, and both gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, head: Head) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.chunks = head.chunks(x.shape[0], weight)
        ctx.buffer = x.new_empty((len(x[ctx.chunks[0]]), weight.shape[0]))
        for chunk in ctx.chunks:
            rows = x[chunk]
            torch.mm(rows, weight.t(), out=ctx.buffer[: len(rows)])
        return x.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x_gradient, total = torch.empty_like(x), weight.main_grad
        for chunk in reversed(ctx.chunks):
            rows = x[chunk]
            logits = ctx.buffer[: len(rows)]
            if chunk != ctx.chunks[-1]:
                torch.mm(rows, weight.t(), out=logits)
            torch.mm(logits, weight, out=x_gradient[chunk])
            if x.dtype == total.dtype:
                total.addmm_(logits.t(), rows)
            else:
                torch.addmm(total, logits.t(), rows, out_dtype=total.dtype, out=total)
        ctx.buffer = None
        return x_gradient, None, None


def loss_problem(softcap: float | None, setting: Setting) -> Problem:
    """Build the loss of Gemma 3 27B's head, with a cap as in Gemma 2 if there is a `softcap`."""
    tokens, hidden, vocabulary = setting.size(TOKENS, 11), setting.size(5376, 24), setting.size(262_144, 70)
    head = Head(vocabulary, Alone(), softcap=softcap)  # type: ignore[arg-type]
    if setting.is_tiny:
        head = replace(head, chunk_bytes=4 * vocabulary * 4)
    scale = hidden**-0.25  # logits of order one
    x, weight = (setting.randn(size, hidden).detach().mul_(scale).requires_grad_() for size in (tokens, vocabulary))
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    labels = torch.randint(vocabulary, (tokens,), device=setting.device)
    index = torch.arange(tokens, device=setting.device)

    def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(x.unsqueeze(1), weight, labels.unsqueeze(0), index, head).sum() / tokens

    def by_torch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(x, weight).float()
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return functional.cross_entropy(logits, labels)

    def by_liger(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        function = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
        return function(x, weight, labels, softcap=softcap)

    def products(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _Products.apply(x, weight, head)

    sides = {OURS: ours, TORCH: by_torch, LIGER: by_liger, PRODUCTS: products}
    return Problem([x, weight], sides, {}, f"{tokens} x {hidden} x {vocabulary}", into_main=1)


@dataclass(frozen=True)
class Attention:
    """Sizes of an attention case; `image_tokens` is the length of each image and each text between, or 0."""

    queries: int
    keys: int
    head_dim: int
    window: int | None
    image_tokens: int = 256


def attention_problem(sizes: Attention, setting: Setting) -> Problem:
    """Build attention over one row, in which text and images alternate."""
    length = setting.size(TOKENS, 150)
    if setting.is_tiny:
        sizes = replace(sizes, queries=4, keys=2, head_dim=64, window=sizes.window and 40)
        sizes = replace(sizes, image_tokens=min(sizes.image_tokens, 20))
    place = torch.arange(length)
    is_image = (place // max(sizes.image_tokens, 1) % 2 == 1) & (sizes.image_tokens > 0)
    low, high = spans_of(torch.zeros(1, length, dtype=torch.int64), is_image.unsqueeze(0))
    visible = Spans(low.to(setting.device), high.to(setting.device))
    q, k, v = (setting.randn(1, heads, length, sizes.head_dim) for heads in (sizes.queries, sizes.keys, sizes.keys))
    window, scale = sizes.window, sizes.head_dim**-0.5
    is_causal = window is None and sizes.image_tokens == 0
    mask = None if is_causal else visible.dense(window)

    def by_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # Repeated, as transformers does: with fewer key heads and a mask, torch would hold all scores in memory.
        k, v = (x.repeat_interleave(sizes.queries // sizes.keys, dim=1) for x in (k, v))
        return functional.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale)

    sides = {
        # Whether or not they are proven on this GPU.
        OURS: lambda q, k, v: operators.attend(q, k, v, visible, window, scale),
        TORCH: by_torch,
    }
    if setting.device.type == "cuda":  # FlexAttention has no backward pass elsewhere
        sides[FLEX] = lambda q, k, v: flex.attend(q, k, v, visible, window, scale)
    pairs = (high - Spans(low, high).first_key(window) + 1).clamp(min=0).sum().item() * sizes.queries
    floors = {"forward": Floor(num_operations=4 * pairs * sizes.head_dim)}
    floors["backward"] = Floor(num_operations=10 * pairs * sizes.head_dim)
    label = f"{length} x {sizes.queries}/{sizes.keys} x {sizes.head_dim}, window {window}"
    return Problem([q, k, v], sides, floors, label)
