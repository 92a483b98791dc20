"""The chunked loss against torch's in fp64, on one rank and divided; its kernels against their reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from megatron_vlm.layers.vocab_parallel_loss import Head, chunk_tokens, linear_cross_entropy
from megatron_vlm.parallel.groups import build_groups
from megatron_vlm.parallel.layout import Layout
from tests.kernels.emulator.emulate import EmulatorError, Order, compile_kernels
from tests.kernels.marks import needs_extension
from tests.ranks import run_ranks
from vlm_kernels.linear_cross_entropy import logits_gradient_, reference, vocabulary_statistics

# 26 real rows of 32: over four ranks the last has 2 of 8; with 14 the last two have none.
VOCABULARY, ROWS, HIDDEN, BATCH, SEQUENCE = 26, 32, 6, 3, 8
Z_LOSS = 0.1


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_inputs(vocabulary: int = VOCABULARY, dtype: torch.dtype = torch.float64, labelled: float = 0.6) -> Any:
    """Hidden states, the whole weight (padding rows are not zero), labels and upstream gradient."""
    x, weight = random(SEQUENCE, BATCH, HIDDEN, seed=1, dtype=dtype), random(ROWS, HIDDEN, seed=2, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, vocabulary, (BATCH, SEQUENCE), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) >= labelled] = -100
    return x, weight, labels, random(BATCH, SEQUENCE, seed=4)


def index_of(labels: torch.Tensor) -> torch.Tensor:
    return (labels.t().flatten() != -100).nonzero().squeeze(1)


def exact(
    x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, vocabulary: int, softcap: float | None, z_loss: float
) -> torch.Tensor:
    """The definition, in fp64, from whole logits."""
    logits = x.double() @ weight.double()[:vocabulary].t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = cross_entropy(logits.permute(1, 2, 0), labels, ignore_index=-100, reduction="none")
    squares = logits.logsumexp(-1).square().t()
    return losses + z_loss * torch.where(labels == -100, 0.0, squares)


Results = tuple[torch.Tensor, ...]


def expected(
    dtype: torch.dtype, vocabulary: int, softcap: float | None, z_loss: float, labelled: float = 0.6
) -> Results:
    x, weight, labels, upstream = make_inputs(vocabulary, dtype, labelled)
    x, weight = (tensor.double().requires_grad_() for tensor in (x, weight))
    losses = exact(x, weight, labels, vocabulary, softcap, z_loss)
    losses.backward(upstream)
    return losses.detach(), x.grad, weight.grad


def computed(
    dtype: torch.dtype,
    vocabulary: int,
    softcap: float | None,
    z_loss: float,
    sequence_parallel: bool = False,
    labelled: float = 0.6,
    chunk: int = 5,
) -> Results:
    """Losses and whole gradients by all ranks of the world as tensor ranks, `chunk` tokens at a time."""
    group = build_groups(Layout(tensor_size=torch.distributed.get_world_size())).tp
    x, weight, labels, upstream = make_inputs(vocabulary, dtype, labelled)
    mine = weight.chunk(group.size())[group.rank()].clone().requires_grad_()
    x = (x.chunk(group.size())[group.rank()] if sequence_parallel else x).clone().requires_grad_()
    head = Head(vocabulary, group, sequence_parallel, softcap, chunk * mine.shape[0] * mine.element_size())
    losses = linear_cross_entropy(x, mine, labels, index_of(labels), head, z_loss)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    losses.backward(upstream.to(losses.dtype))
    return losses.detach(), joined(x.grad, group) if sequence_parallel else x.grad, joined(mine.grad, group)


def joined(part: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    parts = [torch.empty_like(part) for _ in range(group.size())]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)


# Relative to the largest value. fp64 and fp32: sums of at most 32 numbers in another order. bf16: logits and their
# gradients, of order 10 and 1, are rounded to 8 bits.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}
FORMS = [(26, None, 0.0), (26, 2.0, 0.0), (26, None, Z_LOSS), (14, 3.0, Z_LOSS)]


def check(results: Results, truth: Results, dtype: torch.dtype) -> None:
    for ours, theirs in zip(results, truth, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE[dtype] * theirs.abs().max()


def computed_forms(dtype: torch.dtype, sequence_parallel: bool) -> list[Results]:
    return [computed(dtype, *form, sequence_parallel) for form in FORMS]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("world_size", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, False), (4, True)]
)
def test_losses_and_gradients(world_size: int, sequence_parallel: bool, dtype: torch.dtype) -> None:
    truths = [expected(dtype, *form) for form in FORMS]
    for rank in run_ranks(world_size, computed_forms, dtype, sequence_parallel):
        for results, truth, (vocabulary, *_) in zip(rank, truths, FORMS, strict=True):
            check(results, truth, dtype)
            assert not results[2][vocabulary:].any()


@pytest.mark.parametrize("labelled", [0.0, 1.0])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_no_token_or_every_token_has_a_label(labelled: float, sequence_parallel: bool) -> None:
    truth = expected(torch.float32, 26, None, Z_LOSS, labelled)
    for results in run_ranks(2, computed, torch.float32, 26, None, Z_LOSS, sequence_parallel, labelled):
        for ours, theirs in zip(results, truth, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=2e-6)


def test_chunks_do_not_change_the_result() -> None:
    whole, *others = (
        run_ranks(1, computed, torch.float64, 26, 2.0, Z_LOSS, False, 0.6, chunk)[0] for chunk in (100, 1, 4)
    )
    for other in others:
        check(other, whole, torch.float64)


@pytest.mark.parametrize(
    ("tokens", "most", "size"), [(0, 10, 1), (7, 10, 7), (20, 10, 10), (8192, 1536, 1408), (1537, 1536, 896), (3, 0, 1)]
)
def test_chunks_are_even_and_within_the_bound(tokens: int, most: int, size: int) -> None:
    assert chunk_tokens(tokens, 100, 100 * most + 99) == size


def single_rank() -> torch.distributed.ProcessGroup:
    return build_groups(Layout()).tp


def gradcheck() -> bool:
    x, weight, labels, _ = make_inputs()
    head = Head(VOCABULARY, single_rank(), softcap=2.0, chunk_bytes=5 * ROWS * 8)
    return torch.autograd.gradcheck(
        lambda x, weight: linear_cross_entropy(x, weight, labels, index_of(labels), head, Z_LOSS),
        (x.requires_grad_(), weight.requires_grad_()),
    )


def test_gradcheck() -> None:
    assert run_ranks(1, gradcheck) == [True]


def variants() -> list[list[torch.Tensor]]:
    x, weight, labels, _ = make_inputs(dtype=torch.float32)
    x.requires_grad_()
    weight.requires_grad_()
    head = Head(VOCABULARY, single_rank(), chunk_bytes=5 * ROWS * 4)

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(x, weight, labels, index_of(labels), head)

    def grads(losses: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
        return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves)]

    with torch.no_grad():
        evaluated = run(x, weight)
    assert evaluated.grad_fn is None
    compiled = torch.compile(run, backend="aot_eager")
    results = [
        grads(run(x, weight), x, weight),
        grads(compiled(x, weight), x, weight),
        grads(checkpoint(run, x, weight, use_reentrant=False), x, weight),
    ]
    retained = run(x, weight)
    for _ in range(2):
        results.append([retained.detach(), *torch.autograd.grad(retained.sum(), (x, weight), retain_graph=True)])
    frozen_weight, frozen_x = grads(run(x, weight.detach()), x), grads(run(x.detach(), weight), weight)
    results.append([evaluated, frozen_weight[1], frozen_x[1]])
    return results


def test_evaluation_recomputation_compilation_and_frozen_parts() -> None:
    ((plain, *others),) = run_ranks(1, variants)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(other, plain, strict=True))


# Memory and main gradients


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        before = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
        for output in tree_leaves(outputs):
            if torch.is_tensor(output) and output.untyped_storage()._cdata not in before:
                self.bytes = max(self.bytes, output.untyped_storage().nbytes())
        return outputs


def largest_tensor(chunk: int, dtype: torch.dtype) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Of a step with 512 tokens and 1024 rows; the weight has a main gradient, as under data parallelism."""
    x, weight = random(256, 2, 8, seed=1, dtype=dtype), random(1024, 8, seed=2, dtype=dtype).requires_grad_()
    labels = torch.randint(0, 1024, (2, 256), generator=torch.Generator().manual_seed(3))
    weight.main_grad = torch.ones(weight.shape)
    weight.grad_added_to_main_grad = False
    head = Head(1024, single_rank(), chunk_bytes=chunk * 1024 * weight.element_size())
    with Largest() as largest:
        linear_cross_entropy(x.requires_grad_(), weight, labels, index_of(labels), head).sum().backward()
    assert weight.grad_added_to_main_grad and weight.grad.data_ptr() == weight.main_grad.data_ptr()
    wide = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact(*wide, labels, 1024, None, 0.0).sum().backward()
    return largest.bytes, weight.main_grad - 1, wide[1].grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_no_tensor_is_larger_than_a_chunk(dtype: torch.dtype, tolerance: float) -> None:
    """And the gradient is in `main_grad`, of which autograd's stand-in is a view."""
    for chunk in (128, 256):
        ((size, ours, theirs),) = run_ranks(1, largest_tensor, chunk, dtype)
        # The reference computes a chunk in fp32; CUDA kernels make nothing as large.
        assert size == chunk * 1024 * 4
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def tied(zero_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Main gradient of a weight that is looked up too, as megatron-core's hook leaves it, and the exact one."""
    _, weight, labels, _ = make_inputs(dtype=torch.float32)
    ids = torch.randint(0, VOCABULARY, (SEQUENCE, BATCH), generator=torch.Generator().manual_seed(5))
    weight.requires_grad_()
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight), False
    weight.zero_out_wgrad = zero_out
    head = Head(VOCABULARY, single_rank())
    linear_cross_entropy(weight[ids], weight, labels, index_of(labels), head).sum().backward()
    if weight.grad is not None and (not weight.grad_added_to_main_grad or weight.zero_out_wgrad):
        weight.main_grad.add_(weight.grad)
    wide = weight.detach().double().requires_grad_()
    exact(wide[ids], wide, labels, VOCABULARY, None, 0.0).sum().backward()
    return weight.main_grad, wide.grad


