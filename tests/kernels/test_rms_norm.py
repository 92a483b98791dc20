"""RMS norms: the reference against fp64 and autograd, the kernel bodies on the emulated thread model against it."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import vlm_kernels.rms_norm as operators
from tests.kernels.emulator.emulate import EmulatorError, Order, compile_kernels
from vlm_kernels.rms_norm import add_rms_norm, reference, rms_norm, rms_norm_add, rms_norm_add_rms_norm

EPS = 1e-3
OPERATIONS = {  # with the number of rows and of weights that each takes
    rms_norm: (1, 1),
    add_rms_norm: (2, 1),
    rms_norm_add: (2, 1),
    rms_norm_add_rms_norm: (2, 2),
}
TYPES = {torch.float32: "float", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# Elements per access, and vectors that a thread holds (0: none, rows are read again).
VARIANTS = [(torch.float32, 4, 2), (torch.float16, 8, 2), (torch.bfloat16, 8, 2)]
VARIANTS += [(torch.bfloat16, 8, 1), (torch.bfloat16, 8, 0), (torch.float32, 1, 0), (torch.bfloat16, 1, 0)]

LAUNCHER = """
extern "C" void NAME_forward(const T* x, const T* residual, const T* weight, T* sum, T* normed, int64_t rows,
                             int64_t size, int64_t threads, int64_t rows_per_block, float eps, float offset) {
  const dim3 grid((rows + rows_per_block - 1) / rows_per_block), block(threads, rows_per_block);
  emulator::launch(grid, block, 0, [=] {
    rms_norm_forward<T, N, CHUNKS>(x, residual, weight, sum, normed, rows, size, eps, offset);
  });
}
extern "C" void NAME_add_forward(const T* x, const T* residual, const T* post_weight, const T* weight, T* sum,
                                 T* normed, int64_t rows, int64_t size, int64_t threads, int64_t rows_per_block,
                                 float eps, float offset) {
  const dim3 grid((rows + rows_per_block - 1) / rows_per_block), block(threads, rows_per_block);
  emulator::launch(grid, block, 0, [=] {
    rms_norm_add_forward<T, N, CHUNKS>(x, residual, post_weight, weight, sum, normed, rows, size, eps, offset);
  });
}
extern "C" void NAME_gradient(const T* grad_normed, const T* x, const T* weight, const T* addend, T* grad_x,
                              T* grad_weight, float* partials, int64_t rows, int64_t size, int64_t blocks,
                              int64_t threads, int64_t rows_per_block, float eps, float offset) {
  const int64_t bytes = 1 * sizeof(float) * weight_gradient_floats<N, CHUNKS>(threads * rows_per_block);
  emulator::launch(dim3(blocks), dim3(threads, rows_per_block), bytes, [=] {
    rms_norm_gradient<T, N, CHUNKS>(grad_normed, x, weight, addend, grad_x, partials, rows, size, eps, offset);
  });
  if (!partials) return;
  const dim3 columns((size + PARTIAL_COLUMNS - 1) / PARTIAL_COLUMNS);
  emulator::launch(columns, dim3(PARTIAL_COLUMNS, PARTIAL_ROWS), 0, [=] {
    sum_partials<T>(partials, grad_weight, nullptr, blocks * rows_per_block, size);
  });
}
extern "C" void NAME_both_gradient(const T* grad_sum, const T* grad_normed, const T* x, const T* sum,
                                   const T* post_weight, const T* weight, T* grad_residual, T* grad_x,
                                   T* grad_post_weight, T* grad_weight, float* partials, int64_t rows, int64_t size,
                                   int64_t blocks, int64_t threads, int64_t rows_per_block, float eps, float offset) {
  const int64_t bytes = 2 * sizeof(float) * weight_gradient_floats<N, CHUNKS>(threads * rows_per_block);
  emulator::launch(dim3(blocks), dim3(threads, rows_per_block), bytes, [=] {
    rms_norm_add_rms_norm_gradient<T, N, CHUNKS>(grad_sum, grad_normed, x, sum, post_weight, weight, grad_residual,
                                                 grad_x, partials, rows, size, eps, offset);
  });
  const dim3 columns((size + PARTIAL_COLUMNS - 1) / PARTIAL_COLUMNS, 2);
  emulator::launch(columns, dim3(PARTIAL_COLUMNS, PARTIAL_ROWS), 0, [=] {
    sum_partials<T>(partials, grad_post_weight, grad_weight, blocks * rows_per_block, size);
  });
}
"""


def launchers(variants: list[tuple[torch.dtype, int, int]]) -> str:
    text = '#include "csrc/partial_sums.cuh"\n#include "rms_norm/rms_norm.cuh"\nusing namespace kernels;\n'
    for dtype, width, chunks in variants:
        name = f"{TYPES[dtype]}_{width}_{chunks}"
        text += f"#define T {TYPES[dtype]}\n#define N {width}\n#define CHUNKS {chunks}\n"
        text += LAUNCHER.replace("NAME", name) + "#undef T\n#undef N\n#undef CHUNKS\n"
    return text


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def run():
    return compile_kernels(launchers(VARIANTS))


def tensors(rows: int, size: int, count: int, dtype: torch.dtype, shift: int = 0) -> list[torch.Tensor]:
    """Random [rows, size], each `shift` elements past an address that vectors may be read from."""
    memory = [torch.randn(rows * size + shift + 64).mul(2).to(dtype) for _ in range(count)]
    return [part[shift : shift + rows * size].view(rows, size) for part in memory]


def poisoned(like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like, torch.nan)


def check(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal up to the order of sums: a last bit of fp32, and where that decides, the neighbouring 16-bit value."""
    if ours.dtype is torch.float32:
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
        return
    rtol = 2.0**-7 if ours.dtype is torch.bfloat16 else 2.0**-10
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-3)
    assert (ours != theirs).sum() <= max(2, 0.02 * ours.numel())


