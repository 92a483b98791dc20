"""The gradient norm, the clipped step and the loss mean equal transformers' own, whatever each rank holds of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm.config import OptimizerSettings
from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.training.optimizer import apply_gradients, build_optimizer, gradient_norm
from megatron_vlm.training.step import run_global_batch
from tests.families import FAMILIES
from tests.families.gemma3 import GEMMA3
from tests.families.parameters import each_layout
from tests.families.qwen3_vl import QWEN3_VL_MOE
from tests.families.tiny_family import TinyFamily
from tests.parity.comparison import Expected, expected
from tests.parity.layouts import TestLayout, gather_parameter, own_micro_batches, set_up, whole_gradients
from tests.ranks import run_ranks
from tests.sizes import full

# A replica counted twice, or a share left out, moves the norm by 1e-3 or more; sums in another order by 4e-7 at most.
NORM_TOLERANCE = 5e-6
# fp32 gradients in another order of sums (tests/parity), and the rounding of weight - gradient, both about 1e-6 of 1.
STEP_TOLERANCE = 1e-5
CLIP = 0.5  # far below every norm here
SETTINGS = OptimizerSettings(lr=1.0, weight_decay=0.0)

TRAINED = [family for family in FAMILIES if family.tables.norm]
DirectoryOf = Callable[[TinyFamily], str]


@pytest.fixture(scope="module")
def directory_of(tmp_path_factory: pytest.TempPathFactory) -> DirectoryOf:
    """The directory of a model, written once."""

    @cache
    def directory(family: TinyFamily) -> str:
        return family.write(tmp_path_factory.mktemp("hf"))

    return directory


def step(directory: str, layout: TestLayout, batches: list[MicroBatch]) -> tuple[float, float, dict[str, torch.Tensor]]:
    """On a rank: norm and mean loss, and without the distributed optimizer what one clipped SGD step subtracts."""
    model, groups = set_up(directory, layout)
    settings = SETTINGS if layout.distributed_optimizer else OptimizerSettings("sgd", lr=1.0, weight_decay=0.0)
    optimizer = build_optimizer(model, settings, torch.float32, layout.distributed_optimizer, groups)
    before = _values(model, groups)
    loss_sum, label_tokens = run_global_batch(model, own_micro_batches(model, batches, groups, layout), groups)[
        0
    ].tolist()
    norm = gradient_norm(optimizer)
    subtracted = {}
    if not layout.distributed_optimizer:
        apply_gradients(optimizer, norm, CLIP)
        subtracted = {name: before[name] - value for name, value in _values(model, groups).items()}
    return norm, loss_sum / max(label_tokens, 1), subtracted


def _values(model: Sequence[torch.nn.Module], groups: ProcessGroupCollection) -> dict[str, torch.Tensor]:
    return {
        name: gather_parameter(parameter, parameter.data, groups)
        for chunk in model
        for name, parameter in chunk.module.named_parameters()
    }


def check(directory: str, layout: TestLayout, theirs: Expected) -> None:
    norm = torch.stack([gradient.double().square().sum() for gradient in theirs.gradients.values()]).sum().sqrt().item()
    factor = CLIP / norm
    assert factor < 1
    loss = theirs.loss_sum / theirs.label_tokens
    for our_norm, our_loss, subtracted in run_ranks(layout.world_size, step, directory, layout, theirs.micro_batches):
        assert our_norm == pytest.approx(norm, rel=NORM_TOLERANCE)
        assert our_loss == pytest.approx(loss, rel=1e-6)
        for name, ours in subtracted.items():
            gradient = theirs.gradients.get(name, torch.zeros(ours.numel())) * factor  # buffers have none
            if not gradient.any():
                assert not ours.any(), name
            ours = ours.flatten()[: gradient.numel()]  # without the vocabulary's padding
            assert (ours - gradient.flatten()).abs().max() <= STEP_TOLERANCE, name


@pytest.mark.parametrize(("family", "name"), each_layout("norm"))
def test_norm_and_clipped_step(family: TinyFamily, name: str, directory_of: DirectoryOf) -> None:
    check(directory_of(family), family.tables.norm[name], family.expected("mixed"))


@cache
def unequal(family: TinyFamily) -> Expected:
    """For four data ranks, two micro-batches each: one rank has no label, one a few, and some have no image."""
    references = [
        family.micro_batch(case, rank, seed=7 * turn + rank)
        for turn, case in enumerate(("mixed", "text"))
        for rank in range(len(family.cases[case]))
    ]
    for place, num_kept in ((0, 0), (1, 3), (4, 0), (5, 3)):
        labels = references[place].batch.labels.clone()
        labels[:, num_kept:] = -100
        references[place] = replace(references[place], batch=replace(references[place].batch, labels=labels))
    return expected(family.model(), references)


@pytest.mark.parametrize(
    ("family", "distributed_optimizer"), [(GEMMA3, False), *((family, True) for family in TRAINED)], ids=str
)
def test_ranks_with_unequal_label_tokens(
    family: TinyFamily, distributed_optimizer: bool, directory_of: DirectoryOf
) -> None:
    layout = TestLayout(4, distributed_optimizer=distributed_optimizer)
    check(directory_of(family), layout, unequal(family))


def norms_in_bf16(directory: str, layout: TestLayout, batches: list[MicroBatch]) -> list[tuple[float, float]]:
    """On a rank: our norm, and that of the gathered gradients, with the optimizer whole on each rank, and distributed.

    Parameters are copied for the optimizer in bf16, and their copies must be known as experts and as shards.
    """
    norms = []
    for distributed in (False, True):
        own_layout = replace(layout, distributed_optimizer=distributed)
        model, groups = set_up(directory, own_layout, torch.bfloat16)
        optimizer = build_optimizer(model, SETTINGS, torch.bfloat16, distributed, groups)
        run_global_batch(model, own_micro_batches(model, batches, groups, own_layout), groups)
        ours = gradient_norm(optimizer)
        squares = [gradient.double().square().sum() for gradient in whole_gradients(model, groups).values()]
        norms.append((ours, float(torch.stack(squares).sum().sqrt())))
    return norms


@pytest.mark.parametrize(
    "layout",
    [
        TestLayout(2, tensor=2, sequence_parallel=True, expert=2),
        full(TestLayout(2, expert=2)),
        full(TestLayout(2, tensor=2, sequence_parallel=True, expert_tensor=2)),
        full(TestLayout(4, expert=2)),
        full(TestLayout(4, tensor=2, sequence_parallel=True, expert=2)),
    ],
    ids=str,
)
def test_norm_of_experts_in_bf16(layout: TestLayout, directory_of: DirectoryOf) -> None:
    batches = [reference.batch for reference in QWEN3_VL_MOE.micro_batches("mixed")]
    for norms in run_ranks(layout.world_size, norms_in_bf16, directory_of(QWEN3_VL_MOE), layout, batches):
        for ours, gathered in norms:
            assert ours == pytest.approx(gathered, rel=NORM_TOLERANCE)
