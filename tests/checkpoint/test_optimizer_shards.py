"""The distributed optimizer's state, saved by the rank that has it: what moves, what lies where, who can read it.

Reference for the values: what megatron-core itself gathers from the same optimizer.
"""

from __future__ import annotations

import math
import pickle
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_vlm.checkpoint import optimizer_state, torch_dist
from megatron_vlm.checkpoint.optimizer_shards import boxes_of_range
from megatron_vlm.checkpoint.torch_dist import TorchDistReader
from megatron_vlm.errors import CheckpointError
from megatron_vlm.platform.host_memory import HostMemory
from tests.checkpoint.moved_bytes import Copies, bytes_on_disk, counted_collectives
from tests.checkpoint.test_distributed_layouts import assert_follows_reference, load_fails
from tests.checkpoint.tiny_run import FROZEN, ODD_ROWS, PROJECTOR, Run, Settings
from tests.checkpoint.whole_state import Pieces, assemble, assert_same
from tests.parity.layouts import TestLayout
from tests.ranks import run_ranks
from tests.sizes import full

STEPS = 3
RECORD_HEADER_BYTES = 2048  # what torch.save puts around a tensor
LARGEST_NUMBER_BYTES = 16  # what ranks tell each other in a save: flags, counts
KINDS = ("param", "exp_avg", "exp_avg_sq")
DATA_4 = TestLayout(4)
DATA_3 = TestLayout(3)
EXPERTS = TestLayout(4, expert=2)
VIRTUAL = TestLayout(4, pipeline=2, virtual=2)
CONTEXT = TestLayout(4, context=2)


# Rectangles


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (1, 4), (4, 1), (3, 0), (2, 3, 2), (2, 1, 3, 2)], ids=str)
def test_boxes_cover_every_run_in_order(shape: tuple[int, ...]) -> None:
    elements = torch.arange(math.prod(shape)).view(shape)
    for begin in range(elements.numel() + 1):
        for end in range(begin, elements.numel() + 1):
            boxes = list(boxes_of_range(shape, begin, end))
            places = [tuple(slice(o, o + n) for o, n in zip(*box, strict=True)) for box in boxes]
            covered = [int(element) for place in places for element in elements[place].flatten()]
            assert covered == list(range(begin, end))
            assert all(math.prod(sizes) for _, sizes in boxes) and len(boxes) <= max(1, 2 * len(shape) - 1)


# What a save moves


@dataclass(frozen=True)
class Moved:
    """By three saves on one rank: a first, a second, and a third through host memory as on a GPU.

    Attributes:
        exchanged: (name, type, bytes) of what the first two gave to collectives.
        copied: bytes that operators wrote in the second and third.
        staged_bytes: size of the third's host memory.
        shard_bytes: what the rank has of the optimizer's state.
    """

    exchanged: tuple[list[tuple[str, torch.dtype, int]], ...]
    copied: tuple[Counter[str], ...]
    staged_bytes: int
    shard_bytes: int


def save_three_times(settings: Settings, folder: str) -> Moved:
    run = Run(settings, folder)
    run.train(1)
    with counted_collectives() as first:
        run.save()
    run.train(1)
    with counted_collectives() as second, Copies() as copies:
        run.save()
    run.train(1)
    memory = HostMemory()
    run.manager._strategy.base_strategy._host_memory = memory
    with Copies() as staged:
        run.save()
    return Moved((first, second), (copies.num_bytes, staged.num_bytes), memory.num_bytes, shard_bytes(run))


def shard_bytes(run: Run) -> int:
    """What this rank has of the optimizer's state."""
    shards = [parameter for member in run.optimizer.chained_optimizers for parameter in member.get_parameters()]
    return sum(len(KINDS) * shard.nbytes for shard in shards)


@pytest.mark.parametrize("layout", [DATA_4, EXPERTS], ids=str)
def test_a_rank_copies_what_it_has_once_and_sends_none_of_it(tmp_path: Path, layout: TestLayout) -> None:
    ranks = run_ranks(4, save_three_times, Settings(layout, bf16=True), str(tmp_path))
    checkpoint = tmp_path / "step_00000003"
    assert bytes_on_disk(checkpoint, 4, "optimizer.") == [moved.shard_bytes for moved in ranks]
    for moved, num_bytes in zip(ranks, bytes_on_disk(checkpoint, 4), strict=True):
        first, second = moved.exchanged
        assert not [call for call in first if call[1].is_floating_point]  # objects travel as bytes
        assert max(num_bytes for _, _, num_bytes in second) <= LARGEST_NUMBER_BYTES
        at_fork, staged = moved.copied
        # On the host, views alone are copied: torch.save would write all that they are views of.
        assert set(at_fork) == {"aten.clone.default"} and at_fork.total() < num_bytes
        assert staged - at_fork == {"aten.copy_.default": num_bytes}
        assert num_bytes <= moved.staged_bytes < num_bytes + 256 * num_pieces(checkpoint)


