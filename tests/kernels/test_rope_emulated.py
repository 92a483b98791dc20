"""The CUDA kernels that normalise and rotate queries and keys, bodies and launches, run on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import vlm_kernels.rope as module
from tests.kernels.emulator.emulate import Edits, EmulatorError, Order, compile_kernels
from tests.kernels.emulator.operators import load_operators
from tests.kernels.marks import needs_extension
from tests.kernels.rope_cases import EPS, Case, Inputs, make
from vlm_kernels.rope import reference

LAUNCHERS = """
#include "csrc/partial_sums.cuh"
#include "rope/rope.cuh"
using namespace kernels;
using namespace kernels::rope;

template <class T>
Layout<const T> layout(const T* x, const int64_t* strides) { return {x, strides[0], strides[1], strides[2]}; }

template <class Table>
Rotation<Table> rotation_of(const Table* cosine, const Table* sine, const int64_t* sizes, float eps) {
  return {cosine, sine, int(sizes[0] * sizes[1]), int(sizes[1]), int(sizes[2] / 2), 1.0f / sizes[2], int(sizes[3]),
          int(sizes[4]), 0, eps, sizes[5] != 0, float(sizes[6])};
}

template <class T, class Table, int N>
void run_forward(const T* q, const T* k, const T* q_weight, const T* k_weight, const Table* cosine, const Table* sine,
                 const Table* scale, T* q_out, T* k_out, float* q_rstd, float* k_rstd, const int64_t* strides,
                 const int64_t* sizes, float eps) {
  Rotation<Table> rotation = rotation_of(cosine, sine, sizes, eps);
  Both<Forward<T, Table>> both{
      Forward<T, Table>{layout(q, strides), q_out, q_rstd, q_weight, scale, int(sizes[7])},
      Forward<T, Table>{layout(k, strides + 3), k_out, k_rstd, k_weight, nullptr, int(sizes[8])}};
  divide<T, N>(rotation, both, int64_t(1) << 40);
  emulator::launch(dim3(both.at[0].blocks + both.at[1].blocks), dim3(WARPS * WARP), 0,
                   [=] { rope_forward<T, Table, N>(both, rotation); });
}

template <class T, class Table, int N>
void run_backward(const T* q_grad, const T* k_grad, const T* q, const T* k, const float* q_rstd, const float* k_rstd,
                  const T* q_weight, const T* k_weight, const Table* cosine, const Table* sine, const Table* scale,
                  T* q_out, T* k_out, T* q_sums, T* k_sums, float* partials, const int64_t* strides,
                  const int64_t* sizes, int64_t max_blocks) {
  Rotation<Table> rotation = rotation_of(cosine, sine, sizes, 0.0f);
  Both<Backward<T, Table>> both{
      Backward<T, Table>{layout(q, strides), layout(q_grad, strides + 6), q_out, q_rstd, q_weight, partials, scale,
                         int(sizes[7])},
      Backward<T, Table>{layout(k, strides + 3), layout(k_grad, strides + 9), k_out, k_rstd, k_weight, partials,
                         nullptr, int(sizes[8])}};
  divide<T, N>(rotation, both, max_blocks);
  if (q_weight) both.at[1].partial += both.at[0].blocks * sizes[2];
  else both.at[0].partial = both.at[1].partial = nullptr;
  emulator::launch(dim3(both.at[0].blocks + both.at[1].blocks), dim3(WARPS * WARP), WARPS * sizes[2] * 4,
                   [=] { rope_backward<T, Table, N>(both, rotation); });
  T* const sums[2] = {q_sums, k_sums};
  for (int side = 0; side < 2 && q_weight; ++side) {
    emulator::launch(dim3((sizes[2] + 31) / 32), dim3(PARTIAL_COLUMNS, PARTIAL_ROWS), 0, [=] {
      sum_partials<T>(both.at[side].partial, sums[side], nullptr, both.at[side].blocks, int(sizes[2]));
    });
  }
}

