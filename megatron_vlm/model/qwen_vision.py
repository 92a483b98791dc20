"""The vision encoder of Qwen3-VL and its successors: images and videos of any size, and mergers into the text.

Patches of all images lie in one packed sequence, in blocks of merge x merge that make one token of the language model
each; the patches of one frame attend to each other, whatever image or video it belongs to.

Source: transformers models/qwen3_vl (`Qwen3VLVisionModel`).
Shapes: P patches, H vision hidden, N heads, D head dim, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import embedding_bag

from megatron_vlm.layers.linear import Group, RowParallelLinear, SectionedColumnParallelLinear, column_parallel
from megatron_vlm.layers.mlp import MLP
from megatron_vlm.layers.norm import LayerNorm
from megatron_vlm.layers.patches import PackedImages, PatchPositions, PatchProjection
from megatron_vlm.layers.rope import geometric_frequencies
from megatron_vlm.model.vision_tower import VisionTowerChunk, tap_name
from megatron_vlm.model_configs import TowerConfig
from megatron_vlm.parallel.chunk_settings import ChunkSettings
from megatron_vlm.parallel.parameters import declare, normal
from megatron_vlm.parallel.stage_state import StageState
from vlm_kernels.packed_attention import Segments, packed_attention
from vlm_kernels.rope import RopeTable, qk_norm_rope

ROPE_THETA = 10_000.0
MLP_NAMES = ("linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class QwenVisionConfig(TowerConfig):
    """The vision tower and its mergers into the language model's width.

    Attributes:
        num_positions_per_side: side of the square table of learned positions.
        deepstack_layers: tower layers whose outputs are DeepStack features, one for each of the first decoder layers.
    """

    patch_size: int
    temporal_patch_size: int
    num_positions_per_side: int
    out_hidden_size: int
    deepstack_layers: tuple[int, ...]
    norm_eps: float = 1e-6

    @property
    def patch_features(self) -> int:
        """Number of values in one flattened patch."""
        return self.num_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def layer_weights(self) -> int:
        """Number of a layer's weights that each patch is multiplied with."""
        return 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers whose outputs become DeepStack features."""
        return self.deepstack_layers

    @property
    def projector_hidden_size(self) -> int:
        """Width between the two linear layers of a merger."""
        return self.hidden_size * self.spatial_merge_size**2


def patch_rope(positions: PatchPositions, head_dim: int) -> RopeTable:
    """Return cosines and sines [P, D / 2] in fp32: the first half rotates with the row, the second with the column."""
    frequencies = geometric_frequencies(head_dim // 2, ROPE_THETA, positions.row.device)
    angles = torch.cat([axis.float()[:, None] * frequencies for axis in (positions.row, positions.column)], dim=-1)
    return angles.cos(), angles.sin()


class PositionTable(torch.nn.Module):
    """A square table of learned positions, interpolated over each frame; replicated, as it is under 1 % of a tower."""

    def __init__(self, config: QwenVisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.side = config.num_positions_per_side
        weight = torch.nn.Parameter(torch.empty(self.side**2, config.hidden_size, dtype=dtype))
        self.weight = declare(weight, "table", normal)

    def forward(self, positions: PatchPositions) -> torch.Tensor:
        """Return bilinear samples [P, H] in fp32; corners of the frame lie on corners of the table."""
        rows, row_weights = self._neighbours(positions.row, positions.height)
        columns, column_weights = self._neighbours(positions.column, positions.width)
        index_P4 = (rows[:, :, None] * self.side + columns[:, None]).flatten(1)
        weights_P4 = (row_weights[:, :, None] * column_weights[:, None]).flatten(1)
        return embedding_bag(index_P4, self.weight.float(), mode="sum", per_sample_weights=weights_P4)

    def _neighbours(self, position: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the two table lines around each position and their weights, [P, 2] each."""
        # The multiplication comes first, so that a position on a line lies there exactly.
        source = position * (self.side - 1) / (size - 1).clamp(min=1)
        before = source.floor()
        fraction = (source - before).float()
        lines = torch.stack((before, (before + 1).clamp(max=self.side - 1)), dim=1).long()
        return lines, torch.stack((1 - fraction, fraction), dim=1)


class VisionAttention(torch.nn.Module):
    """Attention over the patches of a frame; heads split over the tensor ranks."""

    def __init__(self, config: QwenVisionConfig, mcore_config: TransformerConfig, group: Group) -> None:
        super().__init__()
        self.group, self.head_dim = group, config.hidden_size // config.num_attention_heads
        self.qkv = SectionedColumnParallelLinear(config.hidden_size, config.hidden_size, 3, mcore_config, group)
        self.proj = RowParallelLinear(config.hidden_size, config.hidden_size, mcore_config, group, bias=True)

    def forward(self, x_PH: torch.Tensor, rope: RopeTable, frames: Segments) -> torch.Tensor:
        """Map [P, H] to the same shape."""
        (projected,) = column_parallel(x_PH, (self.qkv,), self.group, False)
        q, k, v = projected.unflatten(-1, (3, -1, self.head_dim)).unbind(1)
        q, k, v = (tensor.transpose(0, 1) for tensor in (*qk_norm_rope(q, k, rope), v))
        attended_NPD = packed_attention(q, k, v, frames, self.head_dim**-0.5)
        return self.proj(attended_NPD.transpose(0, 1).flatten(1))


