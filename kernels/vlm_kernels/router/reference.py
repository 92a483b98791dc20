"""Reference of the router, which defines it and runs where no kernel does; arguments are those of `vlm_kernels.router`.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import math

import torch


def choose_experts(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return [T, E] bool, true at the `top_k` largest logits of each token."""
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    return chosen.scatter_(1, logits.topk(top_k, dim=1, sorted=False).indices, True)


def route(
    logits: torch.Tensor, chosen: torch.Tensor, is_real: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return weights [T, E], and [E] each the tokens that chose an expert and the sum of its probabilities."""
    real = is_real.to(logits.dtype)
    # These are vector-matrix products, which read [T, E] once.
    return _weights(logits, chosen), real @ chosen.to(logits.dtype), real @ logits.softmax(-1)


def route_backward(
    grad_weights: torch.Tensor | None,
    grad_probabilities: torch.Tensor | None,
    logits: torch.Tensor,
    chosen: torch.Tensor,
    is_real: torch.Tensor,
) -> torch.Tensor:
    """Return the gradient of the logits [T, E]."""
    gradient = torch.zeros_like(logits)
    if grad_weights is not None:
        gradient += _through_softmax(_weights(logits, chosen), grad_weights)
    if grad_probabilities is not None:
        gradient += _through_softmax(logits.softmax(-1), grad_probabilities) * is_real.unsqueeze(1)
    return gradient


def _weights(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(~chosen, -math.inf).softmax(-1)


def _through_softmax(values: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    products = values * gradient
    return products - values * products.sum(-1, keepdim=True)
