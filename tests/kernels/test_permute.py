"""Permutation of tokens by experts: the reference against loops over tokens, and megatron-core's own functions.

Shapes: T tokens, E experts, R rows, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from torch.utils.checkpoint import checkpoint

from kernels import permute as ops
from kernels.permute import Permutation, chunk_permutation, expert_permutation, permute, unpermute

HIDDEN = 6


def make_map(num_tokens: int, num_experts: int, top_k: int | None, seed: int = 1) -> torch.Tensor:
    """[T, E] bool: `top_k` experts of each token, or any number, none included."""
    scores = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    if top_k is None:
        return (scores < 0.3) & (torch.arange(num_tokens) % 4 != 1)[:, None] & (torch.arange(num_experts) != 2)
    chosen = scores.topk(top_k).indices
    return torch.zeros(num_tokens, num_experts, dtype=torch.bool).scatter_(1, chosen, True)


MAPS = {
    "two of eight": make_map(13, 8, 2),
    "any number": make_map(29, 5, None),
    "one expert": make_map(7, 1, 1),
    "nobody": torch.zeros(4, 3, dtype=torch.bool),
    "no tokens": torch.zeros(0, 3, dtype=torch.bool),
}


def choices(routing_map: torch.Tensor) -> Iterator[tuple[int, int]]:
    """(token, expert) of each row, in order."""
    for expert in range(routing_map.shape[1]):
        for token in range(routing_map.shape[0]):
            if routing_map[token, expert]:
                yield token, expert


def of_map(routing_map: torch.Tensor) -> Permutation:
    return expert_permutation(routing_map, int(routing_map.sum()))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 3) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


@pytest.mark.parametrize("name", MAPS)
def test_permutation(name: str) -> None:
    routing_map, found = MAPS[name], of_map(MAPS[name])
    num_experts = routing_map.shape[1]
    expected = list(choices(routing_map))
    assert found.entry_of_row.tolist() == [token * num_experts + expert for token, expert in expected]
    for token in range(len(routing_map)):
        rows = found.rows[found.starts[token] : found.starts[token + 1]].tolist()
        assert rows == [row for row, (owner, _) in enumerate(expected) if owner == token]
    assert len(found.starts) == len(routing_map) + 1 and found.starts[0] == 0
    assert all(part.dtype == torch.int32 for part in (found.entry_of_row, found.rows, found.starts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_rows_and_sums_are_those_of_a_loop(name: str, dtype: torch.dtype) -> None:
    """A loop in fp64; only sums round, once."""
    routing_map, permutation = MAPS[name], of_map(MAPS[name])
    num_tokens, num_experts = routing_map.shape
    x, probs = random(num_tokens, HIDDEN, dtype=dtype), random(num_tokens, num_experts, seed=4)
    rows, row_probs = permute(x, permutation, probs)
    assert row_probs is not None
    y, weights = random(*rows.shape, dtype=dtype, seed=5), random(len(rows), seed=6)
    z = random(*rows.shape, dtype=dtype, seed=7)
    ours = [rows, row_probs, unpermute(y, permutation, weights), unpermute(z, permutation)]
    inputs = [x, probs, y, weights, z]

    wide = [value.detach().double().requires_grad_() for value in inputs]
    owners = list(choices(routing_map))
    theirs = [
        torch.stack([wide[0][token] for token, _ in owners]) if owners else wide[0][:0],
        torch.stack([wide[1][token, expert] for token, expert in owners]) if owners else wide[1].flatten()[:0],
    ]
    for given, factors in ((wide[2], wide[3]), (wide[4], torch.ones_like(wide[3]))):
        sums = [torch.zeros(HIDDEN, dtype=torch.float64) for _ in range(num_tokens)]
        for row, (token, _) in enumerate(owners):
            sums[token] = sums[token] + factors[row] * given[row]
        theirs.append(torch.stack(sums) if sums else wide[0])
    weighted = [random(*value.shape, dtype=value.dtype, seed=8 + index) for index, value in enumerate(ours)]
    if owners:
        ours += torch.autograd.grad(ours, inputs, weighted)
        theirs += torch.autograd.grad(theirs, wide, [value.double() for value in weighted])
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.double(), other, rtol=tolerance, atol=tolerance)


def test_gradients() -> None:
    permutation = of_map(make_map(4, 3, None))
    num_rows = len(permutation.rows)
    x, probs, y, weights = (
        random(*shape, dtype=torch.float64) for shape in ((4, 2), (4, 3), (num_rows, 2), (num_rows,))
    )
    assert torch.autograd.gradcheck(lambda x, probs: permute(x, permutation, probs), (x, probs))
    assert torch.autograd.gradcheck(lambda x: permute(x, permutation)[0], (x,))
    assert torch.autograd.gradcheck(lambda y, weights: unpermute(y, permutation, weights), (y, weights))
    assert torch.autograd.gradcheck(lambda y: unpermute(y, permutation), (y,))


def test_operators_are_registered_correctly() -> None:
    routing_map = MAPS["any number"]
    permutation = of_map(routing_map)
    index = ops._parts(permutation)
    num_tokens, num_experts = routing_map.shape
    num_rows = len(permutation.rows)
    torch.library.opcheck(ops._expert_permutation, (routing_map, num_rows))
    x, probs = random(num_tokens, HIDDEN), random(num_tokens, num_experts)
    y, weights = random(num_rows, HIDDEN), random(num_rows)
    for given in (probs, None):
        torch.library.opcheck(ops._permute, (x, given, *index))
    for given in (weights, None):
        torch.library.opcheck(ops._unpermute, (y, given, *index))
    x, y, weights = x.detach(), y.detach(), weights.detach()
    for grad_probs in (weights, None):
        torch.library.opcheck(ops._permute_backward, (y, grad_probs, *index))
    torch.library.opcheck(ops._unpermute_backward, (x, y, weights, *index))
    torch.library.opcheck(ops._unpermute_backward, (x, None, None, *index))


def test_recomputed_and_compiled() -> None:
    routing_map = make_map(9, 4, 2)
    x, probs = random(9, HIDDEN), random(9, 4)

    def run(x: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        permutation = expert_permutation(routing_map, 18)
        rows, row_probs = permute(x, permutation, probs)
        return unpermute(rows.square(), permutation, row_probs)

    results = []
    for variant in (
        run,
        lambda *inputs: checkpoint(run, *inputs, use_reentrant=False),
        torch.compile(run, backend="aot_eager", fullgraph=True),
    ):
        output = variant(x, probs)
        results.append([output, *torch.autograd.grad(output.square().sum(), (x, probs))])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_chunks_in_another_order() -> None:
    sizes, order = torch.tensor([3, 0, 2, 4, 1, 0]), torch.tensor([2, 5, 0, 4, 1, 3])
    permutation = chunk_permutation(sizes, order, 10, torch.device("cpu"))
    x, probs = random(10, HIDDEN), random(10)
    rows, row_probs = permute(x, permutation, probs[:, None])
    expected = moe_utils.sort_chunks_by_idxs(x, sizes, order, probs=probs)
    assert row_probs is not None
    assert torch.equal(rows, expected[0]) and torch.equal(row_probs, expected[1])
    back = chunk_permutation(sizes[order], order.argsort(), 10, x.device)
    assert torch.equal(permute(rows, back)[0], x)
    gradient = random(10, HIDDEN, seed=8)
    assert torch.equal(*(torch.autograd.grad(y, x, gradient)[0] for y in (rows, expected[0])))
