"""How the experts of a pipeline chunk are used: counts for the metrics, and the load-balancing loss.

Shapes: E experts, B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm.layers.load_balancing import LoadBalancing
from megatron_vlm.layers.moe import LocalTokens, Routing
from megatron_vlm.model_configs import DecoderLayerConfig
from megatron_vlm.parallel.chunk_settings import ChunkSettings


class ExpertUse:
    """Adds up what the layers with experts report, over the micro-batches of a step.

    Args:
        layers: configurations of all decoder layers of the model, at least one of which has experts; all alike.
        chunk: settings of the pipeline chunk.
        groups: process groups, over those of tensor and context ranks of which tokens are split.
    """

    def __init__(
        self, layers: Sequence[DecoderLayerConfig], chunk: ChunkSettings, groups: ProcessGroupCollection
    ) -> None:
        experts = {index: layer.moe for index, layer in enumerate(layers) if layer.moe is not None}
        assert len({*experts.values()}) == 1, "layers differ in their experts"
        moe = next(iter(experts.values()))
        self.num_experts, self.rows = moe.num_experts, {layer: row for row, layer in enumerate(experts)}
        self.balancing = (
            None
            if chunk.moe.load_balancing == "none"
            else LoadBalancing(
                chunk.moe.load_balancing,
                chunk.moe.aux_loss_coeff,
                len(experts),
                moe.num_experts,
                moe.top_k,
                groups.tp,
                groups.cp,
            )
        )
        self.reset()

    def reset(self) -> None:
        """Forget all counts."""
        self.tokens: dict[int, torch.Tensor] = {}
        self.balance: torch.Tensor | None = None

    @property
    def num_carried(self) -> int:
        """Number of scalars that a stage sends to the next."""
        return 0 if self.balancing is None else self.balancing.size

    def start(self, device: torch.device) -> torch.Tensor | None:
        """Return the load-balancing sum before the first layer; None where there is no such loss."""
        return None if self.balancing is None else torch.zeros(self.num_carried, device=device)

    def add(
        self, layer: int, routing: Routing, local: LocalTokens, carried: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Count one layer's tokens of a micro-batch, and return the load-balancing sum that includes the layer."""
        counted = self.tokens.get(layer)
        # Count in fp64: fp32 would stop counting at 16 million.
        tokens = routing.tokens.double()
        self.tokens[layer] = tokens if counted is None else counted + tokens
        if self.balancing is None or carried is None:
            return None
        return carried + self.balancing.of_layer(routing, local.num_real)

    def with_balancing(
        self, losses_BS: torch.Tensor, has_label_BS: torch.Tensor, carried: torch.Tensor
    ) -> torch.Tensor:
        """Return token losses with the same values, through which the load-balancing loss sends its gradient.

        Every label token has the weight of the micro-batch's load-balancing loss, so that a global batch weights its
        micro-batches by their label tokens, as it does their mean losses.
        """
        assert self.balancing is not None
        loss = self.balancing.loss(carried)
        balance = loss.detach().double() * has_label_BS.sum()
        self.balance = balance if self.balance is None else self.balance + balance
        return losses_BS + has_label_BS * (self.balancing.coefficient * (loss - loss.detach()))
