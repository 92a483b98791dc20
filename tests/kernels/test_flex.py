"""What torch's compiler makes of FlexAttention for a GPU: which kernel, how many variants, and that they fit.

Nothing runs on a GPU here; `tests/gpu` compares results at the same shapes.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
import torch

from tests.kernels.gpu_compiler import compiling_flex_attention
from tests.kernels.span_compile import SHARED_BYTES
from tests.kernels.span_rows import RUN_SHAPES, run_spans
from tests.sizes import full
from vlm_kernels.span_attention import QueryShard, Spans, flex

ROWS = (17, 60, 100, 127, 128, 300)
WINDOWS = (None, 50)
RATIOS = (1, 2, 4, 8)
HEAD_DIMS = (64, 72, 128, 256, 512)
KEY_HEADS = 2


def attend(
    rows: Iterable[int],
    ratio: int,
    head_dim: int,
    is_training: bool,
    windows: Iterable[int | None] = WINDOWS,
    dtype: torch.dtype = torch.bfloat16,
    ranks: int = 1,
) -> None:
    """One row of each length, as projections write queries, keys and values: tokens before heads.

    With several context ranks the queries are those of the last one, to which every so many tokens belong.
    """
    for length in rows:
        positions = torch.arange(ranks - 1, length, ranks, dtype=torch.int32)[None]
        shapes = ((positions.shape[1], ratio * KEY_HEADS), (length, KEY_HEADS), (length, KEY_HEADS))
        made = (torch.randn((tokens, 1, heads, head_dim)).to(dtype).permute(1, 2, 0, 3) for tokens, heads in shapes)
        q, k, v = (tensor.requires_grad_(is_training) for tensor in made)
        shard = QueryShard(positions, length) if ranks > 1 else None
        spans = Spans(torch.zeros_like(positions), positions, shard)
        for window in windows:
            flex.attend(q, k, v, spans, window, head_dim**-0.5)


@pytest.mark.full
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_short_rows_take_the_general_kernel(ratio: int, head_dim: int, is_training: bool) -> None:
    check_kernels(ROWS, ratio, head_dim, is_training)


@pytest.mark.parametrize("is_training", [True, full(False)])
def test_shards_of_queries_take_the_general_kernel(is_training: bool) -> None:
    """25, 75 and 150 queries, over one block of keys and over several."""
    check_kernels((100, 300, 600), 4, 64, is_training, ranks=4)


def check_kernels(rows: tuple[int, ...], ratio: int, head_dim: int, is_training: bool, ranks: int = 1) -> None:
    """Nothing but FlexAttention's general kernels is compiled."""
    with compiling_flex_attention() as compilations:
        attend(rows, ratio, head_dim, is_training, ranks=ranks)
    passes = ["flex_attention", "flex_attention_backward"][: 1 + is_training]
    for variant in compilations.variants:
        assert len(variant) == len(passes)
    names = [launch.name.removeprefix("triton_tem_fused_")[:-2] for launch in compilations.launches()]
    assert names == passes * len(compilations.variants)
    assert not any("flex_decoding" in launch.source for launch in compilations.launches())


@pytest.mark.parametrize("is_training", [True, False])
def test_the_compiler_by_itself_fails(monkeypatch: pytest.MonkeyPatch, is_training: bool) -> None:
    """Why `kernel_options` names a kernel; goes when this no longer raises."""
    monkeypatch.setattr(flex, "kernel_options", lambda q: {})
    refusals = r"Q and KV block sizes must be divisible|No choices exist"  # of torch 2.15, of torch 2.11
    with compiling_flex_attention(), pytest.raises(Exception, match=refusals):
        attend([100], 8, 64, is_training)


@pytest.mark.parametrize(("ranks", "is_training"), [full(1, True), full(1, False), full(2, True), (2, False)])
def test_variants_are_few_over_lengths_and_windows(ranks: int, is_training: bool) -> None:
    lengths = [*random.Random(3).sample(range(2, 500), 48), 1024, 2500]
    with torch._dynamo.config.patch(recompile_limit=8), compiling_flex_attention() as compilations:
        attend(lengths, 2, 64, is_training, windows=(None, 7, 1024), ranks=ranks)
        # Past its limit dynamo would run attention uncompiled.
        assert torch._dynamo.config.recompile_limit >= 64
    # Rows of one block, rows of less than one block, and longer rows.
    assert len(compilations.variants) <= 3


@pytest.mark.parametrize("is_training", [full(True), False])
def test_variants_are_two_in_packed_and_context_parallel_runs(is_training: bool) -> None:
    """One for single rows and one for several: not by lengths of queries or keys, which may be equal, nor documents."""
    with compiling_flex_attention() as compilations:
        for shape in RUN_SHAPES:
            spans = run_spans(*shape)
            queries, keys, rows, _ = shape
            made = (torch.randn((tokens, rows, heads, 64)) for tokens, heads in ((queries, 4), (keys, 2), (keys, 2)))
            inputs = [tensor.bfloat16().permute(1, 2, 0, 3).requires_grad_(is_training) for tensor in made]
            for window in (None, 50):
                flex.attend(*inputs, spans, window, 0.1)
    assert len(compilations.variants) == 2


SMALL_SIZES = {(8, "float32", 72)}
SIZES = [
    sizes if sizes in SMALL_SIZES else full(*sizes)
    for major in SHARED_BYTES
    for dtype in ("bfloat16", "float32")
    for head_dim in HEAD_DIMS
    for sizes in [(major, dtype, head_dim)]
]


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("major", "dtype", "head_dim"), SIZES)
def test_kernels_fit_in_shared_memory(major: int, dtype: str, head_dim: int) -> None:
    with compiling_flex_attention(major) as compilations:
        attend([300], 2, head_dim, True, windows=[None], dtype=getattr(torch, dtype))
    launches = compilations.launches()
    assert len(launches) == 2
    for launch in launches:
        assert launch.machine_code(major).metadata.shared <= SHARED_BYTES[major], launch.name


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    ("major", "dtype", "head_dim"),
    [(9, torch.bfloat16, 512), full(8, torch.float32, 72)],
)
def test_the_compilers_own_launch_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, major: int, dtype: torch.dtype, head_dim: int
) -> None:
    """Why `kernel_options` says how deep loads are; goes when this no longer holds."""
    monkeypatch.setattr(flex, "kernel_options", lambda q: {"BACKEND": "TRITON"})
    with compiling_flex_attention(major) as compilations:
        attend([300], 2, head_dim, False, windows=[None], dtype=dtype)
    (launch,) = compilations.launches()
    assert launch.machine_code(major).metadata.shared > SHARED_BYTES[major]
