"""A context rank's shard of a micro-batch: some blocks of its tokens, and the keys and values that ranks exchange.

Blocks of tokens are dealt to the ranks by the number of keys that their queries see (`context_blocks`). Any assignment
is exact: every query has the positions, the span and the features of its token in the full micro-batch, and receives
the keys and values of all tokens that it sees. Which those are is known here, on the host, and no rank asks another.

Shapes: B rows, S tokens of a row of the full micro-batch, Sq those of this rank, Sk tokens that its queries see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from megatron_vlm.data.collate import NO_LOSS, MicroBatch
from megatron_vlm.data.context_blocks import padded_length, planned_positions
from megatron_vlm.data.context_facts import ContextShard, KeyExchange
from megatron_vlm.model_configs import AttentionKind, ImageMask

KEYS_TOGETHER = 128
"""Keys are exchanged in groups of this many, as kernels read them, even where a rank sees only some of them."""
PADDING = {"input_ids": 0, "labels": NO_LOSS, "position_ids": 0, "document_ids": -1, "feature_index": -1}
Ranges = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class ContextSharding:
    """Which shard of every micro-batch a rank takes.

    Attributes:
        rank: the context rank.
        size: number of context ranks.
        kinds: all windows and image masks of the decoder's layers.
        multiple_of: divides the number of tokens of a rank (the tensor-parallel size under sequence parallelism).
        plan: assigns positions [size, S / size] to ranks, from the number of keys [S] that queries see in the layers
            with the largest window; see `planned_positions`.
    """

    rank: int
    size: int
    kinds: tuple[AttentionKind, ...]
    multiple_of: int = 1
    plan: Callable[[np.ndarray, int], np.ndarray] = planned_positions


def shard_for_context(batch: MicroBatch, sharding: ContextSharding) -> MicroBatch:
    """Return a rank's shard of a micro-batch, whose media and counters are those of all of it.

    Args:
        batch: on the host.
        sharding: which shard; every context rank passes the same but for the rank.
    """
    length = batch.input_ids.shape[1]
    batch = _padded(batch, padded_length(length, sharding.size, sharding.multiple_of))
    low, high = batch.span_low.numpy(), batch.span_high.numpy()
    starts = _block_starts(high)
    ranges = {window: _ranges(low, high, starts, window, masks) for window, masks in _by_window(sharding.kinds).items()}
    # Layers without a window have most of the work in long rows; those with one are about even whatever is done.
    first, last = ranges[max(ranges, key=lambda window: math.inf if window is None else window)]
    dealt = sharding.plan((last - first + 1).sum(0, dtype=np.int64), sharding.size)
    own = torch.from_numpy(dealt[sharding.rank])
    rows = batch.input_ids.shape[0]
    tokens = ("input_ids", "labels", "position_ids", "document_ids", "span_low", "span_high")
    features = [_image_features(batch, positions) for positions in dealt]
    return replace(
        batch,
        **{name: getattr(batch, name)[..., own] for name in tokens},
        feature_index=_received_features(batch, own, len(features[sharding.rank])),
        context=ContextShard(
            positions=own.int().expand(rows, -1).contiguous(),
            block_starts=torch.from_numpy(starts)[:, own],
            num_tokens=dealt.size,
            num_real=int((batch.document_ids >= 0).sum()),
            exchanges={window: _exchange(dealt, sharding.rank, bounds) for window, bounds in ranges.items()},
            image_features=tuple(features),
        ),
    )


def _padded(batch: MicroBatch, length: int) -> MicroBatch:
    """Return the micro-batch with rows of `length` tokens."""
    missing = length - batch.input_ids.shape[1]
    if not missing:
        return batch
    own = torch.arange(length - missing, length, dtype=torch.int32).expand(len(batch.input_ids), -1)
    changes: dict[str, Any] = {
        name: pad(getattr(batch, name), (0, missing), value=value) for name, value in PADDING.items()
    }
    changes |= {name: torch.cat((getattr(batch, name), own), dim=1) for name in ("span_low", "span_high")}
    counters = batch.counters and {**batch.counters, "padded_tokens": batch.counters["padded_tokens"] + own.numel()}
    return replace(batch, **changes, counters=counters)


def _image_features(batch: MicroBatch, positions: np.ndarray) -> np.ndarray:
    """Return the features of images and videos, int64 ascending, that the tokens at some positions stand for."""
    index = batch.feature_index.numpy()[:, positions].ravel()
    return index[(index >= 0) & (index < batch.num_image_features)].astype(np.int64)


def _received_features(batch: MicroBatch, own: torch.Tensor, num_received: int) -> torch.Tensor:
    """Return the `feature_index` of a rank that receives the image features of its tokens, and has all of audio."""
    index = batch.feature_index[:, own]
    is_image = (index >= 0) & (index < batch.num_image_features)
    received = is_image.flatten().cumsum(0).view_as(index) - 1
    of_audio = index - batch.num_image_features + num_received
    return torch.where(is_image, received, torch.where(index >= 0, of_audio, index)).int()


def _block_starts(high: np.ndarray) -> np.ndarray:
    """Return the first token of each token's block, [B, S] int32: of the run of tokens that see equally far."""
    positions = np.arange(high.shape[1], dtype=np.int32)
    begins = np.ones_like(high, dtype=bool)
    begins[:, 1:] = high[:, 1:] != high[:, :-1]
    return np.maximum.accumulate(np.where(begins, positions, 0), axis=1).astype(np.int32)


