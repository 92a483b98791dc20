"""Tensor-parallel linear layers on megatron-core's, and several column-parallel ones that share one input.

Shapes: S sequence (a shard of it under sequence parallelism), B batch, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide

from megatron_vlm.parallel.parameters import declare, normal, zeros
from megatron_vlm.parallel.sequence import Group, gather_sequence, reduce_input_gradient


class ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """Holds rows of a weight [out, in]; `column_parallel` multiplies.

    Calling it returns (weight, bias): reading them past the call would bypass the hooks by which megatron-core's
    overlapped parameter gathering waits for them.
    """

    def __init__(self, in_size: int, out_size: int, engine: TransformerConfig, group: Group, bias: bool = False):
        super().__init__(in_size, out_size, config=engine, init_method=_no_init, bias=bias, tp_group=group)
        declare(self.weight, "matrix", normal, tensor_dim=0)
        if bias:
            declare(self.bias, "vector", zeros, tensor_dim=0)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weight [out / tensor ranks, in], bias [out / tensor ranks] or None)."""
        return self.weight, self.bias


class SectionedColumnParallelLinear(torch.nn.Module):
    """Several column-parallel linears in one weight [sections, out, in], each section split over the tensor ranks.

    A fused weight [sections * out, in] is the same numbers in the same order, but a rank's rows of it do not lie
    together. Used like `ColumnParallelLinear`: one product and one exchange make the outputs of all sections.

    Args:
        in_size: of the input.
        out_size: of one section.
        sections: how many.
        engine: megatron-core settings.
        group: tensor ranks.
    """

    def __init__(self, in_size: int, out_size: int, sections: int, engine: TransformerConfig, group: Group) -> None:
        super().__init__()
        rows = divide(out_size, group.size())
        self.weight = torch.nn.Parameter(torch.empty(sections, rows, in_size, dtype=engine.params_dtype))
        self.bias = torch.nn.Parameter(torch.empty(sections, rows, dtype=engine.params_dtype))
        declare(self.weight, "matrix", normal, tensor_dim=1)
        declare(self.bias, "vector", zeros, tensor_dim=1)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight [sections * out / tensor ranks, in], bias [sections * out / tensor ranks])."""
        return self.weight.flatten(0, 1), self.bias.flatten()


class ReplicatedLinear(torch.nn.Linear):
    """A whole weight [out, in] without bias on every tensor rank, which uses some of its rows.

    Called like `ColumnParallelLinear`.
    """

    def __init__(self, in_size: int, out_size: int, engine: TransformerConfig) -> None:
        super().__init__(in_size, out_size, bias=False, dtype=engine.params_dtype)
        declare(self.weight, "matrix", normal, partial=True)

    def forward(self) -> tuple[torch.Tensor, None]:
        """(weight [out, in], None)."""
        return self.weight, None


class RowParallelLinear(tensor_parallel.RowParallelLinear):
    """Holds columns of a weight [out, in]; sums over the tensor ranks (and scatters under sequence parallelism)."""

    def __init__(self, in_size: int, out_size: int, engine: TransformerConfig, group: Group, bias: bool = False):
        super().__init__(
            in_size,
            out_size,
            config=engine,
            init_method=_no_init,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=group,
        )
        declare(self.weight, "matrix", normal, tensor_dim=1)
        if bias:
            # Added to a shard of the sequence there; megatron-core would sum its gradient by a mark of its own.
            self.bias.sequence_parallel = False
            declare(self.bias, "vector", zeros, partial=engine.sequence_parallel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [S, B, in / tensor ranks] to [S, B, out]."""
        return super().forward(x)[0]


def _no_init(weight: torch.Tensor) -> None:
    """Weights are set by their declarations after the model is built (`model.init_weights`)."""


def column_parallel(
    x: torch.Tensor,
    linears: Sequence[ColumnParallelLinear | SectionedColumnParallelLinear],
    group: Group,
    sequence_parallel: bool,
) -> list[torch.Tensor]:
    """Outputs of several column-parallel linears on one input, with one exchange in each direction for all of them.

    Args:
        x: [S, B, in], the same on every tensor rank, or a shard of the sequence under sequence parallelism.
        linears: the layers.
        group: tensor ranks.
        sequence_parallel: gather the sequence first.

    Returns:
        One [S, B, out / tensor ranks] per linear, over the whole sequence.
    """
    weights, biases = zip(*(linear() for linear in linears), strict=True)
    outputs = column_parallel_weights(x, weights, group, sequence_parallel)
    return [output if bias is None else output + bias for output, bias in zip(outputs, biases, strict=True)]


def column_parallel_weights(
    x: torch.Tensor, weights: Sequence[torch.Tensor], group: Group, sequence_parallel: bool
) -> tuple[torch.Tensor, ...]:
    """`column_parallel` on bare weights."""
    return _SharedInputLinear.apply(x, group, sequence_parallel and group.size() > 1, *weights)


class _SharedInputLinear(torch.autograd.Function):
    """y_i = gather(x) W_i^T. Saves only the shard of x; gathers it again in the backward pass.

    megatron-core's column-parallel linear does the same for one weight; three of them on one input would gather the
    sequence three times, or sum three input gradients over the tensor ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, group: Group, sequence_parallel: bool, *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        whole = gather_sequence(x, group)[0] if sequence_parallel else x
        return tuple(torch.matmul(whole, weight.t()) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needs_x, needs_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        whole, gathering = x, None
        if ctx.sequence_parallel and any(needs_weights):
            whole, gathering = gather_sequence(x, ctx.group, async_op=True)
        grad_x, reducing = None, None
        if needs_x:
            grad_x = _sum_of_products(gradients, weights)
            grad_x, reducing = reduce_input_gradient(grad_x, ctx.group, ctx.sequence_parallel)
        if gathering is not None:
            gathering.wait()
        rows = whole.flatten(0, -2)
        grad_weights = [
            torch.matmul(gradient.flatten(0, -2).t(), rows) if needed else None
            for gradient, needed in zip(gradients, needs_weights, strict=True)
        ]
        if reducing is not None:
            reducing.wait()
        return grad_x, None, None, *grad_weights


def _sum_of_products(inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of inputs_i weights_i, added up in fp32 whatever the dtype."""
    if inputs[0].dtype is not torch.float32 and len(inputs) > 1:
        # One product sums in fp32; adding bf16 products would round each.
        return torch.matmul(torch.cat(inputs, dim=-1), torch.cat(weights))
    total = torch.matmul(inputs[0], weights[0])
    for rows, weight in zip(inputs[1:], weights[1:], strict=True):
        total.flatten(0, -2).addmm_(rows.flatten(0, -2), weight)
    return total
