"""The router on CUDA: choices against the reference, weights, sums and gradients against fp64, and no waiting."""

from __future__ import annotations

import pytest
import torch

from vlm_kernels.router import choose_experts, reference, route

pytestmark = pytest.mark.usefixtures("poisoned")

# Tokens, experts, choices: each number of logits to a lane, more tokens than summing warps, one token.
SHAPES = [(8192, 128, 8), (31, 8, 2), (20_001, 33, 4), (4097, 512, 10), (1, 1, 1), (300, 1024, 1), (515, 200, 6)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_router(shape: tuple[int, int, int]) -> None:
    num_tokens, num_experts, top_k = shape
    logits = (torch.randn(num_tokens, num_experts, device="cuda") * 3).requires_grad_()
    is_real = torch.rand(num_tokens, device="cuda") < 0.8
    chosen = choose_experts(logits, top_k)
    # As sets: torch may choose another of equal logits, which have equal values.
    assert (chosen.sum(1) == top_k).all()
    smallest = logits.masked_fill(~chosen, torch.inf).amin(1)
    assert (smallest >= logits.masked_fill(chosen, -torch.inf).amax(1)).all()
    weights, tokens, probabilities = route(logits, chosen, is_real)
    upstream = torch.randn_like(weights), torch.randn_like(probabilities)
    (gradient,) = torch.autograd.grad((weights, probabilities), logits, upstream)
    wide = logits.detach().double()
    expected = reference.route(wide, chosen, is_real)
    assert torch.equal(tokens.double(), expected[1])
    torch.testing.assert_close(weights.double(), expected[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(probabilities.double(), expected[2], rtol=1e-5, atol=1e-5)
    wanted = reference.route_backward(*(part.double() for part in upstream), wide, chosen, is_real)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.autograd.grad(route(logits, chosen, is_real)[::2], logits, upstream)[0], gradient)


@pytest.mark.kernels_only
def test_exactly_so_many_are_chosen_of_equal_logits() -> None:
    logits = torch.zeros(70, 128, device="cuda")
    logits[::2, ::3] = torch.nan
    chosen = choose_experts(logits, 50)
    assert (chosen.sum(1) == 50).all() and chosen[1, :50].all()


def test_the_host_never_waits() -> None:
    logits = torch.randn(500, 16, device="cuda").requires_grad_()
    is_real = torch.ones(500, dtype=torch.bool, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        weights, _, probabilities = route(logits, choose_experts(logits, 4), is_real)
        (weights.square().sum() + probabilities.square().sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
