"""Exchange of tokens with the ranks that hold the other experts of a layer, and of what experts make of them.

`AllToAll` sends each token where an expert of its choice is; `AllGather` sends all tokens everywhere, which suits few
ranks. Both call the experts of this rank with rows grouped by expert. What is decided once (`layers.recompute`) is not
exchanged again in recomputation: which rows come from where.

Source: megatron-core's `MoEAlltoAllTokenDispatcher` and `MoEAllGatherTokenDispatcher`, dropless, with the same results;
they compute splits and orders of chunks with many small operators, half of them while the device waits for the host.

Shapes: T tokens of this rank, H hidden, E experts, R rows of this rank's experts, N ranks that share the experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from megatron_vlm.layers.recompute import decided
from megatron_vlm.parallel.sequence import gather_sequence
from megatron_vlm.platform import HostCopy
from vlm_kernels.permute import chunk_permutation, expert_permutation, permute, unpermute

RowExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Maps rows [R, H] grouped by expert, where each expert's rows end, and the rows' weights [R] to weighted outputs."""


class AllToAll:
    """Sends each token to the ranks of its experts.

    The host waits once: the sizes of the exchange, and of what is kept for the backward pass, are counts that only the
    device knows. Until it has them, the device permutes tokens.

    Args:
        num_experts: number of the layer's experts, E.
        top_k: experts per token.
        groups: process groups.
    """

    def __init__(self, num_experts: int, top_k: int, groups: ProcessGroupCollection) -> None:
        self.top_k, self.expert_group, self.tensor_group, self.group = top_k, groups.ep, groups.expt_tp, groups.tp_ep
        self.num_own = num_experts // groups.ep.size()
        self.first = groups.ep.rank() * self.num_own

    def __call__(
        self, x_TH: torch.Tensor, weights_TE: torch.Tensor, chosen_TE: torch.Tensor, experts: RowExperts
    ) -> torch.Tensor:
        """Return the weighted sum of the outputs of each token's experts, [T, H]."""
        permutation = expert_permutation(chosen_TE, x_TH.shape[0] * self.top_k)
        sizes = decided(lambda: _Sizes(permutation.ends, self))
        rows, weights = permute(x_TH, permutation, weights_TE)
        sent, received, of_tensor_ranks = sizes.on_host()
        arrived, weights = (all_to_all(self.expert_group, each, received, sent) for each in (rows, weights))
        if self.tensor_group.size() > 1:
            arrived, weights = (
                gather_from_sequence_parallel_region(each, group=self.tensor_group, output_split_sizes=of_tensor_ranks)
                for each in (arrived, weights)
            )
        by_expert = chunk_permutation(sizes.ends, self.first, self.num_own, arrived.shape[0])
        rows, weights = permute(arrived, by_expert, weights.unsqueeze(-1))
        output = unpermute(experts(rows, by_expert.ends, weights), by_expert)
        if self.tensor_group.size() > 1:
            wide = reduce_scatter_to_sequence_parallel_region(
                output.to(weights.dtype), group=self.tensor_group, input_split_sizes=of_tensor_ranks
            )
            output = wide.to(x_TH.dtype)
        return unpermute(all_to_all(self.expert_group, output, sent, received), permutation)


class _Sizes:
    """How many rows come from and go to each rank.

    Args:
        ends: [E] int32, where the rows of each expert end on this rank.
        exchange: whose sizes these are.

    Attributes:
        ends: [N, E] int32 of all ranks that share the experts: ranks of the expert group within those of the expert
            tensor group, the order in which rows arrive.
    """

    def __init__(self, ends: torch.Tensor, exchange: AllToAll) -> None:
        ranks = exchange.expert_group.size(), exchange.tensor_group.size()
        every, _ = gather_sequence(ends, exchange.group)
        self.ends = every.view(*ranks, -1).transpose(0, 1).reshape(-1, len(ends))
        self._exchange, self._copy = exchange, HostCopy(self.ends)
        self._on_host: tuple[list[int], list[int], list[int]] | None = None

    def on_host(self) -> tuple[list[int], list[int], list[int]]:
        """Return the rows sent to, and received from, each expert rank, and what each expert-tensor rank receives."""
        if self._on_host is None:
            exchange = self._exchange
            num_ranks = exchange.expert_group.size()
            # Rows for each expert rank: [expert-tensor ranks, expert ranks that send, expert ranks that receive].
            ends = self._copy.wait().numpy()[:, exchange.num_own - 1 :: exchange.num_own].astype("int64")
            ends[:, 1:] -= ends[:, :-1].copy()
            rows = ends.reshape(-1, num_ranks, num_ranks)
            place, tensor_place = exchange.expert_group.rank(), exchange.tensor_group.rank()
            self._on_host = (
                rows[tensor_place, place].tolist(),
                rows[tensor_place, :, place].tolist(),
                rows[:, :, place].sum(1).tolist(),
            )
        return self._on_host


class AllGather:
    """Sends all tokens to all ranks, each of which takes those that chose its experts.

    The host waits once for the number of rows. All ranks must have equally many tokens.

    Args:
        num_experts: number of the layer's experts, E.
        groups: process groups.
    """

    def __init__(self, num_experts: int, groups: ProcessGroupCollection) -> None:
        self.group = groups.tp_ep
        num_own = num_experts // groups.ep.size()
        self.own = slice(groups.ep.rank() * num_own, (groups.ep.rank() + 1) * num_own)

    def __call__(
        self, x_TH: torch.Tensor, weights_TE: torch.Tensor, chosen_TE: torch.Tensor, experts: RowExperts
    ) -> torch.Tensor:
        """Return the weighted sum of the outputs of each token's experts, [T, H]."""
        chosen, num_rows = decided(lambda: self._own_choices(chosen_TE))
        weights = gather_from_sequence_parallel_region(weights_TE, group=self.group)[:, self.own]
        x = gather_from_sequence_parallel_region(x_TH, group=self.group, use_global_buffer=True)
        permutation = expert_permutation(chosen, num_rows.on_host())
        rows, row_weights = permute(x, permutation, weights)
        output = unpermute(experts(rows, permutation.ends, row_weights), permutation)
        wide = reduce_scatter_to_sequence_parallel_region(output.to(weights.dtype), group=self.group)
        return wide.to(x_TH.dtype)

    def _own_choices(self, chosen_TE: torch.Tensor) -> tuple[torch.Tensor, _Total]:
        """Return which tokens of all ranks chose this rank's experts, and how many rows these are."""
        own = gather_sequence(chosen_TE, self.group)[0][:, self.own].contiguous()
        return own, _Total(own)


class _Total:
    """The number of true entries of a tensor."""

    def __init__(self, entries: torch.Tensor) -> None:
        self._copy = HostCopy(entries.sum())
        self._on_host: int | None = None

    def on_host(self) -> int:
        """Return the number, for which the host waits the first time."""
        if self._on_host is None:
            self._on_host = int(self._copy.wait())
        return self._on_host
