"""Definition of the gated activations, forward and backward; what runs where no kernel does.

Shapes: T rows (any leading dimensions), F columns of gate and of up.
"""

from __future__ import annotations

import torch
from torch.nn.functional import gelu, silu

SILU, GELU_TANH, GELU = 0, 1, 2


def gated(gate: torch.Tensor, up: torch.Tensor | None, factor: torch.Tensor | None, activation: int) -> torch.Tensor:
    """activation(gate) * up * factor; arguments as in `kernels.gated`, rounded once."""
    gate, up = _split(gate, up)
    product = _activate(_widen(gate), activation) * up
    if factor is not None:
        product *= factor.unsqueeze(-1)
    return product.to(gate.dtype)


def gated_backward(
    gradient: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    factor: torch.Tensor | None,
    activation: int,
) -> list[torch.Tensor]:
    """Gradients of gate (and up in one tensor where they were), of up where it was a tensor, of factor if there is one.

    Args:
        gradient: of the output, [..., F].
        gate, up, factor, activation: the forward pass's.
    """
    joined = up is None
    gate, up = _split(gate, up)
    gradient, wide_gate = _widen(gradient), _widen(gate)
    activated = _activate(wide_gate, activation)
    grad_factor = []
    if factor is not None:
        grad_factor = [(activated * up * gradient).sum(-1).to(factor.dtype)]
        gradient = gradient * factor.unsqueeze(-1)
    grad_gate = _activate_backward(gradient * up, wide_gate, activation)
    grad_up = activated.mul_(gradient)
    if joined:
        return [torch.cat((grad_gate, grad_up), dim=-1).to(gate.dtype), *grad_factor]
    return [grad_gate.to(gate.dtype), grad_up.to(gate.dtype), *grad_factor]


def _split(gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    if up is not None:
        return gate, up
    first, second = gate.chunk(2, dim=-1)
    return first, second


def _widen(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _activate(gate: torch.Tensor, activation: int) -> torch.Tensor:
    if activation == SILU:
        return silu(gate)  # g s(g), s the logistic function
    # g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) / 2, and g times the normal distribution's cumulative density
    return gelu(gate, approximate="tanh" if activation == GELU_TANH else "none")


def _activate_backward(gradient: torch.Tensor, gate: torch.Tensor, activation: int) -> torch.Tensor:
    """The gradient times activation'(gate), which torch computes in one pass."""
    if activation == SILU:
        return torch.ops.aten.silu_backward(gradient, gate)
    return torch.ops.aten.gelu_backward(gradient, gate, approximate="tanh" if activation == GELU_TANH else "none")
