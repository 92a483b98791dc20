"""Span attention by FlexAttention: what a GPU runs where no kernel of ours is proven."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import flex_attention

from kernels.span_attention.spans import Spans


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, window: int | None, scale: float
) -> torch.Tensor:
    """As `span_attention`."""
    return compiled()(q, k, v, block_mask=spans.block_mask(window), scale=scale, enable_gqa=True)


@cache
def compiled() -> Callable[..., Any]:
    # A variant is compiled per window, gradient mode and rough length; past dynamo's limit of 8 it would silently run
    # uncompiled, over dense scores.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)
