"""Permutation of tokens by experts: the reference against loops over tokens, and megatron-core's own functions.

Shapes: T tokens, E experts, R rows, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from tests.kernels.emulator.emulate import Edits, EmulatorError, Order, compile_kernels
from tests.kernels.marks import needs_extension
from vlm_kernels import permute as ops
from vlm_kernels.permute import Permutation, chunk_permutation, expert_permutation, permute, reference, unpermute

PERMUTE, UNPERMUTE = torch.ops.vlm_kernels.permute.default, torch.ops.vlm_kernels.unpermute.default
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
    assert found.ends.tolist() == [sum(owner <= expert for _, owner in expected) for expert in range(num_experts)]
    assert all(part.dtype == torch.int32 for part in (found.entry_of_row, found.rows, found.starts, found.ends))


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
    torch.library.opcheck(ops._chunk_permutation, (ends_of_ranks(2, 3), 0, 3, int(ends_of_ranks(2, 3)[:, -1].sum())))
    x, probs = random(num_tokens, HIDDEN), random(num_tokens, num_experts)
    y, weights = random(num_rows, HIDDEN), random(num_rows)
    for given in (probs, None):
        torch.library.opcheck(PERMUTE, (x, given, *index))
    for given in (weights, None):
        torch.library.opcheck(UNPERMUTE, (y, given, *index))
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


def ends_of_ranks(num_ranks: int, num_experts: int, most: int = 4) -> torch.Tensor:
    """[N, E] int32, where each rank's rows of each expert end; some have none."""
    sizes = torch.randint(0, most + 1, (num_ranks, num_experts), generator=torch.Generator().manual_seed(num_ranks))
    return sizes.cumsum(1).int()


def test_chunks_in_another_order() -> None:
    """As megatron-core sorts the chunks of ranks by expert, and back."""
    ends, first, count = ends_of_ranks(3, 7), 2, 4
    sizes = pad(ends, (1, 0)).diff()[:, first : first + count].long()
    assert (sizes == 0).any()
    num_rows = int(sizes.sum())
    permutation = chunk_permutation(ends, first, count, num_rows)
    order = torch.arange(sizes.numel()).view(sizes.shape).t().flatten()
    x, probs = random(num_rows, HIDDEN), random(num_rows)
    rows, row_probs = permute(x, permutation, probs[:, None])
    expected = moe_utils.sort_chunks_by_idxs(x, sizes.flatten(), order, probs=probs)
    assert row_probs is not None
    assert torch.equal(rows, expected[0]) and torch.equal(row_probs, expected[1])
    assert torch.equal(permutation.ends, sizes.sum(0).cumsum(0).int())
    assert torch.equal(unpermute(rows, permutation), x)
    gradient = random(num_rows, HIDDEN, seed=8)
    assert torch.equal(*(torch.autograd.grad(y, x, gradient, retain_graph=True)[0] for y in (rows, expected[0])))
    (back,) = torch.autograd.grad(unpermute(rows, permutation), x, gradient)
    assert torch.equal(back, gradient)