def _by_window(kinds: Sequence[AttentionKind]) -> Mapping[int | None, set[ImageMask]]:
    masks: dict[int | None, set[ImageMask]] = {}
    for window, mask in kinds:
        masks.setdefault(window, set()).add(mask)
    return masks


def _ranges(low: np.ndarray, high: np.ndarray, starts: np.ndarray, window: int | None, masks: set[ImageMask]) -> Ranges:
    """Return the first and the last key, each [B, S], that a query sees in some layer with this window."""
    positions = np.arange(low.shape[1], dtype=np.int32)
    last = np.broadcast_to(positions, high.shape) if masks == {"causal"} else high
    if window is None:
        return low, last
    reach = positions - (window - 1)
    return np.maximum(low, np.minimum(reach, starts) if "whole" in masks else reach), last


def _exchange(dealt: np.ndarray, rank: int, ranges: Ranges) -> KeyExchange:
    """Return what a rank sends and receives, given the keys that every query sees.

    Args:
        dealt: [ranks, S / ranks], the positions of every rank, ascending.
        rank: the rank.
        ranges: first and last key, each [B, S].
    """
    length = dealt.size
    seen = np.stack([_seen_keys(positions, ranges, length) for positions in dealt])
    own = dealt[rank]
    sent = [np.flatnonzero(seen_by[own]) for seen_by in seen]
    received = [positions[seen[rank, positions]] for positions in dealt]
    return KeyExchange(
        sent=torch.from_numpy(np.concatenate(sent)),
        sent_counts=tuple(map(len, sent)),
        received_counts=tuple(map(len, received)),
        order=torch.from_numpy(np.argsort(np.concatenate(received))),
        places=torch.from_numpy(np.cumsum(seen[rank], dtype=np.int32) - np.int32(1)),
    )


def _seen_keys(positions: np.ndarray, ranges: Ranges, length: int) -> np.ndarray:
    """Return which keys, [S] bool, the queries at some positions see, and the groups of keys around them."""
    first, last = (bounds[:, positions].ravel() for bounds in ranges)
    begun, ended = (np.bincount(bounds, minlength=length + 1) for bounds in (first, last + 1))
    # The queries' own keys count even where padding sees none.
    seen = np.cumsum(begun - ended)[:length] > 0
    seen[positions] = True
    together = math.gcd(length, KEYS_TOGETHER)
    return np.repeat(seen.reshape(-1, together).any(1), together)
