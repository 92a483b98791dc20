"""Tensor-parallel linear layers built on megatron-core's, and several column-parallel ones applied to one input.

A linear layer multiplies with an `Operand` (`layers.operands`): a parameter or what a provider makes of other storage,
and possibly a low-rank pair. Layers on one input are one product where their weights lie side by side
(`layers.side_by_side`).

Shapes: S sequence (a shard of it under sequence parallelism), B batch, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide

from megatron_vlm.layers.operands import Operand, OperandOwner, Provider
from megatron_vlm.layers.side_by_side import Run, runs
from megatron_vlm.layers.weight_gradient import add_product, added_to_main, main_gradient
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
        """Return the weight [sections, out / tensor ranks, in] and the bias [sections * out / tensor ranks] or None."""
        return self.operand(self.weight, None if self.bias is None else self.bias.flatten())


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


ColumnParallel = ColumnParallelLinear | SectionedColumnParallelLinear | ReplicatedLinear


def column_parallel(
    x: torch.Tensor, linears: Sequence[ColumnParallel], group: Group, sequence_parallel: bool
) -> list[torch.Tensor]:
    """Return the outputs of several column-parallel linears on one input, with one exchange per direction for all.

    Args:
        x: [S, B, in], the same on every tensor rank, or a shard of the sequence under sequence parallelism.
        linears: the layers.
        group: the tensor-parallel process group.
        sequence_parallel: gather the sequence first.

    Returns:
        One [S, B, out / tensor ranks] per linear, over the full sequence. Without biases they are views of one tensor.
    """
    return multiply(x, [linear() for linear in linears], group, sequence_parallel)


def joint_column_parallel(
    x: torch.Tensor, linears: Sequence[ColumnParallel], group: Group, sequence_parallel: bool
) -> torch.Tensor:
    """Return what `column_parallel` does in one tensor [S, B, sum of outputs], of linears without biases."""
    operands = [linear() for linear in linears]
    assert all(operand.bias is None for operand in operands), "biases would be left out"
    return _joint_product(x, operands, group, sequence_parallel)[0]


def multiply(
    x: torch.Tensor, operands: Sequence[Operand], group: Group | None = None, sequence_parallel: bool = False
) -> list[torch.Tensor]:
    """Do what `column_parallel` does, on bare operands; without a group, nothing is exchanged."""
    joint, widths = _joint_product(x, operands, group, sequence_parallel)
    outputs = [joint] if len(widths) == 1 else joint.split(widths, dim=-1)
    biases = [operand.bias for operand in operands]
    return [output if bias is None else output + bias for output, bias in zip(outputs, biases, strict=True)]


def _joint_product(
    x: torch.Tensor, operands: Sequence[Operand], group: Group | None, sequence_parallel: bool
) -> tuple[torch.Tensor, list[int]]:
    """Return all outputs side by side in the last dimension, without biases, and the width of each."""
    forms = [
        _Form(None if isinstance(operand.weight, torch.Tensor) else operand.weight, operand.scale, operand.row_range)
        for operand in operands
    ]
    gathers = sequence_parallel and group is not None and group.size() > 1
    tensors = [tensor for operand in operands for tensor in operand.tensors()]
    result: tuple[torch.Tensor, list[int]] = _SharedInputLinear.apply(x, group, gathers, forms, *tensors)
    return result


class _Form(NamedTuple):
    """What an operand has beside its tensors; see `Operand`."""

    provider: Provider | None = None
    scale: float = 0.0
    row_range: tuple[int, int] | None = None

    def matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the rows that are used of a weight, of its B, or of a gradient of either, [rows, columns]."""
        matrix = tensor.flatten(0, -2)
        return matrix if self.row_range is None else matrix.narrow(0, *self.row_range)

    def weight(self, weight: torch.Tensor | None) -> torch.Tensor:
        """Return the rows that are used of the weight."""
        weight = weight if self.provider is None else self.provider()
        assert weight is not None
        return self.matrix(weight)


