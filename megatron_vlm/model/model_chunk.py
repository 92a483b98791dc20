"""The base class of every family's pipeline chunk, as megatron-core's schedules need it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule

from megatron_vlm.data.collate import NO_LOSS, MicroBatch
from megatron_vlm.data.media import PIXELS
from megatron_vlm.layers.patches import PackedImages
from megatron_vlm.model.language_model import LanguageModelChunk
from megatron_vlm.model.vision_tower import VisionTowerChunk, tower_boundary
from megatron_vlm.model_configs import VisionLanguageConfig
from megatron_vlm.parallel.chunk_settings import ChunkSettings
from megatron_vlm.parallel.parameters import redeclare
from megatron_vlm.parallel.stage_state import Boundary, StageState, pack, unpack, with_zero_gradient


class ModelChunk(MegatronModule):
    """One pipeline chunk of a model; a family adds `language_model`, its towers, `embed`, and what it carries.

    Args:
        config: configuration of the model.
        chunk: settings of the pipeline chunk.
        groups: process groups.

    Attributes:
        tower_trains: whether the vision tower has anything to train, on whichever chunks it is: gradients of patches
            are computed only then.
    """

    model_type = ModelType.encoder_or_decoder
    # megatron-core must not sum gradients of tied embeddings: `parallel.gradients` does that for all copies alike.
    share_embeddings_and_output_weights = False
    language_model: LanguageModelChunk
    vision_tower: VisionTowerChunk
    projector: torch.nn.Module

    def __init__(self, config: VisionLanguageConfig, chunk: ChunkSettings, groups: ProcessGroupCollection) -> None:
        super().__init__(chunk.mcore_config)
        self.groups, self.vision = groups, config.vision if "vision_tower" in config.parts else None
        self.first_layer, self.end_layer = chunk.num_layers_before, chunk.num_layers_before + len(chunk.layers)
        self.pre_process, self.post_process, self.vp_stage = chunk.is_first, chunk.is_last, chunk.virtual_stage
        self.attention_backend = chunk.attention_backend
        self.has_embedding, self.tower_layers = chunk.has_embedding, chunk.tower_layers
        self.divides_images = chunk.vision_parallelism == "data" and groups.tp.size() > 1
        # Tensor ranks over which each layer of a tower is sharded.
        self.tower_group = groups.single_rank if self.divides_images else groups.tp
        # Tensor and context ranks that each encode some of the images.
        self.image_groups = groups.tp if self.divides_images else groups.single_rank, groups.cp
        # A micro-batch without images skips the tower, or encodes a blank image whose features nobody reads.
        self.always_encodes = chunk.overlapped and self.vision is not None
        self.tower_trains = True
        self.input_tensor: torch.Tensor | None = None

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Return what the next chunk needs, [rows, B, H], or on the last chunk each token's loss in fp32, [B, S]."""
        state = None if self.pre_process else unpack(self._received, self.boundary_before(batch))
        if state is None or self.tower_layers is not None:
            state = self._until_embedded(state, batch)
        state = self.language_model.run(state, batch)
        if self.post_process:
            return self.losses(state, batch)
        return pack(state, self.boundary_after(batch), self.input_tensor)

    @property
    def _received(self) -> torch.Tensor:
        assert self.input_tensor is not None
        return self.input_tensor

    def _until_embedded(self, state: StageState | None, batch: MicroBatch) -> StageState:
        """Run this chunk's part of the vision tower, and begin the sequence on the chunk with the embedding.

        Args:
            state: patches that the tower's layers before left; None on the first chunk.
            batch: the micro-batch.
        """
        images = self.packed_images(batch)
        patches_train = images is not None and self.tower_trains
        if state is not None and not patches_train:
            state = StageState(state.hidden.detach(), {name: tap.detach() for name, tap in state.carried.items()})
        if images is not None:
            state = self.vision_tower(self._pixels(batch, images) if state is None else state, images)
        if self.has_embedding:
            features: list[torch.Tensor] = []
            if images is not None:
                assert state is not None
                features = images.gather(self.image_projector(*self.vision_tower.finish(state)), batch.context)
            state = self.embed(batch, features)
        elif state is None:
            shape, dtype = self.boundary_after(batch).hidden, self.config.params_dtype
            state = StageState(torch.zeros(shape, dtype=dtype, device=batch.labels.device))
        if self.pre_process or patches_train:
            return state
        return replace(state, hidden=with_zero_gradient(state.hidden, self._received))

    def _pixels(self, batch: MicroBatch, images: PackedImages) -> torch.Tensor:
        """Return the pixels that this rank encodes, on its device."""
        assert self.vision is not None
        pixels = batch.media_inputs.get(PIXELS)
        assert (pixels is None) != bool(batch.grids), "pixels belong on the first stage"
        pixels = torch.zeros(self.vision.blank_pixels) if pixels is None else images.take(pixels)
        return pixels.to(images.device, non_blocking=True)

    def packed_images(self, batch: MicroBatch) -> PackedImages | None:
        """Return the images and videos of a micro-batch that this rank encodes; None if none is encoded."""
        if self.vision is None or not (batch.grids or self.always_encodes):
            return None
        return PackedImages.of(self.vision, batch.grids, batch.labels.device, self.image_groups, self.attention_backend)

    def embed(self, batch: MicroBatch, features: Sequence[torch.Tensor]) -> StageState:
        """Return the input of the first decoder layer: tokens and media as one sequence.

        Args:
            batch: the micro-batch.
            features: the projector's features of images and videos [T, H]; empty if none is encoded.
        """
        raise NotImplementedError

    def losses(self, state: StageState, batch: MicroBatch) -> torch.Tensor:
        """Return the loss of every token in fp32, [B, S], from the state that the last decoder layer left.

        The load-balancing loss of experts is included where there is one.
        """
        losses_BS, use = self.language_model.losses(state.hidden, batch), self.language_model.expert_use
        if use is not None and state.scalars is not None:
            losses_BS = use.with_balancing(losses_BS, batch.labels != NO_LOSS, state.scalars)
        return losses_BS

    def boundary_before(self, batch: MicroBatch) -> Boundary:
        """Return what this chunk receives from the one before it."""
        if self.tower_layers is None:
            return self.boundary(self.first_layer, batch)
        return self._tower_boundary(self.tower_layers.start, batch)

    def boundary_after(self, batch: MicroBatch) -> Boundary:
        """Return what this chunk sends to the one after it."""
        if self.tower_layers is None or self.has_embedding:
            return self.boundary(self.end_layer, batch)
        return self._tower_boundary(self.tower_layers.stop, batch)

    def _tower_boundary(self, layer: int, batch: MicroBatch) -> Boundary:
        assert self.vision is not None
        return tower_boundary(self.vision, layer, self.packed_images(batch))

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

    @property
    def image_projector(self) -> torch.nn.Module:
        """The projector of images; a family with several projectors has them as submodules."""
        return self.projector

    def mark_tower(self) -> None:
        """Declare tower and projector of images replicated with partial gradients, where tensor ranks divide images."""
        modules = (self.vision_tower, *((self.image_projector,) if self.has_embedding else ()))
        if self.divides_images:
            for parameter in (parameter for module in modules for parameter in module.parameters()):
                redeclare(parameter, tensor_dim=None, partial=True)
