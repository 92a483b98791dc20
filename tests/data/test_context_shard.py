"""Context ranks' shards of a micro-batch: all tokens are on one rank, and each rank receives every key that it sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

import numpy as np
import pytest
import torch

from megatron_vlm.data.collate import MicroBatch, spans
from megatron_vlm.data.context_blocks import planned_positions
from megatron_vlm.data.context_shard import ContextSharding, shard_for_context
from megatron_vlm.data.stage_loader import decode, encode
from megatron_vlm.layers.attention import masked_spans
from megatron_vlm.model_configs import AttentionKind
from tests.families.gemma3 import GEMMA3
from tests.families.gemma4 import GEMMA4
from tests.families.qwen3_vl import QWEN3_VL
from tests.families.tiny_family import TinyFamily
from vlm_kernels.span_attention import QueryShard, Spans

TOKENS = ("input_ids", "labels", "position_ids", "document_ids", "span_low", "span_high")
KINDS: tuple[AttentionKind, ...] = ((None, "causal"), (None, "window"), (3, "window"), (3, "whole"), (200, "window"))
Plan = Callable[[np.ndarray, int], np.ndarray]


def anywhere(load: np.ndarray, num_ranks: int) -> np.ndarray:
    order = np.random.default_rng(1).permutation(len(load))
    return np.sort(order.reshape(num_ranks, -1), axis=1)


def shards(batch: MicroBatch, size: int, plan: Plan = planned_positions, multiple_of: int = 1) -> list[MicroBatch]:
    return [shard_for_context(batch, ContextSharding(rank, size, KINDS, multiple_of, plan)) for rank in range(size)]


def packed(family: TinyFamily) -> MicroBatch:
    return family.micro_batches("packed")[0].batch


def long_rows() -> MicroBatch:
    """Two rows of many documents with images, longer than the groups in which keys are exchanged."""
    random, length = np.random.default_rng(0), 1600
    numbers = [np.sort(random.integers(0, 12, length)) for _ in range(2)]
    document_ids = torch.from_numpy(np.stack(numbers)).int()
    document_ids[1] += 12
    document_ids[1, -50:] = -1
    is_image = torch.zeros(2, length, dtype=torch.bool)
    for start in random.integers(0, length - 60, 12):
        is_image[:, start : start + 60] = True
    low, high = spans(document_ids, is_image & (document_ids >= 0))
    tokens = torch.arange(length).expand(2, -1)
    empty = torch.zeros(24, dtype=torch.int32)
    return MicroBatch(tokens, tokens, tokens, document_ids, low, high, tokens.int() - tokens.int() - 1, {}, empty)


@pytest.mark.parametrize("plan", [planned_positions, anywhere])
@pytest.mark.parametrize("family", [GEMMA3, GEMMA4, QWEN3_VL], ids=str)
@pytest.mark.parametrize(("size", "multiple_of"), [(2, 1), (4, 1), (3, 2)])
def test_every_token_is_on_one_rank(family: TinyFamily, size: int, multiple_of: int, plan: Plan) -> None:
    whole = packed(family)
    parts = shards(whole, size, plan, multiple_of)
    lengths = {part.input_ids.shape[1] for part in parts}
    assert len(lengths) == 1 and lengths.pop() % multiple_of == 0
    positions = torch.cat([part.context.positions for part in parts], dim=1)
    order = positions[0].argsort()
    length = whole.input_ids.shape[1]
    assert torch.equal(positions[:, order], torch.arange(positions.shape[1]).int().expand_as(positions))
    for name in TOKENS:
        together = torch.cat([getattr(part, name) for part in parts], dim=-1)[..., order]
        assert torch.equal(together[..., :length], getattr(whole, name)), name
    features = torch.cat([features_of(part, rank, whole) for rank, part in enumerate(parts)], dim=1)[:, order]
    assert torch.equal(features[:, :length], whole.feature_index) and (features[:, length:] == -1).all()
    assert sum(len(features) for features in parts[0].context.image_features) == whole.num_image_features
    padding = torch.cat([part.document_ids for part in parts], dim=1)[:, order][:, length:]
    assert (padding == -1).all()
    labels = sum(len(part.label_index) for part in parts)
    assert labels == len(whole.label_index)
    for part in parts:
        assert part.media == whole.media and part.document_names == whole.document_names
        assert part.context.num_real == int((whole.document_ids >= 0).sum())
        assert part.counters["padded_tokens"] == positions.numel() - part.context.num_real


def features_of(part: MicroBatch, rank: int, whole: MicroBatch) -> torch.Tensor:
    """The features of the full micro-batch that a rank's tokens stand for, from those that it receives."""
    received = torch.from_numpy(part.context.image_features[rank]).int()
    audio = torch.arange(whole.num_image_features, 1 + int(whole.feature_index.max()), dtype=torch.int32)
    table = torch.cat((received, audio, torch.tensor([-1], dtype=torch.int32)))  # the last is that of text
    return table[part.feature_index.long()]


def received_keys(parts: Sequence[MicroBatch], rank: int, window: int | None) -> torch.Tensor:
    """Positions of the keys that a rank has after an exchange, by what the other ranks say that they send."""
    found = []
    for sender in parts:
        exchange = sender.context.exchanges[window]
        sent = sender.context.positions[0][exchange.sent].split(exchange.sent_counts)[rank]
        found.append(sent)
    own = parts[rank].context.exchanges[window]
    assert tuple(map(len, found)) == own.received_counts
    return torch.cat(found)[own.order]


