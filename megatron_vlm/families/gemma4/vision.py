"""Gemma 4's vision tower, for images and video frames of any size.

Patches of all frames lie in one packed sequence, in the blocks that pooling averages; those of a frame attend to each
other. transformers pads frames to one size and masks the padding, with the same result.

Source: transformers models/gemma4 (`Gemma4VisionModel`).
Shapes: P patches, H vision hidden, N heads, D head dim, T tokens of the language model.
"""

from __future__ import annotations

from typing import cast

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import embedding

from megatron_vlm.families.gemma4.clipped_linear import (
    ClippedColumnParallelLinear,
    ClippedGatedMLP,
    ClippedRowParallelLinear,
    clipped_column_parallel,
)
from megatron_vlm.families.gemma4.config import VisionConfig
from megatron_vlm.layers.linear import Group
from megatron_vlm.layers.norm import RMSNorm, norm_add_and_norm, norm_and_add
from megatron_vlm.layers.patches import PackedImages, PatchPositions
from megatron_vlm.layers.rope import geometric_frequencies
from megatron_vlm.layers.side_by_side import add_side_by_side
from megatron_vlm.model.vision_tower import VisionTowerChunk
from megatron_vlm.parallel.chunk_settings import ChunkSettings
from megatron_vlm.parallel.parameters import declare, normal, ones, zeros
from megatron_vlm.parallel.stage_state import StageState
from vlm_kernels.packed_attention import Segments, packed_attention
from vlm_kernels.rms_norm import rms_norm
from vlm_kernels.rope import RopeTable, qk_norm_rope


