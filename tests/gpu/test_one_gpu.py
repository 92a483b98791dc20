"""What only a GPU can tell: compiled FlexAttention, and a training step over NCCL, against the CPU's results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.span_attention import Spans, reference, span_attention
from megatron_vlm import platform
from megatron_vlm.data.collate import spans
from megatron_vlm.training.setup import initialize_distributed
from tests import test_experts
from tests.families import FAMILIES
from tests.families.entry import TinyFamily
from tests.parity.battery import check_case
from tests.parity.layouts import TestLayout, run_case


def _spans(length: int) -> Spans:
    is_real = torch.arange(length) < torch.tensor([length, length - 17])[:, None]
    is_image = torch.zeros_like(is_real)
    is_image[0, 60:230] = is_image[1, 10:40] = True
    low, high = spans(is_real, is_image & is_real)
    return Spans(low.cuda(), high.cuda())


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("window", [None, 130])
def test_compiled_attention_equals_the_reference(head_dim: int, window: int | None) -> None:
    visible = _spans(300)
    shapes = [(2, 4, 300, head_dim), (2, 2, 300, head_dim), (2, 2, 300, head_dim)]
    inputs = [torch.randn(shape, device="cuda", requires_grad=True) for shape in shapes]
    scale = head_dim**-0.5
    ours, theirs = (f(*inputs, visible, window, scale) for f in (span_attention, reference))
    weights = torch.randn_like(theirs)
    # Triton's fp32 products may use TF32 (10 bits of mantissa): 1e-3 relative to values of order 1.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, weights), torch.autograd.grad(theirs, inputs, weights), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-2)


@pytest.mark.parametrize("counts", test_experts.COUNTS.values(), ids=test_experts.COUNTS)
def test_grouped_experts(counts: list[int]) -> None:
    """torch's grouped product has left gradients of experts without tokens unwritten on some GPUs."""
    test_experts.check_experts(counts, "cuda", torch.bfloat16, test_experts.TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_step_equals_transformers(family: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # fp32 throughout: the reference attention here, the compiled one above.
    monkeypatch.setattr("kernels.span_attention._on_gpu", reference)
    cases = {case: family.expected(case) for case in family.cases}
    hf_directory = family.write(tmp_path)
    initialize_distributed(timeout_minutes=2)
    try:
        batches = {case: expected.micro_batches for case, expected in cases.items()}
        results = run_case(hf_directory, TestLayout(), batches)
    finally:
        platform.current().leave_process_group(failed=False)
    for case, expected in cases.items():
        check_case([results[case]], expected, family.vocabulary)