template <class T, class Table>
void find_width(const T* q, const T* k, const T* q_weight, const T* k_weight, const Table* cosine, const Table* sine,
                const int64_t* strides, const int64_t* sizes, int64_t* width) {
  const Rotation<Table> rotation = rotation_of(cosine, sine, sizes, 0.0f);
  Alignment alignment;
  alignment.add(layout(q, strides)), alignment.add(layout(k, strides + 3));
  alignment.add(q_weight), alignment.add(k_weight);
  constexpr int N = VECTOR<T>;
  *width = alignment.allows<T, Table, N>(rotation)       ? N
           : alignment.allows<T, Table, N / 2>(rotation) ? N / 2
           : alignment.allows<T, Table, N / 4>(rotation) ? N / 4
                                                         : 1;
}
"""
VARIANT = """
extern "C" void width_{index}(const {T}* a, const {T}* b, const {T}* c, const {T}* d, const {Table}* e,
                              const {Table}* f, const int64_t* g, const int64_t* h, int64_t* i) {{
  find_width<{T}, {Table}>(a, b, c, d, e, f, g, h, i);
}}
extern "C" void forward_{index}(
    const {T}* a, const {T}* b, const {T}* c, const {T}* d, const {Table}* e, const {Table}* f, const {Table}* g,
    {T}* h, {T}* i, float* j, float* k, const int64_t* l, const int64_t* m, float n) {{
  run_forward<{T}, {Table}, {N}>(a, b, c, d, e, f, g, h, i, j, k, l, m, n);
}}
extern "C" void backward_{index}(
    const {T}* a, const {T}* b, const {T}* c, const {T}* d, const float* e, const float* f, const {T}* g, const {T}* h,
    const {Table}* i, const {Table}* j, const {Table}* k, {T}* l, {T}* m, {T}* n, {T}* o, float* p, const int64_t* q,
    const int64_t* r, int64_t s) {{
  run_backward<{T}, {Table}, {N}>(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s);
}}
"""
SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
NAMES = {SINGLE: "float", HALF: "float16", BRAIN: "bfloat16"}


def case(dtype: torch.dtype, table_dtype: torch.dtype, head_dim: int, **more: object) -> Case:
    return Case(**{"rotated": head_dim, "dtype": dtype, "table_dtype": table_dtype, "head_dim": head_dim} | more)


# With the elements of one access, which the launch code chooses by sizes, strides and addresses.
CASES: dict[str, tuple[Case, int]] = {
    "two slices of heads, scaled, 1 + weight": (
        case(BRAIN, BRAIN, 128, tokens=(3, 2), heads=(17, 2), scaled=True, zero_centered=True),
        8,
    ),
    "heads before tokens": (case(BRAIN, SINGLE, 128, heads=(5, 3), strided=True), 8),
    "heads of 72, packed, no norm": (
        case(BRAIN, SINGLE, 72, tokens=(9,), heads=(16, 16), packed=True, eps=None, weights=False),
        4,
    ),
    "heads of 72 in two sections": (case(HALF, HALF, 72, sections=2, heads=(3, 3), weights=False), 2),
    "512 elements a head": (case(HALF, SINGLE, 512, tokens=(3,), heads=(5, 1)), 8),
    "a quarter turns": (case(BRAIN, SINGLE, 256, rotated=64, heads=(3, 2), strided=True), 8),
    "queries alone": (case(BRAIN, SINGLE, 256, heads=(9, 0), scaled=True), 8),
    "fp32": (case(SINGLE, SINGLE, 128, heads=(9, 2), scaled=True), 4),
    "fp32, heads of 12": (case(SINGLE, SINGLE, 12, heads=(62, 30), packed=True), 2),
    "odd sections, fp32": (case(SINGLE, SINGLE, 30, sections=3, heads=(7, 2), zero_centered=True), 1),
    "any address": (case(BRAIN, BRAIN, 64, tokens=(11,), heads=(3, 2), packed=True), 1),
}


@cache
def compiled(names: tuple[str, ...]) -> Callable[..., None]:
    return compile_kernels(LAUNCHERS + variants(names))


def variants(names: tuple[str, ...]) -> str:
    listed = ((list(CASES).index(name), *CASES[name]) for name in names)
    return "".join(
        VARIANT.format(index=index, T=NAMES[each.dtype], Table=NAMES[each.table_dtype], N=width)
        for index, each, width in listed
    )


def strides(*tensors: torch.Tensor) -> torch.Tensor:
    """Of tokens (outer and inner) and heads of each."""
    return torch.tensor([(*(x.stride() if x.dim() == 4 else (x.stride(0), 0, x.stride(1))),)[:3] for x in tensors])


def sizes(x: Inputs, each: Case) -> torch.Tensor:
    tokens = each.tokens if len(each.tokens) == 2 else (*each.tokens, 1)
    pairs = each.rotated // 2
    flags = (each.eps is not None, each.zero_centered)
    return torch.tensor([*tokens, each.head_dim, pairs, pairs // each.sections, *flags, *each.heads])


def emptied(x: torch.Tensor, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.full(x.shape if shape is None else shape, torch.nan, dtype=dtype or x.dtype)


def inputs_of(name: str) -> tuple[Case, Inputs]:
    each = CASES[name][0]
    x = make(each)
    return each, replace(x, q=moved(x.q), k=moved(x.k), q_weight=moved(x.q_weight)) if name == "any address" else x


def differences(name: str, run: Callable[..., None], order: Order = Order.ASCENDING) -> dict[str, tuple[float, float]]:
    """Largest difference of each result relative to its size, and the share of elements with another value."""
    each, x = inputs_of(name)
    index = list(CASES).index(name)
    shared = (x.q_weight, x.k_weight, x.cosine, x.sine, x.query_scale)
    right = reference.forward(x.q, x.k, *shared, each.eps, each.zero_centered, each.sections)
    layouts, numbers = strides(x.q, x.k, x.q_grad, x.k_grad), sizes(x, each)
    width = torch.zeros(1, dtype=torch.int64)
    run(f"width_{index}", x.q, x.k, *shared[:4], layouts, numbers, width)
    assert width.item() == CASES[name][1]
    heads = [emptied(part, (*part.shape[:-1], 1), SINGLE) for part in (x.q, x.k)]
    found = [emptied(x.q), emptied(x.k), *heads]
    run(f"forward_{index}", x.q, x.k, *shared, *found, layouts, numbers, EPS, order=order)
    # Without a norm, nothing is written to these.
    results = compared(("q", "k", "q_rstd", "k_rstd"), found, right)

    grads = reference.backward(x.q_grad, x.k_grad, x.q, x.k, *right[2:], *shared, each.zero_centered, each.sections)
    found = [emptied(x.q), emptied(x.k), emptied(x.q, (each.head_dim,)), emptied(x.k, (each.head_dim,))]
    # More tokens than the warps of so few blocks: each takes several.
    partials, rstd = torch.full((4, each.head_dim), torch.nan), [None if each.eps is None else r for r in right[2:]]
    inputs = (x.q_grad, x.k_grad, x.q, x.k, *rstd, *shared)
    run(f"backward_{index}", *inputs, *found, partials, layouts, numbers, 3 if each.weights else 100, order=order)
    return results | compared(("q_grad", "k_grad", "q_weight", "k_weight"), found, grads)


def compared(
    names: Sequence[str], found: Sequence[torch.Tensor], right: Sequence[torch.Tensor]
) -> dict[str, tuple[float, float]]:
    pairs = zip(names, found, right, strict=True)
    return {name: compare(mine, its) for name, mine, its in pairs if its.numel()}


def moved(x: torch.Tensor) -> torch.Tensor:
    """The same, one element off an aligned address."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    memory = torch.zeros(span + 1, dtype=x.dtype)[1:]
    return torch.as_strided(memory, x.shape, x.stride(), memory.storage_offset()).copy_(x)


