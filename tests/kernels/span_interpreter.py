"""Run by `test_span_kernels.py` in a process of its own, in Triton's interpreter: kernels against the reference.

The interpreter must be chosen before the kernels are imported. Prints one line per case, as JSON: the largest error of
the output, the logarithms and the gradients of q, k and v, each divided by the largest value. Mutants, each a change of
one line of the sources, follow in the same form: their errors must be large.
Shapes: B batch, N query heads, G key/value heads, Sq queries, Sk keys, D head dim.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import torch

from tests.kernels.span_rows import needed_keys, packed_spans, rank_spans
from vlm_kernels.span_attention import launch, spans, triton_kernels
from vlm_kernels.span_attention.blocks import Blocks, Configuration
from vlm_kernels.span_attention.reference import backward, forward


@dataclass(frozen=True)
class Case:
    """Sizes, window and block sizes; two key blocks to a query block where nothing else is said.

    `length` is Sk, and Sq but for what a context rank's queries are: with `queries`, blocks of so many tokens, of all
    blocks so many, in random order and in each row others; with `planned`, ascending blocks of so many tokens as they
    are planned for so many ranks. Of the keys, `needed` leaves blocks of so many tokens that the queries see.
    """

    head_dim: int
    kind: str
    window: int | None = None
    length: int = 68
    queries: tuple[int, int] | None = None
    planned: tuple[int, int] | None = None
    needed: int = 0
    heads: tuple[int, int] = (1, 1)
    blocks: tuple[int, int] = (32, 16)
    chunk: int = 0
    shares: int = 1
    tma: bool = False
    dtype: torch.dtype = torch.float32


CASES = {
    "causal": Case(64, "causal", heads=(2, 1)),
    "window": Case(64, "causal", window=20, tma=True),
    "images": Case(64, "images", tma=True),
    "documents": Case(128, "documents", window=40, blocks=(16, 32), tma=True),
    "bidirectional segments": Case(72, "segments"),
    "head dim 80": Case(80, "images", length=64, tma=True),
    "256": Case(256, "images", window=40, length=70, chunk=128, blocks=(32, 32)),
    "512, in chunks": Case(512, "documents", length=40, chunk=128, tma=True),
    "shard, images in a window": Case(64, "images", window=20, heads=(4, 2), queries=(16, 2), tma=True),
    "shard, documents": Case(128, "documents", blocks=(16, 32), queries=(4, 9)),
    "shard, a block of tokens to a block of queries": Case(64, "images", window=90, length=160, queries=(32, 3)),
    "shard, queries that see nothing": Case(72, "empty", queries=(4, 8), tma=True),
    "shard, ranges in no order": Case(64, "scattered", blocks=(16, 16), queries=(1, 50)),
    "shard, 512": Case(512, "images", length=70, chunk=128, shares=2, blocks=(32, 32), queries=(10, 4), tma=True),
    "more queries than keys": Case(64, "causal", length=40, queries=(8, 9)),
    "packed": Case(64, "packed", window=50, length=100, heads=(2, 1)),
    "planned blocks of 128 tokens": Case(128, "packed", length=600, planned=(128, 2), blocks=(128, 64), tma=True),
    "needed keys in a window": Case(
        64, "packed", 50, length=300, planned=(32, 4), needed=32, heads=(4, 2), blocks=(64, 32)
    ),
    "fp16": Case(64, "images", window=20, dtype=torch.float16),
}
# In other company, or at other sizes, what the cases above have: `further` on the command line.
FURTHER_CASES = {
    "images in a window": Case(64, "images", window=20, heads=(4, 2)),
    "no tail": Case(64, "causal", length=64, heads=(2, 2)),
    "queries that see nothing": Case(64, "empty"),
    "ranges in no order": Case(64, "scattered", blocks=(16, 16), tma=True),
    "longer": Case(64, "images", window=90, length=160, blocks=(32, 32)),
    "512, columns shared": Case(512, "images", length=70, heads=(2, 1), shares=2, blocks=(32, 32), tma=True),
    "512, both": Case(512, "causal", length=40, chunk=256, shares=4, blocks=(32, 32)),
    "planned blocks of 256 tokens": Case(64, "packed", length=1100, planned=(256, 2), blocks=(128, 128)),
    "planned blocks of 512 tokens, 256": Case(
        256, "packed", length=1100, planned=(512, 2), blocks=(128, 64), chunk=128, tma=True
    ),
    "planned, 512": Case(512, "packed", length=200, planned=(32, 2), blocks=(32, 32), heads=(2, 1), shares=2),
    "needed keys, 128": Case(128, "packed", 200, 900, planned=(128, 4), needed=128, blocks=(128, 64), tma=True),
    "needed keys, 256": Case(256, "packed", 40, 300, planned=(16, 8), needed=16, chunk=128),
    "needed keys, 512": Case(512, "packed", 40, 300, planned=(32, 8), needed=32, blocks=(32, 32), shares=2, tma=True),
    "fp16, needed keys": Case(64, "packed", 50, 300, planned=(32, 4), needed=32, dtype=torch.float16),
    "fp16, 512": Case(512, "documents", length=40, chunk=128, shares=2, tma=True, dtype=torch.float16),
}


def spans_of(kind: str, length: int) -> spans.Spans:
    """Two rows of the kind."""
    if kind == "packed":
        return packed_spans(length)
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
        low[0, 30:66], high[0, 30:66] = 5, 4
        low[1, ::3], high[1, ::3] = length, -1
    elif kind == "scattered":  # neither bound grows with the query
        generator = torch.Generator().manual_seed(0)
        bounds = torch.randint(0, length, (2, 2, length // 8 + 1), generator=generator, dtype=torch.int32)
        low, high = (bound.repeat_interleave(8, dim=1)[:, :length].contiguous() for bound in bounds.sort(0).values)
    return spans.Spans(low, high)


def shuffled_shard(whole: spans.Spans, block: int, count: int) -> spans.Spans:
    """Blocks of the queries in random order, and again from the first if there are not enough."""
    length = whole.low.shape[1]
    generator = torch.Generator().manual_seed(2)
    blocks = torch.arange(length, dtype=torch.int32).split(block)
    orders = [torch.randperm(len(blocks), generator=generator).repeat(2)[:count] for _ in whole.low]
    # Two rows have as many queries: a short last block is left to its end.
    positions = [torch.cat([blocks[index] for index in order]) for order in orders]
    size = min(map(len, positions))
    positions = torch.stack([row[:size] for row in positions])
    low, high = (bound.gather(1, positions.long()) for bound in (whole.low, whole.high))
    return spans.Spans(low, high, spans.QueryShard(positions, length))


def check(case: Case) -> list[float]:
    """Relative errors of output, logarithms, dq, dk and dv. Tensors lie in memory as in the models: tokens first."""
    generator = torch.Generator().manual_seed(1)

    visible, scale = spans_of(case.kind, case.length), case.head_dim**-0.5
    place = torch.arange(case.length)
    if case.queries is not None:
        visible = shuffled_shard(visible, *case.queries)
        place = visible.shard.positions
    if case.planned is not None:
        visible = rank_spans(visible, *case.planned, case.window)
        place = visible.shard.positions

    def random(heads: int, length: int) -> torch.Tensor:
        made = torch.randn((length, 2, heads, case.head_dim), generator=generator)
        return made.to(case.dtype).permute(1, 2, 0, 3)

    heads, key_heads = case.heads
    num_queries = visible.low.shape[1]
    q, k, v, d_out = (
        random(*shape)
        for shape in ((heads, num_queries), (key_heads, case.length), (key_heads, case.length), (heads, num_queries))
    )
    if case.kind == "segments":  # as autograd hands over the gradient of a sum
        d_out = d_out[:1, :, :1].expand(q.shape)
    first = visible.low if case.window is None else torch.maximum(visible.low, place - case.window + 1)
    exact = [tensor.double() for tensor in (q, k, v)]
    expected_out, expected_lse = forward(*exact, first, visible.high, scale)
    dq, *of_keys = backward(d_out.double(), *exact, expected_out, expected_lse, first, visible.high, scale)
    window = case.window
    if case.needed:
        visible, keys = needed_keys(visible, window, case.needed)
        assert len(keys) < case.length
        window = None
        k, v, *of_keys = (tensor[:, :, keys] for tensor in (k, v, *of_keys))
    ours = _results(case, visible, window, (q, k, v, d_out), scale)
    pairs = zip(ours, (expected_out, expected_lse, dq, *of_keys), strict=True)
    return [_error(ours, theirs) for ours, theirs in pairs]


def _results(
    case: Case, visible: spans.Spans, window: int | None, tensors: tuple[torch.Tensor, ...], scale: float
) -> tuple[torch.Tensor, ...]:
    """Output, logarithms, dq, dk and dv of the kernels."""
    q, k, v, d_out = tensors
    first, last = visible.first_key(window), visible.high
    if case.kind == "documents":  # in another order in memory
        first, last = (tensor.t().contiguous().t() for tensor in (first, last))
    # Another shape for the key side, as the tables allow.
    blocks, key_side = (
        Blocks(*sizes, warps=4, stages=1, chunk=case.chunk, shares=case.shares)
        for sizes in (case.blocks, case.blocks[::-1])
    )
    launches = Configuration(blocks, blocks, key_side, case.tma)
    by_query, by_key = visible.block_ranges(window, blocks).by_query, visible.block_ranges(window, key_side).by_key
    out, lse = launch.forward(q, k, v, first, last, by_query, scale, launches)
    return out, lse, *launch.backward(d_out, q, k, v, out, lse, first, last, by_query, by_key, scale, launches)


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Minus infinity (a query that sees nothing) must be where the reference has it."""
    if not torch.equal(ours.isinf(), theirs.isinf()):
        return float("inf")
    finite = ~theirs.isinf()
    difference = (ours.double() - theirs)[finite].abs().max() / theirs[finite].abs().max()
    return difference.nan_to_num(float("inf")).item()


