"""Gated activations: SwiGLU, and GeGLU with the tanh approximation or exact.

The backward pass needs gate and up only, the outputs of the matmuls before; nothing else is saved.

The backward pass works in place where that is safe: with `consume`, by which the caller relinquishes gate and up,
their gradients are written over them if the graph is freed after this pass. Gradients have memory of their own without
`consume`, with `retain_graph` (the next pass reads gate and up), for leaves, and under a compiler, which plans memory
itself. Whoever else saved gate or up for a later step of the same pass gets an error from autograd, but under
activation checkpointing, which does not check versions, wrong values: `consume` is a promise. The forward pass never
writes over its arguments, which the backward pass reads; nor is the incoming gradient written over, which autograd may
have passed to other nodes too.

Shapes: T rows (any leading dimensions), F columns of gate and of up.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor

from vlm_kernels.gated import reference
from vlm_kernels.library import define

Activation = Literal["silu", "gelu_tanh", "gelu"]
ACTIVATIONS: dict[Activation, int] = {
    "silu": reference.SILU,
    "gelu_tanh": reference.GELU_TANH,
    "gelu": reference.GELU,
}


def gated(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: Activation,
    factor: torch.Tensor | None = None,
    consume: bool = False,
) -> torch.Tensor:
    """Compute activation(gate) * up, times a factor of each row.

    Args:
        gate: [..., F], the input of the activation.
        up: [..., F], in gate's dtype.
        activation: "silu", "gelu_tanh" or "gelu" (exact).
        factor: factor of each row, [...] fp32; None for none.
        consume: a promise that nobody else reads gate and up after this call, so that gradients may overwrite them.

    Returns:
        [..., F] in gate's dtype, computed in fp32 and rounded once.
    """
    return _gated(gate.contiguous(), up.contiguous(), factor, ACTIVATIONS[activation], consume)


def gated_halves(
    gate_up: torch.Tensor, activation: Activation, factor: torch.Tensor | None = None, consume: bool = False
) -> torch.Tensor:
    """Compute `gated` of the two halves of a tensor [..., 2 F]; the gradient is one tensor too."""
    return _gated(gate_up.contiguous(), None, factor, ACTIVATIONS[activation], consume)


def _fake(
    gate: torch.Tensor, up: torch.Tensor | None, factor: torch.Tensor | None, activation: int, consume: bool
) -> torch.Tensor:
    return gate.new_empty((*gate.shape[:-1], gate.shape[-1] // (2 if up is None else 1)))


def _fake_backward(
    gradient: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    factor: torch.Tensor | None,
    activation: int,
) -> list[torch.Tensor]:
    return [_contiguous_like(tensor) for tensor in (gate, up, factor) if tensor is not None]


def _fake_backward_in_place(
    gradient: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    factor: torch.Tensor | None,
    activation: int,
) -> torch.Tensor:
    return gradient.new_empty(0) if factor is None else _contiguous_like(factor)


def _contiguous_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    gate, up, factor, ctx.activation, ctx.consume = inputs
    ctx.save_for_backward(gate, up, factor)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gate, up, factor = ctx.saved_tensors
    arguments = (gradient.contiguous(), gate, up, factor, ctx.activation)
    if not (ctx.consume and _are_last_uses(gate, *(() if up is None else (up,)))):
        gradients = iter(_gated_backward(*arguments))
        return (*(None if tensor is None else next(gradients) for tensor in (gate, up, factor)), None, None)
    grad_factor = _gated_backward_in_place(*arguments)
    consumed = [None if tensor is None else tensor.detach() for tensor in (gate, up)]
    torch.autograd.graph.increment_version([tensor for tensor in consumed if tensor is not None])
    return (*consumed, None if factor is None else grad_factor, None, None)


def _are_last_uses(*saved: torch.Tensor) -> bool:
    """Return whether nothing can read a node's saved tensors after its backward pass, if the caller gave them up.

    AOTAutograd checks the same before it donates saved tensors' memory. It traces with a tensor subclass, for which
    the answer is no; a fake tensor counts as a plain tensor.
    """
    ends = not torch._C._autograd._get_current_graph_task_keep_graph()
    return ends and all(not tensor.is_leaf and type(tensor) in (torch.Tensor, FakeTensor) for tensor in saved)


_gated = define(
    "gated(Tensor gate, Tensor? up, Tensor? factor, int activation, bool consume) -> Tensor",
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
_gated_backward_in_place = define(
    "gated_backward_(Tensor gradient, Tensor(a!) gate, Tensor(b!)? up, Tensor? factor, int activation) -> Tensor",
    reference.gated_backward_,
    _fake_backward_in_place,
)
