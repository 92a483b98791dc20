"""Tensor-parallel linear layers of Gemma 4's towers, whose inputs and outputs are clipped to bounds of the checkpoint.

A layer NAME has its weight as `NAME.linear.weight` and, in a tower that clips, four scalars that do not train:
`NAME.input_min`, `NAME.input_max`, `NAME.output_min` and `NAME.output_max`.

Source: transformers models/gemma4 (`Gemma4ClippableLinear`).
Shapes: T packed tokens or patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.layers.linear import (
    ColumnParallelLinear,
    Group,
    RowParallelLinear,
    SectionedColumnParallelLinear,
    joint_column_parallel,
    multiply,
)
from megatron_vlm.layers.operands import Operand
from megatron_vlm.layers.side_by_side import add_side_by_side
from megatron_vlm.parallel.parameters import Initial, declare
from vlm_kernels.gated import gated, gated_halves


def minus_infinity(whole: torch.Tensor, std: float, generator: torch.Generator) -> None:
    """Fill with the lower bound that clips nothing."""
    whole.fill_(-math.inf)


def plus_infinity(whole: torch.Tensor, std: float, generator: torch.Generator) -> None:
    """Fill with the upper bound that clips nothing."""
    whole.fill_(math.inf)


BOUNDS: dict[str, Initial] = {
    "input_min": minus_infinity,
    "input_max": plus_infinity,
    "output_min": minus_infinity,
    "output_max": plus_infinity,
}


class Bounds(NamedTuple):
    """The bounds of one linear layer, scalars."""

    input_min: torch.Tensor
    input_max: torch.Tensor
    output_min: torch.Tensor
    output_max: torch.Tensor

    def clip_input(self, x: torch.Tensor) -> torch.Tensor:
        """Clip the layer's input; its shards may be clipped one by one."""
        return torch.clamp(x, self.input_min, self.input_max)

    def clip_output(self, x: torch.Tensor) -> torch.Tensor:
        """Clip the layer's output; of a row-parallel layer, the sum over the tensor ranks."""
        return torch.clamp(x, self.output_min, self.output_max)


class _ClippedLinear(torch.nn.Module):
    def __init__(self, linear: torch.nn.Module, clips: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear, self.clips = linear, clips
        for name, initial in BOUNDS.items() if clips else ():
            bound = torch.nn.Parameter(torch.empty((), dtype=dtype))
            self.register_parameter(name, declare(bound, "buffer", initial))

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the linear layer."""
        return cast(torch.Tensor, self.linear.weight)

    @property
    def bounds(self) -> Bounds | None:
        """The bounds; None in a tower that does not clip."""
        return Bounds(*(getattr(self, name) for name in BOUNDS)) if self.clips else None


class ClippedColumnParallelLinear(_ClippedLinear):
    """A linear layer that holds rows of a weight [out, in]; `clipped_column_parallel` multiplies.

    Args:
        in_size: size of the input.
        out_size: size of the output over all tensor ranks; with sections, of one section.
        mcore_config: megatron-core settings without sequence parallelism.
        group: the tensor-parallel process group.
        clips: whether there are bounds.
        sections: number of equal sections of the output that are split over the ranks one by one; the weight is
            [sections, out, in] then. None for a plain weight.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        mcore_config: TransformerConfig,
        group: Group,
        clips: bool,
        sections: int | None = None,
    ) -> None:
        linear = (
            ColumnParallelLinear(in_size, out_size, mcore_config, group)
            if sections is None
            else SectionedColumnParallelLinear(in_size, out_size, sections, mcore_config, group, bias=False)
        )
        super().__init__(linear, clips, mcore_config.params_dtype)

    def forward(self) -> tuple[Operand, Bounds | None]:
        """Return the operand of the linear layer, and the bounds."""
        return self.linear(), self.bounds


class ClippedRowParallelLinear(_ClippedLinear):
    """A linear layer that holds columns of a weight [out, in]; outputs are summed over the tensor ranks, then clipped.

    Args:
        in_size: size of the input over all tensor ranks.
        out_size: size of the output.
        mcore_config: megatron-core settings without sequence parallelism.
        group: the tensor-parallel process group.
        clips: whether there are bounds.
    """

    def __init__(self, in_size: int, out_size: int, mcore_config: TransformerConfig, group: Group, clips: bool) -> None:
        linear = RowParallelLinear(in_size, out_size, mcore_config, group)
        super().__init__(linear, clips, mcore_config.params_dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [T, in / tensor ranks] to [T, out]."""
        bounds = self.bounds
        return self.linear(x) if bounds is None else bounds.clip_output(self.linear(bounds.clip_input(x)))


def clipped_column_parallel(
    x: torch.Tensor, linears: Sequence[ClippedColumnParallelLinear], group: Group
) -> list[torch.Tensor]:
    """Return the outputs of several column-parallel linears on one input.

    Each clips by its own bounds; one exchange sums the gradients of the input over the tensor ranks for all of them.

    Args:
        x: [T, in], the same on every tensor rank.
        linears: layers that all clip, or all do not.
        group: the tensor-parallel process group.

    Returns:
        One [T, out / tensor ranks] per linear.
    """
    operands, bounds = zip(*(linear() for linear in linears), strict=True)
    if bounds[0] is None:
        return multiply(x, operands, group)
    x = tensor_parallel.copy_to_tensor_model_parallel_region(x, group=group)
    return [
        own.clip_output(multiply(own.clip_input(x), (operand,))[0])
        for operand, own in zip(operands, bounds, strict=True)
    ]


class ClippedGatedMLP(torch.nn.Module):
    """down(gelu_tanh(gate(x)) * up(x)) of clipped linears.

    Args:
        hidden_size: size of input and output.
        intermediate_size: size between the layers, which ranks split.
        mcore_config: megatron-core settings without sequence parallelism.
        group: the tensor-parallel process group.
        clips: whether there are bounds.
    """

    gate_proj: ClippedColumnParallelLinear
    up_proj: ClippedColumnParallelLinear

    def __init__(
        self, hidden_size: int, intermediate_size: int, mcore_config: TransformerConfig, group: Group, clips: bool
    ) -> None:
        super().__init__()
        self.group = group
        gate, up = (
            ClippedColumnParallelLinear(hidden_size, intermediate_size, mcore_config, group, clips) for _ in range(2)
        )
        add_side_by_side(self, gate_proj=gate, up_proj=up)
        self.down_proj = ClippedRowParallelLinear(intermediate_size, hidden_size, mcore_config, group, clips)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [T, hidden size] to the same shape."""
        if not self.gate_proj.clips:
            linears = [cast(ColumnParallelLinear, layer.linear) for layer in (self.gate_proj, self.up_proj)]
            gate_up = joint_column_parallel(x, linears, self.group, False)
            return self.down_proj(gated_halves(gate_up, "gelu_tanh", consume=True))
        gate, up = clipped_column_parallel(x, (self.gate_proj, self.up_proj), self.group)
        return self.down_proj(gated(gate, up, "gelu_tanh", consume=True))
