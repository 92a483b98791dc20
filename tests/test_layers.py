"""Shared layers against torch's and transformers' own, on one rank and divided over several."""

from __future__ import annotations

import pytest
import torch
import torch.distributed
from torch.nn.functional import cross_entropy, linear
from transformers import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3RMSNorm,
    Gemma3RotaryEmbedding,
    apply_rotary_pos_emb,
)

from megatron_vlm.layers.embedding import TokenEmbedding, padded_vocab_size
from megatron_vlm.layers.linear import multiply
from megatron_vlm.layers.norm import RMSNorm
from megatron_vlm.layers.operands import Operand
from megatron_vlm.layers.rope import rope_table
from megatron_vlm.layers.vocab_parallel_loss import Head, linear_cross_entropy
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.mcore_config import build_mcore_config
from tests.ranks import run_ranks
from vlm_kernels.rope import qk_norm_rope

# fp32 on both sides; sums of at most 100 terms of order one in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def share(whole: torch.Tensor, dim: int, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """This rank's part, as a leaf."""
    return whole.detach().chunk(group.size(), dim)[group.rank()].clone().requires_grad_(whole.requires_grad)


def joined(part: torch.Tensor, dim: int, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    parts = [torch.empty_like(part) for _ in range(group.size())]
    torch.distributed.all_gather(parts, part.detach().contiguous(), group=group)
    return torch.cat(parts, dim)


# Vocabulary


@pytest.mark.parametrize(("size", "padded"), [(1, 64), (64, 64), (65, 128), (262144, 262144), (262208, 262208)])
def test_padded_vocab_size(size: int, padded: int) -> None:
    assert padded_vocab_size(size) == padded


# With 30 tokens, 64 rows: over two ranks the second holds padding only; over four, half of the first two.
VOCABULARY, SEQUENCE, BATCH, HIDDEN = 30, 8, 3, 12


def head_and_loss(sequence_parallel: bool) -> tuple[torch.Tensor, ...]:
    """Losses, whole input gradient and whole weight gradient of the divided head; padding rows are not zero here."""
    groups = build_groups(Layout(tensor_size=torch.distributed.get_world_size()))
    initialize_megatron(1, groups)
    x, weight, labels = head_inputs()
    mine = share(weight, 0, groups.tp)
    x = share(x, 0, groups.tp) if sequence_parallel else x.detach().clone().requires_grad_()
    index = (labels.t().flatten() != -100).nonzero().squeeze(1)
    losses = linear_cross_entropy(x, mine, labels, index, Head(VOCABULARY, groups.tp, sequence_parallel))
    (losses * random(*losses.shape, seed=5)).sum().backward()
    whole_x_grad = joined(x.grad, 0, groups.tp) if sequence_parallel else x.grad
    return losses.detach(), whole_x_grad, joined(mine.grad, 0, groups.tp)


def head_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, weight = random(SEQUENCE, BATCH, HIDDEN), 3 * random(padded_vocab_size(VOCABULARY), HIDDEN, seed=1)
    labels = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(2))
    labels[torch.rand(labels.shape, generator=torch.Generator().manual_seed(3)) < 0.4] = -100
    labels[1] = -100  # a row without any label
    return x.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.parametrize(("world_size", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, True)])
def test_padding_is_outside_the_softmax_and_unlabelled_tokens_cost_nothing(
    world_size: int, sequence_parallel: bool
) -> None:
    x, weight, labels = head_inputs()
    logits = linear(x, weight[:VOCABULARY]).permute(1, 2, 0)
    expected = cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    (expected * random(*expected.shape, seed=5)).sum().backward()
    for losses, x_grad, weight_grad in run_ranks(world_size, head_and_loss, sequence_parallel):
        assert losses.dtype == torch.float32
        assert not losses[labels == -100].any()
        torch.testing.assert_close(losses, expected.detach(), **CLOSE)
        torch.testing.assert_close(x_grad, x.grad, **CLOSE)
        torch.testing.assert_close(weight_grad, weight.grad, **CLOSE)
        assert not weight_grad[VOCABULARY:].any()


def embedding_gradient(padding_id: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    groups = build_groups(Layout(tensor_size=torch.distributed.get_world_size()))
    mcore_config = build_mcore_config(
        HIDDEN, 2, torch.float32, Layout.over(groups.tp.size(), num_layers=1, tensor_size=groups.tp.size())
    )
    embedding = TokenEmbedding(VOCABULARY, HIDDEN, padding_id, False, mcore_config, groups.tp)
    with torch.no_grad():
        embedding.weight.copy_(share(random(padded_vocab_size(VOCABULARY), HIDDEN), 0, groups.tp))
    embedded = embedding(embedding_ids())
    (embedded * random(*embedded.shape, seed=4)).sum().backward()
    return embedded.detach(), joined(embedding.weight.grad, 0, groups.tp)


def embedding_ids() -> torch.Tensor:
    ids = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(6))
    ids[:, 1:3] = 7
    return ids


@pytest.mark.parametrize("padding_id", [None, 7])
@pytest.mark.parametrize("world_size", [1, 2])
def test_embedding_of_padding_gets_no_gradient(world_size: int, padding_id: int | None) -> None:
    reference = torch.nn.Embedding(padded_vocab_size(VOCABULARY), HIDDEN, padding_idx=padding_id)
    with torch.no_grad():
        reference.weight.copy_(random(padded_vocab_size(VOCABULARY), HIDDEN))
    expected = reference(embedding_ids())
    (expected * random(*expected.shape, seed=4)).sum().backward()
    assert padding_id is None or not reference.weight.grad[padding_id].any()
    for embedded, gradient in run_ranks(world_size, embedding_gradient, padding_id):
        assert torch.equal(embedded, expected.detach())
        torch.testing.assert_close(gradient, reference.weight.grad, **CLOSE)


