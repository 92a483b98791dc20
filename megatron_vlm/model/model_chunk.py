"""The base class of every family's pipeline chunk, as megatron-core's schedules need it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule

from megatron_vlm.data.collate import NO_LOSS, MicroBatch
from megatron_vlm.layers.patches import encode_packed
from megatron_vlm.model.language_model import LanguageModelChunk
from megatron_vlm.parallel.chunk_settings import ChunkSettings
from megatron_vlm.parallel.parameters import redeclare
from megatron_vlm.parallel.stage_state import Boundary, StageState, pack, unpack


class ModelChunk(MegatronModule):
    """One pipeline chunk of a model; a family adds `language_model`, its towers, `embed`, and what it carries.

    Args:
        chunk: settings of the pipeline chunk.
        groups: process groups.
        has_vision: whether the model has a vision tower, on whichever stage it is.
    """

    model_type = ModelType.encoder_or_decoder
    # megatron-core must not sum gradients of tied embeddings: `parallel.gradients` does that for all copies alike.
    share_embeddings_and_output_weights = False
    language_model: LanguageModelChunk
    vision_tower: torch.nn.Module
    projector: torch.nn.Module

    def __init__(self, chunk: ChunkSettings, groups: ProcessGroupCollection, has_vision: bool) -> None:
        super().__init__(chunk.mcore_config)
        self.groups = groups
        self.first_layer, self.end_layer = chunk.num_layers_before, chunk.num_layers_before + len(chunk.layers)
        self.pre_process, self.post_process, self.vp_stage = chunk.is_first, chunk.is_last, chunk.virtual_stage
        self.divides_images = chunk.vision_parallelism == "data" and groups.tp.size() > 1
        # Ranks over which each layer of a tower is sharded.
        self.tower_group = groups.single_rank if self.divides_images else groups.tp
        # A micro-batch without images skips the tower, or encodes a blank image whose features nobody reads.
        self.always_encodes = chunk.overlapped and has_vision
        self.input_tensor: torch.Tensor | None = None

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Return what the next chunk needs, [rows, B, H], or on the last chunk each token's loss in fp32, [B, S]."""
        if self.pre_process:
            state = self.embed(batch)
        else:
            assert self.input_tensor is not None
            state = unpack(self.input_tensor, self.boundary(self.first_layer, batch))
        state = self.language_model.run(state, batch)
        if self.post_process:
            return self.losses(state, batch)
        return pack(state, self.boundary(self.end_layer, batch), self.input_tensor)

    def embed(self, batch: MicroBatch) -> StageState:
        """Return the input of the first decoder layer: tokens and media as one sequence."""
        raise NotImplementedError

    def losses(self, state: StageState, batch: MicroBatch) -> torch.Tensor:
        """Return the loss of every token in fp32, [B, S], from the state that the last decoder layer left.

        The load-balancing loss of experts is included where there is one.
        """
        losses_BS, use = self.language_model.losses(state.hidden, batch), self.language_model.expert_use
        if use is not None and state.scalars is not None:
            losses_BS = use.with_balancing(losses_BS, batch.labels != NO_LOSS, state.scalars)
        return losses_BS

    def boundary(self, layer: int, batch: MicroBatch) -> Boundary:
        """Return what is sent to the chunk that begins with a decoder layer (global id).

        By default, that is hidden states, and the load-balancing sum of experts.
        """
        rows, length = batch.input_ids.shape
        if self.config.sequence_parallel:
            length //= self.groups.tp.size()
        use = self.language_model.expert_use
        return Boundary((length, rows, self.config.hidden_size), num_scalars=0 if use is None else use.num_carried)

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Receive what the previous chunk sent (called by the schedule)."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def to_sequence_first(self, x_BSH: torch.Tensor) -> torch.Tensor:
        """Transpose [B, S, H] to [S, B, H], this rank's shard of S under sequence parallelism."""
        x_SBH = x_BSH.transpose(0, 1).contiguous()
        if self.config.sequence_parallel:
            x_SBH = scatter_to_sequence_parallel_region(x_SBH, group=self.groups.tp)
        return x_SBH

    def first_state(self, x_BSH: torch.Tensor, carried: Mapping[str, torch.Tensor] | None = None) -> StageState:
        """Return the state before the first layer.

        Args:
            x_BSH: tokens and media as one sequence.
            carried: tensors for later layers.
        """
        x_SBH, use = self.to_sequence_first(x_BSH), self.language_model.expert_use
        if use is not None and self.groups.tp_ep.size() > 1 and torch.is_grad_enabled() and not x_SBH.requires_grad:
            # Nothing below the experts trains here; on a rank with images something may, and its backward pass
            # exchanges tokens, in which this rank must take part.
            x_SBH.requires_grad_()
        return StageState(x_SBH, carried or {}, use.start(x_BSH.device) if use is not None else None)

    def packed_features(self, batch: MicroBatch) -> list[torch.Tensor]:
        """Return the projector's features of a micro-batch's packed images and videos; empty if none is encoded."""
        if not (batch.grids or self.always_encodes):
            return []
        pixels = batch.media_inputs.get("pixel_values")
        divided_over = self.groups.tp if self.divides_images else None
        return encode_packed(self.vision_tower, self.image_projector, pixels, batch.grids, divided_over)

    @property
    def image_projector(self) -> torch.nn.Module:
        """The projector of images; a family with several projectors has them as submodules."""
        return self.projector

    def mark_tower(self, *towers: torch.nn.Module) -> None:
        """Declare towers replicated with partial gradients, where each tensor rank encodes only some of the images."""
        if self.divides_images:
            for parameter in (parameter for tower in towers for parameter in tower.parameters()):
                redeclare(parameter, tensor_dim=None, partial=True)
