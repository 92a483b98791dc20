"""Feed-forward layers with and without a gate."""

from __future__ import annotations

from typing import Literal, cast

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import gelu

from megatron_vlm.layers.linear import (
    ColumnParallelLinear,
    Group,
    RowParallelLinear,
    column_parallel,
    joint_column_parallel,
)
from megatron_vlm.layers.side_by_side import add_side_by_side
from vlm_kernels.gated import Activation, gated_halves


class GatedMLP(torch.nn.Module):
    """down(activation(gate(x)) * up(x)), where gate and up are column-parallel and down is row-parallel."""

    gate_proj: ColumnParallelLinear
    up_proj: ColumnParallelLinear

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: Activation,
        mcore_config: TransformerConfig,
        group: Group,
    ) -> None:
        super().__init__()
        self.activation, self.group, self.sequence_parallel = activation, group, mcore_config.sequence_parallel
        gate, up = (ColumnParallelLinear(hidden_size, intermediate_size, mcore_config, group) for _ in range(2))
        add_side_by_side(self, gate_proj=gate, up_proj=up)
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, mcore_config, group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [S, B, H] to the same shape; S is a shard of the sequence under sequence parallelism."""
        gate_up = joint_column_parallel(x, (self.gate_proj, self.up_proj), self.group, self.sequence_parallel)
        return self.down_proj(gated_halves(gate_up, self.activation, consume=True))


class MLP(torch.nn.Module):
    """second(gelu(first(x))) with biases; the first is column-parallel and the second row-parallel.

    Args:
        sizes: sizes of the input, between the layers, and of the output.
        names: names of the two layers, as checkpoints of the family have them.
        approximate: form of the GELU: "none" or "tanh".
        mcore_config: megatron-core settings without sequence parallelism.
        group: the tensor-parallel process group.
    """

    def __init__(
        self,
        sizes: tuple[int, int, int],
        names: tuple[str, str],
        approximate: Literal["none", "tanh"],
        mcore_config: TransformerConfig,
        group: Group,
    ) -> None:
        super().__init__()
        self.names, self.approximate, self.group = names, approximate, group
        in_size, hidden_size, out_size = sizes
        self.add_module(names[0], ColumnParallelLinear(in_size, hidden_size, mcore_config, group, bias=True))
        self.add_module(names[1], RowParallelLinear(hidden_size, out_size, mcore_config, group, bias=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out]."""
        first, second = (self.get_submodule(name) for name in self.names)
        (hidden,) = column_parallel(x, (cast(ColumnParallelLinear, first),), self.group, False)
        return second(gelu(hidden, approximate=self.approximate))
