"""The router: the reference against megatron-core's and formulas in fp64, and the kernels' bodies against it.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from torch.utils.checkpoint import checkpoint

from tests.kernels.emulator.emulate import Edits, EmulatorError, Order, compile_kernels
from tests.kernels.marks import needs_extension
from vlm_kernels import router as ops
from vlm_kernels.router import choose_experts, reference, route

ROUTE = torch.ops.vlm_kernels.route.default


def make_logits(num_tokens: int, num_experts: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64) * 3).to(dtype)


def make_real(num_tokens: int) -> torch.Tensor:
    return torch.arange(num_tokens) % 5 != 3


SHAPES = [(13, 8, 2), (7, 128, 8), (5, 4, 4), (3, 1, 1), (0, 8, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_megatrons(shape: tuple[int, int, int]) -> None:
    num_tokens, num_experts, top_k = shape
    logits, is_real = make_logits(num_tokens, num_experts).requires_grad_(), make_real(num_tokens)
    chosen = choose_experts(logits, top_k)
    weights, tokens, probabilities = route(logits, chosen, is_real)
    expected, theirs = topk_routing_with_score_function(logits, top_k)
    assert torch.equal(chosen, theirs)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(tokens, theirs[is_real].sum(0).float())
    assert not tokens.requires_grad and not chosen.requires_grad
    softmax = logits.softmax(-1)
    torch.testing.assert_close(probabilities, softmax[is_real].sum(0), rtol=1e-6, atol=1e-7)
    upstream, of_sums = make_logits(num_tokens, num_experts, seed=2), make_logits(1, num_experts, seed=3)[0]
    ours = torch.autograd.grad([weights, probabilities], logits, [upstream, of_sums])[0]
    wanted = torch.autograd.grad([expected, softmax[is_real].sum(0)], logits, [upstream, of_sums])[0]
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


def test_gradients() -> None:
    logits, is_real = make_logits(6, 5, torch.float64).requires_grad_(), make_real(6)
    chosen = choose_experts(logits, 2)
    for outputs in ((0, 2), (0,), (2,)):
        assert torch.autograd.gradcheck(
            lambda given, outputs=outputs: tuple(route(given, chosen, is_real)[i] for i in outputs), (logits,)
        )


def test_operators_are_registered_correctly() -> None:
    logits, is_real = make_logits(6, 5), make_real(6)
    torch.library.opcheck(ops._choose_experts, (logits, 2))
    chosen = choose_experts(logits, 2)
    torch.library.opcheck(ROUTE, (logits.clone().requires_grad_(), chosen, is_real))
    for of_weights in (make_logits(6, 5, seed=2), None):
        for of_sums in (make_logits(1, 5, seed=3)[0], None):
            torch.library.opcheck(ops._route_backward, (of_weights, of_sums, logits, chosen, is_real))


def test_recomputed_and_compiled() -> None:
    logits, is_real = make_logits(6, 5).requires_grad_(), make_real(6)

    def run(logits: torch.Tensor) -> torch.Tensor:
        weights, _, probabilities = route(logits, choose_experts(logits, 2), is_real)
        return weights.square().sum() + probabilities.square().sum()

    results = []
    for variant in (
        run,
        lambda given: checkpoint(run, given, use_reentrant=False),
        torch.compile(run, backend="aot_eager", fullgraph=True),
    ):
        output = variant(logits)
        results.append([output, *torch.autograd.grad(output, logits)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@needs_extension
def test_calls_reach_the_extension() -> None:
    """Up to the launch, which no tokens need: results have the right shapes, errors come before it."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    logits, no_tokens = torch.empty(0, 5), torch.empty(0, dtype=torch.bool)
    chosen = ops._choose_experts.redispatch(cuda, logits, 2)
    assert chosen.shape == (0, 5) and chosen.dtype == torch.bool
    weights, tokens, probabilities = ROUTE.redispatch(cuda, logits, chosen, no_tokens)
    assert weights.shape == (0, 5) and tokens.tolist() == probabilities.tolist() == [0] * 5
    assert ops._route_backward.redispatch(cuda, weights, tokens, logits, chosen, no_tokens).shape == (0, 5)
    for call, message in (
        (lambda: ops._choose_experts.redispatch(cuda, logits, 6), "more choices than experts"),
        (lambda: ops._choose_experts.redispatch(cuda, torch.empty(1, 2000), 1), "1 to 1024 experts"),
        (lambda: ops._choose_experts.redispatch(cuda, logits.bfloat16(), 1), "logits are fp32"),
        (lambda: ROUTE.redispatch(cuda, logits, chosen.float(), no_tokens), "choices are bool"),
        (lambda: ROUTE.redispatch(cuda, logits, chosen, torch.ones(1, dtype=torch.bool)), "real tokens are bool"),
        (lambda: ops._route_backward.redispatch(cuda, None, torch.empty(4), logits, chosen, no_tokens), r"fp32 \[E\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


# The kernels' bodies on the host


def launchers(size: int) -> str:
    """Of kernels whose lanes hold so many logits."""
    return f"""
#include "csrc/partial_sums.cuh"
#include "router/router.cuh"
using namespace kernels;
extern "C" void choose(const float* logits, uint8_t* chosen, int64_t tokens, int64_t experts, int64_t top_k) {{
  emulator::launch(dim3((tokens + 1) / 2), dim3(32, 2), 0,
                   [=] {{ choose_top<{size}>(logits, chosen, tokens, experts, top_k); }});
}}
extern "C" void route(const float* logits, const uint8_t* chosen, const uint8_t* is_real, float* weights,
                      float* partials, float* sums, float* more_sums, int64_t tokens, int64_t experts,
                      int64_t blocks) {{
  emulator::launch(dim3(blocks), dim3(32, 2), 0,
                   [=] {{ route_tokens<{size}>(logits, chosen, is_real, weights, partials, tokens, experts); }});
  emulator::launch(dim3((experts + 31) / 32, 2), dim3(PARTIAL_COLUMNS, PARTIAL_ROWS), 0,
                   [=] {{ sum_partials<float>(partials, sums, more_sums, blocks * 2, experts); }});
}}
extern "C" void gradient(const float* of_weights, const float* of_sums, const float* logits, const uint8_t* chosen,
                         const uint8_t* is_real, float* result, int64_t tokens, int64_t experts) {{
  emulator::launch(dim3((tokens + 1) / 2), dim3(32, 2), 0, [=] {{
    route_gradient<{size}>(of_weights, of_sums, logits, chosen, is_real, result, tokens, experts);
  }});
}}"""


def poisoned(*shape: int) -> torch.Tensor:
    return torch.full(shape, math.nan)


# Experts: a part of a warp, several to a lane and a part, whole warps; tokens: an uneven end, more than warps.
CASES = {"part of a warp": (7, 8, 2, 1), "three to a lane, uneven": (9, 75, 8, 4), "whole warps": (5, 64, 4, 2)}


def check(name: str, order: Order = Order.SHUFFLED, edits: Edits | None = None) -> None:
    num_tokens, num_experts, top_k, size = CASES[name]
    run = compile_kernels(launchers(size), edits)
    logits, is_real = make_logits(num_tokens, num_experts), make_real(num_tokens)
    chosen = torch.full((num_tokens, num_experts), 9, dtype=torch.uint8)
    run("choose", logits, chosen, num_tokens, num_experts, top_k, order=order)
    assert torch.equal(chosen, reference.choose_experts(logits, top_k).byte())

    blocks = 2
    weights, sums, more_sums = poisoned(num_tokens, num_experts), poisoned(num_experts), poisoned(num_experts)
    partials = poisoned(2, blocks * 2, num_experts)
    sizes = (num_tokens, num_experts, blocks)
    run("route", logits, chosen, is_real, weights, partials, sums, more_sums, *sizes, order=order)
    exact = reference.route(logits.double(), chosen.bool(), is_real)
    for found, wanted in zip((weights, sums, more_sums), exact, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-7)

    # Nothing may depend on what is given for experts that were not chosen.
    of_weights = make_logits(num_tokens, num_experts, seed=2)
    of_sums = make_logits(1, num_experts, seed=3)[0]
    for given in ((of_weights, of_sums), (of_weights, None), (None, of_sums)):
        result = poisoned(num_tokens, num_experts)
        masked = None if given[0] is None else given[0].masked_fill(~chosen.bool(), math.nan)
        run("gradient", masked, given[1], logits, chosen, is_real, result, num_tokens, num_experts, order=order)
        wide = (None if part is None else part.double() for part in given)
        wanted = reference.route_backward(*wide, logits.double(), chosen.bool(), is_real)
        torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("name", CASES)
def test_kernels(name: str, order: Order) -> None:
    check(name, order)


def test_exactly_so_many_are_chosen_whatever_the_values() -> None:
    """Equal logits, infinite ones, and those that are no numbers: another number of rows would end beyond memory."""
    ties = torch.zeros(1, 40)
    infinite, broken = make_logits(2, 40).unbind(0)
    infinite[3], infinite[7:20], broken[::2] = math.inf, -math.inf, math.nan
    logits = torch.cat((ties, ties - math.inf, ties + math.nan, infinite[None], broken[None], -ties.log().neg()))
    chosen = torch.full(logits.shape, 9, dtype=torch.uint8)
    compile_kernels(launchers(2))("choose", logits, chosen, *logits.shape, 38)
    assert (chosen.sum(1) == 38).all() and chosen.max() == 1
    assert chosen[0].tolist() == [1] * 38 + [0] * 2, "of equal logits, not the first experts'"
    assert (reference.choose_experts(logits, 38).sum(1) == 38).all()


# Each edit breaks one thing, in a way that would not stop the kernel from compiling.
MUTATIONS = {
    "order of negative numbers": ("? ~bits :", "? bits :"),
    "one choice for all lanes": ("if (expert % WARP == lane) taken", "taken"),
    "the same choice again": (" || taken >> i & 1) continue;", ") continue;"),
    "experts past the last": ("if (expert < num_experts) chosen[", "chosen["),
    "largest of a lane": ("largest = warp_reduce<Max>(largest);", ""),
    "sum of a lane": ("return 1.0f / warp_reduce<Sum>(sum);", "return 1.0f / sum;"),
    "padding counted": ("if (!is_real[token]) continue;", ""),
    "padding has gradients": ("if (grad_probabilities && is_real[token])", "if (grad_probabilities)"),
    "weights over all experts": (
        "of_chosen = softmax_terms(is_chosen,",
        "of_chosen = softmax_terms(exists,",
    ),
    "gradients of others": ("upstream[i] = is_chosen >> i & 1 ?", "upstream[i] = exists >> i & 1 ?"),
    "no mean": ("(upstream[i] - sum)", "upstream[i]"),
    "a token too many": ("if (token >= num_tokens) return;", ""),
    "warps of one block": ("token += num_warps", "token += blockDim.y"),
    "choices with probabilities": ("partials[(num_warps + warp) *", "partials[warp *"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_seen(name: str) -> None:
    edits = {"router/router.cuh": [MUTATIONS[name]]}
    with pytest.raises((AssertionError, EmulatorError)):
        check("three to a lane, uneven", edits=edits)
