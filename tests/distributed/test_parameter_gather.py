"""No weight is read before its module is called: overlapped parameter gathering waits in hooks of the calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vlm.training.step import run_global_batch
from tests.distributed.reference import micro_batches
from tests.families import FAMILIES
from tests.families.tiny_family import TinyFamily
from tests.parity.layouts import LAYOUTS, set_up
from tests.ranks import run_ranks


def losses(hf_dir: str, family: TinyFamily) -> tuple[float, float, list[str]]:
    """Loss, the same where weights are NaN until their module is called, and names that no call restored."""
    model, groups = set_up(hf_dir, LAYOUTS["TP1"])
    batches = micro_batches(family, ["mixed" if family.has_tower else "text"])
    batches.sort(key=lambda batch: not (batch.feature_index >= 0).any())
    found = [run_global_batch(model, batches, groups)[0][0].item()]
    waiting: dict[torch.nn.Parameter, torch.Tensor] = {}

    def restore(module: torch.nn.Module, arguments: object) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in waiting:
                parameter.data.copy_(waiting.pop(parameter))

    for module in model[0].modules():
        module.register_forward_pre_hook(restore)
    for parameter in model[0].parameters():
        waiting[parameter] = parameter.data.clone()
        parameter.data.fill_(torch.nan)
    found.append(run_global_batch(model, batches, groups)[0][0].item())
    read = {name: parameter for name, parameter in model[0].named_parameters() if parameter.requires_grad}
    return *found, [name for name, parameter in read.items() if parameter in waiting]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_weights_are_read_after_a_call_of_their_module(tmp_path: Path, family: TinyFamily) -> None:
    ((expected, found, never_called),) = run_ranks(1, losses, family.write(tmp_path), family)
    assert found == expected and not never_called
