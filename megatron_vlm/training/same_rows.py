"""Tensor and context ranks read the rows that they share each for itself; this makes sure that all read the same.

A file that is unreadable on one machine for a moment makes a bad row there alone. The ranks would then exchange tensors
of different sizes, and wait for each other until a time-out, or train on different rows without a word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed

from megatron_vlm import platform
from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.errors import DataError


def check_same_rows(batches: Sequence[MicroBatch], group: torch.distributed.ProcessGroup) -> None:
    """Compare what the ranks of a group have read for a global batch, by two numbers of each.

    Args:
        batches: this rank's micro-batches.
        group: the tensor and context ranks that share them; each calls this.

    Raises:
        DataError: on every rank of the group, where some rank has read something else.
    """
    if group.size() == 1:
        return
    number = _number_of(batches)
    bounds = torch.tensor([number, -number], dtype=torch.int64, device=platform.current().device)
    torch.distributed.all_reduce(bounds, op=torch.distributed.ReduceOp.MAX, group=group)
    largest, negated_smallest = bounds.tolist()
    if largest == -negated_smallest:
        return
    mine = (torch.distributed.get_rank(), number, [problem for batch in batches for problem in batch.problems])
    everywhere: list[Any] = [None] * group.size()
    torch.distributed.all_gather_object(everywhere, mine, group=group)
    first_rank, first_number, first_problems = everywhere[0]
    rank, problems = next((rank, problems) for rank, number, problems in everywhere if number != first_number)
    for reader, found, others in ((rank, problems, first_problems), (first_rank, first_problems, problems)):
        if alone := [problem for problem in found if problem not in others]:
            what = f"on rank {reader} alone: {alone[0]}"
            break
    else:
        names = [name for batch in batches for name in batch.document_names]
        what = f"among {', '.join(names)} there is a row with other media or another length"
    raise DataError(
        f"ranks {first_rank} and {rank}, which share their rows, have read different things: {what}",
        fix="see whether the storage works on both machines; starting again resumes from the last checkpoint",
    )


def _number_of(batches: Sequence[MicroBatch]) -> int:
    """Return 62 bits of a digest of which rows there are, and of what was made of them."""
    facts = [(batch.document_names, sorted(batch.counters.items()), batch.media) for batch in batches]
    return int.from_bytes(hashlib.blake2b(repr(facts).encode(), digest_size=8).digest(), "big") >> 2