@needs_extension
def test_calls_reach_the_extension() -> None:
    """Up to the launch, which no tokens need: results have the right shapes, errors come before it."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    *index, ends = ops._expert_permutation.redispatch(cuda, torch.zeros(0, 5, dtype=torch.bool), 0)
    assert [part.tolist() for part in (*index, ends)] == [[], [], [0], [0] * 5]
    index = (*index, 5)
    rows, probs, numbers = torch.empty(0, 8), torch.empty(0, 5), torch.empty(0)
    for operator, given, shapes in (
        (PERMUTE, (rows, probs), [(0, 8), (0,)]),
        (PERMUTE, (rows, None), [(0, 8), (0,)]),
        (ops._permute_backward, (rows, numbers), [(0, 8), (0, 5)]),
        (ops._permute_backward, (rows, None), [(0, 8), (0,)]),
        (ops._unpermute_backward, (rows, rows, numbers), [(0, 8), (0,)]),
        (ops._unpermute_backward, (rows, None, None), [(0, 8), (0,)]),
    ):
        assert [tuple(result.shape) for result in operator.redispatch(cuda, *given, *index)] == shapes
    assert UNPERMUTE.redispatch(cuda, rows, numbers, *index).shape == (0, 8)
    for call, message in (
        (lambda: PERMUTE.redispatch(cuda, torch.empty(3, 8), None, *index), "a row for each token"),
        (lambda: UNPERMUTE.redispatch(cuda, rows, torch.empty(2), *index), "weights are fp32"),
        (lambda: PERMUTE.redispatch(cuda, rows, None, index[0].long(), *index[1:]), "an index is int32"),
        (lambda: ops._expert_permutation.redispatch(cuda, torch.zeros(1, 2000, dtype=torch.bool), 1), "1 to 1024"),
        (lambda: ops._chunk_permutation.redispatch(cuda, ends_of_ranks(2, 4), 3, 2, 1), "no such experts"),
        (lambda: ops._chunk_permutation.redispatch(cuda, ends_of_ranks(65, 64), 0, 64, 1), "1 to 4096 chunks"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


# The kernels' bodies on the host

NAMES = {torch.float32: "float", torch.float16: "float16", torch.bfloat16: "bfloat16"}
INDEX_LAUNCHER = """
#include "permute/permute.cuh"
using namespace kernels;
extern "C" void make_index(const uint8_t* is_chosen, int* counts, int* entry_of_row, int* rows, int* starts, int* ends,
                           int64_t num_tokens, int64_t num_experts, int64_t tile_tokens, int64_t num_tiles) {
  const RoutingMap map{is_chosen, counts, int(num_tokens), int(num_experts), int(tile_tokens), int(num_tiles)};
  const dim3 threads((num_experts + 31) / 32 * 32);
  emulator::launch(dim3(num_tiles), threads, 0, [=] { expert_counts(map); });
  emulator::launch(dim3(num_tiles), threads, 0, [=] { expert_index(map, Index{entry_of_row, rows, starts, ends}); });
}
extern "C" void make_chunk_index(const int* of_ranks, int* entry_of_row, int* rows, int* starts, int* ends,
                                 int64_t num_ranks, int64_t all_experts, int64_t first, int64_t num_experts,
                                 int64_t num_rows, int64_t blocks, int64_t threads) {
  const Chunks chunks{of_ranks, int(num_ranks), int(all_experts), int(first), int(num_experts), int(num_rows)};
  emulator::launch(dim3(blocks), dim3(threads), 2 * chunks.count() * sizeof(int),
                   [=] { chunk_index(chunks, Index{entry_of_row, rows, starts, ends}); });
}"""


def launchers(dtypes: Iterable[torch.dtype] = NAMES) -> str:
    """For each type and vector: {permute_rows,sum_rows,weighted_rows_gradient}_{type}_{N}."""
    text = [INDEX_LAUNCHER]
    for dtype in dtypes:
        name = NAMES[dtype]
        for n in (1, 16 // dtype.itemsize):
            suffix, types = f"{name}_{n}", f"{name}, {n}"
            text.append(f"""
