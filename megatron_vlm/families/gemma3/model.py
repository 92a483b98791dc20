"""Gemma 3 as pipeline chunks: vision tower and embedding on the first, decoder layers, head and loss on the last.

Source: transformers models/gemma3 (`Gemma3TextModel`, `Gemma3ForConditionalGeneration`).
Shapes: B batch, S sequence (hidden states hold a shard of it under sequence parallelism), H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.families.gemma3.config import LayerConfig, ModelConfig, TextConfig
from megatron_vlm.families.gemma3.vision import Projector, VisionTower
from megatron_vlm.layers.attention import SelfAttention
from megatron_vlm.layers.embedding import place_features
from megatron_vlm.layers.linear import Group
from megatron_vlm.layers.mlp import GatedMLP
from megatron_vlm.layers.norm import norm_add_and_norm, norm_and_add
from megatron_vlm.layers.rope import RopeTable, rope_table
from megatron_vlm.model.language_model import LanguageModelChunk, residual_norm
from megatron_vlm.model.model_chunk import ModelChunk
from megatron_vlm.parallel.chunk_settings import ChunkSettings
from megatron_vlm.parallel.stage_state import StageState
from vlm_kernels.span_attention import Spans

RopeTables = Mapping[tuple[int, float, float], RopeTable]


class DecoderLayer(torch.nn.Module):
    """Attention and feed-forward, each between a norm of its input and a norm of its output ("sandwich")."""

    def __init__(self, text: TextConfig, layer: LayerConfig, chunk: ChunkSettings, group: Group) -> None:
        super().__init__()
        self.rope_kind = (layer.head_dim, layer.rope_theta, layer.rope_scaling_factor)
        self.self_attn = SelfAttention(
            text.hidden_size,
            layer,
            chunk.mcore_config,
            group,
            norms="zero_centered",
            recompute_core=chunk.recompute == "selective",
        )
        self.mlp = GatedMLP(text.hidden_size, layer.intermediate_size, "gelu_tanh", chunk.mcore_config, group)
        norms = [residual_norm(text, chunk, zero_centered=True) for _ in range(4)]
        self.input_layernorm, self.post_attention_layernorm = norms[:2]
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norms[2:]

    def forward(self, x_SBH: torch.Tensor, rope: RopeTables, spans: Spans) -> torch.Tensor:
        """Map [S, B, H] to the same shape."""
        attended = self.self_attn(self.input_layernorm(x_SBH), rope[self.rope_kind], spans)
        x_SBH, normed = norm_add_and_norm(
            attended, x_SBH, self.post_attention_layernorm, self.pre_feedforward_layernorm
        )
        return norm_and_add(self.mlp(normed), x_SBH, self.post_feedforward_layernorm)


class Gemma3LanguageModel(LanguageModelChunk):
    """The decoder layers of one chunk; embeddings are scaled by the root of the hidden size."""

    def __init__(self, text: TextConfig, chunk: ChunkSettings, groups: ProcessGroupCollection) -> None:
        super().__init__(
            text,
            chunk,
            groups,
            make_layer=lambda index: DecoderLayer(text, text.layers[index], chunk, groups.tp),
            zero_centered_norm=True,
            softcap=text.final_logit_softcapping,
            embedding_scale=text.hidden_size**0.5,
        )

    def layer_inputs(self, batch: MicroBatch, dtype: torch.dtype) -> tuple[RopeTables, Spans]:
        """Return a rotary table for each kind of layer, and spans."""
        layers = cast("list[DecoderLayer]", list(self.layers.values()))
        kinds = dict.fromkeys(layer.rope_kind for layer in layers)
        rope = {kind: rope_table(batch.position_ids, *kind, dtype) for kind in kinds}
        return rope, self.spans(batch)


class Gemma3Chunk(ModelChunk):
    """One pipeline chunk of Gemma 3, called by megatron-core's schedules.

    Args:
        config: configuration of the model.
        chunk: settings of the pipeline chunk.
        groups: process groups; `tp` and `single_rank` are read.
    """

    language_model: Gemma3LanguageModel

    def __init__(self, config: ModelConfig, chunk: ChunkSettings, groups: ProcessGroupCollection) -> None:
        super().__init__(config, chunk, groups)
        self.language_model = Gemma3LanguageModel(config.text, chunk, groups)
        if chunk.tower_layers is not None:
            assert config.vision is not None
            self.vision_tower = VisionTower(config.vision, chunk, self.tower_group)
            if chunk.has_embedding:
                dtype = chunk.mcore_config.params_dtype
                self.projector = Projector(config.vision, config.text.hidden_size, dtype, self.tower_group)
            self.mark_tower()

    def embed(self, batch: MicroBatch, features: Sequence[torch.Tensor]) -> StageState:
        """Return tokens and images as one sequence."""
        # Soft image tokens may lie outside the vocabulary; their looked-up embeddings are replaced.
        x_BSH = self.language_model.embed(batch.input_ids.masked_fill(batch.feature_index >= 0, 0))
        for of_images in features:
            x_BSH = place_features(x_BSH, of_images, batch.feature_index)
        return self.first_state(x_BSH)