class _SharedInputLinear(torch.autograd.Function):
    """y_i = gather(x) W_i^T + s_i (gather(x) A_i^T) B_i^T, all side by side in one tensor; and the width of each.

    Weights that lie side by side are one product, forward and for the gradient of the input, and so are their gradients
    where their main gradients do. The outputs are one tensor in any case, so that their gradient is one too, and no
    weight or gradient of a weight is copied to join it. Consumers of single outputs have autograd join their gradients,
    in one pass over activations; a product for each output would instead read and write their sum in fp32.

    An input's gradient of several products (weights that lie apart, low-rank pairs) is summed in fp32 and rounded once.

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
        forms: Sequence[_Form],
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, list[int]]:
        full = gather_sequence(x, group)[0] if gathers and group is not None else x
        rows = full.flatten(0, -2)
        matrices = [form.weight(weight) for form, weight in zip(forms, tensors[::3], strict=True)]
        widths = [len(matrix) for matrix in matrices]
        joint = _products(rows, matrices, widths)
        inners: list[torch.Tensor | None] = []
        outputs = joint.split(widths, dim=1)
        for form, output, a, b in zip(forms, outputs, tensors[1::3], tensors[2::3], strict=True):
            inner = None
            if a is not None and b is not None:
                inner = torch.mm(rows, a.t())
                output.addmm_(inner, form.matrix(b).t(), alpha=form.scale)
            inners.append(inner)
        # B's gradient needs the inner activations, W's and A's the input.
        trains = any(ctx.needs_input_grad[4::3]) or any(ctx.needs_input_grad[5::3])
        ctx.save_for_backward(x if trains else None, *inners, *tensors)
        ctx.group, ctx.gathers, ctx.forms, ctx.widths = group, gathers, forms, widths
        # What recomputation saves of a parameter is not the parameter, which has the main gradient.
        ctx.parameters = [tensor if isinstance(tensor, torch.nn.Parameter) else None for tensor in tensors]
        return joint.view(*full.shape[:-1], sum(widths)), widths

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        forms, inners, tensors = ctx.forms, saved[: len(ctx.forms)], saved[len(ctx.forms) :]
        weights, a_sides, b_sides = tensors[::3], tensors[1::3], tensors[2::3]
        full, gathering = x, None
        if ctx.gathers and x is not None:
            full, gathering = gather_sequence(x, ctx.group, async_op=True)
        joint = gradient.flatten(0, -2)
        outputs = joint.split(ctx.widths, dim=1)
        of_inners = [
            None if b is None else form.scale * torch.mm(output, form.matrix(b))
            for form, output, b in zip(forms, outputs, b_sides, strict=True)
        ]
        grad_x, reducing = None, None
        if ctx.needs_input_grad[0]:
            matrices = [form.weight(weight) for form, weight in zip(forms, weights, strict=True)]
            factors: list[Any] = [(_columns(joint, ctx.widths, run), run.matrix) for run in runs(matrices)]
            factors += [(left, right) for left, right in zip(of_inners, a_sides, strict=True) if left is not None]
            grad_x = _sum_of_products(factors)
            grad_x = grad_x.view(*gradient.shape[:-1], grad_x.shape[1])
            if ctx.group is not None:
                grad_x, reducing = reduce_input_gradient(grad_x, ctx.group, ctx.gathers)
        if gathering is not None:
            gathering.wait()
        rows = None if full is None else full.flatten(0, -2)
        needs = ctx.needs_input_grad[4:]
        grads: list[torch.Tensor | None] = [None] * len(tensors)
        trained = [own if own is not None else tensor for own, tensor in zip(ctx.parameters, tensors, strict=True)]
        grads[::3] = _weight_gradients(ctx, trained[::3], joint, rows)
        for index, (form, inner) in enumerate(zip(forms, inners, strict=True)):
            if needs[3 * index + 1]:
                grads[3 * index + 1] = _gradient(trained[3 * index + 1], _Form(), of_inners[index], rows)
            if needs[3 * index + 2]:
                grads[3 * index + 2] = _gradient(trained[3 * index + 2], form, outputs[index], inner, form.scale)
        if reducing is not None:
            reducing.wait()
        return grad_x, None, None, None, *grads


def _products(rows: torch.Tensor, matrices: Sequence[torch.Tensor], widths: Sequence[int]) -> torch.Tensor:
    """Return the products of the input with all weights, side by side."""
    found = list(runs(matrices))
    if len(found) == 1:
        return torch.mm(rows, found[0].matrix.t())
    joint = rows.new_empty((len(rows), sum(widths)))
    for run in found:
        torch.mm(rows, run.matrix.t(), out=_columns(joint, widths, run))
    return joint


def _columns(joint: torch.Tensor, widths: Sequence[int], run: Run) -> torch.Tensor:
    """Return the columns that a run of weights has in a tensor of all outputs."""
    return joint.narrow(1, sum(widths[: run.first]), sum(widths[run.first : run.last]))


def _sum_of_products(factors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return the sum of several products, accumulated in fp32 whatever the dtype."""
    (left, right), *others = factors
    if not others:
        return torch.mm(left, right)
    total = left.new_empty((len(left), right.shape[1]), dtype=torch.promote_types(left.dtype, torch.float32))
    add_product(total, left, right, overwrite=True)
    for other_left, other_right in others:
        add_product(total, other_left, other_right)
    return total.to(left.dtype)


def _weight_gradients(
    ctx: Any, weights: Sequence[torch.Tensor | None], joint: torch.Tensor, rows: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """Return what autograd gets of each weight, from the gradient of all outputs and the input."""
    needed = ctx.needs_input_grad[4::3]
    trained = [weight if is_needed else None for weight, is_needed in zip(weights, needed, strict=True)]
    mains = [None if weight is None else main_gradient(weight) for weight in trained]
    matrices = [None if main is None else form.matrix(main) for form, main in zip(ctx.forms, mains, strict=True)]
    for run in runs(matrices):
        assert rows is not None
        add_product(run.matrix, _columns(joint, ctx.widths, run).t(), rows)
    gradients: list[torch.Tensor | None] = []
    for weight, main, form, output in zip(trained, mains, ctx.forms, joint.split(ctx.widths, dim=1), strict=True):
        if weight is None:
            gradients.append(None)
        elif main is None:
            gradients.append(_gradient(weight, form, output, rows))
        else:
            gradients.append(added_to_main(weight, main))
    return gradients


def _gradient(
    parameter: torch.Tensor | None,
    form: _Form,
    output_gradient: torch.Tensor | None,
    rows: torch.Tensor | None,
    factor: float = 1.0,
) -> torch.Tensor | None:
    """Return what autograd gets of one parameter: the sum over rows of outer products, times a factor."""
    assert parameter is not None and output_gradient is not None and rows is not None
    main = main_gradient(parameter)
    if main is not None:
        add_product(form.matrix(main), output_gradient.t(), rows, factor)
        return added_to_main(parameter, main)
    product = torch.mm(output_gradient.t(), rows)
    if factor != 1.0:
        product *= factor
    if form.row_range is None:
        return product.view_as(parameter)
    gradient = torch.zeros_like(parameter)
    form.matrix(gradient).copy_(product)
    return gradient
