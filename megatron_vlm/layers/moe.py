"""Mixture of experts: a router, megatron-core's token dispatchers, and all experts of a rank in one grouped product.

The dispatchers permute tokens by our kernels (`layers.expert_permutation`); a rank that holds all experts needs none.

Dropless: every token reaches its `top_k` experts, however unevenly they are loaded. The ranks of a pipeline stage are
divided anew for experts (`parallel.groups`): expert-parallel ranks hold different experts, expert-tensor ranks share
each of them, and the rest are replicas.

Shapes: S sequence (a shard of it under sequence parallelism), B batch, H hidden, E experts, I expert width,
T tokens: of this rank in router and layer, sent to its experts in `Experts`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import router_gating_linear, topk_routing_with_score_function
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import grouped_mm, linear, pad

from megatron_vlm.layers.expert_permutation import install as install_expert_permutation
from megatron_vlm.parallel.chunk_settings import ChunkSettings
from megatron_vlm.parallel.parameters import declare, normal
from vlm_kernels.gated import gated_halves
from vlm_kernels.permute import expert_permutation, permute, unpermute

DISPATCHERS = {"alltoall": MoEAlltoAllTokenDispatcher, "allgather": MoEAllGatherTokenDispatcher}


class MoERecord(Protocol):
    """What a layer's configuration record says about its experts."""

    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...


@dataclass(frozen=True)
class Routing:
    """Where one layer sent its tokens; padding is not counted.

    Attributes:
        tokens: [E] fp32, tokens that chose each expert, on this rank; no gradient.
        probabilities: [E] fp32, sum over this rank's tokens of each expert's probability before the choice.
    """

    tokens: torch.Tensor
    probabilities: torch.Tensor


@dataclass(frozen=True)
class TokenShare:
    """This rank's tokens of a micro-batch.

    Attributes:
        is_real: [S * B] bool, false on padding, which is computed like text but not counted.
        num_real: tokens that are not padding, over all tensor ranks.
        common_length: tokens of the rank that has most, where ranks must bring equally many; None elsewhere.
    """

    is_real: torch.Tensor
    num_real: torch.Tensor
    common_length: int | None

    @staticmethod
    def of(document_ids_BS: torch.Tensor, chunk: ChunkSettings, groups: ProcessGroupCollection) -> TokenShare:
        """The share of this tensor rank: a part of the sequence under sequence parallelism, else all of it."""
        is_real_SB = (document_ids_BS >= 0).t()
        num_real = is_real_SB.sum()
        if chunk.engine.sequence_parallel:
            is_real_SB = is_real_SB.chunk(groups.tp.size())[groups.tp.rank()]
        is_real = is_real_SB.flatten()
        common_length = None
        if chunk.moe.token_dispatcher_type == "allgather" and groups.tp_ep.size() > 1:
            # Data ranks have rows of their own lengths. Once per micro-batch and chunk, the host waits for this number.
            longest = torch.tensor(is_real.numel(), device=is_real.device)
            torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX, group=groups.tp_ep)
            common_length = int(longest.item())
        return TokenShare(is_real, num_real, common_length)


class Router(torch.nn.Module):
    """Chooses experts: top-k of the logits, softmax over the chosen ones, in fp32.

    The softmax over all experts, cut to its top k and normalised to sum to one, is the same. transformers computes the
    logits in the activations' type; in bf16 nearly equal experts may then be chosen otherwise.
    """

    def __init__(self, hidden_size: int, moe: MoERecord, engine: TransformerConfig) -> None:
        super().__init__()
        self.top_k = moe.top_k
        weight = torch.nn.Parameter(torch.empty(moe.num_experts, hidden_size, dtype=engine.params_dtype))
        self.weight = declare(weight, "table", normal, partial=engine.sequence_parallel)

    def forward(self, x_TH: torch.Tensor, is_real_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Routing]:
        """Weights [T, E] fp32 (zero where not chosen), choices [T, E] bool, and their sums over real tokens."""
        if len(x_TH):
            logits = router_gating_linear(x_TH, self.weight, None, torch.float32)  # keeps its input as it is
        else:  # which it cannot reshape
            logits = linear(x_TH.float(), self.weight.float())
        weights, chosen = topk_routing_with_score_function(logits, self.top_k)
        real = is_real_T.float()
        # Vector-matrix products, which read [T, E] once.
        return weights, chosen, Routing(real @ chosen.float(), real @ logits.softmax(-1))