def compare(found: torch.Tensor, right: torch.Tensor) -> tuple[float, float]:
    error = (found.double() - right.double()).abs().max() / right.double().abs().max()
    return float(error.nan_to_num(torch.inf)), float((found != right).double().mean())


def is_right(name: str, found: dict[str, tuple[float, float]]) -> bool:
    """Sums of up to 512 terms in another order; where that tips a rounding, one unit in the last place."""
    each = CASES[name][0]
    if each.dtype == SINGLE:
        return all(error < 3e-6 for error, _ in found.values())
    unit = 2**-8 if each.dtype == BRAIN else 2**-11
    limit = {key: 3e-6 if "rstd" in key else 2 * unit for key in found}
    share = {key: 1.0 if "rstd" in key else 0.02 for key in found}
    return all(error <= limit[key] and other <= share[key] for key, (error, other) in found.items())


# Those with tails, whose memory is guarded here.
BODIES = tuple(name for name in CASES if name.startswith(("two", "heads of 72, packed", "fp32", "odd", "any")))


@pytest.mark.parametrize("name", BODIES)
def test_bodies_are_the_reference(name: str) -> None:
    order = Order(list(CASES).index(name) % len(Order))
    found = differences(name, compiled(BODIES), order)
    assert is_right(name, found), found


