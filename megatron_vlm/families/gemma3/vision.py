"""Gemma 3's vision encoder: the SigLIP tower and the projector into the language model.

Source: transformers models/siglip (vision model without pooling head) and `Gemma3MultiModalProjector`.
Shapes: I images, P patches of all images, H vision hidden, N heads, D head dim, T soft tokens of all images.
"""

from __future__ import annotations

from typing import cast

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import avg_pool2d, scaled_dot_product_attention

from megatron_vlm.families.gemma3.config import VisionConfig
from megatron_vlm.layers.linear import ColumnParallelLinear, Group, RowParallelLinear, column_parallel
from megatron_vlm.layers.mlp import MLP
from megatron_vlm.layers.norm import LayerNorm, RMSNorm
from megatron_vlm.layers.patches import PackedImages, PatchProjection
from megatron_vlm.layers.side_by_side import add_side_by_side
from megatron_vlm.model.vision_tower import VisionTowerChunk
from megatron_vlm.parallel.chunk_settings import ChunkSettings
from megatron_vlm.parallel.parameters import declare, normal
from megatron_vlm.parallel.stage_state import StageState


class VisionEmbeddings(torch.nn.Module):
    """Patch projection plus learned positions; replicated: 1 % of the tower, and sharding would gather activations."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        side, patch = config.image_size // config.patch_size, config.patch_size
        self.patch_embedding = PatchProjection(
            (config.num_channels, patch, patch), config.hidden_size, dtype, bias=True
        )
        self.position_embedding = torch.nn.Embedding(side * side, config.hidden_size, dtype=dtype)
        declare(self.position_embedding.weight, "table", normal)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map [I, channels, height, width] to [I, patches, H]."""
        weight = self.patch_embedding.weight
        patches = pixels.unfold(2, weight.shape[2], weight.shape[2]).unfold(3, weight.shape[3], weight.shape[3])
        # One copy rounds and brings each patch together.
        patches = patches.permute(0, 2, 3, 1, 4, 5).to(weight.dtype, memory_format=torch.contiguous_format)
        embedded = self.patch_embedding(patches.flatten(3).flatten(1, 2))
        positions = torch.arange(self.position_embedding.num_embeddings, device=pixels.device)
        return embedded + self.position_embedding(positions)


class VisionAttention(torch.nn.Module):
    """Full attention over the patches of an image; heads split over the tensor ranks."""

    q_proj: ColumnParallelLinear
    k_proj: ColumnParallelLinear
    v_proj: ColumnParallelLinear

    def __init__(self, config: VisionConfig, mcore_config: TransformerConfig, group: Group) -> None:
        super().__init__()
        self.group, self.head_dim = group, config.hidden_size // config.num_attention_heads
        size = config.hidden_size
        q_proj, k_proj, v_proj = (ColumnParallelLinear(size, size, mcore_config, group, bias=True) for _ in range(3))
        add_side_by_side(self, q_proj=q_proj, k_proj=k_proj, v_proj=v_proj)
        self.out_proj = RowParallelLinear(size, size, mcore_config, group, bias=True)

    def forward(self, x_PH: torch.Tensor, num_images: int) -> torch.Tensor:
        """Map [P, H] to the same shape."""
        projected = column_parallel(x_PH, (self.q_proj, self.k_proj, self.v_proj), self.group, False)
        q, k, v = (tensor.view(num_images, -1, *tensor.shape[1:]) for tensor in projected)
        q, k, v = (tensor.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for tensor in (q, k, v))
        attended_INPD = scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5)
        return self.out_proj(attended_INPD.transpose(1, 2).flatten(2).flatten(0, 1))


class VisionLayer(torch.nn.Module):
    """A pre-norm encoder layer."""

    def __init__(self, config: VisionConfig, mcore_config: TransformerConfig, group: Group) -> None:
        super().__init__()
        size = config.hidden_size
        self.layer_norm1, self.layer_norm2 = (
            LayerNorm(size, config.norm_eps, mcore_config.params_dtype) for _ in range(2)
        )
        self.self_attn = VisionAttention(config, mcore_config, group)
        self.mlp = MLP((size, config.intermediate_size, size), ("fc1", "fc2"), "tanh", mcore_config, group)

    def forward(self, x_PH: torch.Tensor, num_images: int) -> torch.Tensor:
        """Map [P, H] to the same shape."""
        x_PH = x_PH + self.self_attn(self.layer_norm1(x_PH), num_images)
        return x_PH + self.mlp(self.layer_norm2(x_PH))


class VisionTower(VisionTowerChunk):
    """SigLIP, whose heads and feed-forward columns are split over `group`: one rank where images are split instead.

    Args:
        config: configuration of the tower.
        chunk: settings of the pipeline chunk.
        group: process group over which each layer is sharded.
    """

    def __init__(self, config: VisionConfig, chunk: ChunkSettings, group: Group) -> None:
        super().__init__(config, chunk)
        mcore_config = chunk.tower_mcore_config
        if chunk.is_first:
            self.embeddings = VisionEmbeddings(config, mcore_config.params_dtype)
        self.encoder = torch.nn.Module()
        self.encoder.layers = self.make_layers(lambda: VisionLayer(config, mcore_config, group))
        if chunk.has_embedding:
            self.post_layernorm = LayerNorm(config.hidden_size, config.norm_eps, mcore_config.params_dtype)

    @property
    def layers(self) -> torch.nn.ModuleDict:
        """This chunk's layers."""
        return cast(torch.nn.ModuleDict, self.encoder.layers)

    def start(self, pixels: torch.Tensor, images: PackedImages) -> torch.Tensor:
        """Map [I, channels, height, width] to [P, H]."""
        return self.embeddings(pixels).flatten(0, 1)

    def layer_inputs(self, images: PackedImages, dtype: torch.dtype) -> tuple[int]:
        """Return the number of images."""
        return (len(images.frames),)

    def finish(self, state: StageState) -> tuple[torch.Tensor]:
        """Return the norm of the last layer's output."""
        return (self.post_layernorm(state.hidden),)


class Projector(torch.nn.Module):
    """A projector that average-pools patches into soft tokens and maps them to the language model's width.

    Columns of its linear map are split over `group`.

    The weight is stored [in, out], unlike a linear layer's.
    """

    def __init__(self, config: VisionConfig, out_size: int, dtype: torch.dtype, group: Group) -> None:
        super().__init__()
        self.group, self.pool_size = group, config.spatial_merge_size
        self.grid = config.blank_frame[1:]
        weight = torch.nn.Parameter(torch.empty(config.hidden_size, out_size // group.size(), dtype=dtype))
        self.mm_input_projection_weight = declare(weight, "matrix", normal, tensor_dim=1)
        self.mm_soft_emb_norm = RMSNorm(config.hidden_size, config.norm_eps, zero_centered=True, dtype=dtype)

    def forward(self, x_PH: torch.Tensor) -> list[torch.Tensor]:
        """Map vision features [P, H] to soft tokens [T, text hidden] of all images."""
        grid = x_PH.unflatten(0, (-1, *self.grid)).permute(0, 3, 1, 2)
        pooled_TH = avg_pool2d(grid, self.pool_size).flatten(2).transpose(1, 2).flatten(0, 1)
        normed = copy_to_tensor_model_parallel_region(self.mm_soft_emb_norm(pooled_TH), group=self.group)
        projected = torch.matmul(normed, self.mm_input_projection_weight)
        return [gather_from_tensor_model_parallel_region(projected, group=self.group)]