def check_kernels(
    run,
    dtype: torch.dtype,
    width: int,
    chunks: int,
    shape: tuple[int, int],
    block: tuple[int, int],
    order: Order = Order.ASCENDING,
    offset: float = 1.0,
    with_weight: bool = True,
    shift: int = 0,
) -> None:
    """All kernels of one variant against the reference, over rows that no whole number of blocks covers."""
    name, (rows, size), num_blocks = f"{TYPES[dtype]}_{width}_{chunks}", shape, 2
    x, residual, grad, grad_sum = tensors(rows, size, 4, dtype, shift)
    post_weight, weight = [w[0].mul(0.3) if with_weight else None for w in tensors(1, size, 2, dtype)]
    launch = (rows, size, *block, EPS, offset)
    launch_backward = (rows, size, num_blocks, *block, EPS, offset)
    settings = (EPS, bool(offset))
    partials = torch.full((2, num_blocks * block[1], size), torch.nan)

    ours, total = poisoned(x), poisoned(x)
    run(f"{name}_forward", x, None, weight, None, ours, *launch, order=order)
    check(ours, reference.rms_norm(x, weight, *settings))

    run(f"{name}_forward", x, residual, weight, total, ours.fill_(torch.nan), *launch, order=order)
    for mine, its in zip((total, ours), reference.add_rms_norm(x, residual, weight, *settings), strict=True):
        check(mine, its)

    run(f"{name}_add_forward", x, residual, post_weight, None, total.fill_(torch.nan), None, *launch, order=order)
    check(total, reference.rms_norm_add(x, residual, post_weight, *settings))

    both = (x, residual, post_weight, weight)
    run(f"{name}_add_forward", *both, total.fill_(torch.nan), ours.fill_(torch.nan), *launch, order=order)
    expected = reference.rms_norm_add_rms_norm(*both, *settings)
    for mine, its in zip((total, ours), expected, strict=True):
        check(mine, its)

    for addend in (None, grad_sum):
        grad_x, grad_weight = poisoned(x), None if weight is None else poisoned(weight)
        sums = None if weight is None else partials.fill_(torch.nan)
        arguments = (grad, x, weight, addend, grad_x, grad_weight, sums)
        run(f"{name}_gradient", *arguments, *launch_backward, order=order)
        theirs = reference.rms_norm_backward(grad, x, weight, addend, *settings, True)
        check(grad_x, theirs[0])
        if grad_weight is not None:
            check(grad_weight, theirs[1])

    total = expected[0]
    results = [poisoned(x), poisoned(x), *(poisoned(x[0]) for _ in range(2))]
    arguments = (grad_sum, grad, x, total, post_weight, weight, *results, partials.fill_(torch.nan))
    run(f"{name}_both_gradient", *arguments, *launch_backward, order=order)
    theirs = reference.rms_norm_add_rms_norm_backward(
        grad_sum, grad, x, total, post_weight, weight, *settings, with_weight
    )
    for mine, its in zip(results[: 4 if with_weight else 2], theirs, strict=False):
        check(mine, its)


