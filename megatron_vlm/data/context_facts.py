"""What a context rank knows of the full micro-batch: where its tokens lie, and which keys and values it exchanges.

Shapes: B rows, S tokens of a row of the full micro-batch, Sq those of this rank, Sk tokens that its queries see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class KeyExchange:
    """The keys and values that a rank sends and receives in layers with one window.

    The arrays are tensors; on their way between processes, numpy arrays.

    Attributes:
        sent: [tokens sent] int64, which of this rank's tokens are sent: those for rank 0 first, ascending for each. A
            token that several ranks see comes several times.
        sent_counts: number of tokens for each rank, this one included.
        received_counts: number of tokens from each rank.
        order: [Sk] int64, which of the received tokens is the next key, ascending in the sequence.
        places: [S] int32, the place of each token among these keys; meaningless for tokens that are not received.
    """

    sent: Any
    sent_counts: tuple[int, ...]
    received_counts: tuple[int, ...]
    order: Any
    places: Any

    @property
    def num_keys(self) -> int:
        """Number of keys that this rank has after the exchange, Sk."""
        return sum(self.received_counts)

    def map(self, function: Callable[[Any], Any]) -> KeyExchange:
        """Return the same with `function` applied to the arrays."""
        return replace(self, **{name: function(getattr(self, name)) for name in ("sent", "order", "places")})


@dataclass(frozen=True)
class ContextShard:
    """Where a context rank's tokens lie in the full micro-batch.

    Attributes:
        positions: [B, Sq] int32, place of each token in its row, ascending.
        block_starts: [B, Sq] int32, first token of the token's block, the run of tokens that see equally far.
        num_tokens: tokens of a row of the full micro-batch, S.
        num_real: tokens of the full micro-batch that are not padding.
        exchanges: what is exchanged in the layers with each window.
        image_features: for every context rank the features of images and videos that its tokens stand for, [features]
            int64, ascending; they stay on the host.
    """

    positions: Any
    block_starts: Any
    num_tokens: int
    num_real: int
    exchanges: Mapping[int | None, KeyExchange]
    image_features: tuple[np.ndarray, ...]

    def map(self, function: Callable[[Any], Any]) -> ContextShard:
        """Return the same with `function` applied to the arrays that devices read."""
        return replace(
            self,
            positions=function(self.positions),
            block_starts=function(self.block_starts),
            exchanges={window: exchange.map(function) for window, exchange in self.exchanges.items()},
        )
