"""Reference of the gated activations, forward and backward, which defines them and runs where no kernel does.

Shapes: T rows (any leading dimensions), F columns of gate and of up.
"""

from __future__ import annotations

import torch
from torch.nn.functional import gelu, silu

SILU, GELU_TANH, GELU = 0, 1, 2


def gated(
    gate: torch.Tensor, up: torch.Tensor | None, factor: torch.Tensor | None, activation: int, consume: bool
) -> torch.Tensor:
    """Compute activation(gate) * up * factor, rounded once; arguments as in `vlm_kernels.gated`."""
    gate, up = _split(gate, up)
    product = _activate(_widen(gate), activation).mul_(up)
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
    """Return the gradients of gate, of up and of factor, each where it was given; gate may hold both halves.

    Args:
        gradient: gradient of the output, [..., F].
        gate, up, factor, activation: arguments of the forward pass.
    """
    grad_gate, grad_up, grad_factor = _gradients(gradient, *_split(gate, up), factor, activation)
    of_factor = [] if grad_factor is None else [grad_factor]
    if up is None:
        return [torch.cat((grad_gate, grad_up), dim=-1).to(gate.dtype), *of_factor]
    return [grad_gate.to(gate.dtype), grad_up.to(up.dtype), *of_factor]


def gated_backward_(
    gradient: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    factor: torch.Tensor | None,
    activation: int,
) -> torch.Tensor:
    """Write the gradients of gate and up over them; return that of factor, empty if there is no factor."""
    gate, up = _split(gate, up)
    is_wide = _widen(gate) is gate
    grad_gate, grad_up, grad_factor = _gradients(
        gradient, gate, up, factor, activation, (gate, up) if is_wide else None
    )
    if not is_wide:
        gate.copy_(grad_gate)
        up.copy_(grad_up)
    return gradient.new_empty(0) if grad_factor is None else grad_factor


def _gradients(
    gradient: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    factor: torch.Tensor | None,
    activation: int,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of gate, up and factor, the first two not yet rounded and written to `out` where it is given."""
    gradient, gate = _widen(gradient), _widen(gate)
    activated = _activate(gate, activation)
    grad_factor = None
    if factor is not None:
        grad_factor = (activated * up * gradient).sum(-1).to(factor.dtype)
        gradient = gradient * factor.unsqueeze(-1)
    of_activated = gradient * up
    grad_gate, grad_up = out or (of_activated, activated)
    _activate_backward(of_activated, gate, activation, grad_gate)
    return grad_gate, torch.mul(activated, gradient, out=grad_up), grad_factor


def _split(gate: torch.Tensor, up: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    if up is not None:
        return gate, up
    first, second = gate.chunk(2, dim=-1)
    return first, second


def _widen(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _activate(gate: torch.Tensor, activation: int) -> torch.Tensor:
    if activation == SILU:
        return silu(gate)  # g s(g), with s the logistic function
    # g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) / 2, and g times the normal distribution's cumulative density
    return gelu(gate, approximate="tanh" if activation == GELU_TANH else "none")


def _activate_backward(gradient: torch.Tensor, gate: torch.Tensor, activation: int, out: torch.Tensor) -> None:
    """Write gradient * activation'(gate) to `out`, which may be either of them; torch computes it in one pass."""
    if activation == SILU:
        torch.ops.aten.silu_backward.grad_input(gradient, gate, grad_input=out)
    else:
        approximate = "tanh" if activation == GELU_TANH else "none"
        torch.ops.aten.gelu_backward.grad_input(gradient, gate, approximate=approximate, grad_input=out)
