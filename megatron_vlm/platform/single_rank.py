"""Skip the collectives of data-parallel groups of a single rank.

megatron-core reduces gradients and gathers parameters in groups of one too. NCCL does nothing then; gloo copies the
whole buffer, which costs a tenth of a step on one CPU process. This goes when either of them stops doing so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed

Group = torch.distributed.ProcessGroup


class _Done:
    """The handle of a collective that is finished."""

    def wait(self) -> None:
        pass


@contextmanager
def _coalescing_manager(group: Group, async_ops: bool = False) -> Iterator[Any]:
    if group.size() == 1:
        yield _Done()  # torch's own fails on exit without a single collective
    else:
        with torch.distributed._coalescing_manager(group, async_ops=async_ops) as work:
            yield work


def _unless_single(exchange: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a collective of (output, input); a single rank's output is its input, in place in megatron-core."""

    def call(output: torch.Tensor, source: torch.Tensor, *, group: Group, **options: Any) -> Any:
        if group.size() > 1:
            return exchange(output, source, group=group, **options)
        if output.data_ptr() != source.data_ptr():
            output.copy_(source)
        return _Done() if options.get("async_op") else None

    return call


def install() -> None:
    """Give megatron-core's data parallelism these collectives; call once."""
    from megatron.core.distributed import param_and_grad_buffer

    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        setattr(param_and_grad_buffer, name, _unless_single(getattr(param_and_grad_buffer, name)))
    param_and_grad_buffer._coalescing_manager = _coalescing_manager
