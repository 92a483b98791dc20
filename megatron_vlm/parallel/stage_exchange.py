"""The exchange between pipeline stages: megatron-core's, but every rank knows beforehand the shape of what it receives.

The ranks of a pipeline have the same micro-batches, of different lengths, and a model says what crosses each boundary
(`ModelChunk.boundary_before`). So no shapes are sent, for which the host would wait at every exchange.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

Shape = tuple[int, int, int]


class StageExchange(P2PCommunicator):
    """What a schedule of megatron-core sends and receives by.

    Args:
        group: the pipeline group.
        mcore_config: megatron-core settings.
        from_previous: shapes of the tensors that this rank receives in the forward pass, in the schedule's order.
        from_next: shapes of the gradients that it receives in the backward pass, in the schedule's order.
    """

    def __init__(
        self,
        group: torch.distributed.ProcessGroup,
        mcore_config: ModelParallelConfig,
        from_previous: Iterator[Shape],
        from_next: Iterator[Shape],
    ) -> None:
        super().__init__(group, mcore_config)
        self._from_previous, self._from_next = from_previous, from_next

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[Shape | None, Shape | None]:
        """Return the shapes of what is received next, where megatron-core would ask the neighbours."""
        return next(self._from_previous) if recv_prev else None, next(self._from_next) if recv_next else None