class VisionLayer(torch.nn.Module):
    """A pre-norm layer; its norms act on unsharded activations, so they are replicated with full gradients."""

    def __init__(self, config: QwenVisionConfig, mcore_config: TransformerConfig, group: Group) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm1, self.norm2 = (LayerNorm(size, config.norm_eps, mcore_config.params_dtype) for _ in range(2))
        self.attn = VisionAttention(config, mcore_config, group)
        self.mlp = MLP((size, config.intermediate_size, size), MLP_NAMES, "tanh", mcore_config, group)

    def forward(self, x_PH: torch.Tensor, rope: RopeTable, frames: Segments) -> torch.Tensor:
        """Map [P, H] to the same shape."""
        x_PH = x_PH + self.attn(self.norm1(x_PH), rope, frames)
        return x_PH + self.mlp(self.norm2(x_PH))


class VisionTower(VisionTowerChunk):
    """A tower whose heads and feed-forward columns are split over `group`: one rank where frames are split instead.

    Patch projection, positions and norms are replicated: they are about 1 % of the tower, and every rank needs their
    full outputs, so that shards would have to be gathered.

    Args:
        config: configuration of the tower.
        chunk: settings of the pipeline chunk.
        group: process group over which each layer is sharded.
    """

    def __init__(self, config: QwenVisionConfig, chunk: ChunkSettings, group: Group) -> None:
        super().__init__(config, chunk)
        self.config, mcore_config = config, chunk.tower_mcore_config
        if chunk.is_first:
            self.patch_embed = torch.nn.Module()
            kernel = (config.num_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
            self.patch_embed.proj = PatchProjection(kernel, config.hidden_size, mcore_config.params_dtype, bias=True)
            self.pos_embed = PositionTable(config, mcore_config.params_dtype)
        self.blocks = self.make_layers(lambda: VisionLayer(config, mcore_config, group))

    @property
    def layers(self) -> torch.nn.ModuleDict:
        """This chunk's layers."""
        return self.blocks

    def start(self, pixels: torch.Tensor, images: PackedImages) -> torch.Tensor:
        """Map [P, patch features] to [P, H]."""
        patches: torch.Tensor = self.patch_embed.proj(pixels)  # type: ignore[operator]
        return patches + self.pos_embed(images.positions).to(patches.dtype)

    def layer_inputs(self, images: PackedImages, dtype: torch.dtype) -> tuple[RopeTable, Segments]:
        """Return the rotary table, and frames as segments."""
        return patch_rope(images.positions, self.config.hidden_size // self.config.num_attention_heads), images.segments

    def finish(self, state: StageState) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the output of the last layer, and those of `deepstack_layers`, [P, H] each."""
        return state.hidden, [state.carried[tap_name(layer)] for layer in sorted(self.taps)]


class Merger(MLP):
    """A merger that makes one vector of each block of patches and maps it to the language model's width.

    Args:
        config: configuration of the tower.
        norm_after: normalise the joined vector, not each patch.
        mcore_config: megatron-core settings without sequence parallelism.
        group: process group over which the merger is sharded.
    """

    def __init__(
        self, config: QwenVisionConfig, norm_after: bool, mcore_config: TransformerConfig, group: Group
    ) -> None:
        joined_size = config.projector_hidden_size
        super().__init__((joined_size, joined_size, config.out_hidden_size), MLP_NAMES, "none", mcore_config, group)
        self.joined_size, norm_size = joined_size, joined_size if norm_after else config.hidden_size
        self.norm = LayerNorm(norm_size, config.norm_eps, mcore_config.params_dtype)

    def forward(self, x_PH: torch.Tensor) -> torch.Tensor:
        """Map [P, H] to [P / patches per block, text hidden]."""
        normed = self.norm(x_PH.reshape(-1, *self.norm.normalized_shape))
        return super().forward(normed.reshape(-1, self.joined_size))


class Projector(torch.nn.Module):
    """The mergers: one for the tower's output, and one for each DeepStack feature, which normalises the joined vector.

    Args:
        config: configuration of the tower.
        mcore_config: megatron-core settings without sequence parallelism.
        group: process group over which each merger is sharded.
    """

    def __init__(self, config: QwenVisionConfig, mcore_config: TransformerConfig, group: Group) -> None:
        super().__init__()
        self.merger = Merger(config, norm_after=False, mcore_config=mcore_config, group=group)
        self.deepstack_merger_list = torch.nn.ModuleList(
            Merger(config, norm_after=True, mcore_config=mcore_config, group=group) for _ in config.deepstack_layers
        )

    def forward(self, last: torch.Tensor, taps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Map the tower's results to [P / patches per block, text hidden]: main features, then DeepStack features."""
        return [
            self.merger(last),
            *(merger(tap) for merger, tap in zip(self.deepstack_merger_list, taps, strict=True)),
        ]
