"""The auxiliary loss that keeps experts evenly used, in both definitions in use.

f_e is the fraction of real tokens that chose expert e, P_e the mean of its probability before the choice.

- "transformers": one value over all layers, E * sum_e f_e P_e, with f and P averaged over the layers first. A balanced
  model has the value top_k. Source: `load_balancing_loss_func` of transformers' mixture-of-experts models.
- "megatron": E / top_k * sum_e f_e P_e for every layer, added up. A balanced layer has the value 1. Source:
  `switch_load_balancing_loss_func` of megatron-core.

Both are taken over a micro-batch, and a global batch weights its micro-batches by their label tokens. What later
pipeline stages need of earlier ones is sent with the hidden states as a sum of a few scalars. In bf16 the gradient that
comes back to earlier stages has the precision of bf16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)

from megatron_vlm.layers.moe import Routing


@dataclass(frozen=True)
class LoadBalancing:
    """How a model's load-balancing loss is added up.

    Attributes:
        definition: "transformers" or "megatron"; see the module's docstring.
        coefficient: weight of the loss beside the language modelling loss.
        num_layers: layers with experts in the full model.
        num_experts: experts of each layer.
        top_k: experts per token.
        tensor_group: the tensor-parallel process group, each rank of which has a shard of the tokens (sequence
            parallelism) or all (one rank).
        context_group: the context-parallel process group, each rank of which has a shard of tokens and labels.
    """

    definition: str
    coefficient: float
    num_layers: int
    num_experts: int
    top_k: int
    tensor_group: torch.distributed.ProcessGroup
    context_group: torch.distributed.ProcessGroup

    @property
    def size(self) -> int:
        """Number of elements of the sum over layers."""
        return 2 * self.num_experts if self.definition == "transformers" else 1

    def of_layer(self, routing: Routing, num_real: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of what a layer adds to the sum, [size] fp32.

        Args:
            routing: where this rank's tokens went.
            num_real: number of tokens of the full micro-batch that are not padding.
        """
        count = num_real.clamp(min=1)
        if self.definition == "transformers":
            return torch.cat((routing.tokens, routing.probabilities)) / count
        tokens = routing.tokens
        for group in (self.tensor_group, self.context_group):
            if group.size() > 1:
                tokens = tokens.clone()
                torch.distributed.all_reduce(tokens, group=group)
        return self._product(tokens / count, routing.probabilities / count) / self.top_k

    def loss(self, total: torch.Tensor) -> torch.Tensor:
        """Return the loss, without its coefficient, from the sum over all layers.

        Its gradient is the same on tensor ranks, which have the same labels, and is summed over context ranks.
        """
        total = total.clone()  # megatron-core adds up in place
        for group in (self.tensor_group, self.context_group):
            total = reduce_from_tensor_model_parallel_region(total, group=group)
        total = copy_to_tensor_model_parallel_region(total, group=self.context_group)
        if self.definition == "megatron":
            return total.squeeze(0)
        fractions, probabilities = (total / self.num_layers).chunk(2)
        return self._product(fractions.detach(), probabilities).squeeze(0)

    def _product(self, fractions: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        return self.num_experts * (fractions * probabilities).sum(0, keepdim=True)
