"""What context ranks exchange: keys and values before attention, and features of images before the first layer.

There is no ring: tokens of an image see later ones, and windows and documents leave most steps of a ring empty. Each
rank receives the keys and values that its queries see, in one exchange for each layer, and gradients take the way back.

For a while a rank holds, in a layer with G heads of keys of D values each on it, 2 G D values for each of the tokens
sent and twice for each of the Sk received; of those it keeps Sk for the backward pass, unless attention is recomputed,
which repeats the exchange instead.

Shapes: B rows, Sq tokens of this rank, Sk tokens that it receives, G key/value heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed
from megatron.core.tensor_parallel import all_to_all
from torch.autograd.function import once_differentiable

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.data.context_facts import ContextShard, KeyExchange
from vlm_kernels.span_attention import Backend, Documents, QueryShard, Spans

Group = torch.distributed.ProcessGroup


def spans_of(batch: MicroBatch, group: Group, backend: Backend) -> Spans:
    """Return the spans of a micro-batch, and of a context rank's shard, how keys and values are gathered.

    Args:
        batch: the micro-batch.
        group: the context-parallel process group.
        backend: what computes attention on a GPU.
    """
    if batch.context is None:
        assert group.size() == 1, "a shard of the micro-batch for each context rank"
        documents = Documents(batch.document_lengths, seen="range" if batch.sees_ahead else "past")
        return Spans(batch.span_low, batch.span_high, documents=documents, backend=backend)
    context: ContextShard = batch.context

    def gather(
        k: torch.Tensor, v: torch.Tensor, spans: Spans, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor, Spans]:
        exchange = context.exchanges[window]
        k, v = exchange_keys(k, v, exchange, group)
        return k, v, spans.among(window, exchange.places, exchange.num_keys)

    shard = QueryShard(context.positions, context.num_tokens, context.block_starts, gather)
    return Spans(batch.span_low, batch.span_high, shard, backend=backend)


def exchange_keys(
    k: torch.Tensor, v: torch.Tensor, exchange: KeyExchange, group: Group
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values, each [Sk, B, G, D], that this rank's queries see, ascending in the sequence.

    Args:
        k: keys [Sq, B, G, D] of this rank's tokens.
        v: values, likewise.
        exchange: what is sent and received.
        group: the context-parallel process group.
    """
    own = torch.cat((k, v), dim=2)
    gathered = _exchange_rows(own, exchange.sent, exchange.sent_counts, exchange.received_counts, exchange.order, group)
    keys, values = gathered.chunk(2, dim=2)
    return keys, values


def exchange_features(
    features: torch.Tensor, rank_of_feature: np.ndarray, context: ContextShard, group: Group
) -> torch.Tensor:
    """Return the features of images that this rank's tokens stand for, [features, ...], ascending.

    Args:
        features: of the images that this context rank has encoded, ascending.
        rank_of_feature: which context rank has encoded each feature of the micro-batch.
        context: which features the tokens of every rank stand for.
        group: the context-parallel process group.
    """
    place = np.empty(len(rank_of_feature), np.int64)
    for rank in range(group.size()):
        encoded = rank_of_feature == rank
        place[encoded] = np.arange(encoded.sum())
    own, wanted = group.rank(), context.image_features
    sent = [place[each[rank_of_feature[each] == own]] for each in wanted]
    received = [wanted[own][rank_of_feature[wanted[own]] == rank] for rank in range(group.size())]
    index, order = (
        torch.from_numpy(values).to(features.device, non_blocking=True)
        for values in (np.concatenate(sent), np.argsort(np.concatenate(received)))
    )
    return _exchange_rows(features, index, tuple(map(len, sent)), tuple(map(len, received)), order, group)


def _exchange_rows(
    rows: torch.Tensor,
    sent: torch.Tensor,
    sent_counts: tuple[int, ...],
    received_counts: tuple[int, ...],
    order: torch.Tensor,
    group: Group,
) -> torch.Tensor:
    """Send rows by their indices, so many to each rank; return those received, in an order."""
    given = _SentRows.apply(rows, sent, sent_counts)
    received = all_to_all(group, given, list(received_counts), list(sent_counts))
    result: torch.Tensor = _Reordered.apply(received, order)
    return result


class _SentRows(torch.autograd.Function):
    """Rows by their indices; gradients of a row that was sent several times are added in fp32, in order of ranks."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.counts, ctx.num_rows = counts, rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (index,) = ctx.saved_tensors
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = torch.zeros((ctx.num_rows, *gradient.shape[1:]), dtype=wide, device=gradient.device)
        for of_rank, part in zip(index.split(ctx.counts), gradient.split(ctx.counts), strict=True):
            total.index_add_(0, of_rank, part.to(wide))
        return total.to(gradient.dtype), None, None


class _Reordered(torch.autograd.Function):
    """Rows in another order, each once, so that their gradients are put back in place and not added up."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (order,) = ctx.saved_tensors
        return torch.empty_like(gradient).index_copy_(0, order, gradient), None