def num_pieces(checkpoint: Path) -> int:
    with TorchDistReader(checkpoint) as reader:
        return len(reader._storage)


# Who reads what another layout wrote


def train_and_save(settings: Settings, folder: str) -> tuple[Pieces, Pieces]:
    """What is saved, and the optimizer's tensors as megatron-core gathers them."""
    run = Run(settings, folder)
    run.train(STEPS)
    run.save()
    with as_before():
        return run.pieces(), run.pieces()


def save(settings: Settings, folder: str) -> None:
    run = Run(settings, folder)
    run.train(STEPS)
    run.save()


@contextmanager
def as_before() -> Iterator[None]:
    """The state is gathered on every data rank, in megatron-core's form for any layout: what this program did once."""
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cuda", lambda self: self)
        patch.setattr(
            optimizer_state,
            "sharded_shards",
            lambda member, model: member.sharded_state_dict(model, metadata=metadata)["param_state"],
        )
        yield


def load(settings: Settings, folder: str) -> Pieces:
    run = Run(settings, folder)
    assert run.load().step == STEPS
    return run.pieces()


def canonical(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a bf16 run, under the keys of the distributed optimizer."""
    return {key.replace(".fp32_param.", ".param."): value for key, value in whole.items()}


def pieces_within_rows(checkpoint: Path) -> set[str]:
    """Tensors of which some piece begins or ends within a row."""
    with TorchDistReader(checkpoint) as reader:
        return {
            key
            for key, entry in reader.tensors.items()
            if len(entry.size) > 1 and any(chunk.sizes[-1] != entry.size[-1] for chunk in entry.chunks)
        }


NOT_DISTRIBUTED = Settings(TestLayout(2), distributed_optimizer=False, bf16=True)
TARGETS = [
    Settings(TestLayout(2), bf16=True),
    full(Settings(DATA_3, bf16=True)),
    full(Settings(TestLayout(4, tensor=2, expert=2, expert_tensor=2), bf16=True)),
    full(Settings(VIRTUAL, bf16=True)),
    NOT_DISTRIBUTED,
]


@pytest.fixture(scope="module", params=[DATA_4, EXPERTS, full(DATA_3), full(CONTEXT)], ids=str)
def source(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, torch.Tensor]]:
    """A checkpoint in which a data rank's shard ends within a row, and what it holds by megatron-core's account."""
    layout, folder = request.param, tmp_path_factory.mktemp("source")
    results = run_ranks(layout.world_size, train_and_save, Settings(layout, bf16=True), str(folder))
    saved, gathered = (assemble(pieces) for pieces in zip(*results, strict=True))
    assert_same(gathered, saved)
    assert {f"optimizer.state.{kind}.{ODD_ROWS}" for kind in KINDS} <= pieces_within_rows(folder / f"step_{STEPS:08d}")
    return str(folder), gathered


@pytest.mark.parametrize("target", TARGETS, ids=lambda settings: f"{settings.layout} {settings.distributed_optimizer}")
def test_shards_are_read_in_any_layout(source: tuple[str, dict[str, torch.Tensor]], target: Settings) -> None:
    folder, gathered = source
    loaded = assemble(run_ranks(target.layout.world_size, load, target, folder))
    assert_same(gathered, canonical(loaded))


@pytest.mark.parametrize("target", [DATA_4, full(TestLayout(2, tensor=2))], ids=str)
def test_shards_read_what_is_stored_whole(tmp_path: Path, target: TestLayout) -> None:
    run_ranks(2, save, NOT_DISTRIBUTED, str(tmp_path))
    stored = assemble(run_ranks(2, load, NOT_DISTRIBUTED, str(tmp_path)))
    loaded = assemble(run_ranks(target.world_size, load, Settings(target, bf16=True), str(tmp_path)))
    assert_same(canonical(stored), loaded)


@pytest.mark.full
@pytest.mark.parametrize("target", [TestLayout(2), DATA_4], ids=str)
def test_virtual_stages_are_read_in_other_layouts(tmp_path: Path, target: TestLayout) -> None:
    """In fp32, so that torch's AdamW is the reference: in pipelines megatron-core's gathered state is shifted."""
    run_ranks(4, save, Settings(VIRTUAL), str(tmp_path))
    loaded = assemble(run_ranks(target.world_size, load, Settings(target), str(tmp_path)))
    assert_follows_reference(loaded, STEPS)


def load_counted(settings: Settings, folder: str) -> tuple[int, int, int]:
    """Bytes of the optimizer's records that a rank reads, their number, and the bytes of its shards."""
    run, record_bytes = Run(settings, folder), []
    load_record = torch_dist._load_record

    def counting(record: Any, items: Any, planner: Any) -> None:
        if items[0].storage_index.fqn.startswith("optimizer."):
            record_bytes.append(record._num_bytes)
        load_record(record, items, planner)

    with pytest.MonkeyPatch.context() as patch, counted_collectives() as calls:
        patch.setattr(torch_dist, "_load_record", counting)
        run.load()
    assert not [call for call in calls if call[1].is_floating_point]
    return sum(record_bytes), len(record_bytes), shard_bytes(run)


def test_a_rank_reads_its_shards_alone(source: tuple[str, dict[str, torch.Tensor]], request: Any) -> None:
    layout = request.node.callspec.params["source"]
    for read_bytes, num_records, own_bytes in run_ranks(
        layout.world_size, load_counted, Settings(layout, bf16=True), source[0]
    ):
        assert own_bytes < read_bytes < own_bytes + RECORD_HEADER_BYTES * num_records


# Checkpoints of earlier versions


def save_as_before_and_continue(settings: Settings, folder: str) -> dict[str, Any]:
    run = Run(settings, folder)
    run.train(STEPS)
    with as_before():
        run.save()
    run.train(2)
    return run.local_state()


def resumed(settings: Settings, folder: str) -> dict[str, Any]:
    run = Run(settings, folder)
    assert run.load().same_layout
    run.train(2)
    return run.local_state()


def test_a_checkpoint_with_whole_parameters_continues_bit_for_bit(tmp_path: Path) -> None:
    settings = Settings(DATA_4, bf16=True)
    expected = run_ranks(4, save_as_before_and_continue, settings, str(tmp_path))
    with TorchDistReader(tmp_path / f"step_{STEPS:08d}") as reader:
        assert all(len(entry.chunks) == 1 for entry in reader.tensors.values())
    for left, right in zip(expected, run_ranks(4, resumed, settings, str(tmp_path)), strict=True):
        assert_same(left, right)


def test_a_missing_piece_is_told(tmp_path: Path) -> None:
    run_ranks(4, save, Settings(DATA_4, bf16=True), str(tmp_path))
    (folder,) = tmp_path.glob("step_*")
    metadata = FileSystemReader(folder).read_metadata()
    key = f"optimizer.state.exp_avg.{ODD_ROWS}"
    missing = metadata.state_dict_metadata[key].chunks.pop()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    message = f"{missing.sizes.numel()} of the {95 * 23} elements of {key} are missing"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        TorchDistReader(folder)


# Unusual optimizers


def save_and_continue(settings: Settings, folder: str, num_steps: int) -> dict[str, Any]:
    run = Run(settings, folder)
    run.train(num_steps)
    run.save()
    run.train(2)
    return run.local_state()


@pytest.mark.parametrize("distributed", [True, False], ids=["sharded", "whole"])
@pytest.mark.parametrize(
    ("freeze", "num_steps"), [(r"(?!.*experts)", STEPS), (FROZEN, 0)], ids=["experts alone train", "before any update"]
)
def test_it_continues_bit_for_bit(freeze: str, num_steps: int, distributed: bool, tmp_path: Path) -> None:
    """Where no dense parameter trains, megatron-core has a stub for their optimizer."""
    settings = Settings(EXPERTS, bf16=True, freeze=freeze, distributed_optimizer=distributed)
    expected = run_ranks(4, save_and_continue, settings, str(tmp_path), num_steps)
    for left, right in zip(expected, run_ranks(4, resumed, settings, str(tmp_path)), strict=True):
        assert_same(left, right)


# One rank alone


def test_every_rank_learns_of_a_tensor_that_one_rank_misses(tmp_path: Path) -> None:
    run_ranks(4, save, Settings(DATA_4, freeze=f"{FROZEN}|{PROJECTOR}"), str(tmp_path))
    messages = run_ranks(4, load_fails, Settings(DATA_4), str(tmp_path))
    assert f"optimizer.state.exp_avg.{PROJECTOR} is missing" in messages[0] and messages == [messages[0]] * 4


def test_background_saves_reuse_their_host_memory(tmp_path: Path) -> None:
    assert all(run_ranks(2, save_in_background, str(tmp_path)))


def save_in_background(folder: str) -> bool:
    settings = Settings(TestLayout(2), bf16=True)
    run = Run(settings, folder, async_save=True)
    run.manager._host_memory = memory = HostMemory()
    states, blocks = {}, []
    for _ in range(2):
        run.train(1)
        states[run.step] = run.local_state()
        run.save()
        blocks.append(memory._block)
    run.train(1)
    run.manager.finalize(blocking=True)
    again = Run(settings, folder)
    again.load()
    assert_same(again.local_state(), states[again.step])
    return again.step == 2 and blocks[0] is blocks[1]