def patch_rope(positions: PatchPositions, config: VisionConfig, dtype: torch.dtype) -> RopeTable:
    """Return cosines and sines [P, D / 2]: the first half of a head rotates with the column, the second with the row.

    Each half is a section of its own (`qk_norm_rope`).
    """
    frequencies = geometric_frequencies(config.head_dim // 2, config.rope_theta, positions.row.device)
    angles = torch.cat((positions.column[:, None] * frequencies, positions.row[:, None] * frequencies), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class PatchEmbedder(torch.nn.Module):
    """The projection of patches, and learned embeddings of their columns and rows; replicated.

    The table is 2 to 5 % of the tower; dividing it would need a gather of all patches.
    """

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        size = config.hidden_size
        self.input_proj = torch.nn.Linear(config.patch_features, size, bias=False, dtype=dtype)
        declare(self.input_proj.weight, "filter", normal)
        table = torch.nn.Parameter(torch.empty(2, config.num_positions_per_side, size, dtype=dtype))
        self.position_embedding_table = declare(table, "table", ones)

    def forward(self, pixel_values: torch.Tensor, positions: PatchPositions) -> torch.Tensor:
        """Map [P, patch features] in [0, 1] to [P, H]."""
        patches = (2 * (pixel_values - 0.5)).to(self.input_proj.weight.dtype)
        by_column, by_row = self.position_embedding_table
        places = embedding(positions.column, by_column) + embedding(positions.row, by_row)
        return self.input_proj(patches) + places


class VisionAttention(torch.nn.Module):
    """Attention over the patches of a frame, with norms of queries, keys and values; heads split over the ranks."""

    q_proj: ClippedColumnParallelLinear
    k_proj: ClippedColumnParallelLinear
    v_proj: ClippedColumnParallelLinear

    def __init__(self, config: VisionConfig, mcore_config: TransformerConfig, group: Group) -> None:
        super().__init__()
        self.group, self.head_dim, self.eps, size = group, config.head_dim, config.norm_eps, config.hidden_size
        q_proj, k_proj, v_proj = (
            ClippedColumnParallelLinear(size, size, mcore_config, group, config.clips) for _ in range(3)
        )
        add_side_by_side(self, q_proj=q_proj, k_proj=k_proj, v_proj=v_proj)
        self.o_proj = ClippedRowParallelLinear(size, size, mcore_config, group, config.clips)
        # These act on this rank's heads only.
        self.q_norm, self.k_norm = (
            RMSNorm(config.head_dim, config.norm_eps, False, mcore_config.params_dtype, partial=True) for _ in range(2)
        )

    def forward(self, x_PH: torch.Tensor, rope: RopeTable, frames: Segments) -> torch.Tensor:
        """Map [P, H] to the same shape."""
        projected = clipped_column_parallel(x_PH, (self.q_proj, self.k_proj, self.v_proj), self.group)
        q, k, v = (tensor.unflatten(-1, (-1, self.head_dim)) for tensor in projected)
        v = rms_norm(v, None, self.eps)
        q, k = qk_norm_rope(q, k, rope, q_weight=self.q_norm(), k_weight=self.k_norm(), eps=self.eps, sections=2)
        q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
        attended_NPD = packed_attention(q, k, v, frames, 1.0)
        return self.o_proj(attended_NPD.transpose(0, 1).flatten(1))


class VisionLayer(torch.nn.Module):
    """Attention and feed-forward, each between a norm of its input and a norm of its output.

    These norms act on unsharded activations, so they are replicated with full gradients.
    """

    def __init__(self, config: VisionConfig, mcore_config: TransformerConfig, group: Group) -> None:
        super().__init__()
        norms = [RMSNorm(config.hidden_size, config.norm_eps, False, mcore_config.params_dtype) for _ in range(4)]
        self.input_layernorm, self.post_attention_layernorm = norms[:2]
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norms[2:]
        self.self_attn = VisionAttention(config, mcore_config, group)
        self.mlp = ClippedGatedMLP(config.hidden_size, config.intermediate_size, mcore_config, group, config.clips)

    def forward(self, x_PH: torch.Tensor, rope: RopeTable, frames: Segments) -> torch.Tensor:
        """Map [P, H] to the same shape."""
        attended = self.self_attn(self.input_layernorm(x_PH), rope, frames)
        x_PH, normed = norm_add_and_norm(attended, x_PH, self.post_attention_layernorm, self.pre_feedforward_layernorm)
        return norm_and_add(self.mlp(normed), x_PH, self.post_feedforward_layernorm)


class VisionTower(VisionTowerChunk):
    """The tower, whose heads and feed-forward columns are split over `group`: one rank where images are split instead.

    Args:
        config: configuration of the tower.
        chunk: settings of the pipeline chunk.
        group: process group over which each layer is sharded.
    """

    def __init__(self, config: VisionConfig, chunk: ChunkSettings, group: Group) -> None:
        super().__init__(config, chunk)
        self.config, mcore_config, dtype = config, chunk.tower_mcore_config, chunk.mcore_config.params_dtype
        if chunk.is_first:
            self.patch_embedder = PatchEmbedder(config, dtype)
        self.encoder = torch.nn.Module()
        self.encoder.layers = self.make_layers(lambda: VisionLayer(config, mcore_config, group))
        if chunk.has_embedding and config.standardizes:
            bias, scale = (torch.nn.Parameter(torch.empty(config.hidden_size, dtype=dtype)) for _ in range(2))
            self.std_bias, self.std_scale = declare(bias, "buffer", zeros), declare(scale, "buffer", ones)

    @property
    def layers(self) -> torch.nn.ModuleDict:
        """This chunk's layers."""
        return cast(torch.nn.ModuleDict, self.encoder.layers)

    def start(self, pixels: torch.Tensor, images: PackedImages) -> torch.Tensor:
        """Map [P, patch features] to [P, H]."""
        return self.patch_embedder(pixels, images.positions)

    def layer_inputs(self, images: PackedImages, dtype: torch.dtype) -> tuple[RopeTable, Segments]:
        """Return the rotary table, and frames as segments."""
        return patch_rope(images.positions, self.config, dtype), images.segments

    def finish(self, state: StageState) -> tuple[torch.Tensor]:
        """Return the means of blocks, [T, H], scaled, and standardised where the model does; scaled in fp32.

        The mean itself is rounded to the activations' dtype, as in transformers.
        """
        config, x_PH = self.config, state.hidden
        blocks = x_PH.float().unflatten(0, (-1, config.spatial_merge_size**2))
        pooled = blocks.mean(1).to(x_PH.dtype).float() * config.hidden_size**0.5
        if config.standardizes:
            pooled = (pooled - self.std_bias.float()) * self.std_scale.float()
        return (pooled.to(x_PH.dtype),)
