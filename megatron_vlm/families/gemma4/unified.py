"""How images enter Gemma 4 12B, which has no tower: patches of pixels become tokens by linear layers and norms.

Source: transformers models/gemma4_unified (`Gemma4UnifiedVisionEmbedder`).
Shapes: P patches, one for each token, E width of their embedding.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch.nn.functional import embedding

from megatron_vlm.families.gemma4.config import PixelEmbedderConfig
from megatron_vlm.layers.linear import ColumnParallelLinear, Group, column_parallel
from megatron_vlm.layers.norm import LayerNorm
from megatron_vlm.layers.patches import PackedImages
from megatron_vlm.model.vision_tower import VisionTowerChunk
from megatron_vlm.parallel.chunk_settings import ChunkSettings
from megatron_vlm.parallel.parameters import declare, normal, redeclare


class PixelEmbedder(VisionTowerChunk):
    """A tower without layers, which embeds patches and their places.

    Rows of the linear map are split over `group`, which gathers their outputs for the norm behind them.

    Args:
        config: configuration of the embedder.
        chunk: settings of the pipeline chunk.
        group: process group over which the linear map is sharded.
    """

    def __init__(self, config: PixelEmbedderConfig, chunk: ChunkSettings, group: Group) -> None:
        super().__init__(config, chunk)
        self.group, mcore_config = group, chunk.tower_mcore_config
        size, dtype = config.hidden_size, mcore_config.params_dtype
        self.patch_ln1 = LayerNorm(config.patch_features, config.norm_eps, dtype)
        self.patch_dense = ColumnParallelLinear(config.patch_features, size, mcore_config, group, bias=True)
        redeclare(self.patch_dense.weight, kind="filter")  # type: ignore[arg-type]
        self.patch_ln2 = LayerNorm(size, config.norm_eps, dtype)
        places = torch.nn.Parameter(torch.empty(config.num_positions_per_side, 2, size, dtype=dtype))
        self.pos_embedding = declare(places, "table", normal)
        self.pos_norm = LayerNorm(size, config.norm_eps, dtype)

    def start(self, pixels: torch.Tensor, images: PackedImages) -> torch.Tensor:
        """Map pixels in [0, 1], [P, patch features], to [P, E]."""
        normed = self.patch_ln1(pixels.to(self.pos_embedding.dtype))
        (part,) = column_parallel(normed, (self.patch_dense,), self.group, False)
        x_PE = self.patch_ln2(gather_from_tensor_model_parallel_region(part, group=self.group))
        positions, (by_column, by_row) = images.positions, self.pos_embedding.unbind(1)
        return self.pos_norm(x_PE + (embedding(positions.column, by_column) + embedding(positions.row, by_row)))
