"""Tensor-parallel linear layers built on megatron-core's, and several column-parallel ones applied to one input.

A linear layer multiplies with an `Operand` (`layers.operands`): a parameter or what a provider makes of other storage,
and possibly a low-rank pair.

Shapes: S sequence (a shard of it under sequence parallelism), B batch, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide

from megatron_vlm.layers.operands import Operand, OperandOwner, Provider
from megatron_vlm.parallel.parameters import declare, normal, zeros
from megatron_vlm.parallel.sequence import Group, gather_sequence, reduce_input_gradient


class ColumnParallelLinear(OperandOwner, tensor_parallel.ColumnParallelLinear):
    """A linear layer that holds rows of a weight [out, in]; `column_parallel` multiplies.

    Calling it returns its operand: reading weights past the call would bypass the hooks by which megatron-core's
    overlapped parameter gathering waits for them.
    """

    def __init__(self, in_size: int, out_size: int, mcore_config: TransformerConfig, group: Group, bias: bool = False):
        super().__init__(in_size, out_size, config=mcore_config, init_method=_no_init, bias=bias, tp_group=group)
        declare(self.weight, "matrix", normal, tensor_dim=0)
        if self.bias is not None:
            declare(self.bias, "vector", zeros, tensor_dim=0)

    def forward(self) -> Operand:
        """Return the weight [out / tensor ranks, in] and the bias [out / tensor ranks] or None."""
        return self.operand(self.weight, self.bias)


class SectionedColumnParallelLinear(OperandOwner, torch.nn.Module):
    """Several column-parallel linears in one weight [sections, out, in], each section split over the tensor ranks.

    A fused weight [sections * out, in] has the same elements in the same order, but a rank's rows of it are not
    contiguous. It is used like `ColumnParallelLinear`: one matmul and one exchange make the outputs of all sections.

    Args:
        in_size: size of the input.
        out_size: output size of one section, over all tensor ranks.
        sections: number of sections.
        mcore_config: megatron-core settings.
        group: the tensor-parallel process group.
        bias: add a bias [sections, out].
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        sections: int,
        mcore_config: TransformerConfig,
        group: Group,
        bias: bool = True,
    ) -> None:
        super().__init__()
        rows = divide(out_size, group.size())
        self.weight = torch.nn.Parameter(torch.empty(sections, rows, in_size, dtype=mcore_config.params_dtype))
        declare(self.weight, "matrix", normal, tensor_dim=1)
        self.bias = None
        if bias:
            self.bias = torch.nn.Parameter(torch.empty(sections, rows, dtype=mcore_config.params_dtype))
            declare(self.bias, "vector", zeros, tensor_dim=1)

    def forward(self) -> Operand:
        """Return the weight [sections * out / tensor ranks, in] and the bias [its rows] or None."""
        weight = None if self.weight is None else self.weight.flatten(0, 1)
        return self.operand(weight, None if self.bias is None else self.bias.flatten())


class ReplicatedLinear(OperandOwner, torch.nn.Linear):
    """A replicated weight [out, in] without bias on every tensor rank, which uses some of its rows.

    It is called like `ColumnParallelLinear`.

    Args:
        in_size: size of the input.
        out_size: output size of the whole weight.
        rows: first row that this rank uses, and how many.
        mcore_config: megatron-core settings.
    """

    def __init__(self, in_size: int, out_size: int, rows: tuple[int, int], mcore_config: TransformerConfig) -> None:
        super().__init__(in_size, out_size, bias=False, dtype=mcore_config.params_dtype)
        self.rows = rows
        declare(self.weight, "matrix", normal, partial=True)

    def forward(self) -> Operand:  # type: ignore[override]
        """Return this rank's rows of the weight, [rows, in]."""
        return self.operand(self.weight, None).rows(*self.rows)


