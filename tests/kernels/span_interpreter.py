"""Run by `test_span_kernels.py` in a process of its own, in Triton's interpreter: kernels against the reference.

The interpreter must be chosen before the kernels are imported. Prints one line per case, as JSON: the largest error of
the output, the logarithms and the gradients of q, k and v, each divided by the largest value.
Shapes: B batch, N query heads, G key/value heads, S sequence, D head dim.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from itertools import pairwise

import torch

from kernels.span_attention import Spans, launch
from kernels.span_attention.blocks import Blocks, Configuration
from kernels.span_attention.reference import backward, forward


@dataclass(frozen=True)
class Case:
    """Sizes, window and block sizes; two key blocks to a query block where nothing else is said."""

    head_dim: int
    kind: str
    window: int | None = None
    length: int = 100
    heads: tuple[int, int] = (2, 1)
    blocks: tuple[int, int] = (32, 16)
    shares: int = 1
    dtype: torch.dtype = torch.float32


CASES = {
    "causal": Case(64, "causal"),
    "window": Case(64, "causal", window=20),
    "images": Case(64, "images"),
    "images in a window": Case(64, "images", window=20, heads=(3, 3)),
    "documents": Case(128, "documents", window=40, blocks=(16, 32)),
    "no tail": Case(64, "causal", length=96, heads=(4, 2)),
    "bidirectional segments": Case(72, "segments", heads=(1, 1)),
    "head dim 80": Case(80, "images", length=64),
    "queries that see nothing": Case(64, "empty"),
    "ranges in no order": Case(64, "scattered", blocks=(16, 16)),
    "longer": Case(64, "images", window=90, length=250, heads=(1, 1)),
    "256": Case(256, "images", window=40, heads=(1, 1), length=70),
    "512": Case(512, "images", length=70, shares=2, blocks=(32, 32)),
    "512 in four": Case(512, "causal", length=40, shares=4, heads=(1, 1)),
    "fp16": Case(64, "images", window=20, dtype=torch.float16),
    "fp16, 512": Case(512, "documents", length=40, shares=2, dtype=torch.float16),
}


def spans_of(kind: str, length: int) -> Spans:
    """Two rows of the kind."""
    place = torch.arange(length, dtype=torch.int32)
    low, high = torch.zeros((2, length), dtype=torch.int32), place.repeat(2, 1)
    if kind == "images":  # across borders of blocks; the second row ends in padding, which sees itself
        high[0, 10:45] = 44
        high[1, 3:9] = 8
        low[1, -21:] = place[-21:]
    elif kind == "documents":  # with an image
        low[0, 23:], low[1, 31:] = 23, 31
        high[0, 25:34] = 33
    elif kind == "segments":
        borders = (0, 3, length // 2, length)
        for begin, end in pairwise(borders):
            low[0, begin:end], high[0, begin:end] = begin, end - 1
        high[1] = length - 1
    elif kind == "empty":  # whole blocks, and single queries
        low[0, 30:99], high[0, 30:99] = 5, 4
        low[1, ::3], high[1, ::3] = length, -1
    elif kind == "scattered":  # neither bound grows with the query
        generator = torch.Generator().manual_seed(0)
        bounds = torch.randint(0, length, (2, 2, length // 8 + 1), generator=generator, dtype=torch.int32)
        low, high = (bound.repeat_interleave(8, dim=1)[:, :length].contiguous() for bound in bounds.sort(0).values)
    return Spans(low, high)


def check(case: Case) -> list[float]:
    """Relative errors of output, logarithms, dq, dk and dv. Tensors lie in memory as in the models: tokens first."""
    generator = torch.Generator().manual_seed(1)

    def random(heads: int) -> torch.Tensor:
        made = torch.randn((case.length, 2, heads, case.head_dim), generator=generator)
        return made.to(case.dtype).permute(1, 2, 0, 3)

    heads, key_heads = case.heads
    q, k, v, d_out = random(heads), random(key_heads), random(key_heads), random(heads)
    spans, scale = spans_of(case.kind, case.length), case.head_dim**-0.5
    first, last = spans.first_key(case.window), spans.high
    blocks = Blocks(*case.blocks, case.shares, warps=4, stages=1)
    # Another shape for the key side, as the tables allow.
    launches = Configuration(blocks, blocks, Blocks(*reversed(case.blocks), case.shares, warps=4, stages=1))
    by_query = spans.block_ranges(case.window, launches.queries).by_query
    by_key = spans.block_ranges(case.window, launches.keys).by_key
    out, lse = launch.forward(q, k, v, first, last, by_query, scale, blocks)
    gradients = launch.backward(d_out, q, k, v, out, lse, first, last, by_query, by_key, scale, launches)
    exact = [tensor.double() for tensor in (q, k, v)]
    expected_out, expected_lse = forward(*exact, first, last, scale)
    expected = backward(d_out.double(), *exact, expected_out, expected_lse, first, last, scale)
    pairs = zip((out, lse, *gradients), (expected_out, expected_lse, *expected), strict=True)
    return [_error(ours, theirs) for ours, theirs in pairs]


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Minus infinity (a query that sees nothing) must be where the reference has it."""
    if not torch.equal(ours.isinf(), theirs.isinf()):
        return float("inf")
    finite = ~theirs.isinf()
    difference = (ours.double() - theirs)[finite].abs().max() / theirs[finite].abs().max()
    return difference.nan_to_num(float("inf")).item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or CASES:
        print(json.dumps({"case": name, "errors": check(CASES[name])}), flush=True)
