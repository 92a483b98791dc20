"""Weights that lie side by side in memory, which one product computes with.

Queries, keys and values, or gate and up, are several linear layers on one input. Each has a parameter of its own: a
name, a gradient rule, a place in checkpoints. Where their matrices follow each other in memory, a view of them all is
one operand. Whether they do is looked up whenever they are used, never assumed: megatron-core's data parallelism moves
gradients, and with the distributed optimizer parameters too, into buffers of its own, in the reverse order of
registration. With that optimizer each begins at a multiple of 64 elements, and a bucket ends at a multiple of 128 and
of the number of data ranks, which leaves a gap only after matrices of other sizes than published models have. Layers
with biases, whose biases come in between, have one product of their weights at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch


class Run(NamedTuple):
    """Matrices that follow each other.

    Attributes:
        first: index of the first.
        last: index after the last.
        matrix: all of them, [rows, columns].
    """

    first: int
    last: int
    matrix: torch.Tensor


def runs(matrices: Sequence[torch.Tensor | None]) -> Iterator[Run]:
    """Yield the longest runs of matrices [rows_i, columns] that lie one after the other in memory; None ends a run."""
    first = 0
    while first < len(matrices):
        matrix, last = matrices[first], first + 1
        if matrix is None:
            first = last
            continue
        while last < len(matrices) and _follows(matrix, matrices[last]):
            rows = matrix.shape[0] + matrices[last].shape[0]  # type: ignore[union-attr]
            matrix = matrix.as_strided((rows, matrix.shape[1]), (matrix.shape[1], 1))
            last += 1
        yield Run(first, last, matrix)
        first = last


def _follows(matrix: torch.Tensor, other: torch.Tensor | None) -> bool:
    return (
        other is not None
        and matrix.untyped_storage()._cdata == other.untyped_storage()._cdata
        and matrix.dtype == other.dtype
        and matrix.shape[1] == other.shape[1]
        and matrix.is_contiguous()
        and other.is_contiguous()
        and bool(matrix.storage_offset() + matrix.numel() == other.storage_offset())
    )


def add_side_by_side(owner: torch.nn.Module, **linears: torch.nn.Module) -> None:
    """Register linear layers on one input, in the order of their outputs, as attributes with these names.

    They are registered in reverse, so that megatron-core's buffers have their matrices in this order.
    """
    for name, linear in reversed(linears.items()):
        owner.add_module(name, linear)
    owner.side_by_side = tuple(linears)  # type: ignore[assignment]


def side_by_side(owner: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the linear layers that `add_side_by_side` registered, in the order of their outputs."""
    return [owner.get_submodule(name) for name in getattr(owner, "side_by_side", ())]


def lay_side_by_side(model: torch.nn.Module) -> None:
    """Move the weights of each group of linear layers (`add_side_by_side`) into memory of their own, side by side.

    Call it when it is known which parameters train and which weights come from providers: a weight that is frozen, or
    released, must not share memory with one that megatron-core moves.
    """
    for owner in model.modules():
        for key, members in groupby([linear.weight for linear in side_by_side(owner)], _what_must_agree):
            weights = list(members)
            if key is not None and len(weights) > 1:
                _join([weight for weight in weights if isinstance(weight, torch.nn.Parameter)])


def _what_must_agree(weight: Any) -> object:
    return None if weight is None else (weight.requires_grad, weight.dtype, weight.shape[-1])


def _join(weights: Sequence[torch.nn.Parameter]) -> None:
    flat = torch.cat([weight.detach().flatten() for weight in weights])
    for weight, part in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
        weight.data = part.view(weight.shape)
