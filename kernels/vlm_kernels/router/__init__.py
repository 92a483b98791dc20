"""A router's choice of experts, the weights of the chosen ones, and what a load-balancing loss needs.

The choice is an operator of its own, so that a layer that is recomputed can take the choice of its first pass. Sums
over tokens run in one order, without atomics.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from typing import Any

import torch

from vlm_kernels.library import define
from vlm_kernels.router import reference


def choose_experts(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Choose exactly `top_k` experts for each token, also where logits are equal or no numbers.

    Args:
        logits: [T, E] fp32; has no gradient through the choice.
        top_k: experts per token, at most E.

    Returns:
        [T, E] bool. Of equal logits the kernel chooses the first expert's, the reference any.
    """
    chosen: torch.Tensor = _choose_experts(logits.detach().contiguous(), top_k)
    return chosen


def route(
    logits: torch.Tensor, chosen: torch.Tensor, is_real: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight the chosen experts by a softmax over their logits.

    Args:
        logits: [T, E] fp32.
        chosen: [T, E] bool, at least one expert of each token.
        is_real: [T] bool, tokens that the sums count.

    Returns:
        Weights [T, E] fp32, zero where not chosen; [E] fp32, tokens that chose each expert, without a gradient; and
        [E] fp32, the sum over tokens of each expert's probability in a softmax over all experts.
    """
    weights, tokens, probabilities = _route(logits.contiguous(), chosen.contiguous(), is_real.contiguous())
    return weights, tokens.detach(), probabilities


def _fake_choose_experts(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    return torch.empty_like(logits, dtype=torch.bool)


def _fake_route(
    logits: torch.Tensor, chosen: torch.Tensor, is_real: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(logits), logits.new_empty(logits.shape[1]), logits.new_empty(logits.shape[1])


def _fake_route_backward(
    grad_weights: torch.Tensor | None, grad_probabilities: torch.Tensor | None, logits: torch.Tensor, *_: torch.Tensor
) -> torch.Tensor:
    return torch.empty_like(logits)


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(
    ctx: Any, grad_weights: torch.Tensor | None, _: torch.Tensor | None, grad_probabilities: torch.Tensor | None
) -> tuple[torch.Tensor | None, None, None]:
    if grad_weights is None and grad_probabilities is None:
        return None, None, None
    given = (None if gradient is None else gradient.contiguous() for gradient in (grad_weights, grad_probabilities))
    return _route_backward(*given, *ctx.saved_tensors), None, None


_choose_experts = define(
    "choose_experts(Tensor logits, int top_k) -> Tensor", reference.choose_experts, _fake_choose_experts
)
_route = define(
    "route(Tensor logits, Tensor chosen, Tensor is_real) -> (Tensor, Tensor, Tensor)",
    reference.route,
    _fake_route,
    _backward,
    _save,
)
_route_backward = define(
    "route_backward(Tensor? grad_weights, Tensor? grad_probabilities, Tensor logits, Tensor chosen, Tensor is_real) "
    "-> Tensor",
    reference.route_backward,
    _fake_route_backward,
)
