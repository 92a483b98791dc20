"""The expert permutation on CUDA: its index against the reference, sums against fp64, and that the host never waits."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_permute import MAPS, make_map
from vlm_kernels.permute import Permutation, chunk_permutation, expert_permutation, permute, reference, unpermute

pytestmark = pytest.mark.usefixtures("poisoned")


def fresh_map(num_tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    return make_map(num_tokens, num_experts, top_k, seed=int(torch.seed() % 2**31)).cuda()


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype).requires_grad_()


# One tile and many, tiles of several steps, one word of experts and many.
MAP_SHAPES = [(8192, 128, 8), (31, 8, 2), (20_001, 33, 4), (4097, 512, 10), (1, 1, 1), (300, 1024, 1)]


@pytest.mark.parametrize("shape", MAP_SHAPES, ids=str)
def test_index(shape: tuple[int, int, int]) -> None:
    routing_map = fresh_map(*shape)
    found = expert_permutation(routing_map, shape[0] * shape[2])
    expected = reference.expert_permutation(routing_map.cpu(), shape[0] * shape[2])
    for ours, theirs in zip((found.entry_of_row, found.rows, found.starts, found.ends), expected, strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("name", MAPS)
def test_index_of_uneven_maps(name: str) -> None:
    num_rows = int(MAPS[name].sum())
    found = expert_permutation(MAPS[name].cuda(), num_rows)
    expected = reference.expert_permutation(MAPS[name], num_rows)
    for ours, theirs in zip((found.entry_of_row, found.rows, found.starts, found.ends), expected, strict=True):
        assert torch.equal(ours.cpu(), theirs)


def index_of(permutation: Permutation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    return permutation.entry_of_row, permutation.rows, permutation.starts, permutation.num_experts


@pytest.mark.parametrize("hidden", [2048, 2816, 4096, 40, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_and_sums(dtype: torch.dtype, hidden: int) -> None:
    num_tokens, num_experts, top_k = 515, 64, 6
    routing_map = fresh_map(num_tokens, num_experts, top_k)
    permutation = expert_permutation(routing_map, num_tokens * top_k)
    x, probs = random(num_tokens, hidden, dtype=dtype), random(num_tokens, num_experts)
    rows, row_probs = permute(x, permutation, probs)
    y, weights, z = random(*rows.shape, dtype=dtype), random(len(rows)), random(*rows.shape, dtype=dtype)
    assert row_probs is not None
    ours = [rows, row_probs, unpermute(y, permutation, weights), unpermute(z, permutation)]
    inputs = [x, probs, y, weights, z]
    gradients = [torch.randn_like(value) for value in ours]
    ours += torch.autograd.grad(ours, inputs, gradients)

    index, wide = index_of(permutation), [value.detach().double() for value in inputs]
    grad_rows, grad_row_probs, grad_weighted, grad_sums = (value.double() for value in gradients)
    theirs = [
        *reference.permute(wide[0], wide[1], *index),
        reference.unpermute(wide[2], wide[3], *index),
        reference.unpermute(wide[4], None, *index),
        *reference.permute_backward(grad_rows, grad_row_probs, *index),
        *reference.unpermute_backward(grad_weighted, wide[2], wide[3], *index),
        reference.unpermute_backward(grad_sums, None, None, *index)[0],
    ]
    bounds = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
    for own, other in zip(ours, theirs, strict=True):
        assert ((own.double() - other).abs() <= bounds[own.dtype] * other.abs() + 2e-6 * other.abs().max()).all()


# Ranks, experts of all ranks, the first of these rows' experts and their number; most rows of one rank and expert.
@pytest.mark.parametrize("shape", [(8, 128, 16, 16, 300), (64, 64, 63, 1, 40), (2, 1024, 0, 1024, 3), (2, 8, 4, 4, 0)])
def test_chunks_in_another_order(shape: tuple[int, int, int, int, int]) -> None:
    ranks, all_experts, first, count, most = shape
    sizes = torch.randint(0, most + 1, (ranks, all_experts))
    own = sizes[:, first : first + count]
    num_rows = int(own.sum())
    x, probs = random(num_rows, 512, dtype=torch.bfloat16), random(num_rows)
    permutation = chunk_permutation(sizes.cumsum(1).int().cuda(), first, count, num_rows)
    rows, row_probs = permute(x, permutation, probs[:, None])
    assert row_probs is not None
    assert torch.equal(permutation.ends.cpu(), own.sum(0).cumsum(0).int())
    order = torch.arange(own.numel()).view(own.shape).t().flatten().tolist()
    for ours, whole in ((rows, x), (row_probs, probs)):
        parts = whole.split(own.flatten().tolist())
        assert torch.equal(ours, torch.cat([parts[chunk] for chunk in order]))
    assert torch.equal(unpermute(rows, permutation), x)


def test_the_same_bits_again() -> None:
    routing_map = fresh_map(2000, 64, 8)
    x, probs = random(2000, 256, dtype=torch.bfloat16), random(2000, 64)
    gradient = torch.randn(2000, 256, device="cuda").bfloat16()
    runs = []
    for _ in range(3):
        permutation = expert_permutation(routing_map, 16_000)
        rows, row_probs = permute(x, permutation, probs)
        output = unpermute(rows, permutation, row_probs)
        runs.append([output, *torch.autograd.grad(output, (x, probs), gradient)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_the_host_never_waits() -> None:
    routing_map = fresh_map(500, 16, 4)
    x, probs = random(500, 64, dtype=torch.bfloat16), random(500, 16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        permutation = expert_permutation(routing_map, 2000)
        rows, row_probs = permute(x, permutation, probs)
        unpermute(rows, permutation, row_probs).float().sum().backward()
        chunk_permutation(torch.arange(16, dtype=torch.int32, device="cuda")[None], 2, 4, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
