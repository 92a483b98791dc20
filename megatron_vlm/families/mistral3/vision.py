"""Mistral3's vision encoder: the Pixtral tower for images of any size, and the projector into the language model.

Patches of all images lie in one packed sequence, in blocks that the projector merges; those of an image attend to each
other. transformers encodes them in raster order, with the same result: only their positions distinguish patches.

Source: transformers models/pixtral (`PixtralVisionModel`) and `Mistral3MultiModalProjector`.
Shapes: P patches, H vision hidden, N heads, D head dim, T tokens of the language model.
"""

from __future__ import annotations

from typing import cast

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import gelu

from megatron_vlm.families.mistral3.config import VisionConfig
from megatron_vlm.layers.linear import ColumnParallelLinear, Group, RowParallelLinear, column_parallel
from megatron_vlm.layers.mlp import GatedMLP
from megatron_vlm.layers.norm import RMSNorm, add_and_norm
from megatron_vlm.layers.patches import PackedImages, PatchPositions, PatchProjection
from megatron_vlm.layers.rope import geometric_frequencies
from megatron_vlm.layers.side_by_side import add_side_by_side
from megatron_vlm.model.vision_tower import VisionTowerChunk
from megatron_vlm.parallel.chunk_settings import ChunkSettings
from megatron_vlm.parallel.parameters import declare, normal
from vlm_kernels.packed_attention import Segments, packed_attention
from vlm_kernels.rope import RopeTable, qk_norm_rope