@pytest.mark.parametrize(("dtype", "width", "chunks"), VARIANTS)
def test_kernels_equal_the_reference(run, dtype: torch.dtype, width: int, chunks: int) -> None:
    """Rows that fill the threads' vectors, that leave some idle, that share a block; any size without vectors."""
    full = width * (chunks or 3)
    cases = [((5, full * 64), (64, 1)), ((7, full * 64 - 3 * width), (64, 2)), ((3, width), (32, 1))]
    if width == 1:
        cases += [((6, 131), (32, 4)), ((1, 1), (32, 4))]
    for shape, block in cases:
        check_kernels(run, dtype, width, chunks, shape, block)


@pytest.mark.parametrize(("order", "offset", "with_weight"), list(product(Order, (0.0, 1.0), (True, False))))
def test_any_order_of_threads_and_weights(run, order: Order, offset: float, with_weight: bool) -> None:
    check_kernels(run, torch.float32, 4, 2, (5, 700), (96, 2), order, offset, with_weight)


def test_unaligned_rows(run) -> None:
    check_kernels(run, torch.bfloat16, 1, 0, (5, 77), (64, 1), shift=3)
    with pytest.raises(EmulatorError, match="16 bytes at an address"):
        check_kernels(run, torch.bfloat16, 8, 2, (5, 80), (32, 1), shift=3)


MUTATIONS = {
    "no barrier between the warps of a row": ("csrc/device.cuh", "__syncthreads();", ""),
    "sums of a row over one warp": ("csrc/device.cuh", "lane < num_warps ? row", "lane < 1 ? row"),
    "a column too many": ("rms_norm/rms_norm.cuh", "if (column < size)", "if (column <= size)"),
    "a row too many": ("rms_norm/rms_norm.cuh", "row < num_rows ? size : 0", "size"),
    "scratch of one row for the next": ("rms_norm/rms_norm.cuh", "turn ^= 1;", ""),
    "scratch of one norm for the other": ("rms_norm/rms_norm.cuh", "scratch + REDUCTION_SCRATCH<1>", "scratch"),
    "the norm not rounded before it is added": (
        "rms_norm/rms_norm.cuh",
        "rounded<T>(value[i] * post_scale * factors[i])",
        "value[i] * post_scale * factors[i]",
    ),
    "no one plus the weight": ("rms_norm/rms_norm.cuh", "stored[i] + offset", "stored[i]"),
    "no gradient through the mean": ("rms_norm/rms_norm.cuh", "gradient - value * projection", "gradient"),
    "sums not begun with zero": (
        "rms_norm/rms_norm.cuh",
        "store(sums(chunk, column, i), Vector<float, PIECE>{})",
        "sums(chunk, column, i)",
    ),
    "sums of one weight's gradient over the other's": (
        "rms_norm/rms_norm.cuh",
        "weight_sums + weight_gradient_floats<N, CHUNKS>(blockDim.x * blockDim.y)",
        "weight_sums",
    ),
    "sums of one thread over its neighbour's": ("rms_norm/rms_norm.cuh", "+ thread * PIECE)", "+ thread)"),
    "no barrier before partial sums are added": ("csrc/partial_sums.cuh", "__syncthreads();", ""),
    "a partial row left out": ("csrc/partial_sums.cuh", "row = threadIdx.y;", "row = threadIdx.y + 1;"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mistake_is_seen(mutation: str) -> None:
    path, old, new = MUTATIONS[mutation]
    variant = (torch.bfloat16, 8, 2) if "rounded" in mutation else (torch.float32, 4, 2)
    mutant = compile_kernels(launchers([variant]), {path: [(old, new)]})
    with pytest.raises((AssertionError, EmulatorError)):
        check_kernels(mutant, *variant, (5, 88 * variant[1] * variant[2]), (96, 2))


def inputs(operation, dtype: torch.dtype, with_weight: bool = True) -> list[torch.Tensor | None]:
    num_rows, num_weights = OPERATIONS[operation]
    rows = [torch.randn(2, 3, 24).to(dtype).requires_grad_() for _ in range(num_rows)]
    weights = [torch.randn(24).to(dtype).requires_grad_() if with_weight else None for _ in range(num_weights)]
    return [*rows, *weights]


def outputs(operation, arguments, zero_centered: bool = False) -> tuple[torch.Tensor, ...]:
    result = operation(*arguments, EPS, zero_centered)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("with_weight", [True, False])
def test_gradients_of_the_reference(operation, with_weight: bool) -> None:
    arguments = inputs(operation, torch.float64, with_weight)
    for zero_centered in (True, False):
        assert torch.autograd.gradcheck(lambda *given: operation(*given, EPS, zero_centered), arguments)  # noqa: B023


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_equals_fp64(operation, dtype: torch.dtype) -> None:
    """With sums given in the dtype that they are stored in: what is between has one rounding."""
    arguments = inputs(operation, dtype)
    results = outputs(operation, arguments)
    exact = outputs(operation, [argument.double() for argument in arguments])
    eps = torch.finfo(dtype).eps
    for mine, its in zip(results, exact, strict=True):
        # Two roundings of terms, one of their sum, and again where that is normed.
        torch.testing.assert_close(mine.double(), its, rtol=4 * eps, atol=4 * eps)
    upstream = [torch.randn_like(result) for result in results]
    grads = torch.autograd.grad(results, arguments, upstream)
    exact_grads = torch.autograd.grad(exact, arguments, [grad.double() for grad in upstream])
    for mine, its in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(mine.double(), its.double(), rtol=8 * eps, atol=16 * eps)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_fused_equals_separate_bit_for_bit(operation) -> None:
    arguments = [argument.detach() for argument in inputs(operation, torch.bfloat16)]
    x, *rest = arguments
    if operation is rms_norm:
        separate = (torch.nn.functional.rms_norm(x.float(), (24,), rest[0].float(), EPS).bfloat16(),)
    elif operation is add_rms_norm:
        separate = (rest[0] + x, rms_norm(rest[0] + x, rest[1], EPS))
    else:
        total = rest[0] + rms_norm(x, rest[1], EPS)
        separate = (total, rms_norm(total, rest[-1], EPS))[: 1 if operation is rms_norm_add else 2]
    for mine, its in zip(outputs(operation, arguments), separate, strict=True):
        assert mine.equal(its)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_under_checkpoint_and_compile(operation) -> None:
    arguments = inputs(operation, torch.float32)

    def loss(*given: torch.Tensor) -> torch.Tensor:
        return sum(result.square().sum() for result in outputs(operation, given))

    expected = torch.autograd.grad(loss(*arguments), arguments)
    recomputed = torch.autograd.grad(checkpoint(loss, *arguments, use_reentrant=False), arguments)
    compiled = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*arguments), arguments)
    torch.testing.assert_close(recomputed, expected, rtol=0, atol=0)
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize("with_weight", [True, False])
def test_opcheck(with_weight: bool) -> None:
    for operation in OPERATIONS:
        arguments = inputs(operation, torch.float32, with_weight)
        torch.library.opcheck(getattr(torch.ops.vlm_kernels, operation.__name__).default, (*arguments, EPS, True))
    x, grad = torch.randn(2, 3, 24), torch.randn(2, 3, 24)
    weight = torch.randn(24) if with_weight else None
    for needs_weight, addend in ((True, grad), (False, None)):
        torch.library.opcheck(operators._rms_norm_backward, (grad, x, weight, addend, EPS, True, needs_weight))
        both = (grad, grad, x, x, weight, weight, EPS, True, needs_weight)
        torch.library.opcheck(operators._rms_norm_add_rms_norm_backward, both)


