"""Which attention Transformer Engine computes, with which arguments, and that the result is the same.

Transformer Engine is a stand-in here (`tests/stand_ins/transformer_engine.py`); the GPU tests run the library itself.
Shapes: B batch, N query heads, G key/value heads, S sequence, D head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch

import vlm_kernels.span_attention as span_module
from megatron_vlm.data.collate import spans as visible_ranges
from megatron_vlm.layers.attention import AttentionCore, masked_spans
from tests.kernels.span_rows import shard_of
from tests.stand_ins import transformer_engine as stand_in
from vlm_kernels import packed_attention as packed_module
from vlm_kernels.packed_attention import Segments, packed_attention
from vlm_kernels.span_attention import Documents, QueryShard, Spans, blocks, flex, operators, reference, span_attention
from vlm_kernels.span_attention import transformer_engine as form

LENGTHS = ((9, 21, 10), (33, 7))
"""Documents of two rows of 40 tokens; the last of the second row is padding."""
LENGTH = 40
IMAGE = slice(12, 18)


def make_spans(sees_ahead: bool = False, backend: Any = "transformer_engine") -> Spans:
    """What `spans_of` makes of two packed rows, with or without an image that sees ahead."""
    ids = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in LENGTHS]
    ids[1] = ids[1].where(ids[1] == 0, -1)
    is_image = torch.zeros((2, LENGTH), dtype=torch.bool)
    is_image[0, IMAGE] = sees_ahead
    low, high = visible_ranges(torch.stack(ids), is_image)
    documents = Documents((*LENGTHS[0], *LENGTHS[1]), seen="range" if sees_ahead else "past")
    return Spans(low, high, documents=documents, backend=backend)


def make_tensors(head_dim: int = 16, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Queries [S, B, N, D], keys and values [S, B, G, D], as projections write them."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn((LENGTH, 2, heads, head_dim), generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (4, 2, 2)
    ]


@pytest.fixture(autouse=True)
def as_on_a_gpu() -> Iterator[None]:
    with (
        mock.patch.object(span_module, "is_on_gpu", lambda tensor: True),
        mock.patch.object(packed_module, "is_on_gpu", lambda tensor: True),
        mock.patch.object(flex, "attend", reference),
    ):
        yield


def results(core: AttentionCore, tensors: list[torch.Tensor], spans: Spans) -> list[torch.Tensor]:
    """Output and gradients, of real tokens: nothing reads what padding sees."""
    output = core(*tensors, spans)
    real = torch.ones_like(output)
    real[LENGTHS[1][0] :, 1] = 0
    output = output * real
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), tensors)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_packed_text_is_the_same(window: int | None, recompute: bool) -> None:
    tensors, core = make_tensors(), AttentionCore(window, 0.3, recompute)
    with stand_in.installed() as log:
        found = results(core, tensors, make_spans())
    expected = results(AttentionCore(window, 0.3, False), tensors, make_spans(backend="flex"))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)  # fp64 on both sides
    call = {
        "lengths": (9, 21, 10, 33, 7),
        "mask": "padding_causal",
        # Ours counts the query itself, theirs does not.
        "window": (-1 if window is None else window - 1, 0),
        "shape": (2 * LENGTH, 4, 16),
        "groups": 2,
        "scale": 0.3,
        "dtype": torch.float64,
    }
    assert log.calls == [call] * (1 + recompute) and len(log.built) == 1


@pytest.mark.parametrize("lengths", [(24,), (12, 12, 12), (24, 4, 60, 1)])
def test_frames_are_the_same(lengths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn((sum(lengths), 3, 4, 16), generator=generator, dtype=torch.float64, requires_grad=True)
    q, k, v = packed.permute(1, 2, 0, 3)
    segments = Segments(lengths, packed.device, "transformer_engine")
    with stand_in.installed() as log:
        found = packed_attention(q, k, v, segments, 0.3)
    expected = packed_module.reference(q, k, v, segments, 0.3)
    weights = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad((output * weights).sum(), packed)[0] for output in (found, expected)]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    (call,) = log.calls
    assert (call["lengths"], call["mask"], call["window"]) == (lengths, "padding", (-1, -1))


def takers(q: torch.Tensor, spans: Spans, window: int | None = None) -> str:
    """The implementation that a call of the operator runs."""
    names = {flex: "flex", operators: "operator", form: "transformer_engine"}
    ran: list[str] = []
    with ExitStack() as stack:
        for module, name in names.items():
            stack.enter_context(mock.patch.object(module, "attend", lambda *_, name=name: ran.append(name)))
        span_attention(q, q, q, spans, window, 1.0)
    (taken,) = ran
    return taken


def queries(head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros((2, 4, LENGTH, head_dim), dtype=dtype)


def test_what_it_takes() -> None:
    text, image = make_spans(), make_spans(sees_ahead=True)
    assert takers(queries(), text) == takers(queries(), text, window=7) == "transformer_engine"
    assert takers(queries(head_dim=256), text) == takers(queries(head_dim=72), text) == "transformer_engine"
    assert takers(queries(dtype=torch.float16), text) == "transformer_engine"
    # Layers to which images are causal, also where others let them see ahead.
    assert takers(queries(), masked_spans(image, "causal")) == "transformer_engine"
    assert takers(queries(), masked_spans(text, "window")) == "transformer_engine"
    # Whose images see their block whatever the window: here there is none.
    assert takers(queries(), text.with_whole_blocks(), window=4) == "transformer_engine"


def test_what_stays_with_flex_attention() -> None:
    text, image = make_spans(), make_spans(sees_ahead=True)
    assert takers(queries(), image) == takers(queries(), image, window=7) == "flex"
    assert takers(queries(), masked_spans(image, "window")) == "flex"
    assert takers(queries(), image.with_whole_blocks(), window=4) == "flex"
    assert takers(queries(head_dim=512), text) == takers(queries(head_dim=100), text) == "flex"
    assert takers(queries(dtype=torch.float32), text) == "flex"
    shard = shard_of(make_spans(), torch.arange(LENGTH, dtype=torch.int32).repeat(2, 1))
    assert takers(queries(), dataclasses.replace(shard, backend="transformer_engine")) == "flex"
    frames = Documents((LENGTH, LENGTH), seen="all")
    assert takers(queries(), dataclasses.replace(text, documents=frames), window=7) == "flex"


def test_auto_takes_what_is_proven_and_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = make_spans(backend="auto")
    assert takers(queries(), spans) == "flex", "nothing is proven"
    monkeypatch.setattr(span_module, "is_proven", lambda q: True)
    assert takers(queries(), spans) == "operator"
    monkeypatch.setattr(form, "PROVEN", {(64, None)})  # the host has no compute capability
    form.why_absent.cache_clear()
    assert takers(queries(), spans) == "operator", "not installed"
    with stand_in.installed():
        assert takers(queries(), spans) == "transformer_engine"
        assert takers(queries(128), spans) == "operator"
        assert takers(queries(), make_spans(backend="flex")) == "flex"


def test_flex_means_flex_on_context_ranks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_module, "is_proven", lambda q: True)
    places = torch.arange(LENGTH, dtype=torch.int32)
    starts = places.repeat(2, 1)
    for backend, taken in (("flex", "flex"), ("auto", "operator")):
        bounds = make_spans()
        shard = QueryShard(starts, LENGTH, block_starts=starts)
        spans = Spans(bounds.low, bounds.high, shard, backend=backend)  # type: ignore[arg-type]
        derived = (spans, spans.causal(), spans.with_whole_blocks(), spans.among(7, places, LENGTH))
        assert [takers(queries(), each) for each in derived] == [taken] * 4


def test_nothing_counts_as_proven_yet() -> None:
    """Goes when the first stage of `make gpu` has passed with Transformer Engine."""
    assert not form.PROVEN and not blocks.PROVEN


def test_dense_scores_are_refused() -> None:
    with (
        stand_in.installed(fused=False),
        pytest.raises(RuntimeError, match=r"no fused attention for 4 query heads, 2 key heads of 16 in torch\.float64"),
    ):
        AttentionCore(None, 1.0, False)(*make_tensors(), make_spans())


def test_the_host_waits_for_nothing() -> None:
    """Tensors are never read to choose: their values may be missing."""
    text = make_spans()
    for name in ("low", "high"):
        setattr(text, name, getattr(text, name).to("meta"))
    assert form.takes(queries().to("meta"), text, 7)