@pytest.fixture(scope="module")
def operators() -> Any:
    return load_operators("rope/rope.cu", [torch.ops.vlm_kernels.qk_norm_rope.default, module._backward])


@pytest.mark.parametrize("name", CASES)
def test_operators_as_they_are_launched(name: str, operators: Any) -> None:
    each, x = inputs_of(name)
    shared = (x.q_weight, x.k_weight, x.cosine, x.sine, x.query_scale)
    forward = (x.q, x.k, *shared, each.eps, each.zero_centered, each.sections)
    right, found = reference.forward(*forward), operators.qk_norm_rope(*forward)
    backward = (x.q_grad, x.k_grad, x.q, x.k, *right[2:], *shared, each.zero_centered, each.sections)
    right, found = (*right, *reference.backward(*backward)), (*found, *operators.qk_norm_rope_backward(*backward))
    for mine, its in zip(found, right, strict=True):
        assert mine.shape == its.shape and mine.dtype == its.dtype and mine.is_contiguous()
    names = ("q", "k", "q_rstd", "k_rstd", "q_grad", "k_grad", "q_weight", "k_weight")
    results = compared(names, found, right)
    assert is_right(name, results), results


def test_tables_and_heads_that_do_not_lie_together_are_copied(operators: Any) -> None:
    each = case(SINGLE, SINGLE, 32, scaled=True)
    x = make(each)
    turned = {
        "q": torch.stack((x.q, x.q), dim=-1)[..., 0],
        "cosine": x.cosine.transpose(0, 1).contiguous().transpose(0, 1),
        "query_scale": x.query_scale.t().contiguous().t(),
    }
    assert all(not tensor.is_contiguous() for tensor in turned.values())
    results = []
    for inputs in (x, replace(x, **turned)):
        shared = (inputs.q_weight, inputs.k_weight, inputs.cosine, inputs.sine, inputs.query_scale)
        results.append(operators.qk_norm_rope(inputs.q, inputs.k, *shared, EPS, False, 1))
    assert all(torch.equal(mine, its) for mine, its in zip(*results, strict=True))


def test_no_tokens(operators: Any) -> None:
    each = case(BRAIN, BRAIN, 32, tokens=(0, 2))
    x = make(each)
    shared = (x.q_weight, x.k_weight, x.cosine, x.sine, x.query_scale)
    found = operators.qk_norm_rope(x.q, x.k, *shared, EPS, False, 1)
    grads = operators.qk_norm_rope_backward(x.q_grad, x.k_grad, x.q, x.k, *found[2:], *shared, False, 1)
    right = reference.backward(x.q_grad, x.k_grad, x.q, x.k, *found[2:], *shared, False, 1)
    assert all(torch.equal(mine, its) and mine.dtype == its.dtype for mine, its in zip(grads, right, strict=True))


