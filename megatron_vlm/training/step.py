"""Forward and backward passes of one global batch through megatron-core's pipeline schedules, and what they counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func, get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config, unwrap_model

from megatron_vlm import platform
from megatron_vlm.data.collate import NO_LOSS, MicroBatch
from megatron_vlm.model.model_chunk import ModelChunk
from megatron_vlm.parallel.stage_exchange import StageExchange
from megatron_vlm.parallel.stage_state import packed_shape


class LossSums:
    """Sums of losses and label tokens per data source, over micro-batches and data ranks.

    Args:
        num_sources: number of data sources in the blend.
        device: device that holds the sums.
    """

    def __init__(self, num_sources: int, device: torch.device) -> None:
        self._sums = torch.zeros((2, num_sources), dtype=torch.float64, device=device)

    def add(self, losses_BS: torch.Tensor, batch: MicroBatch) -> None:
        """Count one micro-batch; a label token counts for the source of its document."""
        losses, documents = (
            values.t().flatten()[batch.label_index] for values in (losses_BS.detach(), batch.document_ids)
        )
        sources, losses = batch.document_sources[documents], losses.double()
        for sums, values in zip(self._sums, (losses, torch.ones_like(losses)), strict=True):
            sums.index_add_(0, sources, values)

    def reduce(self, groups: ProcessGroupCollection) -> torch.Tensor:
        """Return [sources, (loss sum, label tokens)] over the global batch, on every rank."""
        torch.distributed.all_reduce(self._sums, group=groups.dp_cp)
        # Only the last pipeline stage counted; the others hold zeros.
        torch.distributed.all_reduce(self._sums, group=groups.pp)
        return self._sums.t()


def run_global_batch(
    model: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    groups: ProcessGroupCollection,
    num_sources: int = 1,
    forward_only: bool = False,
) -> torch.Tensor:
    """Run this data rank's micro-batches; gradients become those of the mean loss over all label tokens.

    Args:
        model: this rank's model chunks.
        micro_batches: the micro-batches, on the device; the same on all tensor and pipeline ranks of this data rank.
        groups: this rank's process groups.
        num_sources: number of data sources, by which the loss is split.
        forward_only: run no backward pass, as evaluation does.

    Returns:
        [sources, (loss sum, label tokens)] over the global batch, float64, on every rank.
    """
    sums = LossSums(num_sources, micro_batches[0].labels.device)
    virtual_size = len(model) if len(model) > 1 else None
    iterators = [iter(micro_batches) for _ in model]
    get_forward_backward_func(pp_size=groups.pp.size(), vp_size=virtual_size)(
        forward_step_func=partial(_forward_step, sums),
        data_iterator=iterators if virtual_size else iterators[0],
        model=list(model) if virtual_size else model[0],
        num_microbatches=len(micro_batches),
        # Each micro-batch has a length of its own, which `StageExchange` knows.
        seq_length=0,
        micro_batch_size=0,
        forward_only=forward_only,
        p2p_communicator=stage_exchange(model, micro_batches, groups) if groups.pp.size() > 1 else None,
        pg_collection=groups,
    )
    return sums.reduce(groups)


def stage_exchange(
    model: Sequence[torch.nn.Module], micro_batches: Sequence[MicroBatch], groups: ProcessGroupCollection
) -> StageExchange:
    """Return the exchange between stages for one global batch.

    Args:
        model: this rank's model chunks, wrapped for data parallelism or not.
        micro_batches: the micro-batches of this data rank.
        groups: this rank's process groups.
    """
    chunks: list[ModelChunk] = unwrap_model(list(model))
    mcore_config = get_model_config(model[0])
    order = get_schedule_table(len(micro_batches), len(chunks), mcore_config.microbatch_group_size_per_vp_stage)
    forward = ((chunks[chunk], micro_batches[batch]) for batch, chunk in order)
    backward = ((chunks[-1 - chunk], micro_batches[batch]) for batch, chunk in order)
    return StageExchange(
        groups.pp,
        mcore_config,
        (packed_shape(chunk.boundary_before(batch)) for chunk, batch in forward if not chunk.pre_process),
        (packed_shape(chunk.boundary_after(batch)) for chunk, batch in backward if not chunk.post_process),
    )


def collect_expert_use(
    chunks: Sequence[torch.nn.Module], groups: ProcessGroupCollection
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Sum what was counted since the last call over all ranks, which must all call it; None without experts.

    Args:
        chunks: this rank's pipeline chunks, wrapped for data parallelism or not.
        groups: this rank's process groups.

    Returns:
        Tokens routed to each expert [layers with experts, E], and the sum of load-balancing losses times label tokens,
        both float64.
    """
    uses = [chunk.language_model.expert_use for chunk in unwrap_model(list(chunks))]
    if uses[0] is None:
        return None
    device = platform.current().device
    tokens = torch.zeros((len(uses[0].rows), uses[0].num_experts), dtype=torch.float64, device=device)
    balance = torch.zeros((), dtype=torch.float64, device=device)
    for use in uses:
        for layer, counted in use.tokens.items():
            tokens[use.rows[layer]] += counted
        if use.balance is not None:
            # Equal on all tensor-parallel ranks, which are summed below.
            balance += use.balance / groups.tp.size()
        use.reset()
    packed = torch.cat((tokens.flatten(), balance.view(1)))
    for group in (groups.tp, groups.dp_cp, groups.pp):
        torch.distributed.all_reduce(packed, group=group)
    return packed[:-1].view_as(tokens), packed[-1]


LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]


def _forward_step(
    sums: LossSums, batches: Iterator[MicroBatch], chunk: torch.nn.Module
) -> tuple[torch.Tensor, LossFunction]:
    batch = next(batches)
    return chunk(batch), partial(_loss, sums, batch)


def _loss(
    sums: LossSums, batch: MicroBatch, losses_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Return megatron-core's triple: sum of losses, number of label tokens, figures to log (none: `sums` has them)."""
    sums.add(losses_BS, batch)
    return losses_BS.sum(), (batch.labels != NO_LOSS).sum().int(), {}