def test_strided_inputs() -> None:
    for operation in OPERATIONS:
        arguments = inputs(operation, torch.float32)
        strided = [
            given.detach().mT.contiguous().mT.requires_grad_() if given.dim() > 1 else given for given in arguments
        ]
        torch.library.opcheck(getattr(torch.ops.vlm_kernels, operation.__name__).default, (*strided, EPS, True))
        for mine, its in zip(outputs(operation, strided), outputs(operation, arguments), strict=True):
            assert mine.is_contiguous() and mine.equal(its)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_second_derivatives_are_refused(operation) -> None:
    """They would be without what depends on the inputs, and nobody would see it."""
    arguments = inputs(operation, torch.float64)
    loss = sum(result.square().sum() for result in outputs(operation, arguments))
    gradient, *_ = torch.autograd.grad(loss, arguments, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_frozen_weights_and_inputs() -> None:
    x, weight = torch.randn(4, 24, requires_grad=True), torch.randn(24)
    rms_norm(x, weight, EPS).sum().backward()
    assert x.grad is not None and weight.grad is None
    x, residual, post_weight, weight = inputs(rms_norm_add_rms_norm, torch.float32)
    total, _ = rms_norm_add_rms_norm(x, residual, post_weight.detach(), weight, EPS)
    total.sum().backward()
    assert residual.grad.equal(torch.ones_like(residual)) and weight.grad.abs().sum() == 0