def patch_rope(positions: PatchPositions, config: VisionConfig, dtype: torch.dtype) -> RopeTable:
    """Return cosines and sines [P, D / 2]: even frequencies rotate with the row, odd ones with the column."""
    head_dim = config.hidden_size // config.num_attention_heads
    frequencies = geometric_frequencies(head_dim, config.rope_theta, positions.row.device)
    by_row, by_column = positions.row[:, None] * frequencies[0::2], positions.column[:, None] * frequencies[1::2]
    angles = torch.cat((by_row, by_column), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class VisionAttention(torch.nn.Module):
    """Attention over the patches of an image; heads split over the tensor ranks."""

    q_proj: ColumnParallelLinear
    k_proj: ColumnParallelLinear
    v_proj: ColumnParallelLinear

    def __init__(self, config: VisionConfig, mcore_config: TransformerConfig, group: Group) -> None:
        super().__init__()
        self.group, self.head_dim = group, config.hidden_size // config.num_attention_heads
        size = config.hidden_size
        q_proj, k_proj, v_proj = (ColumnParallelLinear(size, size, mcore_config, group) for _ in range(3))
        add_side_by_side(self, q_proj=q_proj, k_proj=k_proj, v_proj=v_proj)
        self.o_proj = RowParallelLinear(size, size, mcore_config, group)

    def forward(self, x_PH: torch.Tensor, rope: RopeTable, images: Segments) -> torch.Tensor:
        """Map [P, H] to the same shape."""
        projected = column_parallel(x_PH, (self.q_proj, self.k_proj, self.v_proj), self.group, False)
        q, k, v = (tensor.unflatten(-1, (-1, self.head_dim)) for tensor in projected)
        # Rotation keeps neither queries nor keys; values that are views would keep the projections of both.
        q, k, v = (tensor.transpose(0, 1) for tensor in (*qk_norm_rope(q, k, rope), v.contiguous()))
        attended_NPD = packed_attention(q, k, v, images, self.head_dim**-0.5)
        return self.o_proj(attended_NPD.transpose(0, 1).flatten(1))


class VisionLayer(torch.nn.Module):
    """A pre-norm layer; its norms act on unsharded activations, so they are replicated with full gradients."""

    def __init__(self, config: VisionConfig, mcore_config: TransformerConfig, group: Group) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = (_norm(config, mcore_config) for _ in range(2))
        self.attention = VisionAttention(config, mcore_config, group)
        self.feed_forward = GatedMLP(
            config.hidden_size, config.intermediate_size, config.activation, mcore_config, group
        )

    def forward(self, x_PH: torch.Tensor, rope: RopeTable, images: Segments) -> torch.Tensor:
        """Map [P, H] to the same shape."""
        attended = self.attention(self.attention_norm(x_PH), rope, images)
        x_PH, normed = add_and_norm(attended, x_PH, self.ffn_norm)
        return x_PH + self.feed_forward(normed)


def _norm(config: VisionConfig, mcore_config: TransformerConfig) -> RMSNorm:
    return RMSNorm(config.hidden_size, config.norm_eps, zero_centered=False, dtype=mcore_config.params_dtype)


class VisionTower(VisionTowerChunk):
    """Pixtral, whose heads and feed-forward columns are split over `group`: one rank where images are split instead.

    The patch projection and norms are replicated: they are under 0.2 % of the tower.

    Args:
        config: configuration of the tower.
        chunk: settings of the pipeline chunk.
        group: process group over which each layer is sharded.
    """

    def __init__(self, config: VisionConfig, chunk: ChunkSettings, group: Group) -> None:
        super().__init__(config, chunk)
        self.config, mcore_config = config, chunk.tower_mcore_config
        if chunk.is_first:
            kernel = (config.num_channels, config.patch_size, config.patch_size)
            self.patch_conv = PatchProjection(kernel, config.hidden_size, mcore_config.params_dtype, bias=False)
            self.ln_pre = _norm(config, mcore_config)
        self.transformer = torch.nn.Module()
        self.transformer.layers = self.make_layers(lambda: VisionLayer(config, mcore_config, group))

    @property
    def layers(self) -> torch.nn.ModuleDict:
        """This chunk's layers."""
        return cast(torch.nn.ModuleDict, self.transformer.layers)

    def start(self, pixels: torch.Tensor, images: PackedImages) -> torch.Tensor:
        """Map [P, patch features] to [P, H]."""
        return self.ln_pre(self.patch_conv(pixels))

    def layer_inputs(self, images: PackedImages, dtype: torch.dtype) -> tuple[RopeTable, Segments]:
        """Return the rotary table, and images as segments."""
        return patch_rope(images.positions, self.config, dtype), images.segments


class PatchMerger(torch.nn.Module):
    """A layer that merges each block of patches into one vector of the tower's width; replicated: 1 % of the tower."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.block = config.spatial_merge_size**2
        joined = config.hidden_size * self.block
        self.merging_layer = torch.nn.Linear(joined, config.hidden_size, bias=False, dtype=dtype)
        declare(self.merging_layer.weight, "matrix", normal)

    def forward(self, x_PH: torch.Tensor) -> torch.Tensor:
        """Map [P, H] to [T, H]; the values of one channel of all patches of a block are contiguous."""
        channels_first = x_PH.unflatten(0, (-1, self.block)).transpose(1, 2)
        return self.merging_layer(channels_first.flatten(1))


class Projector(torch.nn.Module):
    """A projector: norm, merging of blocks, and two linear layers, the first column-parallel, the second row-parallel.

    Args:
        config: configuration of the tower.
        mcore_config: megatron-core settings without sequence parallelism.
        group: process group over which the linear layers are sharded.
    """

    def __init__(self, config: VisionConfig, mcore_config: TransformerConfig, group: Group) -> None:
        super().__init__()
        self.group, out_size, bias = group, config.out_hidden_size, config.projector_bias
        self.norm = RMSNorm(
            config.hidden_size, config.projector_norm_eps, zero_centered=False, dtype=mcore_config.params_dtype
        )
        self.patch_merger = PatchMerger(config, mcore_config.params_dtype)
        self.linear_1 = ColumnParallelLinear(config.hidden_size, out_size, mcore_config, group, bias)
        self.linear_2 = RowParallelLinear(out_size, out_size, mcore_config, group, bias)

    def forward(self, x_PH: torch.Tensor) -> list[torch.Tensor]:
        """Map the tower's output to features [T, text hidden]."""
        merged = self.patch_merger(self.norm(x_PH))
        (hidden,) = column_parallel(merged, (self.linear_1,), self.group, False)
        return [self.linear_2(gelu(hidden))]