@needs_extension
def test_calls_reach_the_extension() -> None:
    """Up to the launch, which no tokens need."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for each in (case(BRAIN, SINGLE, 32, tokens=(0,)), case(BRAIN, SINGLE, 32, tokens=(0,), eps=None, weights=False)):
        x = make(each)
        shared = (x.q_weight, x.k_weight, x.cosine, x.sine, x.query_scale)
        forward = (x.q, x.k, *shared, each.eps, False, 1)
        found = torch.ops.vlm_kernels.qk_norm_rope.default.redispatch(cuda, *forward)
        right = reference.forward(*forward)
        backward = (x.q_grad, x.k_grad, x.q, x.k, *right[2:], *shared, False, 1)
        found = (*found, *module._backward.redispatch(cuda, *backward))
        for mine, its in zip(found, (*right, *reference.backward(*backward)), strict=True):
            assert mine.shape == its.shape and mine.dtype == its.dtype and torch.equal(mine, its)


def test_what_is_refused(operators: Any) -> None:
    x = make(case(SINGLE, SINGLE, 16))
    shared: dict[str, Any] = {"weights": (x.q_weight, x.k_weight), "table": (x.cosine, x.sine), "scale": None}

    def message(q: torch.Tensor = x.q, k: torch.Tensor = x.k, sections: int = 1, **more: Any) -> str:
        given = shared | more
        with pytest.raises(RuntimeError) as error:
            operators.qk_norm_rope(q, k, *given["weights"], *given["table"], given["scale"], EPS, False, sections)
        return str(error.value)

    assert "one or two token dimensions" in message(x.q[0, 0], x.k[0, 0])
    assert "same tokens" in message(k=x.k[1:])
    assert "same tokens" in message(table=(x.cosine[1:], x.sine))
    assert "equally large" in message(k=x.k[..., :8])
    assert "equal sections" in message(sections=3)
    assert "equal sections" in message(table=(x.cosine.repeat(1, 1, 2), x.sine.repeat(1, 1, 2)))
    assert "one dtype" in message(k=x.k.bfloat16())
    assert "one dtype" in message(table=(x.cosine.half(), x.sine.half()))
    assert "one number" in message(scale=torch.ones(3))
    assert "size and dtype" in message(weights=(x.q_weight[:8], None))
    wide = torch.zeros(2, 1, 1024)
    assert "at most 512" in message(wide, wide, table=(torch.ones(2, 4), torch.ones(2, 4)), weights=(None, None))


MUTATIONS: dict[str, tuple[str, str, str]] = {
    "no barrier before sums of warps": ("__syncthreads();", "", "fp32"),
    "norm of half a head": ("distance > 0; distance /= 2", "distance > 1; distance /= 2", "fp32"),
    "weight's sum over half a warp": ("distance < WARP;", "distance < WARP / 2;", "fp32"),
    "idle lanes write": ("if (!places.exists(chunk)) continue;", "", "odd sections, fp32"),
    "heads past the last are written": ("if (head >= side.heads) continue;", "", "fp32, heads of 12"),
    "sections run on": ("/ rotation.section_pairs * rotation.section_pairs", "* 0", "odd sections, fp32"),
    "no rounding of products": (
        "std::is_same_v<T, Table>) {\n    const Vector",
        "false) {\n    const Vector",
        "two slices of heads, scaled, 1 + weight",
    ),
    "one round of heads": ("head += step) {", "head += step, base = side.heads) {", "fp32, heads of 12"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mistake_is_seen(mutation: str) -> None:
    old, new, name = MUTATIONS[mutation]
    edits: Edits = {"rope/rope.cuh": [(old, new)]}
    run = compile_kernels(LAUNCHERS + variants((name,)), edits)
    try:
        found = differences(name, run)
    except EmulatorError as error:
        assert "outside" in str(error) or "threads wait" in str(error)
    else:
        assert not is_right(name, found), found
