"""Gated activations: SwiGLU, and GeGLU with tanh or exact.

Backward needs gate and up only, which the products before wrote; nothing else is kept.

Results are never written over arguments. In the forward pass gate and up are read again by the backward pass. There,
writing gradients over them is right only if nobody reads them later: a graph that is kept (`retain_graph`), a hook or
a saved-tensor hook may, and an operator cannot know. It would spare no traffic, only one buffer while the kernel runs.
The kernels themselves read each vector before they write it: a caller that owns its arguments may let results lie over
them.

Shapes: T rows (any leading dimensions), F columns of gate and of up.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from kernels.gated import reference
from kernels.library import define

Activation = Literal["silu", "gelu_tanh", "gelu"]
ACTIVATIONS: dict[Activation, int] = {
    "silu": reference.SILU,
    "gelu_tanh": reference.GELU_TANH,
    "gelu": reference.GELU,
}


def gated(
    gate: torch.Tensor, up: torch.Tensor, activation: Activation, factor: torch.Tensor | None = None
) -> torch.Tensor:
    """activation(gate) * up, times a factor of each row.

    Args:
        gate: [..., F].
        up: the same shape and dtype.
        activation: "silu", "gelu_tanh" or "gelu" (exact).
        factor: [...] fp32.

    Returns:
        [..., F] in gate's dtype, computed in fp32 and rounded once.
    """
    return _gated(gate.contiguous(), up.contiguous(), factor, ACTIVATIONS[activation])


def gated_halves(gate_up: torch.Tensor, activation: Activation, factor: torch.Tensor | None = None) -> torch.Tensor:
    """`gated` of the two halves of [..., 2 F]; their gradient is one tensor too."""
    return _gated(gate_up.contiguous(), None, factor, ACTIVATIONS[activation])


def _fake(gate: torch.Tensor, up: torch.Tensor | None, factor: torch.Tensor | None, activation: int) -> torch.Tensor:
    return gate.new_empty((*gate.shape[:-1], gate.shape[-1] // (2 if up is None else 1)))


def _fake_backward(
    gradient: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    factor: torch.Tensor | None,
    activation: int,
) -> list[torch.Tensor]:
    return [torch.empty_like(tensor) for tensor in (gate, up, factor) if tensor is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    gate, up, factor, ctx.activation = inputs
    ctx.save_for_backward(gate, up, factor)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors
    gradients = iter(_gated_backward(gradient.contiguous(), *saved, ctx.activation))
    return (*(None if tensor is None else next(gradients) for tensor in saved), None)


_gated = define(
    "gated(Tensor gate, Tensor? up, Tensor? factor, int activation) -> Tensor",
    reference.gated,
    _fake,
    _backward,
    _save,
)
_gated_backward = define(
    "gated_backward(Tensor gradient, Tensor gate, Tensor? up, Tensor? factor, int activation) -> Tensor[]",
    reference.gated_backward,
    _fake_backward,
)