extern "C" void permute_rows_{suffix}(const {name}* x, const float* probs, const int* entry_of_row, const int* rows,
                                      const int* starts, {name}* y, float* row_probs, int64_t tokens,
                                      int64_t vectors) {{
  emulator::launch(dim3((tokens + 1) / 2), dim3(32, 2), 0, [=] {{
    permute_rows<{types}>(x, probs, entry_of_row, rows, starts, y, row_probs, tokens, vectors);
  }});
}}
extern "C" void sum_rows_{suffix}(const {name}* y, const float* weights, const float* grad_row_probs,
                                  const int* entry_of_row, const int* rows, const int* starts, {name}* x,
                                  float* grad_probs, int64_t tokens, int64_t vectors, int64_t num_experts) {{
  emulator::launch(dim3((tokens + 1) / 2), dim3(32, 2), 0, [=] {{
    sum_rows<{types}>(y, weights, grad_row_probs, entry_of_row, rows, starts, x, grad_probs, tokens, vectors,
                      num_experts);
  }});
}}
extern "C" void weighted_rows_gradient_{suffix}(const {name}* gradient, const {name}* y, const float* weights,
                                                const int* entry_of_row, {name}* grad_y, float* grad_weights,
                                                int64_t num_rows, int64_t vectors, int64_t num_experts) {{
  emulator::launch(dim3((num_rows + 1) / 2), dim3(32, 2), 0, [=] {{
    weighted_rows_gradient<{types}>(gradient, y, weights, entry_of_row, grad_y, grad_weights, num_rows, vectors,
                                    num_experts);
  }});
}}""")
    return "\n".join(text)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, math.nan, dtype=dtype) if dtype.is_floating_point else torch.full(shape, -1, dtype=dtype)


def check_index(
    routing_map: torch.Tensor, tile_tokens: int = 32, order: Order = Order.SHUFFLED, edits: Edits | None = None
) -> None:
    num_tokens, num_experts = routing_map.shape
    expected = reference.expert_permutation(routing_map, int(routing_map.sum()))
    found = [poisoned(*part.shape, dtype=torch.int32) for part in expected]
    num_tiles = -(-num_tokens // tile_tokens)
    counts = poisoned(num_tiles, num_experts, dtype=torch.int32)
    sizes = (num_tokens, num_experts, tile_tokens, num_tiles)
    compile_kernels(INDEX_LAUNCHER, edits)("make_index", routing_map, counts, *found, *sizes, order=order)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


# Several tiles and words of experts, a tile of several steps, an uneven end, tokens and experts without choices.
INDEX_CASES = {
    "two words, uneven end": (make_map(75, 40, 6), 32),
    "several steps in a tile": (make_map(150, 33, 4), 64),
    "any number": (make_map(70, 9, None), 32),
    "nobody": (torch.zeros(33, 3, dtype=torch.bool), 32),
    "everybody": (torch.ones(33, 5, dtype=torch.bool), 32),
}


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("name", INDEX_CASES)
def test_kernels_of_the_index(name: str, order: Order) -> None:
    check_index(*INDEX_CASES[name], order)


# More chunks than threads, and a whole number of times; more rows than threads; no rows; all experts, one expert.
CHUNK_CASES = {
    "more chunks than threads": (ends_of_ranks(5, 40), 3, 30, 2, 64),
    "all experts": (ends_of_ranks(4, 16), 0, 16, 1, 64),
    "one expert": (ends_of_ranks(3, 5, 30), 4, 1, 2, 32),
    "no rows": (ends_of_ranks(2, 4, 0), 1, 2, 1, 32),
}


def check_chunks(
    ends: torch.Tensor,
    first: int,
    num_experts: int,
    blocks: int,
    threads: int,
    order: Order = Order.SHUFFLED,
    edits: Edits | None = None,
) -> None:
    num_rows = int(pad(ends, (1, 0)).diff()[:, first : first + num_experts].sum())
    expected = reference.chunk_permutation(ends, first, num_experts, num_rows)
    found = [poisoned(*part.shape, dtype=torch.int32) for part in expected]
    sizes = (*ends.shape, first, num_experts, num_rows, blocks, threads)
    compile_kernels(INDEX_LAUNCHER, edits)("make_chunk_index", ends, *found, *sizes, order=order)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("name", CHUNK_CASES)
def test_kernel_of_chunks(name: str, order: Order) -> None:
    check_chunks(*CHUNK_CASES[name], order)


def check_rows(
    dtype: torch.dtype,
    hidden: int,
    routing_map: torch.Tensor,
    order: Order = Order.SHUFFLED,
    edits: Edits | None = None,
    unaligned: bool = False,
) -> None:
    """Every kernel against the reference in fp64."""
    run = compile_kernels(launchers([dtype]) if edits else launchers(), edits)
    n = 1 if unaligned or hidden * dtype.itemsize % 16 else 16 // dtype.itemsize
    suffix, vectors = f"{NAMES[dtype]}_{n}", hidden // n
    permutation = of_map(routing_map)
    index = ops._parts(permutation)
    num_tokens, num_experts = routing_map.shape
    num_rows = len(permutation.rows)
    x, y = (random(count, hidden, dtype=dtype, seed=count).detach() for count in (num_tokens, num_rows))
    if unaligned:
        x, y = (torch.cat((value.new_zeros(1), value.flatten()))[1:].view_as(value) for value in (x, y))
    probs, weights = random(num_tokens, num_experts).detach(), random(num_rows, seed=4).detach()

    rows, row_probs = poisoned(num_rows, hidden, dtype=dtype), poisoned(num_rows)
    run(f"permute_rows_{suffix}", x, probs, *index[:3], rows, row_probs, num_tokens, vectors, order=order)
    assert torch.equal(rows, reference.permute(x, None, *index)[0])
    assert torch.equal(row_probs, reference.permute(x, probs, *index)[1])

    bound = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for factors in (weights, None):
        sums, grad_probs = poisoned(num_tokens, hidden, dtype=dtype), poisoned(num_tokens, num_experts)
        sizes = (num_tokens, vectors, num_experts)
        run(f"sum_rows_{suffix}", y, factors, weights, *index[:3], sums, grad_probs, *sizes, order=order)
        exact = reference.unpermute(y.double(), None if factors is None else factors.double(), *index)
        assert ((sums.double() - exact).abs() <= bound * exact.abs() + 1e-6).all()
        assert torch.equal(grad_probs, reference.permute_backward(y, weights, *index)[1])

    grad_y, grad_weights = poisoned(num_rows, hidden, dtype=dtype), poisoned(num_rows)
    arguments = (x, y, weights, index[0], grad_y, grad_weights, num_rows, vectors, num_experts)
    run(f"weighted_rows_gradient_{suffix}", *arguments, order=order)
    expected = reference.unpermute_backward(x.double(), y.double(), weights.double(), *index)
    assert ((grad_y.double() - expected[0]).abs() <= bound * expected[0].abs() + 1e-6).all()
    torch.testing.assert_close(grad_weights.double(), expected[1], rtol=1e-5, atol=1e-5)


# More vectors than threads, a part of a warp, and no whole vectors; five rows are a batch and one more.
@pytest.mark.parametrize("hidden", [72 * 8, 40, 13])
@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_kernels(dtype: torch.dtype, hidden: int) -> None:
    check_rows(dtype, hidden, make_map(5, 7, 5))
    check_rows(dtype, hidden, MAPS["any number"][:9], Order.DESCENDING)


def test_kernels_at_any_address() -> None:
    check_rows(torch.bfloat16, 16, make_map(3, 4, 2), unaligned=True)


BARRIER = "__syncthreads();"
# Each edit breaks one thing, in a way that would not stop the kernel from compiling.
INDEX_MUTATIONS = {
    "no barrier after the bits": (f"<< step;\n    }}\n    {BARRIER}", "<< step;\n    }"),
    "no barrier after the first places": (f"= begin;\n    }}\n    {BARRIER}", "= begin;\n    }"),
    "no barrier before the next step": (f"next += of_step;\n    {BARRIER}", "next += of_step;"),
    "earlier tiles with this one": ("tile < static_cast", "tile <= static_cast"),
    "own choice counted": ("(1u << lane) - 1", "(2u << lane) - 1"),
    "words of all experts": ("other < word;", "other < num_words;"),
    "the end left out": ("if (blockIdx.x + 1 == gridDim.x &&", "if (false &&"),
    "ends of this tile": ("= first_row + all;", "= first_row + earlier;"),
}
CHUNK_MUTATIONS = {
    "no barrier before the rows": (f"earlier += total;\n  }}\n  {BARRIER}", "earlier += total;\n  }"),
    "the first chunks again": (
        "if (chunk < count) begins[chunk] = begin;\n    earlier += total;",
        "begins[chunk] = begin;",
    ),
    "places of the new order": ("old_begins[expert * num_ranks + rank]", "old_begins[chunk]"),
    "the chunk before": ("begins[middle] <= row", "begins[middle] < row"),
    "the other way": ("index.rows[old_row] = row;", "index.rows[row] = old_row;"),
    "experts from the first": ("all_experts + first_expert + expert;", "all_experts + expert;"),
    "no last start": ("index.starts[chunks.num_rows] = chunks.num_rows;", ""),
    "ends of ranks": ("begins[(expert + 1) * num_ranks]", "begins[expert + 1]"),
    "one block's rows": ("row += stride", "row += chunks.num_rows"),
}
ROW_MUTATIONS = {
    "no rest of a batch": ("for (; place < end; ++place) add_rows", "if (false) add_rows"),
    "a token too many": ("if (token >= num_tokens) return;", ""),
    "the wrong token": ("entry_of_row[row] / num_experts", "entry_of_row[row] % num_experts"),
    "no zeros where not chosen": ("if (entry_of_row[row] == entry) gradient", "gradient"),
    "no sum over the warp": ("sum = warp_reduce<Sum>(sum);", ""),
    "vectors past the end": ("if (vector >= vectors_per_row) continue;", ""),
}


@pytest.mark.parametrize("name", INDEX_MUTATIONS)
def test_mutations_of_the_index_are_seen(name: str) -> None:
    edits = {"permute/permute.cuh": [INDEX_MUTATIONS[name]]}

    def check_all(order: Order) -> None:
        for case in ("two words, uneven end", "several steps in a tile"):
            check_index(*INDEX_CASES[case], order, edits)

    with pytest.raises((AssertionError, EmulatorError)):
        for order in Order:
            check_all(order)


@pytest.mark.parametrize("name", CHUNK_MUTATIONS)
def test_mutations_of_chunks_are_seen(name: str) -> None:
    edits = {"permute/permute.cuh": [CHUNK_MUTATIONS[name]]}
    with pytest.raises((AssertionError, EmulatorError)):
        for order in Order:
            for case in ("more chunks than threads", "one expert"):
                check_chunks(*CHUNK_CASES[case], order, edits)


@pytest.mark.parametrize("name", ROW_MUTATIONS)
def test_mutations_of_rows_are_seen(name: str) -> None:
    with pytest.raises((AssertionError, EmulatorError)):
        check_rows(torch.float32, 40, make_map(5, 7, 5), edits={"permute/permute.cuh": [ROW_MUTATIONS[name]]})