@pytest.mark.parametrize("plan", [planned_positions, anywhere])
@pytest.mark.parametrize("batch", [packed(GEMMA3), packed(GEMMA4), long_rows()], ids=["gemma3", "gemma4", "long"])
@pytest.mark.parametrize("size", [2, 4])
def test_every_key_that_is_seen_is_received(batch: MicroBatch, size: int, plan: Plan) -> None:
    """In order, and the spans among the received keys hide exactly what the spans of the full sequence hide."""
    parts = shards(batch, size, plan)
    length = parts[0].context.num_tokens
    together = torch.cat([part.context.positions for part in parts], dim=1)[0].argsort()
    low, high = (torch.cat([getattr(part, name) for part in parts], dim=1)[:, together] for name in TOKENS[4:6])
    for window, mask in KINDS:
        visible = masked_spans(Spans(low, high), mask).dense(window)
        for rank, part in enumerate(parts):
            keys, context = received_keys(parts, rank, window), part.context
            assert torch.equal(keys, keys.unique())
            own = visible[:, :, context.positions[0].long()]
            left_out = torch.ones(length, dtype=torch.bool)
            left_out[keys.long()] = False
            assert not own[..., left_out].any(), "a key that a query sees"
            exchange = context.exchanges[window]
            shard = QueryShard(context.positions, context.num_tokens, context.block_starts)
            among = masked_spans(Spans(part.span_low, part.span_high, shard), mask).among(
                window, exchange.places, exchange.num_keys
            )
            assert torch.equal(among.dense(None), own[..., keys.long()])


def test_layers_with_a_window_receive_less() -> None:
    """Where a rank's tokens lie together; keys come in groups of 64, which divides the rows and the groups of 128."""
    together = np.arange(1600).reshape(4, 400)
    parts = shards(long_rows(), 4, lambda load, size: together)
    counts = [{window: exchange.num_keys for window, exchange in part.context.exchanges.items()} for part in parts]
    assert all(400 <= each[3] <= each[200] <= each[None] for each in counts)
    assert counts[-1][3] <= 400 + 2 * 64 + 60  # a window, and an image of 60 tokens that began before
    assert any(each[3] < each[200] for each in counts)


@pytest.mark.parametrize(
    ("kinds", "num_keys"), [(((None, "causal"),), 128), (((None, "causal"), (None, "window")), 256)]
)
def test_causal_layers_do_not_ask_for_later_keys(kinds: tuple[AttentionKind, ...], num_keys: int) -> None:
    """The first rank has the first half of an image, which other layers see whole."""
    halves, tokens = np.arange(256).reshape(2, 128), torch.arange(256)[None]
    low, high = spans(torch.zeros_like(tokens), (tokens >= 100) & (tokens < 200))
    ids = torch.zeros_like(tokens).int()
    batch = MicroBatch(tokens, tokens, tokens, ids, low, high, ids - 1, {}, torch.zeros(1, dtype=torch.int32))
    shard = shard_for_context(batch, ContextSharding(0, 2, kinds, 1, lambda load, size: halves))
    assert shard.context.exchanges[None].num_keys == num_keys


@pytest.mark.parametrize(
    ("kinds", "most"),
    [(((3, "window"),), 3), (((3, "window"), (200, "window")), 200), (((3, "window"), (None, "causal")), 256)],
)
def test_tokens_are_dealt_by_the_keys_of_the_largest_window(kinds: tuple[AttentionKind, ...], most: int) -> None:
    tokens, loads = torch.arange(256)[None], []

    def plan(load: np.ndarray, size: int) -> np.ndarray:
        loads.append(load)
        return np.arange(256).reshape(2, 128)

    ids = torch.zeros_like(tokens).int()
    low, high = spans(ids, ids > 0)
    batch = MicroBatch(tokens, tokens, tokens, ids, low, high, ids - 1, {}, torch.zeros(1, dtype=torch.int32))
    shard_for_context(batch, ContextSharding(0, 2, kinds, 1, plan))
    assert loads[0].tolist() == [min(position + 1, most) for position in range(256)]


def test_a_shard_travels_to_other_stages() -> None:
    (part, _) = shards(packed(GEMMA4), 2)
    (arrived,) = decode(encode([part]))
    assert arrived.context.positions.dtype == torch.int32
    for field in fields(part.context):
        sent, found = getattr(part.context, field.name), getattr(arrived.context, field.name)
        if isinstance(sent, torch.Tensor):
            assert torch.equal(found, sent)
    for window, exchange in part.context.exchanges.items():
        found = arrived.context.exchanges[window]
        assert (found.sent_counts, found.received_counts) == (exchange.sent_counts, exchange.received_counts)
        for name in ("sent", "order", "places"):
            assert torch.equal(getattr(found, name), getattr(exchange, name))


def test_a_shard_moves_to_a_device() -> None:
    moved = shards(packed(GEMMA3), 2)[0].to("meta")
    assert moved.context.positions.is_meta and moved.context.exchanges[None].order.is_meta
