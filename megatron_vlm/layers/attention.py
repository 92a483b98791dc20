"""Grouped-query self-attention with query/key norms, rotary positions and spans, over tensor-parallel heads.

Shapes: S sequence (whole inside attention, also under sequence parallelism), B batch, H hidden, N heads, D head dim.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.checkpoint import checkpoint

from megatron_vlm.layers.linear import (
    ColumnParallelLinear,
    Group,
    ReplicatedLinear,
    RowParallelLinear,
    column_parallel_weights,
)
from megatron_vlm.layers.norm import RMSNorm
from vlm_kernels.rope import RopeTable, qk_norm_rope
from vlm_kernels.span_attention import Spans, span_attention


class AttentionRecord(Protocol):
    """What a layer's configuration record says about attention."""

    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def window(self) -> int | None: ...
    @property
    def softmax_scale(self) -> float: ...
    @property
    def norm_eps(self) -> float: ...


class SelfAttention(torch.nn.Module):
    """Self-attention of one decoder layer; heads are split over the tensor ranks.

    With more tensor ranks than key/value heads, `k_proj` and `v_proj` are whole on every rank, which uses the rows of
    the one head that its query heads share: sharding them further would split a head. Their gradients are then sums.

    Args:
        hidden_size: H.
        layer: this layer's record.
        engine: megatron-core settings.
        group: tensor ranks.
        norms: of queries and keys before they are rotated: none, by their weight, or by one plus their weight.
        recompute_core: compute the attention product again in the backward pass.
    """

    def __init__(
        self,
        hidden_size: int,
        layer: AttentionRecord,
        engine: TransformerConfig,
        group: Group,
        norms: Literal["none", "plain", "zero_centered"],
        recompute_core: bool,
    ) -> None:
        super().__init__()
        self.layer, self.group, self.recompute_core = layer, group, recompute_core
        self.sequence_parallel = engine.sequence_parallel
        query_size = layer.num_attention_heads * layer.head_dim
        key_size = layer.num_key_value_heads * layer.head_dim
        self.q_proj = ColumnParallelLinear(hidden_size, query_size, engine, group)
        self.replicated_keys = group.size() > layer.num_key_value_heads
        self.k_proj, self.v_proj = (
            ReplicatedLinear(hidden_size, key_size, engine)
            if self.replicated_keys
            else ColumnParallelLinear(hidden_size, key_size, engine, group)
            for _ in range(2)
        )
        self.o_proj = RowParallelLinear(query_size, hidden_size, engine, group)
        self.norms = norms
        if norms != "none":
            # These act on this rank's heads only.
            self.q_norm, self.k_norm = (
                RMSNorm(layer.head_dim, layer.norm_eps, norms == "zero_centered", engine.params_dtype, partial=True)
                for _ in range(2)
            )

    def forward(
        self,
        x_SBH: torch.Tensor,
        rope: RopeTable,
        spans: Spans,
        query_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            x_SBH: a shard of the sequence under sequence parallelism.
            rope: cosines and sines [S, B, D / 2] of the whole sequence.
            spans: visible ranges.
            query_scale: [S, B], factor on rotated queries that depends on their place.

        Returns:
            Like `x_SBH`.
        """
        weights = (self.q_proj()[0], *self._key_value_weights())
        q, k, v = (
            projected.unflatten(-1, (-1, self.layer.head_dim))
            for projected in column_parallel_weights(x_SBH, weights, self.group, self.sequence_parallel)
        )
        q, k = qk_norm_rope(q, k, rope, query_scale=query_scale, **self._norms())
        attended = (
            checkpoint(self._core, q, k, v, spans, use_reentrant=False)
            if self.recompute_core and self.training
            else self._core(q, k, v, spans)
        )
        return self.o_proj(attended)

    def _core(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans) -> torch.Tensor:
        layer = self.layer
        heads_first = (tensor.permute(1, 2, 0, 3) for tensor in (q, k, v))
        attended_BNSD = span_attention(*heads_first, spans, window=layer.window, scale=layer.softmax_scale)
        return attended_BNSD.permute(2, 0, 1, 3).flatten(2).contiguous()

    def _norms(self) -> dict[str, Any]:
        if self.norms == "none":
            return {}
        return {
            "q_weight": self.q_norm(),
            "k_weight": self.k_norm(),
            "eps": self.layer.norm_eps,
            "zero_centered": self.norms == "zero_centered",
        }

    def _key_value_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self.k_proj()[0], self.v_proj()[0]
        if not self.replicated_keys:
            return k, v
        head = self.group.rank() * self.layer.num_key_value_heads // self.group.size()
        start, size = head * self.layer.head_dim, self.layer.head_dim
        return k.narrow(0, start, size), v.narrow(0, start, size)
