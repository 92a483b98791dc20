"""Gated feed-forward layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.layers.linear import ColumnParallelLinear, Group, RowParallelLinear, column_parallel


class GatedMLP(torch.nn.Module):
    """down(activation(gate(x)) * up(x)), columns of gate and up and rows of down split over the tensor ranks."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: Callable[[torch.Tensor], torch.Tensor],
        engine: TransformerConfig,
        group: Group,
    ) -> None:
        super().__init__()
        self.activation, self.group, self.sequence_parallel = activation, group, engine.sequence_parallel
        self.gate_proj = ColumnParallelLinear(hidden_size, intermediate_size, engine, group)
        self.up_proj = ColumnParallelLinear(hidden_size, intermediate_size, engine, group)
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, engine, group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[S, B, H] to the same, shards of the sequence under sequence parallelism."""
        gate, up = column_parallel(x, (self.gate_proj, self.up_proj), self.group, self.sequence_parallel)
        return self.down_proj(self.activation(gate) * up)
