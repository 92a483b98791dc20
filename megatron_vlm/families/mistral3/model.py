"""Mistral3 as pipeline chunks: embedding and vision tower on the first, decoder layers, head and loss on the last.

Source: transformers models/mistral3, models/mistral and models/ministral3 (`Mistral3ForConditionalGeneration`).
Shapes: B batch, S sequence (hidden states hold a shard of it under sequence parallelism), H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.families.mistral3.config import ModelConfig, QueryScaling, TextConfig
from megatron_vlm.families.mistral3.vision import Projector, VisionTower
from megatron_vlm.layers.attention import SelfAttention
from megatron_vlm.layers.embedding import place_features
from megatron_vlm.layers.linear import Group
from megatron_vlm.layers.mlp import GatedMLP
from megatron_vlm.layers.norm import add_and_norm
from megatron_vlm.layers.rope import RopeTable, rope_table, yarn_table
from megatron_vlm.model.language_model import LanguageModelChunk, residual_norm
from megatron_vlm.model.model_chunk import ModelChunk
from megatron_vlm.model_configs import DecoderLayerConfig
from megatron_vlm.parallel.chunk_settings import ChunkSettings
from megatron_vlm.parallel.stage_state import StageState
from vlm_kernels.span_attention import Spans


class DecoderLayer(torch.nn.Module):
    """A decoder layer with pre-norm attention and feed-forward."""

    def __init__(self, text: TextConfig, layer: DecoderLayerConfig, chunk: ChunkSettings, group: Group) -> None:
        super().__init__()
        self.input_layernorm = residual_norm(text, chunk, zero_centered=False)
        self.self_attn = SelfAttention(
            text.hidden_size,
            layer,
            chunk.mcore_config,
            group,
            norms="none",
            recompute_core=chunk.recompute == "selective",
        )
        self.post_attention_layernorm = residual_norm(text, chunk, zero_centered=False)
        self.mlp = GatedMLP(text.hidden_size, layer.intermediate_size, "silu", chunk.mcore_config, group)

    def forward(
        self, x_SBH: torch.Tensor, rope: RopeTable, spans: Spans, query_scale: torch.Tensor | None
    ) -> torch.Tensor:
        """Map [S, B, H] to the same shape."""
        attended = self.self_attn(self.input_layernorm(x_SBH), rope, spans, query_scale)
        x_SBH, normed = add_and_norm(attended, x_SBH, self.post_attention_layernorm)
        return x_SBH + self.mlp(normed)


class Mistral3LanguageModel(LanguageModelChunk):
    """The decoder layers of one chunk."""

    text: TextConfig

    def __init__(self, text: TextConfig, chunk: ChunkSettings, groups: ProcessGroupCollection) -> None:
        super().__init__(
            text,
            chunk,
            groups,
            make_layer=lambda index: DecoderLayer(text, text.layers[index], chunk, groups.tp),
            zero_centered_norm=False,
        )

    def layer_inputs(self, batch: MicroBatch, dtype: torch.dtype) -> tuple[RopeTable, Spans, torch.Tensor | None]:
        """Return the rotary table, spans, and the factor on queries."""
        text, positions_BS = self.text, batch.position_ids
        head_dim = text.layers[0].head_dim
        rope = (
            rope_table(positions_BS, head_dim, text.rope_theta, 1.0, dtype)
            if text.yarn is None
            else yarn_table(positions_BS, head_dim, text.rope_theta, text.yarn, dtype)
        )
        scale = None if text.query_scaling is None else query_scale(positions_BS, text.query_scaling, dtype)
        return rope, self.spans(batch), scale


def query_scale(positions_BS: torch.Tensor, scaling: QueryScaling, dtype: torch.dtype) -> torch.Tensor:
    """Return the factor [S, B] from positions in the token's own document; it is 1 below `original_length`."""
    steps_SB = (positions_BS.t().contiguous() // scaling.original_length).float()
    return (1 + scaling.beta * torch.log(1 + steps_SB)).to(dtype)


class Mistral3Chunk(ModelChunk):
    """One pipeline chunk of Mistral3, called by megatron-core's schedules.

    Args:
        config: configuration of the model.
        chunk: settings of the pipeline chunk.
        groups: process groups; `tp` and `single_rank` are read.
    """

    language_model: Mistral3LanguageModel

    def __init__(self, config: ModelConfig, chunk: ChunkSettings, groups: ProcessGroupCollection) -> None:
        super().__init__(config, chunk, groups)
        self.language_model = Mistral3LanguageModel(config.text, chunk, groups)
        if chunk.tower_layers is not None:
            assert config.vision is not None
            self.vision_tower = VisionTower(config.vision, chunk, self.tower_group)
            if chunk.has_embedding:
                self.projector = Projector(config.vision, chunk.tower_mcore_config, self.tower_group)
            self.mark_tower()

    def embed(self, batch: MicroBatch, features: Sequence[torch.Tensor]) -> StageState:
        """Return tokens and images as one sequence."""
        x_BSH = self.language_model.embed(batch.input_ids.masked_fill(batch.feature_index >= 0, 0))
        for of_images in features:
            x_BSH = place_features(x_BSH, of_images, batch.feature_index)
        return self.first_state(x_BSH)
