"""Gemma 4's attention: norms of queries, keys and values, keys as values, and keys and values of an earlier layer.

Shapes: S sequence (unsharded inside attention), B batch, H hidden, N query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from typing import cast

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.families.gemma4.config import LayerConfig
from megatron_vlm.layers.attention import AttentionCore, key_value_linear
from megatron_vlm.layers.linear import (
    ColumnParallel,
    ColumnParallelLinear,
    Group,
    RowParallelLinear,
    column_parallel,
)
from megatron_vlm.layers.norm import RMSNorm
from megatron_vlm.layers.side_by_side import add_side_by_side, side_by_side
from vlm_kernels.rms_norm import rms_norm
from vlm_kernels.rope import RopeTable, qk_norm_rope
from vlm_kernels.span_attention import Spans

KeysAndValues = tuple[torch.Tensor, torch.Tensor]
"""Keys, normalised and rotated, and normalised values of this rank's heads, each [S, B, G, D]."""


class Attention(torch.nn.Module):
    """Self-attention of one decoder layer; heads are split over the tensor ranks.

    Args:
        hidden_size: H.
        layer: this layer's configuration.
        mcore_config: megatron-core settings.
        group: the tensor-parallel process group.
        recompute_core: compute `AttentionCore` again in the backward pass.
    """

    def __init__(
        self,
        hidden_size: int,
        layer: LayerConfig,
        mcore_config: TransformerConfig,
        group: Group,
        recompute_core: bool,
    ) -> None:
        super().__init__()
        self.layer, self.group, self.sequence_parallel = layer, group, mcore_config.sequence_parallel
        query_size = layer.num_attention_heads * layer.head_dim
        linears: dict[str, ColumnParallel] = {
            "q_proj": ColumnParallelLinear(hidden_size, query_size, mcore_config, group)
        }
        self.q_norm = self._head_norm(mcore_config)
        if layer.keys_of_layer is None:
            linears["k_proj"] = key_value_linear(hidden_size, layer, mcore_config, group)
            self.k_norm = self._head_norm(mcore_config)
            if not layer.keys_as_values:
                linears["v_proj"] = key_value_linear(hidden_size, layer, mcore_config, group)
        add_side_by_side(self, **linears)
        self.core = AttentionCore(layer.window, layer.softmax_scale, recompute_core)
        self.o_proj = RowParallelLinear(query_size, hidden_size, mcore_config, group)

    def forward(
        self, x_SBH: torch.Tensor, rope: RopeTable, spans: Spans, shared: KeysAndValues | None
    ) -> tuple[torch.Tensor, KeysAndValues]:
        """Return the output of self-attention, projections included, and the keys and values attended with.

        Args:
            x_SBH: hidden states; a shard of the sequence under sequence parallelism.
            rope: cosines and sines [S, B, D / 2].
            spans: visible ranges.
            shared: keys and values of an earlier layer, for a layer that has none of its own.
        """
        linears = [cast(ColumnParallel, linear) for linear in side_by_side(self)]
        q, *projected = (
            output.unflatten(-1, (-1, self.layer.head_dim))
            for output in column_parallel(x_SBH, linears, self.group, self.sequence_parallel)
        )
        eps = self.layer.norm_eps
        if shared is None:
            k, v = projected[0], projected[-1]
            v = rms_norm(v, None, eps)
            q, k = qk_norm_rope(q, k, rope, q_weight=self.q_norm(), k_weight=self.k_norm(), eps=eps)
            shared = k, v
        else:
            no_keys = q[..., :0, :]
            q, _ = qk_norm_rope(q, no_keys, rope, q_weight=self.q_norm(), eps=eps)
        return self.o_proj(self.core(q, *shared, spans)), shared

    def _head_norm(self, mcore_config: TransformerConfig) -> RMSNorm:
        # It acts on this rank's heads only.
        layer = self.layer
        return RMSNorm(layer.head_dim, layer.norm_eps, False, mcore_config.params_dtype, partial=True)