# Column-parallel weights on one input


def column_parallel_results(sequence_parallel: bool, frozen: tuple[bool, ...], x_needs_grad: bool) -> tuple:
    groups = build_groups(Layout(tensor_size=torch.distributed.get_world_size()))
    x, *weights = column_inputs(frozen, x_needs_grad)
    x = share(x, 0, groups.tp) if sequence_parallel else x.detach().clone().requires_grad_(x_needs_grad)
    mine = [share(weight, 0, groups.tp) for weight in weights]
    outputs = multiply(x, [Operand(weight) for weight in mine], groups.tp, sequence_parallel)
    whole = [joined(output, -1, groups.tp) for output in outputs]
    if any(output.requires_grad for output in outputs):
        sum(
            (output * share(random(*complete.shape, seed=index), -1, groups.tp)).sum()
            for index, (output, complete) in enumerate(zip(outputs, whole, strict=True))
        ).backward()
    x_grad = None if x.grad is None else joined(x.grad, 0, groups.tp) if sequence_parallel else x.grad
    weight_grads = [None if weight.grad is None else joined(weight.grad, 0, groups.tp) for weight in mine]
    return whole, x_grad, weight_grads


def column_inputs(frozen: tuple[bool, ...], x_needs_grad: bool) -> list[torch.Tensor]:
    sizes = (8, 16, 4)
    weights = [random(size, HIDDEN, seed=size).requires_grad_(not f) for size, f in zip(sizes, frozen, strict=True)]
    return [random(SEQUENCE, BATCH, HIDDEN).requires_grad_(x_needs_grad), *weights]


@pytest.mark.parametrize("frozen", [(False,) * 3, (True, False, True), (True,) * 3], ids=["none", "some", "all"])
@pytest.mark.parametrize("x_needs_grad", [True, False])
@pytest.mark.parametrize(("world_size", "sequence_parallel"), [(1, True), (2, False), (2, True)])
def test_linears_on_one_input(
    world_size: int, sequence_parallel: bool, x_needs_grad: bool, frozen: tuple[bool, ...]
) -> None:
    x, *weights = column_inputs(frozen, x_needs_grad)
    expected = [linear(x, weight) for weight in weights]
    if x_needs_grad or not all(frozen):
        sum((output * random(*output.shape, seed=index)).sum() for index, output in enumerate(expected)).backward()
    for outputs, x_grad, weight_grads in run_ranks(
        world_size, column_parallel_results, sequence_parallel, frozen, x_needs_grad
    ):
        for mine, other in zip(
            [*outputs, x_grad, *weight_grads],
            [*(output.detach() for output in expected), x.grad, *(weight.grad for weight in weights)],
            strict=True,
        ):
            assert (mine is None) == (other is None)
            if other is not None:
                torch.testing.assert_close(mine, other, **CLOSE)


# Norm and positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_transformers_bit_for_bit(dtype: torch.dtype) -> None:
    ours, theirs = RMSNorm(64, 1e-6, zero_centered=True, dtype=dtype), Gemma3RMSNorm(64).to(dtype)
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(random(64, seed=1))
    results = []
    for norm in (ours, theirs):
        x = (5 * random(7, 3, 64)).to(dtype).requires_grad_()
        y = norm(x)
        y.backward(random(7, 3, 64, seed=2).to(dtype))
        results.append((y.detach(), x.grad, norm.weight.grad))
    assert results[0][0].dtype == dtype
    assert torch.equal(results[0][0], results[1][0])
    for mine, other in zip(results[0][1:], results[1][1:], strict=True):
        # Squares are written x.square() there and x.pow(2) here: the same value, summed in fp32 either way.
        torch.testing.assert_close(mine, other)


def test_rms_norm_around_one() -> None:
    ours, theirs = RMSNorm(64, 1e-5, zero_centered=False, dtype=torch.float32), torch.nn.RMSNorm(64, 1e-5)
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(random(64, seed=1))
    torch.testing.assert_close(ours(random(5, 64)), theirs(random(5, 64)), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["default", "linear"])
def test_rope_is_transformers(kind: str, dtype: torch.dtype) -> None:
    """Bit for bit without scaling; with it, transformers divides frequencies and we do too. Positions are large."""
    rope = {"rope_type": kind, "rope_theta": 10_000.0} | ({"factor": 8.0} if kind == "linear" else {})
    config = Gemma3TextConfig(
        head_dim=32,
        rope_parameters={"full_attention": rope, "sliding_attention": rope},
        layer_types=["full_attention", "sliding_attention"],
        num_hidden_layers=2,
    )
    positions = torch.stack((torch.arange(6), torch.arange(100_000, 100_006)))
    x_SBND = random(6, 2, 3, 32).to(dtype)
    cosine, sine = Gemma3RotaryEmbedding(config)(x_SBND, positions, "full_attention")
    expected_BNSD, _ = apply_rotary_pos_emb(x_SBND.permute(1, 2, 0, 3), x_SBND.permute(1, 2, 0, 3), cosine, sine)
    table = rope_table(positions, 32, 10_000.0, rope.get("factor", 1.0), dtype)
    for ours, theirs in zip(table, (cosine, sine), strict=True):
        assert torch.equal(torch.cat((ours, ours), dim=-1), theirs.transpose(0, 1))
    for rotated in qk_norm_rope(x_SBND, x_SBND, table):
        assert torch.equal(rotated, expected_BNSD.permute(2, 0, 1, 3))