@dataclass(frozen=True)
class Mutant:
    """A text of a module of the kernels replaced, and the case that must notice."""

    module: ModuleType
    old: str
    new: str
    case: Case


_SMALL = Case(64, "images", length=60, tma=True)
_SHARD = Case(64, "images", length=60, queries=(8, 4))
MUTANTS = {
    "no window": Mutant(spans, "torch.maximum(self.low, first)", "self.low", Case(64, "causal", 20, 60)),
    "bound of keys": Mutant(triton_kernels, "<= last[:, None]", "< last[:, None]", _SMALL),
    "bound of queries": Mutant(triton_kernels, "<= last_key[None, :]", "< last_key[None, :]", _SMALL),
    "no rescale": Mutant(triton_kernels, "total * rescale[:, None] + ", "total + ", _SMALL),
    "no delta": Mutant(triton_kernels, "(d_weights - delta[:, None])", "d_weights", _SMALL),
    "a block too few": Mutant(spans, "(last + keys, last + 1)", "(last, last + 1)", _SMALL),
    "whole too early": Mutant(spans, "(first, first + keys - 1)", "(first, first)", replace(_SMALL, kind="documents")),
    "partial blocks after the whole ones": Mutant(triton_kernels, "block >= whole_begin", "block < 0", _SMALL),
    "a block too late": Mutant(spans, "where(touched, count).amin(2)", "where(touched, count).amin(2) + 1", _SMALL),
    "heads of a group": Mutant(
        triton_kernels, "key_head * group + member", "key_head + member", replace(_SMALL, heads=(4, 2))
    ),
    "a chunk left out": Mutant(
        triton_kernels, "tl.range(0, COLUMNS, CHUNK", "tl.range(0, COLUMNS - CHUNK, CHUNK", replace(_SMALL, chunk=32)
    ),
    "positions of a whole sequence": Mutant(
        spans, "return self.shard.positions", "pass", Case(64, "causal", 20, 60, (16, 2), tma=True)
    ),
    "as many keys as queries": Mutant(
        triton_kernels, "k_head, k_token, num_keys)", "k_head, k_token, num_queries)", _SHARD
    ),
    "as many values as queries": Mutant(
        triton_kernels, "v_head, v_token, num_keys)", "v_head, v_token, num_queries)", _SHARD
    ),
    "as many gradients of keys as queries": Mutant(
        triton_kernels, "dk_head, dk_token, num_keys)", "dk_head, dk_token, num_queries)", _SHARD
    ),
    "whole for one query of a block": Mutant(
        spans, "seeing_whole == size.clamp(max=queries)[:, None]", "seeing_whole > 0", _SHARD
    ),
    "column of a share": Mutant(
        triton_kernels, "_load(v, key_start, own_column,", "_load(v, key_start, 0,", replace(_SMALL, shares=2)
    ),
}


# Who names the module, and how.
_USERS = {triton_kernels: (launch, "triton_kernels"), spans: (sys.modules[__name__], "spans")}


def errors_of(mutant: Mutant) -> list[float]:
    """Relative errors with the mutant in place of the module."""
    text = Path(mutant.module.__file__).read_text()
    assert mutant.old in text, mutant
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "mutant.py")
        path.write_text(text.replace(mutant.old, mutant.new))
        specification = importlib.util.spec_from_file_location("mutant", path)
        module = sys.modules["mutant"] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        owner, attribute = _USERS[mutant.module]
        try:
            setattr(owner, attribute, module)
            return check(mutant.case)
        finally:
            setattr(owner, attribute, mutant.module)


if __name__ == "__main__":
    torch.set_num_threads(1)
    names = sys.argv[1:] or [*CASES, *MUTANTS]
    if names == ["further"]:
        names = list(FURTHER_CASES)
    for name, case in (CASES | FURTHER_CASES).items():
        if name in names:
            print(json.dumps({"case": name, "errors": check(case)}), flush=True)
    for name, mutant in MUTANTS.items():
        if name in names:
            print(json.dumps({"mutant": name, "errors": errors_of(mutant)}), flush=True)
