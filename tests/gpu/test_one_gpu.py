"""What only a GPU can tell: products of experts, a training step over NCCL, page-locked memory; against the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vlm import platform
from megatron_vlm.platform.host_memory import HostMemory
from megatron_vlm.training.setup import initialize_distributed
from tests import test_experts
from tests.families import FAMILIES
from tests.families.tiny_family import TinyFamily
from tests.gpu.poison import poison
from tests.parity.comparison import check_case
from tests.parity.layouts import TestLayout, run_case
from tests.training import test_muon_families
from vlm_kernels.span_attention import reference

FAMILIES_WITH_MUON = [family for family in FAMILIES if str(family) in ("gemma3", "qwen3_vl_moe")]


@pytest.mark.parametrize("counts", test_experts.COUNTS.values(), ids=test_experts.COUNTS)
def test_grouped_experts(counts: list[int]) -> None:
    """torch's grouped product has left gradients of experts without tokens unwritten on some GPUs."""
    poison()
    test_experts.check_experts(counts, "cuda", torch.bfloat16, test_experts.TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_step_equals_transformers(family: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # fp32 throughout: the reference attention here, the compiled one above.
    monkeypatch.setattr("vlm_kernels.span_attention._on_gpu", reference)
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


@pytest.mark.parametrize("family", FAMILIES_WITH_MUON, ids=str)
def test_a_muon_step_equals_the_cpus(family: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_kernels.span_attention._on_gpu", reference)
    theirs = family.expected("mixed")
    hf_directory = family.write(tmp_path)
    initialize_distributed(timeout_minutes=2)
    try:
        updates = test_muon_families.step(hf_directory, TestLayout(), theirs.micro_batches)
    finally:
        platform.current().leave_process_group(failed=False)
    test_muon_families.check(updates, theirs)


def test_what_is_saved_is_copied_into_page_locked_memory() -> None:
    memory = HostMemory()
    for factor in (1, 2):
        tensors = [factor * torch.arange(1 << 20, device="cuda"), torch.full((3,), factor, device="cuda").bfloat16()]
        for copy, tensor in zip(memory.copy(tensors), tensors, strict=True):
            assert torch.equal(copy, tensor.cpu())
            assert copy.is_pinned() == platform.current().accelerated
