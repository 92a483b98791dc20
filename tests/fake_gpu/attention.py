"""FlexAttention as operators of shapes: what a GPU runs for spans, without the compiler that makes its kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.library import Library

from megatron_vlm.families.gemma3 import vision
from vlm_kernels import span_attention
from vlm_kernels.span_attention import flex

_library = Library("fake_gpu", "DEF")
_library.define("flex_attention(Tensor q, Tensor k, Tensor v) -> (Tensor out, Tensor lse)")
_library.define("flex_attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor, Tensor)")
_operators = torch.ops.fake_gpu


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # The result has the order in memory of the queries (`_permute_strides` in torch's flex_attention).
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _backward(d_out: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(tensor) for tensor in inputs)


torch.library.register_fake("fake_gpu::flex_attention", _forward, lib=_library)
torch.library.register_fake("fake_gpu::flex_attention_backward", _backward, lib=_library)


class _FlexAttention(torch.autograd.Function):
    """Keeps what FlexAttention keeps: its inputs, its result and the log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = _operators.flex_attention(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> Any:
        return _operators.flex_attention_backward(d_out, *ctx.saved_tensors[:3])


def _flex_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
    return _FlexAttention.apply(q, k, v)  # type: ignore[no-any-return]


def _flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Compute what torch chooses on a GPU, where it would ask the device for its properties."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]  # type: ignore[no-any-return]


@contextmanager
def attention_as_on_cuda() -> Iterator[None]:
    """Let attention take the way of real tensors on CUDA, block masks included, to the kernels' door."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(span_attention, "is_fake", lambda tensor: False))
        stack.enter_context(mock.patch.object(flex, "compiled", lambda: _flex_attention))
        stack.enter_context(mock.patch.object(vision, "scaled_dot_product_attention", _flash_attention))
        yield