def test_a_weight_that_is_looked_up_too() -> None:
    ((ours, theirs),) = run_ranks(1, tied, True)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    ((without_mark, _),) = run_ranks(1, tied, False)
    assert (without_mark - theirs).abs().max() > 0.1


# Operators and kernels

TOKENS = 5


def make_logits(width: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits up to 60 in size, and labels of which some are another rank's."""
    logits = 20 * random(TOKENS, width, seed=6)
    labels = torch.tensor([0, columns - 1, columns, -3, columns // 2])
    return logits.to(dtype), labels


def make_factors(logits: torch.Tensor, columns: int, softcap: float) -> torch.Tensor:
    values = reference.capped(logits.double()[:, :columns], softcap)
    largest = values.amax(-1) + torch.tensor([0.0, 0.0, 1.5, 0.0, 0.0])  # another rank's is larger
    log_total = (values - largest[:, None]).exp().sum(-1).log() + 0.25
    return torch.stack((largest, log_total, random(TOKENS, seed=7), random(TOKENS, seed=8)), dim=-1)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_reference_is_the_definition(dtype: torch.dtype, softcap: float) -> None:
    columns = 40
    logits, labels = make_logits(48, columns, dtype)
    raw = logits.double()[:, :columns].requires_grad_()
    values = raw if softcap == 0 else softcap * torch.tanh(raw / softcap)
    largest, total, at_label = vocabulary_statistics(logits, labels, columns, softcap).double().unbind(-1)
    # Exponents of up to 120 are rounded to fp32.
    close = {"rtol": 2e-5, "atol": 1e-5} if dtype != torch.float64 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(largest + total.log(), values.logsumexp(-1), **close)
    is_mine = (labels >= 0) & (labels < columns)
    own = values[torch.arange(TOKENS), labels.clamp(0, columns - 1)]
    torch.testing.assert_close(at_label, torch.where(is_mine, own, 0.0), **close)
    factors = make_factors(logits, columns, softcap)
    largest, log_total, scale, weight = factors.unbind(-1)
    loss = scale * (values - largest.unsqueeze(-1) - log_total.unsqueeze(-1)).exp().sum(-1) - weight * own * is_mine
    loss.sum().backward()
    logits_gradient_(logits, labels, factors.to(torch.promote_types(dtype, torch.float32)), columns, softcap)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(logits[:, :columns].double(), raw.grad, rtol=max(eps, 2e-5), atol=1e-5)
    assert not logits[:, columns:].any()


def test_operators_are_registered_correctly() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits, labels = make_logits(48, 40, dtype)
        torch.library.opcheck(vocabulary_statistics, (logits, labels, 40, 2.0))
        factors = make_factors(logits, 40, 2.0).float()
        torch.library.opcheck(logits_gradient_, (logits, labels, factors, 40, 2.0))


NAMES = {torch.float32: "float", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def launchers(*names: str) -> str:
    return """
#include <type_traits>
#include "linear_cross_entropy/linear_cross_entropy.cuh"
using namespace kernels;
""" + "".join(LAUNCHERS.replace("{name}", name) for name in names)


LAUNCHERS = """
extern "C" void statistics_{name}(const {name}* logits, const int64_t* labels, float* statistics, int64_t tokens,
                                  int64_t width, int64_t columns, float softcap, int64_t threads, int64_t vector) {
  emulator::launch(dim3(tokens), dim3(threads), 0, [=] {
    auto run = [&](auto n) {
      if (softcap == 0) vocabulary_statistics<{name}, n(), false>(logits, labels, statistics, width, columns, softcap);
      else vocabulary_statistics<{name}, n(), true>(logits, labels, statistics, width, columns, softcap);
    };
    if (vector == 1) run(std::integral_constant<int, 1>{});
    else run(std::integral_constant<int, VECTOR<{name}>>{});
  });
}
extern "C" void gradient_{name}({name}* logits, const int64_t* labels, const float* factors, int64_t tokens,
                                int64_t width, int64_t columns, float softcap, int64_t threads, int64_t vector) {
  const int64_t per_tile = threads * vector * VOCABULARY_UNROLL;
  emulator::launch(dim3(tokens, (width + per_tile - 1) / per_tile), dim3(threads), 0, [=] {
    auto run = [&](auto n) {
      if (softcap == 0) logits_gradient<{name}, n(), false>(logits, labels, factors, width, columns, softcap);
      else logits_gradient<{name}, n(), true>(logits, labels, factors, width, columns, softcap);
    };
    if (vector == 1) run(std::integral_constant<int, 1>{});
    else run(std::integral_constant<int, VECTOR<{name}>>{});
  });
}
"""
THREADS = 64
# Widths: less than a vector per thread; several vectors per thread and a tile that ends early; a tail of the columns.
WIDTHS = [(64, 64), (4096, 4001), (2304, 2304), (64, 0), (37, 33), (24, 3)]


@pytest.fixture(scope="module")
def run() -> Any:
    return compile_kernels(launchers(*NAMES.values()))


def emulated(run: Any, logits: torch.Tensor, labels: torch.Tensor, columns: int, softcap: float, **order: Order) -> Any:
    """Statistics, factors from them as if this rank were alone, and the gradient, by the kernels."""
    name, width = NAMES[logits.dtype], logits.shape[1]
    vector = 16 // logits.element_size()
    if width % vector:
        vector = 1
    shape = (TOKENS, width, columns, softcap, THREADS, vector)
    statistics, gradient = torch.full((TOKENS, 3), math.nan), logits.clone()
    factors = make_factors(logits, columns, softcap).float() if columns else torch.ones(TOKENS, 4)
    run(f"statistics_{name}", logits, labels, statistics, *shape, **order)
    run(f"gradient_{name}", gradient, labels, factors, *shape, **order)
    return statistics, factors, gradient


def check_kernels(run: Any, width: int, columns: int, dtype: torch.dtype, softcap: float, **order: Order) -> None:
    logits, labels = make_logits(width, columns, dtype)
    statistics, factors, gradient = emulated(run, logits, labels, columns, softcap, **order)
    torch.testing.assert_close(
        statistics, vocabulary_statistics(logits, labels, columns, softcap), rtol=1e-5, atol=1e-6
    )
    other = logits.clone()
    logits_gradient_(other, labels, factors, columns, softcap)
    # Functions differ in their last bits, which may turn the rounding of a result: one unit of its last place.
    torch.testing.assert_close(gradient, other, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-6)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize(("width", "columns"), WIDTHS)
def test_kernels_are_the_reference(run: Any, width: int, columns: int, dtype: torch.dtype, softcap: float) -> None:
    check_kernels(run, width, columns, dtype, softcap)


@pytest.mark.parametrize("order", Order)
def test_in_any_order_of_threads(run: Any, order: Order) -> None:
    check_kernels(run, 2304, 2301, torch.bfloat16, 0.0, order=order)


def test_not_a_number_shows(run: Any) -> None:
    """Wherever it stands: also where it is all that a thread sees."""
    for dtype, places in ((torch.bfloat16, slice(8, 16)), (torch.float32, slice(50, 51))):
        logits, labels = make_logits(64, 64, dtype)
        logits[1, places] = math.nan
        statistics, _, _ = emulated(run, logits, labels, 64, 0.0)
        losses = statistics[:, 1].log() + statistics[:, 0] - statistics[:, 2]
        assert losses.isnan().tolist() == [False, True, False, False, False]


FILE = "linear_cross_entropy/linear_cross_entropy.cuh"
MUTATIONS = {
    "no rescaling": ("total *= expf(largest - shift(new_largest));", ""),
    "no rescaling between threads": ("softmax.rescale(largest[0]);", ""),
    "shared scratch": ("scratch + REDUCTION_SCRATCH<1>);", "scratch);"),
    "tail left out": ("column < columns; column += threads", "column < 0; column += threads"),
    "padding in the softmax": ("num_vectors = columns / N", "num_vectors = (columns + N - 1) / N"),
    "rest left out": ("for (; index < num_vectors; index += threads)", "for (; index < 0; index += threads)"),
    "another's label": ("label >= 0 && label < columns", "label < columns"),
    "label of the vector": ("start + i == label", "start == label"),
    "gradient of padding": ("start + i < columns ? gradient : 0.0f", "gradient"),
    "past the row": ("if (start >= width) break;", ""),
    "without the cap's slope": ("if (CAPPED) gradient *=", "if (false) gradient *="),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_shows(mutation: str) -> None:
    changed = compile_kernels(launchers("bfloat16"), {FILE: [MUTATIONS[mutation]]})
    with pytest.raises((AssertionError, EmulatorError)):
        for order in (Order.ASCENDING, Order.SHUFFLED):
            for width, columns in ((4096, 4001), (1056, 1053)):
                check_kernels(changed, width, columns, torch.bfloat16, 30.0, order=order)


# The compiled extension


@needs_extension
def test_calls_are_checked() -> None:
    """Through the dispatcher and torch's stable ABI up to the launch, which no token needs."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    logits, labels = torch.empty(0, 64), torch.empty(0, dtype=torch.int64)
    assert vocabulary_statistics.redispatch(cuda, logits, labels, 60, 0.0).shape == (0, 3)
    assert logits_gradient_.redispatch(cuda, logits, labels, torch.empty(0, 4), 60, 2.0) is None
    logits, labels, factors = torch.empty(3, 64), torch.zeros(3, dtype=torch.int64), torch.empty(3, 5)
    for wrong, message in (
        ((logits[:, :32], labels, 30), "contiguous matrix"),
        ((logits, labels.int(), 30), "one int64 per row"),
        ((logits, labels, 65), "at most as many"),
    ):
        with pytest.raises(RuntimeError, match=message):
            vocabulary_statistics.redispatch(cuda, *wrong, 0.0)
    for wrong_factors in (factors, factors[:, :4], factors[:, :4].double().contiguous()):
        with pytest.raises(RuntimeError, match="fp32 expected"):
            logits_gradient_.redispatch(cuda, logits, labels, wrong_factors, 64, 0.0)
