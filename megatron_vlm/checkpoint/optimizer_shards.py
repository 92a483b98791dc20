"""The distributed optimizer's state as it lies on the data ranks, described by its places in whole tensors.

A data rank has a run of a parameter's elements, row after row: of the tensor rank's part if that is divided. In the
whole tensor this is no rectangle in general, but a few: the end of a row, whole rows, the beginning of a row, and the
same in each further dimension. Each is a tensor of its own for megatron-core's checkpoints, a view of the rank's
memory, so that saving copies nothing that another rank has, and loading writes where the optimizer reads.

megatron-core's own formats that can be read in another layout have all data ranks gather the whole state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a rectangular part of a tensor."""


def boxes_of_range(shape: tuple[int, ...], begin: int, end: int) -> Iterator[Box]:
    """Cut a run of a tensor's elements into as few rectangles as whole rows allow, in their order in memory.

    Args:
        shape: of the tensor.
        begin: the run's first element, in the tensor's order in memory.
        end: after its last element.

    Yields:
        At most `2 * len(shape) - 1` boxes.
    """
    if begin >= end:
        return
    if not shape:
        yield (), ()
        return
    rest = shape[1:]
    row_elements = math.prod(rest)

    def within_row(row: int, first: int, last: int) -> Iterator[Box]:
        for offsets, sizes in boxes_of_range(rest, first, last):
            yield (row, *offsets), (1, *sizes)

    first_whole, end_whole = -(-begin // row_elements), end // row_elements
    before, after = first_whole * row_elements - begin, end - end_whole * row_elements
    if first_whole > end_whole:
        yield from within_row(end_whole, row_elements - before, after)
        return
    yield from within_row(first_whole - 1, row_elements - before, row_elements)
    if first_whole < end_whole:
        yield (first_whole, *[0] * len(rest)), (end_whole - first_whole, *rest)
    yield from within_row(end_whole, 0, after)


def sharded_shards(
    optimizer: DistributedOptimizer, model_state: Mapping[str, ShardedTensor]
) -> dict[int, ShardedTensor]:
    """Describe what this rank has of the fp32 main parameters and of the optimizer's tensors beside them.

    Args:
        optimizer: with its state allocated.
        model_state: result of `sharded_model_state`, which says where the rank's parts of the parameters are.

    Returns:
        Numbered views of the optimizer's memory under the keys `optimizer.state.<kind>.<parameter name>`, where the
        kind of main parameters is `param`.
    """
    places = {leaf.data: leaf for leaf in model_state.values()}
    found: list[ShardedTensor] = []
    for parameter in optimizer.model_param_gbuf_map:
        place, run = places[parameter], optimizer._get_model_param_range_map(parameter)["param"]
        for kind, values in optimizer._get_main_param_and_optimizer_states(parameter).items():
            assert values.shape == (run.end - run.start,), f"{kind} of {place.key} is {list(values.shape)}"
            found += _pieces(f"optimizer.state.{kind}.{place.key}", values.detach(), place, run.start)
    return dict(enumerate(found))


def _pieces(key: str, values: torch.Tensor, place: ShardedTensor, begin: int) -> Iterator[ShardedTensor]:
    """Yield rectangular views of a run of elements that begins at `begin` of the parameter at `place`."""
    done = 0
    for offsets, sizes in boxes_of_range(tuple(place.local_shape), begin, begin + len(values)):
        num_elements = math.prod(sizes)
        yield ShardedTensor(
            key,
            values[done : done + num_elements].view(sizes),
            values.dtype,
            local_shape=sizes,
            global_shape=place.global_shape,
            global_offset=tuple(map(sum, zip(place.global_offset, offsets, strict=True))),
            axis_fragmentations=None,  # the pieces of a tensor have different shapes
            replica_id=(*place.replica_id[:-1], 0),  # no other data rank has it
        )
        done += num_elements