class Experts(torch.nn.Module):
    """down(silu(gate(x)) * up(x)) of this rank's experts, each on its own rows, by grouped products.

    Gate and up are two sections of one weight, [experts, 2, I, H], so that a share of I has both; in memory that is
    transformers' [experts, 2 I, H].

    Args:
        hidden_size: H.
        moe: the layer's record.
        engine: megatron-core settings.
        groups: process groups; `ep` divides experts, `expt_tp` their width.
    """

    def __init__(
        self, hidden_size: int, moe: MoERecord, engine: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__()
        count, width = moe.num_experts // groups.ep.size(), moe.intermediate_size // groups.expt_tp.size()
        dtype = engine.params_dtype
        self.gate_up_proj = torch.nn.Parameter(torch.empty(count, 2, width, hidden_size, dtype=dtype))
        self.down_proj = torch.nn.Parameter(torch.empty(count, hidden_size, width, dtype=dtype))
        for weight in (self.gate_up_proj, self.down_proj):
            declare(weight, "matrix", normal, tensor_dim=2, is_expert=True)

    def forward(self, x_TH: torch.Tensor, tokens_per_expert: torch.Tensor, weights_T: torch.Tensor) -> torch.Tensor:
        """Weighted outputs [T, H], partial sums if experts are shared.

        Args:
            x_TH: rows grouped by expert.
            tokens_per_expert: [experts of this rank], which sum to T: rows past the last group would stay unwritten.
            weights_T: the router's weight of each row.
        """
        ends = tokens_per_expert.to(x_TH.device, non_blocking=True).cumsum(0, dtype=torch.int32)
        gate_up = grouped_mm(x_TH, self.gate_up_proj.flatten(1, 2).transpose(1, 2), offs=ends)
        # The weight is applied where rows are narrow; the last product is linear.
        hidden = gated_halves(gate_up, "silu", weights_T, consume=True)
        return grouped_mm(hidden, self.down_proj.transpose(1, 2), offs=ends)


class MoE(torch.nn.Module):
    """A feed-forward layer of experts.

    Where ranks share or divide experts the host waits in every call: sizes of the exchange, and of what is kept for the
    backward pass, are counts of tokens that only the device knows. A rank with all experts never waits.

    Args:
        hidden_size: H.
        moe: the layer's record.
        chunk: how the chunk is held.
        groups: process groups.
    """

    def __init__(self, hidden_size: int, moe: MoERecord, chunk: ChunkSettings, groups: ProcessGroupCollection) -> None:
        super().__init__()
        self.top_k = moe.top_k
        self.gate = Router(hidden_size, moe, chunk.engine)
        self.experts = Experts(hidden_size, moe, chunk.engine, groups)
        self.dispatcher = None
        if groups.tp_ep.size() == 1:
            return
        engine = dataclasses.replace(
            chunk.engine,
            num_moe_experts=moe.num_experts,
            moe_router_topk=moe.top_k,
            moe_ffn_hidden_size=moe.intermediate_size,
            moe_router_dtype="fp32",  # says what our router does
            expert_model_parallel_size=groups.ep.size(),
            expert_tensor_parallel_size=groups.expt_tp.size(),
            moe_token_dispatcher_type=chunk.moe.token_dispatcher_type,
            # Both are asserted only: the layer reads neither.
            variable_seq_lengths=chunk.moe.token_dispatcher_type == "alltoall",
            moe_router_pre_softmax=moe.top_k == 1,
        )
        count = self.experts.down_proj.shape[0]
        first = groups.ep.rank() * count
        install_expert_permutation()
        self.dispatcher = DISPATCHERS[chunk.moe.token_dispatcher_type](
            count, list(range(first, first + count)), engine, groups
        )

    def forward(self, x_SBH: torch.Tensor, share: TokenShare) -> tuple[torch.Tensor, Routing]:
        """[S, B, H] to the same, and where the tokens went.

        Args:
            x_SBH: normalised hidden states.
            share: about these tokens.
        """
        x_TH = x_SBH.flatten(0, 1)
        weights, chosen, routing = self.gate(x_TH, share.is_real)
        if share.common_length is not None:
            # Rows that choose no expert.
            missing = (0, 0, 0, share.common_length - x_TH.shape[0])
            x_TH, weights, chosen = pad(x_TH, missing), pad(weights, missing), pad(chosen, missing)
        if self.dispatcher is None:
            output = self._on_this_rank(x_TH, weights, chosen)
        else:
            output = self._exchanged(self.dispatcher, x_TH, weights, chosen)
        return output[: x_SBH.shape[0] * x_SBH.shape[1]].view_as(x_SBH), routing

    def _on_this_rank(self, x_TH: torch.Tensor, weights_TE: torch.Tensor, chosen_TE: torch.Tensor) -> torch.Tensor:
        permutation = expert_permutation(chosen_TE, x_TH.shape[0] * self.top_k)
        rows, row_weights = permute(x_TH, permutation, weights_TE)
        assert row_weights is not None
        return unpermute(self.experts(rows, chosen_TE.sum(0), row_weights), permutation)

    def _exchanged(
        self, dispatcher: Any, x_TH: torch.Tensor, weights_TE: torch.Tensor, chosen_TE: torch.Tensor
    ) -> torch.Tensor:
        try:
            rows, weights = dispatcher.dispatch_preprocess(x_TH, chosen_TE, weights_TE)
            rows, weights = dispatcher.token_dispatch(rows, weights)
            rows, tokens_per_expert, weights = dispatcher.dispatch_postprocess(rows, weights)
            rows = self.experts(rows, tokens_per_expert, weights)
            rows = dispatcher.combine_preprocess(rows)
            return dispatcher.combine_postprocess(dispatcher.token_combine(rows))
        finally:
            # The dispatcher would keep this graph alive. Recomputation ends by an exception, once nothing more is read.
            dispatcher.probs = dispatcher.routing_map = dispatcher.local_probs = dispatcher.local_map = None
