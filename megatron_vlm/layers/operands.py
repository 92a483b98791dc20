"""Operands of linear layers: a weight, which may be stored in another form, and a low-rank pair beside it.

Adapters, quantised weights and other number formats enter here and nowhere else. The operand of an ordinary linear
layer is its parameter. With a provider there is no such parameter: the provider makes the weight from what it stores,
anew for each matmul, so that nothing of a weight's size is kept between the passes.

Source of the low-rank pair: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_vlm.parallel.parameters import ParameterSpec, declare, normal, spec_of, zeros

Provider = Callable[[], torch.Tensor]
"""A function that makes a weight [out, in] (of experts [experts, out, in]) that does not train."""


@dataclass(frozen=True)
class Operand:
    """The tensors W, b, A and B of y = x W^T + b + scale (x A^T) B^T.

    Attributes:
        weight: W, [..., out, in], whose leading dimensions count sections of the output; or the provider that makes it.
            A parameter is given as such, not as a view, so that its gradient can be added to its `main_grad`.
        bias: b, [out] of all sections; None for none.
        a: A, [rank, in]; None without a low-rank pair.
        b: B, [..., out, rank]; None without a low-rank pair.
        scale: factor of the low-rank pair.
        row_range: first of the outputs that are used, and how many; None for all.
    """

    weight: torch.Tensor | Provider
    bias: torch.Tensor | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 0.0
    row_range: tuple[int, int] | None = None

    def tensors(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return W, A and B as far as autograd sees them: a weight from a provider is None."""
        return self.weight if isinstance(self.weight, torch.Tensor) else None, self.a, self.b

    def rows(self, start: int, count: int) -> Operand:
        """Return the operand of `count` outputs from `start` on."""
        bias = None if self.bias is None else self.bias.narrow(0, start, count)
        first = start if self.row_range is None else self.row_range[0] + start
        return replace(self, bias=bias, row_range=(first, count))


class OperandOwner(torch.nn.Module):
    """A linear layer whose weight may come from a provider, and which may have a low-rank pair.

    A new pair changes no output: A is random, B is zero. It is sharded as the weight is declared: one side along the
    dimension that is split over the tensor ranks, while the other is replicated on each of them with a partial
    gradient; of a replicated weight with a partial gradient, both sides are such.
    """

    weight: torch.Tensor
    bias: Any
    provider: Provider | None = None
    low_rank_scale: float | None = None

    def provide_weight(self, provider: Provider) -> None:
        """Take the weight from a provider; the parameter and its memory are released."""
        self.declared = Declared.of(self.weight)
        self.provider = provider
        self.register_parameter("weight", None)

    def add_low_rank(self, rank: int, scale: float) -> None:
        """Add a pair of this rank; `scale` is the factor of its product."""
        if self.provider is None:
            self.lora_A, self.lora_B = Declared.of(self.weight).low_rank_pair(rank, self.weight)
        else:
            self.lora_A, self.lora_B = self.declared.low_rank_pair(rank, self.provider())
        self.low_rank_scale = scale

    def operand(self, weight: torch.Tensor | None, bias: torch.Tensor | None) -> Operand:
        """Return the operand, given the weight that this module trains, or None with a provider."""
        factor = weight if self.provider is None else self.provider
        assert factor is not None
        if self.low_rank_scale is None:
            return Operand(factor, bias)
        return Operand(factor, bias, self.lora_A, self.lora_B, self.low_rank_scale)


@dataclass(frozen=True)
class Declared:
    """What a weight's parameter says of it: this rank's shape [..., out, in], and its declaration."""

    shape: torch.Size
    spec: ParameterSpec

    @staticmethod
    def of(weight: torch.Tensor) -> Declared:
        """Return what a parameter says."""
        assert isinstance(weight, torch.nn.Parameter)
        return Declared(weight.shape, spec_of(weight))

    def low_rank_pair(self, rank: int, like: torch.Tensor) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        """Return A [rank, in] and B [..., out, rank]; of experts, A is [experts, rank, in].

        Args:
            rank: rank of the product.
            like: a tensor of the pair's dtype and device.
        """
        spec, num_dims = self.spec, len(self.shape)
        is_split, splits_input = spec.tensor_dim is not None, spec.tensor_dim == num_dims - 1
        experts = self.shape[:1] if spec.is_expert else ()
        a, b = (
            torch.nn.Parameter(torch.empty(*shape, dtype=like.dtype, device=like.device))
            for shape in ((*experts, rank, self.shape[-1]), (*self.shape[:-1], rank))
        )
        declare(
            a,
            "matrix",
            normal,
            tensor_dim=a.dim() - 1 if splits_input else None,
            is_expert=spec.is_expert,
            partial=spec.partial or (is_split and not splits_input),
        )
        declare(
            b,
            "matrix",
            zeros,
            tensor_dim=None if splits_input else spec.tensor_dim,
            is_expert=spec.is_expert,
            partial=spec.partial or splits_input,
        )
        return a, b
