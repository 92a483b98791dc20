"""Mixture of experts: a router, the exchange of tokens, and all experts of a rank in one grouped matmul.

Tokens are exchanged in `layers.expert_exchange`; a rank that holds all experts exchanges none. A layer that is
recomputed takes the experts that its first pass chose (`layers.recompute.decided`): another choice at a near tie would
change the rows of ranks.

Dropless: every token reaches its `top_k` experts, however unevenly they are loaded. The ranks of a pipeline stage are
regrouped for experts (`parallel.groups`): expert-parallel ranks hold different experts, expert-tensor ranks a shard of
each of them, and the rest are replicas.

Shapes: S sequence (a shard of it under sequence parallelism), B batch, H hidden, E experts, I expert width,
T tokens: this rank's in router and layer, those sent to its experts in `Experts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from megatron_vlm.layers.expert_exchange import AllGather, AllToAll
from megatron_vlm.layers.grouped_linear import grouped_linear
from megatron_vlm.layers.operands import Declared, Operand, Provider
from megatron_vlm.layers.recompute import decided
from megatron_vlm.model_configs import MoEConfig
from megatron_vlm.parallel.chunk_settings import ChunkSettings
from megatron_vlm.parallel.parameters import declare, normal, spec_of
from vlm_kernels.device import is_on_gpu
from vlm_kernels.gated import gated_halves
from vlm_kernels.permute import expert_permutation, permute, unpermute
from vlm_kernels.router import choose_experts, route


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
class LocalTokens:
    """This rank's tokens of a micro-batch.

    Attributes:
        is_real: [S * B] bool, false on padding, which is computed like text but not counted.
        num_real: number of tokens of the full micro-batch that are not padding.
        common_length: number of tokens of the rank that has most, where all ranks must contribute equally many; None
            elsewhere.
    """

    is_real: torch.Tensor
    num_real: torch.Tensor
    common_length: int | None

    @staticmethod
    def of(
        document_ids_BS: torch.Tensor,
        chunk: ChunkSettings,
        groups: ProcessGroupCollection,
        num_real: int | None = None,
    ) -> LocalTokens:
        """Return this rank's tokens: those given, or under sequence parallelism this tensor rank's part of them.

        Args:
            document_ids_BS: document of each token; negative on padding.
            chunk: settings of the pipeline chunk.
            groups: process groups.
            num_real: see `LocalTokens`; None where the tokens given are the full micro-batch.
        """
        is_real_SB = (document_ids_BS >= 0).t()
        count = is_real_SB.sum() if num_real is None else torch.tensor(num_real)
        if chunk.mcore_config.sequence_parallel:
            is_real_SB = is_real_SB.chunk(groups.tp.size())[groups.tp.rank()]
        is_real = is_real_SB.flatten()
        common_length = None
        if chunk.moe.token_dispatcher_type == "allgather" and groups.tp_ep.size() > 1:
            # Sequence lengths differ between data ranks. The host waits for this number once per micro-batch and chunk.
            longest = torch.tensor(is_real.numel(), device=is_real.device)
            torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX, group=groups.tp_ep)
            common_length = int(longest.item())
        return LocalTokens(is_real, count, common_length)


class TopKRouter(torch.nn.Module):
    """A router that chooses the top-k experts by logits, with weights from a softmax over the chosen ones, in fp32.

    The softmax over all experts, cut to its top k and normalised to sum to one, gives the same weights. transformers
    computes the logits in the activations' dtype; in bf16 nearly equal experts may then be chosen differently.
    """

    def __init__(self, hidden_size: int, moe: MoEConfig, mcore_config: TransformerConfig) -> None:
        super().__init__()
        self.top_k = moe.top_k
        weight = torch.nn.Parameter(torch.empty(moe.num_experts, hidden_size, dtype=mcore_config.params_dtype))
        self.weight = declare(weight, "table", normal, partial=mcore_config.sequence_parallel)

    def forward(self, x_TH: torch.Tensor, is_real_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Routing]:
        """Return weights [T, E] fp32 (zero where not chosen), choices [T, E] bool, and their sums over real tokens."""
        logits = _RouterLogits.apply(x_TH, self.weight)
        chosen = decided(lambda: choose_experts(logits, self.top_k))
        weights, tokens, probabilities = route(logits, chosen, is_real_T)
        return weights, chosen, Routing(tokens, probabilities)


class _RouterLogits(torch.autograd.Function):
    """x [T, H] times weight [E, H], in fp32.

    The host widens both first. A GPU multiplies bf16 as it is, whose products are exact in fp32: only the order of the
    sum differs. In the backward pass it rounds the gradient of the logits to bf16, as that of any other linear is.
    """

    @staticmethod
    def forward(ctx: Any, x_TH: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_TH if ctx.needs_input_grad[1] else None, weight)
        if is_on_gpu(x_TH) and x_TH.dtype != torch.float32:
            return torch.mm(x_TH, weight.t(), out_dtype=torch.float32)
        return torch.mm(x_TH.float(), weight.float().t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TE: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x_TH, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        dtype = weight.dtype if is_on_gpu(weight) else torch.float32
        gradient = gradient_TE.to(dtype)
        return (
            torch.mm(gradient, weight.to(dtype)).to(weight.dtype) if needs_x else None,
            torch.mm(gradient.t(), x_TH.to(dtype)).to(weight.dtype) if needs_weight else None,
        )


class Experts(torch.nn.Module):
    """down(activation(gate(x)) * up(x)) of this rank's experts, each on its own rows, by grouped matmuls.

    Gate and up are two sections of one weight, [experts, 2, I, H], so that a shard of I has both; in memory that is
    transformers' [experts, 2 I, H].

    Args:
        hidden_size: H.
        moe: configuration of the layer's experts.
        mcore_config: megatron-core settings.
        groups: process groups; experts are split over `ep`, and their width over `expt_tp`.
    """

    def __init__(
        self, hidden_size: int, moe: MoEConfig, mcore_config: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__()
        count, width = moe.num_experts // groups.ep.size(), moe.intermediate_size // groups.expt_tp.size()
        self.activation, dtype = moe.activation, mcore_config.params_dtype
        self.gate_up_proj = torch.nn.Parameter(torch.empty(count, 2, width, hidden_size, dtype=dtype))
        self.down_proj = torch.nn.Parameter(torch.empty(count, hidden_size, width, dtype=dtype))
        for weight in (self.gate_up_proj, self.down_proj):
            declare(weight, "matrix", normal, tensor_dim=2, is_expert=True)
        self.expert_tensor_rank = groups.expt_tp.rank()
        self.providers: dict[str, Provider] = {}
        self.declared: dict[str, Declared] = {}
        self.low_rank_scales: dict[str, float] = {}

    def forward(self, x_TH: torch.Tensor, ends: torch.Tensor, weights_T: torch.Tensor) -> torch.Tensor:
        """Return weighted outputs [T, H], which are partial sums if experts are sharded.

        Args:
            x_TH: rows grouped by expert.
            ends: [experts of this rank] int32, where each expert's rows end; the last at T: rows past it would stay
                unwritten.
            weights_T: the router's weight of each row.
        """
        gate_up = grouped_linear(x_TH, self._operand("gate_up_proj"), ends)
        # The weight is applied where rows are narrow; the last matmul is linear.
        hidden = gated_halves(gate_up, self.activation, weights_T, consume=True)
        return grouped_linear(hidden, self._operand("down_proj"), ends)

    def provide_weight(self, name: Literal["gate_up_proj", "down_proj"], provider: Provider) -> None:
        """Take a weight [experts, out, in] of this rank from a provider; the parameter and its memory are released."""
        self.declared[name] = Declared.of(getattr(self, name))
        self.providers[name] = provider
        self.register_parameter(name, None)

    def add_low_rank(self, name: Literal["gate_up_proj", "down_proj"], rank: int, scale: float) -> None:
        """Add a low-rank pair to each expert: A [experts, rank, in] is random, B [experts, out, rank] is zero.

        The side of the experts' width is sharded like the weight. The other is replicated on each of the ranks of an
        expert, with a partial gradient. A GPU's grouped matmul needs rows of a multiple of 16 bytes: in bf16, a rank
        that is a multiple of 8.
        """
        if name in self.providers:
            a, b = self.declared[name].low_rank_pair(rank, self.providers[name]())
        else:
            weight = getattr(self, name)
            a, b = Declared.of(weight).low_rank_pair(rank, weight)
        self.register_parameter(f"{name}_lora_A", a)
        self.register_parameter(f"{name}_lora_B", b)
        self.low_rank_scales[name] = scale
        for side in (a, b):
            if spec_of(side).tensor_dim is None:  # megatron-core's gradient norm would count its copies
                side.shared = self.expert_tensor_rank != 0  # type: ignore[attr-defined]

    def _operand(self, name: str) -> Operand:
        """Return the weight and low-rank pair of a linear layer; of gate and up, the pair of both together."""
        weight = self.providers[name] if name in self.providers else getattr(self, name)
        if name not in self.low_rank_scales:
            return Operand(weight)
        a, b = getattr(self, f"{name}_lora_A"), getattr(self, f"{name}_lora_B").flatten(1, -2)
        return Operand(weight, None, a, b, self.low_rank_scales[name])


class MoE(torch.nn.Module):
    """A feed-forward layer of experts.

    Where experts are split over ranks the host waits once: sizes of the exchange, and of what is kept for the backward
    pass, are counts of tokens that only the device knows. Recomputation and a rank with all experts never wait.

    Args:
        hidden_size: H.
        moe: configuration of the layer's experts.
        router: module that chooses experts: called with its input [T, H] and which tokens are real, it returns what
            `TopKRouter` does. Its parameters are the layer's `gate`.
        chunk: settings of the pipeline chunk.
        groups: process groups.
    """

    def __init__(
        self,
        hidden_size: int,
        moe: MoEConfig,
        router: torch.nn.Module,
        chunk: ChunkSettings,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__()
        self.top_k = moe.top_k
        self.gate = router
        self.experts = Experts(hidden_size, moe, chunk.mcore_config, groups)
        self.exchange: AllToAll | AllGather | None = None
        if groups.tp_ep.size() > 1:
            gathers = chunk.moe.token_dispatcher_type == "allgather"
            self.exchange = (
                AllGather(moe.num_experts, groups) if gathers else AllToAll(moe.num_experts, moe.top_k, groups)
            )

    def forward(
        self, x_SBH: torch.Tensor, tokens: LocalTokens, router_input: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Routing]:
        """Map [S, B, H] to the same shape, and return where the tokens went.

        Args:
            x_SBH: input of the experts.
            tokens: which of the tokens are real.
            router_input: [S, B, H], input of the router; None for `x_SBH`.
        """
        x_TH = x_SBH.flatten(0, 1)
        weights, chosen, routing = self.gate(
            x_TH if router_input is None else router_input.flatten(0, 1), tokens.is_real
        )
        if tokens.common_length is not None:
            # The added rows choose no expert.
            missing = (0, 0, 0, tokens.common_length - x_TH.shape[0])
            x_TH, weights, chosen = pad(x_TH, missing), pad(weights, missing), pad(chosen, missing)
        if self.exchange is None:
            output = self._on_this_rank(x_TH, weights, chosen)
        else:
            output = self.exchange(x_TH, weights, chosen, self.experts)
        if tokens.common_length is not None:
            output = output[: x_SBH.shape[0] * x_SBH.shape[1]]
        return output.view_as(x_SBH), routing

    def _on_this_rank(self, x_TH: torch.Tensor, weights_TE: torch.Tensor, chosen_TE: torch.Tensor) -> torch.Tensor:
        permutation = expert_permutation(chosen_TE, x_TH.shape[0] * self.top_k)
        rows, row_weights = permute(x_TH, permutation, weights_TE)
        return unpermute(self.experts(rows, permutation.ends, row_weights), permutation)
