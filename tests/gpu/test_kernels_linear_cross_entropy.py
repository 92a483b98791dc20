"""The chunked loss on CUDA: kernels against fp64, its memory, its gradient, and that the host never waits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_vlm.layers.vocab_parallel_loss import Head, linear_cross_entropy
from megatron_vlm.parallel.groups import build_groups
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.training.setup import initialize_distributed
from tests.kernels.test_linear_cross_entropy import exact, index_of
from vlm_kernels.linear_cross_entropy import logits_gradient_, vocabulary_statistics

MIB = 2**20


pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(scope="module")
def group() -> Iterator[torch.distributed.ProcessGroup]:
    initialize_distributed(timeout_minutes=2)
    yield build_groups(Layout()).tp
    torch.distributed.destroy_process_group()


# Whole vectors, a tail of the columns, rows that are not aligned, more than one tile, no column at all.
SHAPES = [(64, 262144, 262144), (33, 32768, 32001), (257, 1003, 1000), (8, 64, 64), (8, 4096, 0), (0, 64, 64)]


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels(shape: tuple[int, int, int], dtype: torch.dtype, softcap: float) -> None:
    tokens, width, columns = shape
    logits = (10 * torch.randn(tokens, width, device="cuda")).to(dtype)
    labels = torch.randint(-width // 4, width, (tokens,), device="cuda")
    is_mine = (labels >= 0) & (labels < columns)
    raw = logits.double()[:, :columns].requires_grad_()
    values = raw if softcap == 0 else softcap * torch.tanh(raw / softcap)
    largest, total, at_label = vocabulary_statistics(logits, labels, columns, softcap).double().unbind(-1)
    if columns == 0:
        assert (largest == -torch.inf).all() and not total.any() and not at_label.any()
        log_sum = torch.zeros_like(largest)
        own = log_sum
    else:
        log_sum = values.logsumexp(-1)
        own = torch.where(is_mine, values.gather(1, labels.clamp(0, columns - 1)[:, None]).squeeze(1), 0.0)
        # fp32 exponentials of arguments up to 100, and their sum.
        torch.testing.assert_close(largest + total.log(), log_sum, rtol=0, atol=2e-5)
        torch.testing.assert_close(at_label, own, rtol=2e-6, atol=0)
    factors = torch.randn(tokens, 4, device="cuda")
    # As in the loss: the first two are the logarithm of the sum in parts, of which the gradient knows nothing.
    factors[:, 0] = values.detach().amax(-1) if columns else 0.0
    factors[:, 1] = (log_sum.detach() - factors[:, 0].double()).float()
    scale, weight = factors[:, 2:].double().unbind(-1)
    loss = scale * (values - factors[:, :2].double().sum(-1, keepdim=True)).exp().sum(-1) - weight * own
    (expected,) = torch.autograd.grad(loss.sum(), raw, allow_unused=True)
    logits_gradient_(logits, labels, factors, columns, softcap)
    assert not logits[:, columns:].any()
    if columns and tokens:
        # Rounded once; exponents are off by some bits of fp32.
        error = (logits[:, :columns].double() - expected).abs()
        assert (error <= torch.finfo(dtype).eps * expected.abs() + 2e-5 * factors[:, 2:].abs().max()).all()


def test_not_a_number_shows() -> None:
    logits = torch.randn(4, 4096, device="cuda").bfloat16()
    logits[2, 8:16] = torch.nan
    statistics = vocabulary_statistics(logits, torch.zeros(4, dtype=torch.int64, device="cuda"), 4096, 0.0)
    assert statistics[:, 1].isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("into_main_grad", [True, False])
def test_loss_and_gradients(group: torch.distributed.ProcessGroup, softcap: float | None, into_main_grad: bool) -> None:
    vocabulary, rows, hidden = 8000, 8064, 256
    x = torch.randn(300, 2, hidden, device="cuda").bfloat16().requires_grad_()
    weight = (0.1 * torch.randn(rows, hidden, device="cuda")).bfloat16().requires_grad_()
    labels = torch.randint(0, vocabulary, (2, 300))
    labels[torch.rand(labels.shape) < 0.5] = -100
    index, labels = index_of(labels).cuda(), labels.cuda()
    if into_main_grad:
        weight.main_grad, weight.grad_added_to_main_grad = torch.ones(rows, hidden, device="cuda"), False
    head = Head(vocabulary, group, softcap=softcap, chunk_bytes=100 * rows * 2)
    losses = linear_cross_entropy(x, weight, labels, index, head, z_loss_coeff=1e-3)
    losses.sum().backward()
    wide = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    truth = exact(*wide, labels, vocabulary, softcap, 1e-3)
    truth.sum().backward()
    weight_gradient = weight.main_grad - 1 if into_main_grad else weight.grad
    for ours, theirs in ((losses, truth), (x.grad, wide[0].grad), (weight_gradient, wide[1].grad)):
        # Logits and their gradients are rounded to 8 bits.
        assert (ours - theirs).abs().max() <= 2e-2 * theirs.abs().max()
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()


@pytest.mark.kernels_only
def test_memory_is_the_chunk_and_the_host_does_not_wait(group: torch.distributed.ProcessGroup) -> None:
    """8192 tokens and 131072 rows, whose logits are 2 GiB, with 256 MiB at a time."""
    x = torch.randn(8192, 1, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (0.02 * torch.randn(131072, 1024, device="cuda")).bfloat16().requires_grad_()
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape, device="cuda"), False
    labels = torch.randint(0, 131072, (1, 8192))
    index, labels = index_of(labels).cuda(), labels.cuda()
    head = Head(131072, group, chunk_bytes=256 * MIB)
    linear_cross_entropy(x, weight, labels, index, head).sum().backward()  # workspaces of cuBLAS
    x.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(x, weight, labels, index, head).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # The chunk, the gradient of x, rows of a chunk and of its gradient, a few numbers per token.
    assert torch.cuda.max_memory_allocated() - before <= 256 * MIB + 3 * x.nbytes + 4 * MIB
