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

from megatron_vlm.parallel.parameters import declare, normal, zeros

Provider = Callable[[], torch.Tensor]
"""A function that makes a weight [out, in] (of experts [experts, out, in]) that does not train."""


@dataclass(frozen=True)
class Operand:
    """The tensors W, b, A and B of y = x W^T + b + scale (x A^T) B^T.

    Attributes:
        weight: W, [out, in], or the provider that makes it.
        bias: b, [out]; None for none.
        a: A, [rank, in]; None without a low-rank pair.
        b: B, [out, rank]; None without a low-rank pair.
        scale: factor of the low-rank pair.
    """

    weight: torch.Tensor | Provider
    bias: torch.Tensor | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 0.0

    def tensors(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return W, A and B as far as autograd sees them: a weight from a provider is None."""
        return self.weight if isinstance(self.weight, torch.Tensor) else None, self.a, self.b

    def rows(self, start: int, count: int) -> Operand:
        """Return the operand of `count` outputs from `start` on."""
        weight, bias, b = self.weight, self.bias, self.b
        return replace(
            self,
            weight=weight.narrow(0, start, count)
            if isinstance(weight, torch.Tensor)
            else lambda: weight().narrow(0, start, count),
            bias=None if bias is None else bias.narrow(0, start, count),
            b=None if b is None else b.narrow(0, start, count),
        )


class OperandOwner(torch.nn.Module):
    """A linear layer whose weight may come from a provider, and which may have a low-rank pair.

    A new pair changes no output: A is random, B is zero. It is sharded like the weight: one side along the dimension
    that is split over the tensor ranks, while the other is replicated on each of them with a partial gradient.
    """

    weight: torch.Tensor
    bias: Any
    provider: Provider | None = None
    low_rank_scale: float | None = None

    def provide_weight(self, provider: Provider) -> None:
        """Take the weight from a provider; the parameter and its memory are released."""
        self.provider = provider
        self.register_parameter("weight", None)

    def operand(self, weight: torch.Tensor | None, bias: torch.Tensor | None) -> Operand:
        """Return the operand, given the weight that this module trains, or None with a provider."""
        factor = weight if self.provider is None else self.provider
        assert factor is not None
        if self.low_rank_scale is None:
            return Operand(factor, bias)
        return Operand(factor, bias, self.lora_A, self.lora_B.flatten(0, -2), self.low_rank_scale)

    def _add_pair(
        self,
        rank: int,
        in_size: int,
        out_sizes: tuple[int, ...],
        scale: float,
        *,
        a_partial: bool = False,
        a_tensor_dim: int | None = None,
        b_partial: bool = False,
        b_tensor_dim: int | None = None,
    ) -> None:
        like = self.weight if self.provider is None else self.provider()
        a, b = (torch.nn.Parameter(like.new_empty(shape)) for shape in ((rank, in_size), (*out_sizes, rank)))
        self.lora_A = declare(a, "matrix", normal, partial=a_partial, tensor_dim=a_tensor_dim)
        self.lora_B = declare(b, "matrix", zeros, partial=b_partial, tensor_dim=b_tensor_dim)
        self.low_rank_scale = scale