class RowParallelLinear(OperandOwner, tensor_parallel.RowParallelLinear):
    """A linear layer that holds columns of a weight [out, in], and sums outputs over the tensor ranks.

    Under sequence parallelism the sum is also scattered along the sequence.
    """

    def __init__(self, in_size: int, out_size: int, mcore_config: TransformerConfig, group: Group, bias: bool = False):
        super().__init__(
            in_size,
            out_size,
            config=mcore_config,
            init_method=_no_init,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=group,
        )
        declare(self.weight, "matrix", normal, tensor_dim=1)
        if self.bias is not None:
            # Under sequence parallelism the bias is added to a shard of the sequence, and its gradient is summed by our
            # declaration; megatron-core would sum it once more because of this mark.
            self.bias.sequence_parallel = False
            declare(self.bias, "vector", zeros, partial=mcore_config.sequence_parallel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [S, B, in / tensor ranks] to [S, B, out]."""
        return super().forward(x)[0]

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor | None, *_: Any, **__: Any) -> torch.Tensor:
        """Return this rank's summand, in place of megatron-core's plain matmul of input and weight."""
        return multiply(input, (self.operand(weight, None),))[0]


def _no_init(weight: torch.Tensor) -> None:
    """Do nothing: weights are set by their declarations after the model is built (`model.init_weights`)."""


def column_parallel(
    x: torch.Tensor,
    linears: Sequence[ColumnParallelLinear | SectionedColumnParallelLinear | ReplicatedLinear],
    group: Group,
    sequence_parallel: bool,
) -> list[torch.Tensor]:
    """Return the outputs of several column-parallel linears on one input, with one exchange per direction for all.

    Args:
        x: [S, B, in], the same on every tensor rank, or a shard of the sequence under sequence parallelism.
        linears: the layers.
        group: the tensor-parallel process group.
        sequence_parallel: gather the sequence first.

    Returns:
        One [S, B, out / tensor ranks] per linear, over the full sequence.
    """
    return multiply(x, [linear() for linear in linears], group, sequence_parallel)


def multiply(
    x: torch.Tensor, operands: Sequence[Operand], group: Group | None = None, sequence_parallel: bool = False
) -> list[torch.Tensor]:
    """Do what `column_parallel` does, on bare operands; without a group, nothing is exchanged."""
    tensors = [tensor for operand in operands for tensor in operand.tensors()]
    providers = (None if isinstance(operand.weight, torch.Tensor) else operand.weight for operand in operands)
    forms = [(provider, operand.scale) for provider, operand in zip(providers, operands, strict=True)]
    gathers = sequence_parallel and group is not None and group.size() > 1
    outputs = _SharedInputLinear.apply(x, group, gathers, forms, *tensors)
    biases = [operand.bias for operand in operands]
    return [output if bias is None else output + bias for output, bias in zip(outputs, biases, strict=True)]


class _SharedInputLinear(torch.autograd.Function):
    """y_i = gather(x) W_i^T + s_i (gather(x) A_i^T) B_i^T.

    Only this rank's shard of the input is saved, and gathered again in the backward pass; none of it where no weight
    trains. A weight from a provider is not saved either: the provider makes it again.

    megatron-core's column-parallel linear does the same for one weight; three of them on one input would gather the
    sequence three times, or sum three input gradients over the tensor ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        group: Group | None,
        gathers: bool,
        forms: Sequence[tuple[Provider | None, float]],
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        full = gather_sequence(x, group)[0] if gathers and group is not None else x
        outputs, inners = [], []
        for (provider, scale), weight, a, b in _operands(forms, tensors):
            output = torch.matmul(full, _weight(provider, weight).t())
            inner = None
            if a is not None and b is not None:
                inner = torch.matmul(full, a.t())
                output.flatten(0, -2).addmm_(inner.flatten(0, -2), b.t(), alpha=scale)
            outputs.append(output)
            inners.append(inner)
        # B's gradient needs the inner activations, W's and A's the input.
        trains = any(ctx.needs_input_grad[4::3]) or any(ctx.needs_input_grad[5::3])
        ctx.save_for_backward(x if trains else None, *inners, *tensors)
        ctx.group, ctx.gathers, ctx.forms = group, gathers, forms
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        inners, tensors = saved[: len(ctx.forms)], saved[len(ctx.forms) :]
        operands = list(_operands(ctx.forms, tensors))
        full, gathering = x, None
        if ctx.gathers and x is not None:
            full, gathering = gather_sequence(x, ctx.group, async_op=True)
        inner_gradients = [
            None if b is None else scale * torch.matmul(gradient, b)
            for gradient, ((_, scale), _, _, b) in zip(gradients, operands, strict=True)
        ]
        grad_x, reducing = None, None
        if ctx.needs_input_grad[0]:
            weights = [_weight(provider, weight) for (provider, _), weight, *_ in operands]
            pairs = [
                (of_inner, a) for of_inner, (_, _, a, _) in zip(inner_gradients, operands, strict=True) if a is not None
            ]
            of_inners, matrices = zip(*pairs, strict=True) if pairs else ((), ())
            grad_x = _sum_of_products((*gradients, *of_inners), (*weights, *matrices))
            if ctx.group is not None:
                grad_x, reducing = reduce_input_gradient(grad_x, ctx.group, ctx.gathers)
        if gathering is not None:
            gathering.wait()
        grads: list[torch.Tensor | None] = []
        for index, (gradient, of_inner, inner) in enumerate(zip(gradients, inner_gradients, inners, strict=True)):
            (_, scale), *_ = operands[index]
            of_weight, of_a, of_b = ctx.needs_input_grad[4 + 3 * index : 7 + 3 * index]
            grads.append(_outer(gradient, full) if of_weight else None)
            grads.append(_outer(of_inner, full) if of_a else None)
            grads.append(scale * _outer(gradient, inner) if of_b else None)
        if reducing is not None:
            reducing.wait()
        return grad_x, None, None, None, *grads


def _operands(
    forms: Sequence[tuple[Provider | None, float]], tensors: Sequence[torch.Tensor | None]
) -> Iterator[tuple[tuple[Provider | None, float], torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
    """Yield ((provider, scale), weight, A, B) of every linear."""
    return zip(forms, tensors[::3], tensors[1::3], tensors[2::3], strict=True)


def _weight(provider: Provider | None, weight: torch.Tensor | None) -> torch.Tensor:
    weight = weight if provider is None else provider()
    assert weight is not None
    return weight


def _outer(gradient: torch.Tensor | None, rows: torch.Tensor | None) -> torch.Tensor:
    """Return the sum over tokens of the outer products of an output's gradient and an input."""
    assert gradient is not None and rows is not None
    return torch.matmul(gradient.flatten(0, -2).t(), rows.flatten(0, -2))


def _sum_of_products(inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of inputs_i weights_i, accumulated in fp32 whatever the dtype."""
    if inputs[0].dtype is not torch.float32 and len(inputs) > 1:
        # One matmul accumulates in fp32; adding the results of several in bf16 would round each.
        return torch.matmul(torch.cat(tuple(inputs), dim=-1), torch.cat(tuple(weights)))
    total = torch.matmul(inputs[0], weights[0])
    for rows, weight in zip(inputs[1:], weights[1:], strict=True):
        total.flatten(0, -2).addmm_(rows.flatten(0, -2), weight)
    return total
