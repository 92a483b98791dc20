"""What all ranks learn from one or from any of them; numbers travel as tensors, objects only where they must.

At thousands of ranks an exchange of objects takes seconds. Each function is called on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed

from megatron_vlm.errors import CheckpointError, UserError
from megatron_vlm.platform.device import current


def is_any(condition: bool) -> bool:
    """Return whether a condition holds on any rank; called on every rank."""
    flag = torch.tensor(condition, dtype=torch.int32, device=current().device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag)


def gather_if_any[Value](value: Value | None) -> list[Value | None]:
    """Return the values of all ranks, in their order; objects travel only if some rank has one that is not None."""
    values: list[Value | None] = [None] * torch.distributed.get_world_size()
    if is_any(value is not None):
        torch.distributed.all_gather_object(values, value)
    return values


def share_first(value: Any) -> Any:
    """Return the first rank's value on every rank; None and integers travel as numbers, anything else as an object."""
    kind, number = (0, 0) if value is None else (1, value) if type(value) is int else (2, 0)
    head = torch.tensor([kind, number], dtype=torch.int64, device=current().device)
    torch.distributed.broadcast(head, src=0)
    kind, number = head.tolist()
    if kind < 2:
        return number if kind else None
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def on_first_rank[Result](action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 and give its result, or its error for the user, to every rank."""
    outcome: Any = None
    if torch.distributed.get_rank() == 0:
        try:
            outcome = action()
        except UserError as error:
            outcome = error
        except OSError as error:
            where = None if error.filename is None else str(error.filename)
            outcome = CheckpointError(error.strerror or str(error), where, "make the folder usable and try again")
    outcome = share_first(outcome)
    if isinstance(outcome, UserError):
        raise outcome
    result: Result = outcome
    return result
