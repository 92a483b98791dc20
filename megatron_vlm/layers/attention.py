"""Grouped-query self-attention with query/key norms, rotary positions and spans, over tensor-parallel heads.

Shapes: S sequence (unsharded inside attention, also under sequence parallelism; under context parallelism a rank's
shard of it), B batch, H hidden, N query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.checkpoint import checkpoint

from megatron_vlm.layers.linear import (
    ColumnParallelLinear,
    Group,
    ReplicatedLinear,
    RowParallelLinear,
    column_parallel,
)
from megatron_vlm.layers.norm import RMSNorm
from megatron_vlm.layers.side_by_side import add_side_by_side
from megatron_vlm.model_configs import DecoderLayerConfig, ImageMask
from vlm_kernels.rope import RopeTable, qk_norm_rope
from vlm_kernels.span_attention import Spans, span_attention


class AttentionCore(torch.nn.Module):
    """Attention between projected heads: all of a layer's attention but its projections, norms and rotation.

    Where queries are a context rank's shard of the sequence, the keys and values that they see are gathered here and
    nowhere else.

    Args:
        window: number of keys visible on the past side, the query's own included; None is unlimited.
        scale: factor on the scores.
        recompute: compute attention again in the backward pass, and gather keys and values again.
    """

    def __init__(self, window: int | None, scale: float, recompute: bool) -> None:
        super().__init__()
        self.window, self.scale, self.recompute = window, scale, recompute

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans) -> torch.Tensor:
        """Return the attended values of this rank's queries.

        Args:
            q: queries [S, B, N, D].
            k: keys [S, B, G, D].
            v: values [S, B, G, D].
            spans: visible ranges, which shard of the sequence S is, and how its ranks gather keys and values.

        Returns:
            [S, B, N * D].
        """
        if self.recompute and self.training:
            return checkpoint(self._attend, q, k, v, spans, use_reentrant=False, preserve_rng_state=False)
        return self._attend(q, k, v, spans)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans) -> torch.Tensor:
        window = self.window
        if spans.shard is not None and spans.shard.gather is not None:
            k, v, spans = spans.shard.gather(k, v, spans, window)
            window = None  # the spans have it
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (q, k, v))
        attended_BNSD = span_attention(q, k, v, spans, window, self.scale)
        return attended_BNSD.permute(2, 0, 1, 3).flatten(2).contiguous()


def masked_spans(spans: Spans, image_mask: ImageMask) -> Spans:
    """Return the spans of layers with an image mask, from those in which images see ahead."""
    if image_mask == "causal":
        return spans.causal()
    return spans if image_mask == "window" else spans.with_whole_blocks()


def key_value_linear(
    hidden_size: int, layer: DecoderLayerConfig, mcore_config: TransformerConfig, group: Group
) -> ColumnParallelLinear | ReplicatedLinear:
    """Build the projection of keys or values, whose heads are split over the tensor ranks.

    With more tensor ranks than heads it is replicated on every rank, which uses the rows of the one head that its query
    heads attend with: sharding it further would split a head. Its gradients are then summed over the ranks.
    """
    heads, size = layer.num_key_value_heads, layer.head_dim
    if group.size() <= heads:
        return ColumnParallelLinear(hidden_size, heads * size, mcore_config, group)
    own_head = group.rank() * heads // group.size()
    return ReplicatedLinear(hidden_size, heads * size, (own_head * size, size), mcore_config)


class SelfAttention(torch.nn.Module):
    """Self-attention of one decoder layer; heads are split over the tensor ranks.

    Args:
        hidden_size: H.
        layer: this layer's configuration.
        mcore_config: megatron-core settings.
        group: the tensor-parallel process group.
        norms: the norms of queries and keys before rotation: none, scaled by the weight, or by one plus the weight.
        recompute_core: compute `AttentionCore` again in the backward pass.
    """

    q_proj: ColumnParallelLinear
    k_proj: ColumnParallelLinear | ReplicatedLinear
    v_proj: ColumnParallelLinear | ReplicatedLinear

    def __init__(
        self,
        hidden_size: int,
        layer: DecoderLayerConfig,
        mcore_config: TransformerConfig,
        group: Group,
        norms: Literal["none", "plain", "zero_centered"],
        recompute_core: bool,
    ) -> None:
        super().__init__()
        self.layer, self.group = layer, group
        self.sequence_parallel = mcore_config.sequence_parallel
        query_size = layer.num_attention_heads * layer.head_dim
        q_proj = ColumnParallelLinear(hidden_size, query_size, mcore_config, group)
        k_proj, v_proj = (key_value_linear(hidden_size, layer, mcore_config, group) for _ in range(2))
        add_side_by_side(self, q_proj=q_proj, k_proj=k_proj, v_proj=v_proj)
        self.core = AttentionCore(layer.window, layer.softmax_scale, recompute_core)
        self.o_proj = RowParallelLinear(query_size, hidden_size, mcore_config, group)
        self.norms = norms
        if norms != "none":
            # These act on this rank's heads only.
            self.q_norm, self.k_norm = (
                RMSNorm(
                    layer.head_dim, layer.norm_eps, norms == "zero_centered", mcore_config.params_dtype, partial=True
                )
                for _ in range(2)
            )

    def forward(
        self,
        x_SBH: torch.Tensor,
        rope: RopeTable,
        spans: Spans,
        query_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the output of self-attention, projections included.

        Args:
            x_SBH: hidden states; a shard of the sequence under sequence parallelism.
            rope: cosines and sines [S, B, D / 2].
            spans: visible ranges.
            query_scale: [S, B], factor on rotated queries that depends on their position.

        Returns:
            A tensor of the shape of `x_SBH`.
        """
        linears = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (
            projected.unflatten(-1, (-1, self.layer.head_dim))
            for projected in column_parallel(x_SBH, linears, self.group, self.sequence_parallel)
        )
        if self.norms == "none":
            # Rotation keeps neither queries nor keys; values that are views would keep the projections of both.
            v = v.contiguous()
        q, k = qk_norm_rope(q, k, rope, query_scale=query_scale, **self._norms())
        return self.o_proj(self.core(q, k, v, spans))

    def _norms(self) -> dict[str, Any]:
        if self.norms == "none":
            return {}
        return {
            "q_weight": self.q_norm(),
            "k_weight": self.k_norm(),
            "eps": self.layer.norm_eps,
            "zero_centered": self.norms == "zero_centered",
        }
