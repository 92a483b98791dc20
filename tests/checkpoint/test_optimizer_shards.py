"""The distributed optimizer's state, saved by the rank that has it: what moves, what lies where, who can read it.

Reference for the values: what megatron-core itself gathers from the same optimizer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vlm.checkpoint import optimizer_state
from megatron_vlm.checkpoint.manager import sharded_model_state
from megatron_vlm.checkpoint.optimizer_shards import boxes_of_range
from megatron_vlm.checkpoint.torch_dist import TorchDistReader
from megatron_vlm.platform.host_memory import HostMemory
from tests.checkpoint.test_distributed_layouts import load_and_continue, load_fails, straight_and_resumed
from tests.checkpoint.tiny_run import FROZEN, PROJECTOR, Run, Settings
from tests.checkpoint.whole_state import Pieces, assemble, assert_same
from tests.parity.layouts import TestLayout
from tests.ranks import run_ranks
from tests.sizes import full

STEPS = 3
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


@contextmanager
def counted_collectives() -> Iterator[list[tuple[str, torch.dtype, int]]]:
    """Within the block, (name, type, bytes) of every tensor that a collective is given."""
    calls: list[tuple[str, torch.dtype, int]] = []
    names = ("all_gather", "gather", "all_gather_into_tensor", "broadcast", "all_reduce", "all_to_all_single", "scatter")
    names += ("reduce_scatter_tensor", "send", "recv", "isend", "irecv")

    def counting(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            values = [*arguments, *options.values()]
            flat = [part for value in values for part in (value if isinstance(value, list) else [value])]
            calls.extend((name, part.dtype, part.nbytes) for part in flat if isinstance(part, torch.Tensor))
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            replacement = counting(name, getattr(distributed_c10d, name))
            for module in (torch.distributed, distributed_c10d):
                patch.setattr(module, name, replacement)
        yield calls


class _Copies(TorchDispatchMode):
    """Counts the bytes that operators write, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype.is_floating_point and not function.is_view:
            self.num_bytes[str(function)] += result.nbytes
        return result


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
    with counted_collectives() as second, _Copies() as copies:
        run.save()
    run.train(1)
    memory = HostMemory()
    run.manager._strategy.base_strategy._host_memory = memory
    with _Copies() as staged:
        run.save()
    shards = [parameter for member in run.optimizer.chained_optimizers for parameter in member.get_parameters()]
    shard_bytes = sum(len(KINDS) * shard.nbytes for shard in shards)
    return Moved((first, second), (copies.num_bytes, staged.num_bytes), memory.num_bytes, shard_bytes)


def bytes_on_disk(checkpoint: Path, num_ranks: int, prefix: str = "") -> list[int]:
    """Bytes of the tensors in the file that each rank wrote."""
    found = [0] * num_ranks
    with TorchDistReader(checkpoint) as reader:
        for index, stored in reader._storage.items():
            entry = reader.tensors.get(index.fqn)
            if entry is not None and index.fqn.startswith(prefix):
                (chunk,) = (chunk for chunk in entry.chunks if chunk.offsets == index.offset)
                rank = int(stored.relative_path.split("_")[2])
                found[rank] += math.prod(chunk.sizes) * entry.properties.dtype.itemsize
    return found


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
    model = sharded_model_state(run.chunks, run.groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer_state, "sharded_shards", gathered_by_megatron)
        tree = optimizer_state.sharded_state(run.optimizer, model, is_loading=False)
    gathered = [leaf for leaf in nested_values(tree) if isinstance(leaf, ShardedTensor)]
    places = [
        tuple(slice(o, o + n) for o, n in zip(leaf.global_offset, leaf.local_shape, strict=True)) for leaf in gathered
    ]
    reference = [(leaf.key, tuple(leaf.global_shape), place, leaf.data) for leaf, place in zip(gathered, places)]
    return run.pieces(), reference


def gathered_by_megatron(optimizer: Any, model_state: Any) -> Any:
    """megatron-core's own state that can be read in any layout: every data rank has whole parameters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cuda", lambda self: self)
        metadata = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
        return optimizer.sharded_state_dict(model_state, metadata=metadata)["param_state"]


def save_as_before(settings: Settings, folder: str) -> None:
    """A checkpoint as this program wrote it while every data rank gathered the state."""
    run = Run(settings, folder)
    run.train(STEPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer_state, "sharded_shards", gathered_by_megatron)
        run.save()


def straight(settings: Settings) -> dict[str, Any]:
    run = Run(settings, "nowhere")
    run.train(STEPS + 2)
    return run.local_state()


def resumed(settings: Settings, folder: str) -> dict[str, Any]:
    run = Run(settings, folder)
    assert run.load().same_layout
    run.train(2)
    return run.local_state()


def partial_rows(checkpoint: Path) -> list[str]:
    """Tensors of which some piece begins or ends within a row."""
    with TorchDistReader(checkpoint) as reader:
        return [
            key
            for key, entry in reader.tensors.items()
            if any(chunk.sizes[-1:] != entry.size[-1:] for chunk in entry.chunks)
        ]


@pytest.mark.parametrize(
    ("source", "targets"),
    [
        (DATA_4, [TestLayout(2), full(DATA_3)]),
        (DATA_3, [TestLayout(), full(TestLayout(4, tensor=2, expert=2, expert_tensor=2))]),
        (EXPERTS, [TestLayout(2, tensor=2), full(TestLayout(4, expert=4))]),
    ],
)
def test_placeholder(source, targets): ...
