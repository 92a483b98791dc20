"""Settings of a pipeline chunk: which part of a model it is, and how it is computed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True)
class MoESettings:
    """How tokens reach experts, and how the load of experts is balanced; unused by a model without experts.

    Attributes:
        token_dispatcher_type: tokens are sent to their experts (alltoall), or every rank gets all tokens and keeps
            those of its experts (allgather).
        load_balancing: definition of the auxiliary loss; see `layers.load_balancing`.
        aux_loss_coeff: weight of the auxiliary loss.
    """

    token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    load_balancing: Literal["none", "transformers", "megatron"] = "none"
    aux_loss_coeff: float = 1e-3


@dataclass(frozen=True)
class LossSettings:
    """How the loss is computed.

    Attributes:
        chunk_bytes: most memory for logits, in bytes.
        z_loss_coeff: factor on the square of each token's log-sum-exp; 0 for none.
    """

    chunk_bytes: int = 768 * 2**20
    z_loss_coeff: float = 0.0


@dataclass(frozen=True)
class ChunkSettings:
    """The settings from which a family builds one pipeline chunk.

    Attributes:
        layers: global ids of its decoder layers.
        num_layers_before: number of decoder layers in all chunks before it.
        is_first: whether no chunk is before it; images enter there.
        is_last: whether it holds the final norm and the head.
        virtual_stage: its index among this rank's chunks; None without virtual stages.
        mcore_config: megatron-core settings of the language model.
        has_embedding: whether it holds the embedding, the projector and an audio tower.
        tower_layers: global ids of the vision tower's layers that it holds; None where it holds no part of a tower.
        recompute: which activations are computed again in the backward pass.
        vision_parallelism: whether tensor ranks split the layers of the vision tower (tensor) or the images (data).
        moe: settings of mixture-of-experts layers.
        loss: settings of the loss.
        overlapped: whether gradients or parameters are exchanged while the model runs, in the order in which it uses
            them. Every data rank must then run every layer, also towers without input: otherwise exchanges would not
            match.
    """

    layers: tuple[int, ...]
    num_layers_before: int
    is_first: bool
    is_last: bool
    virtual_stage: int | None
    mcore_config: TransformerConfig
    has_embedding: bool = True
    tower_layers: range | None = None
    recompute: Literal["none", "selective", "full"] = "none"
    vision_parallelism: Literal["tensor", "data"] = "tensor"
    moe: MoESettings = field(default_factory=MoESettings)
    loss: LossSettings = field(default_factory=LossSettings)
    overlapped: bool = False

    @cached_property
    def tower_mcore_config(self) -> TransformerConfig:
        """`mcore_config` for towers, whose sequences are not sharded."""
        return dataclasses.replace(self.mcore_config, sequence_parallel=False)
