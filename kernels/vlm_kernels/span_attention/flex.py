"""Span attention by FlexAttention, which runs on a GPU where none of our kernels is proven."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.fx.experimental._config
from torch.nn.attention.flex_attention import flex_attention

from vlm_kernels.span_attention.spans import Spans


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, window: int | None, scale: float
) -> torch.Tensor:
    """Compute `span_attention` by compiled FlexAttention."""
    mask = spans.block_mask(window)
    return compiled()(q, k, v, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=kernel_options(q))


def kernel_options(q: torch.Tensor) -> dict[str, Any]:
    """Return the options that the compiler needs for queries [B, N, Sq, D].

    They select the general kernel: for one row of fewer than 128 tokens the compiler would choose the decoding kernel,
    also in training, and then refuse it where tokens x query heads per key head exceed 128. They also set two pipeline
    stages where the default of three does not fit in shared memory: bf16 at head dim 512 on every GPU, fp32 at many
    head dims on sm_80 (`tests/kernels/test_flex.py`).
    """
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    if q.shape[-1] > 256 or q.dtype == torch.float32:
        options["fwd_num_stages"] = 2
    return options


@cache
def compiled() -> Callable[..., Any]:
    # A variant is compiled per head size, number of heads, dtype and gradient mode; past dynamo's limit of 8 it would
    # silently run uncompiled, over dense scores.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    # Otherwise sizes that are equal in a first call, such as those of queries and keys, must always be.
    torch.fx.experimental._config.use_duck_shape = False
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)
