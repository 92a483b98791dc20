"""Qwen3-VL as pipeline chunks: vision tower and embedding on the first, decoder layers, head and loss on the last.

Features of the vision tower enter twice: in place of placeholder tokens, and, from intermediate layers ("DeepStack"),
added to the hidden states after each of the first decoder layers, wherever in the pipeline those are.

Source: transformers models/qwen3_vl and models/qwen3_vl_moe (`Qwen3VLModel`, `Qwen3VLMoeModel`).
Shapes: B batch, S sequence (hidden states hold a shard of it under sequence parallelism), H hidden, T tokens of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.families.qwen3_vl.config import ModelConfig, TextConfig
from megatron_vlm.layers.attention import SelfAttention
from megatron_vlm.layers.embedding import place_features, spread_features
from megatron_vlm.layers.mlp import GatedMLP
from megatron_vlm.layers.moe import LocalTokens, MoE, Routing, TopKRouter
from megatron_vlm.layers.norm import add_and_norm
from megatron_vlm.layers.rope import RopeTable, mrope_table
from megatron_vlm.model.language_model import LanguageModelChunk, residual_norm
from megatron_vlm.model.model_chunk import ModelChunk
from megatron_vlm.model.qwen_vision import Projector, VisionTower
from megatron_vlm.model_configs import DecoderLayerConfig
from megatron_vlm.parallel.chunk_settings import ChunkSettings
from megatron_vlm.parallel.stage_state import Boundary, StageState
from vlm_kernels.span_attention import Spans


class DecoderLayer(torch.nn.Module):
    """A decoder layer with pre-norm attention and feed-forward; the latter is dense or made of experts."""

    def __init__(
        self, text: TextConfig, layer: DecoderLayerConfig, chunk: ChunkSettings, groups: ProcessGroupCollection
    ) -> None:
        super().__init__()
        self.input_layernorm = residual_norm(text, chunk, zero_centered=False)
        self.self_attn = SelfAttention(
            text.hidden_size,
            layer,
            chunk.mcore_config,
            groups.tp,
            norms="plain",
            recompute_core=chunk.recompute == "selective",
        )
        self.post_attention_layernorm = residual_norm(text, chunk, zero_centered=False)
        self.mlp: MoE | GatedMLP = (
            GatedMLP(text.hidden_size, layer.intermediate_size, "silu", chunk.mcore_config, groups.tp)
            if layer.moe is None
            else MoE(
                text.hidden_size, layer.moe, TopKRouter(text.hidden_size, layer.moe, chunk.mcore_config), chunk, groups
            )
        )

    def forward(
        self, x_SBH: torch.Tensor, rope: RopeTable, spans: Spans, tokens: LocalTokens | None
    ) -> tuple[torch.Tensor, Routing | None]:
        """Map [S, B, H] to the same shape, and return where experts' tokens went."""
        attended = self.self_attn(self.input_layernorm(x_SBH), rope, spans)
        x_SBH, normed = add_and_norm(attended, x_SBH, self.post_attention_layernorm)
        if isinstance(self.mlp, MoE):
            fed, routing = self.mlp(normed, tokens)
            return x_SBH + fed, routing
        return x_SBH + self.mlp(normed), None


class Qwen3VLLanguageModel(LanguageModelChunk):
    """The decoder layers of one chunk."""

    def __init__(self, text: TextConfig, chunk: ChunkSettings, groups: ProcessGroupCollection) -> None:
        super().__init__(
            text,
            chunk,
            groups,
            make_layer=lambda index: DecoderLayer(text, text.layers[index], chunk, groups),
            zero_centered_norm=False,
        )
        self.rope = (text.layers[0].head_dim, text.rope_theta, text.mrope_section)

    def layer_inputs(self, batch: MicroBatch, dtype: torch.dtype) -> tuple[RopeTable, Spans, LocalTokens | None]:
        """Return the rotary table, spans, and which tokens count for the experts."""
        rope = mrope_table(batch.position_ids, *self.rope, dtype)
        return rope, self.spans(batch), self.local_tokens(batch)

    def after_layer(
        self, layer: int, output: tuple[torch.Tensor, Routing | None], state: StageState, inputs: tuple[Any, ...]
    ) -> StageState:
        """Count where experts' tokens went, and add the layer's DeepStack features."""
        (x_SBH, routing), carried = output, dict(state.carried)
        *_, tokens = inputs
        scalars = self.count_experts(layer, routing, tokens, state.scalars)
        if deepstack_name(layer) in carried:
            x_SBH = x_SBH + carried.pop(deepstack_name(layer))
        return StageState(x_SBH, carried, scalars)


def deepstack_name(layer: int) -> str:
    """Return the name of the DeepStack features that are added after a layer."""
    return f"deepstack_{layer}"


class Qwen3VLChunk(ModelChunk):
    """One pipeline chunk of Qwen3-VL, called by megatron-core's schedules.

    Args:
        config: configuration of the model.
        chunk: settings of the pipeline chunk.
        groups: process groups; those of tensor ranks, of a single rank and of experts are read.
    """

    language_model: Qwen3VLLanguageModel

    def __init__(self, config: ModelConfig, chunk: ChunkSettings, groups: ProcessGroupCollection) -> None:
        super().__init__(config, chunk, groups)
        self.language_model = Qwen3VLLanguageModel(config.text, chunk, groups)
        self.num_levels = 0
        if "vision_tower" in config.parts:
            assert config.vision is not None
            self.num_levels = len(config.vision.deepstack_layers)
        if chunk.tower_layers is not None:
            assert config.vision is not None
            self.vision_tower = VisionTower(config.vision, chunk, self.tower_group)
            if chunk.has_embedding:
                self.projector = Projector(config.vision, chunk.tower_mcore_config, self.tower_group)
            self.mark_tower()

    def boundary(self, layer: int, batch: MicroBatch) -> Boundary:
        """Return the shapes of hidden states, remaining DeepStack features, and the load-balancing sum."""
        boundary = super().boundary(layer, batch)
        is_visual = bool(batch.grids) or self.always_encodes
        levels = range(layer, self.num_levels) if is_visual else ()
        return replace(boundary, carried={deepstack_name(level): boundary.hidden for level in levels})

    def embed(self, batch: MicroBatch, features: Sequence[torch.Tensor]) -> StageState:
        """Return tokens and visual features as one sequence, and the DeepStack features, zero on text."""
        is_visual = batch.feature_index >= 0
        x_BSH = self.language_model.embed(batch.input_ids.masked_fill(is_visual, 0))
        if features:
            x_BSH = place_features(x_BSH, features[0], batch.feature_index)
        levels = [spread_features(level.to(x_BSH.dtype), batch.feature_index) for level in features[1:]]
        return self.first_state(
            x_BSH, {deepstack_name(layer): self.to_sequence_first(level_BSH) for layer, level_BSH in enumerate(levels)}
        )
