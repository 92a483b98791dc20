"""Which part of a model a pipeline chunk is, and how it is held."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True)
class MoESettings:
    """How experts are reached and kept busy; means nothing to a model without experts.

    Attributes:
        token_dispatcher_type: megatron-core's dispatcher: tokens go to their experts (alltoall), or every rank sees all
            tokens and keeps its experts' (allgather).
        load_balancing: definition of the auxiliary loss; see `layers.load_balancing`.
        aux_loss_coeff: its weight.
    """

    token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    load_balancing: Literal["none", "transformers", "megatron"] = "none"
    aux_loss_coeff: float = 1e-3


@dataclass(frozen=True)
class LossSettings:
    """How the loss is computed.

    Attributes:
        chunk_bytes: most memory for logits.
        z_loss_coeff: factor on the square of each token's log-sum-exp; 0 for none.
    """

    chunk_bytes: int = 768 * 2**20
    z_loss_coeff: float = 0.0


@dataclass(frozen=True)
class ChunkSettings:
    """What a family needs to build one pipeline chunk.

    Attributes:
        layers: global ids of its decoder layers.
        num_layers_before: decoder layers of all chunks before it.
        is_first: holds the embedding and the towers.
        is_last: holds the final norm and the head.
        virtual_stage: its place among this rank's chunks; None without virtual stages.
        mcore_config: megatron-core settings of the language model.
        recompute: activations computed again in the backward pass.
        vision_parallelism: how the tensor ranks share the vision tower.
        moe: how experts are reached and kept busy.
        loss: how it is computed.
        overlapped: gradients or parameters are exchanged while the model runs, in the order in which it comes to them.
            Every data rank must then run every layer, towers without input included: exchanges would not match.
    """

    layers: tuple[int, ...]
    num_layers_before: int
    is_first: bool
    is_last: bool
    virtual_stage: int | None
    mcore_config: TransformerConfig
    recompute: Literal["none", "selective", "full"] = "none"
    vision_parallelism: Literal["tensor", "data"] = "tensor"
    moe: MoESettings = field(default_factory=MoESettings)
    loss: LossSettings = field(default_factory=LossSettings)
    overlapped: bool = False

    @cached_property
    def tower_mcore_config(self) -> TransformerConfig:
        """`mcore_config` for towers, whose sequences are not divided."""
        return dataclasses.replace(self.mcore_config, sequence_parallel=False)
