"""Gemma 4 as pipeline chunks: towers and embedding on the first, decoder layers, head and loss on the last.

Later layers of E2B and E4B read what earlier ones left, on whichever stages they are: the embeddings, and the keys and
values of two layers.

Source: transformers models/gemma4 (`Gemma4TextModel`, `Gemma4ForConditionalGeneration`).
Shapes: B batch, S sequence (hidden states hold a shard of it under sequence parallelism), H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.data.media import AUDIO
from megatron_vlm.families.gemma4.attention import Attention, KeysAndValues
from megatron_vlm.families.gemma4.audio import AudioTower
from megatron_vlm.families.gemma4.audio_config import AudioConfig
from megatron_vlm.families.gemma4.config import LayerConfig, ModelConfig, TextConfig, VisionConfig
from megatron_vlm.families.gemma4.moe import Router
from megatron_vlm.families.gemma4.per_layer import PerLayerInput
from megatron_vlm.families.gemma4.projector import Projector
from megatron_vlm.families.gemma4.unified import PixelEmbedder
from megatron_vlm.families.gemma4.vision import VisionTower
from megatron_vlm.layers.attention import masked_spans
from megatron_vlm.layers.embedding import place_features
from megatron_vlm.layers.mlp import GatedMLP
from megatron_vlm.layers.moe import LocalTokens, MoE, Routing
from megatron_vlm.layers.norm import RMSNorm, norm_add_and_norm, norm_and_add
from megatron_vlm.layers.rope import RopeTable, rope_table
from megatron_vlm.model.language_model import LanguageModelChunk, residual_norm
from megatron_vlm.model.model_chunk import ModelChunk
from megatron_vlm.model_configs import ImageMask
from megatron_vlm.parallel.chunk_settings import ChunkSettings
from megatron_vlm.parallel.parameters import declare, ones, redeclare
from megatron_vlm.parallel.stage_state import Boundary, StageState
from vlm_kernels.span_attention import Spans

RopeTables = Mapping[tuple[int, float, int], RopeTable]
EMBEDDED = "embedded"
"""Name of the carried input of the first decoder layer."""


@dataclass(frozen=True)
class LayerInputs:
    """What every decoder layer of a chunk is given, beside hidden states and carried tensors.

    Attributes:
        rope: rotary table of each kind of layer.
        spans: visible ranges of each kind of layer.
        tokens: which tokens count for the experts; None without experts.
        ids: [S, B] token ids of the full sequence, the padding token's in place of media, for layers with an input of
            their own; None without.
        per_layer_norm: weight of the norm of that input.
    """

    rope: RopeTables
    spans: tuple[tuple[ImageMask, Spans], ...]
    tokens: LocalTokens | None
    ids: torch.Tensor | None
    per_layer_norm: torch.Tensor | None


class DecoderLayer(torch.nn.Module):
    """Attention and feed-forward, each between a norm of its input and a norm of its output, and the layer's own input.

    Experts stand beside the dense feed-forward layer: both have a norm of their output, and their sum has one too. A
    scalar, which never trains, multiplies the result, residual included.
    """

    def __init__(
        self, text: TextConfig, layer: LayerConfig, chunk: ChunkSettings, groups: ProcessGroupCollection
    ) -> None:
        super().__init__()
        self.layer = layer
        self.rope_kind = (layer.head_dim, layer.rope_theta, layer.rope_angles)
        self.self_attn = Attention(
            text.hidden_size, layer, chunk.mcore_config, groups.tp, recompute_core=chunk.recompute == "selective"
        )
        self.mlp = GatedMLP(text.hidden_size, layer.intermediate_size, "gelu_tanh", chunk.mcore_config, groups.tp)
        self.input_layernorm, self.post_attention_layernorm = _norms(text, chunk, 2)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = _norms(text, chunk, 2)
        if layer.moe is not None:
            router = Router(text.hidden_size, layer.moe, layer.norm_eps, chunk.mcore_config)
            self.moe = MoE(text.hidden_size, layer.moe, router, chunk, groups)
            self.post_feedforward_layernorm_1, self.post_feedforward_layernorm_2 = _norms(text, chunk, 2)
            (self.pre_feedforward_layernorm_2,) = _norms(text, chunk, 1)
        if text.per_layer_size is not None:
            self.per_layer_input = PerLayerInput(text, chunk, groups.tp)
        scalar = torch.nn.Parameter(torch.empty(1, dtype=chunk.mcore_config.params_dtype))
        self.layer_scalar = declare(scalar, "buffer", ones)

    def forward(
        self,
        x_SBH: torch.Tensor,
        embedded_SBH: torch.Tensor | None,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
        inputs: LayerInputs,
    ) -> tuple[torch.Tensor, KeysAndValues | None, Routing | None]:
        """Map [S, B, H] to the same shape; return also what the layer lends, and where experts' tokens went.

        Args:
            x_SBH: hidden states.
            embedded_SBH: input of the first layer, for layers with an input of their own.
            keys: keys [S, B, G, D] of an earlier layer, for layers without their own; S is not sharded.
            values: values of that layer, likewise.
            inputs: see `LayerInputs`.
        """
        rope, spans = inputs.rope[self.rope_kind], dict(inputs.spans)[self.layer.image_mask]
        borrowed = None if keys is None or values is None else (keys, values)
        attended, keys_and_values = self.self_attn(self.input_layernorm(x_SBH), rope, spans, borrowed)
        x_SBH, normed = norm_add_and_norm(
            attended, x_SBH, self.post_attention_layernorm, self.pre_feedforward_layernorm
        )
        fed, routing = self.mlp(normed), None
        if self.layer.moe is not None:
            fed, routing = self._with_experts(fed, x_SBH, inputs.tokens)
        x_SBH = norm_and_add(fed, x_SBH, self.post_feedforward_layernorm)
        if embedded_SBH is not None:
            x_SBH = self.per_layer_input(x_SBH, embedded_SBH, inputs.ids, inputs.per_layer_norm)
        return x_SBH * self.layer_scalar, keys_and_values if self.layer.lends_keys else None, routing

    def _with_experts(
        self, fed_SBH: torch.Tensor, x_SBH: torch.Tensor, tokens: LocalTokens | None
    ) -> tuple[torch.Tensor, Routing]:
        """Return the sum of the norms of the dense layer's and the experts' outputs, and where their tokens went."""
        # The router reads the residual stream itself.
        routed, routing = self.moe(self.pre_feedforward_layernorm_2(x_SBH), tokens, router_input=x_SBH)
        dense = self.post_feedforward_layernorm_1(fed_SBH)
        return norm_and_add(routed, dense, self.post_feedforward_layernorm_2), routing


def _norms(text: TextConfig, chunk: ChunkSettings, count: int) -> list[RMSNorm]:
    return [residual_norm(text, chunk, zero_centered=False) for _ in range(count)]


def keys_name(layer: int) -> str:
    """Return the name of a layer's carried keys."""
    return f"keys_{layer}"


def values_name(layer: int) -> str:
    """Return the name of a layer's carried values."""
    return f"values_{layer}"


class Gemma4LanguageModel(LanguageModelChunk):
    """The decoder layers of one chunk; embeddings are scaled by the root of the hidden size."""

    text: TextConfig

    def __init__(self, text: TextConfig, chunk: ChunkSettings, groups: ProcessGroupCollection) -> None:
        super().__init__(
            text,
            chunk,
            groups,
            make_layer=lambda index: DecoderLayer(text, text.layers[index], chunk, groups),
            zero_centered_norm=False,
            softcap=text.final_logit_softcapping,
            embedding_scale=text.hidden_size**0.5,
        )
        if text.per_layer_size is not None:
            dtype, is_partial = chunk.mcore_config.params_dtype, chunk.mcore_config.sequence_parallel
            self.per_layer_projection_norm = RMSNorm(text.per_layer_size, text.norm_eps, False, dtype, is_partial)
            redeclare(self.per_layer_projection_norm.weight, stages="all")

    def run(self, state: StageState, batch: MicroBatch) -> StageState:
        """Run this chunk's layers; the input of the first one is carried to all others that read it."""
        if self.text.per_layer_size is not None and EMBEDDED not in state.carried:
            state = replace(state, carried={**state.carried, EMBEDDED: state.hidden})
        state = super().run(state, batch)
        if self.text.per_layer_size is not None and not self.layers:
            # Overlapped communication waits for the gradient of every parameter.
            state = replace(state, hidden=state.hidden + 0.0 * self.per_layer_projection_norm().sum())
        return state

    def layer_inputs(self, batch: MicroBatch, dtype: torch.dtype) -> tuple[LayerInputs]:
        """Return what every layer is given."""
        layers = cast("list[DecoderLayer]", list(self.layers.values()))
        rope = {
            (head_dim, theta, angles): rope_table(batch.position_ids, head_dim, theta, 1.0, dtype, num_angles=angles)
            for head_dim, theta, angles in dict.fromkeys(layer.rope_kind for layer in layers)
        }
        all_spans = self.spans(batch)
        masks = dict.fromkeys(layer.layer.image_mask for layer in layers)
        spans = tuple((mask, masked_spans(all_spans, mask)) for mask in masks)
        ids, norm = None, None
        if self.text.per_layer_size is not None:
            ids = batch.input_ids.masked_fill(batch.feature_index >= 0, self.text.pad_token_id or 0).t()
            norm = self.per_layer_projection_norm()
        return (LayerInputs(rope, spans, self.local_tokens(batch), ids, norm),)

    def layer_reads(self, layer: int, state: StageState) -> tuple[Any, ...]:
        """Return the embeddings, and keys and values of an earlier layer, each None for a layer that reads none."""
        lender, embedded = self.text.layers[layer].keys_of_layer, state.carried.get(EMBEDDED)
        if lender is None:
            return embedded, None, None
        return embedded, state.carried[keys_name(lender)], state.carried[values_name(lender)]

    def after_layer(
        self,
        layer: int,
        output: tuple[torch.Tensor, KeysAndValues | None, Routing | None],
        state: StageState,
        inputs: tuple[LayerInputs],
    ) -> StageState:
        """Count where experts' tokens went, and keep keys and values that later layers read."""
        x_SBH, lent, routing = output
        carried = dict(state.carried)
        if lent is not None:
            carried |= zip((keys_name(layer), values_name(layer)), lent, strict=True)
        scalars = self.count_experts(layer, routing, inputs[0].tokens, state.scalars)
        return StageState(x_SBH, carried, scalars)


class Gemma4Chunk(ModelChunk):
    """One pipeline chunk of Gemma 4, called by megatron-core's schedules.

    Args:
        config: configuration of the model.
        chunk: settings of the pipeline chunk.
        groups: process groups.
    """

    language_model: Gemma4LanguageModel

    def __init__(self, config: ModelConfig, chunk: ChunkSettings, groups: ProcessGroupCollection) -> None:
        super().__init__(config, chunk, groups)
        self.language_model = Gemma4LanguageModel(config.text, chunk, groups)
        if chunk.has_embedding and not config.text_only:
            self.projector = torch.nn.Module()
        if chunk.tower_layers is not None:
            vision, mcore_config = config.vision, chunk.tower_mcore_config
            assert vision is not None
            self.vision_tower = (
                VisionTower(vision, chunk, self.tower_group)
                if isinstance(vision, VisionConfig)
                else PixelEmbedder(vision, chunk, self.tower_group)
            )
            if chunk.has_embedding:
                self.projector.vision = Projector(
                    vision.hidden_size,
                    config.text.hidden_size,
                    vision.projector_norm_eps,
                    mcore_config,
                    self.tower_group,
                )
            self.mark_tower()
        self.audio = config.audio if chunk.has_embedding else None
        if self.audio is not None:
            audio, mcore_config = self.audio, chunk.tower_mcore_config
            if isinstance(audio, AudioConfig):
                self.audio_tower = AudioTower(audio, mcore_config, groups.tp, chunk.recompute == "full")
            self.projector.audio = Projector(
                audio.output_size, config.text.hidden_size, audio.norm_eps, mcore_config, groups.tp
            )
        self.overlapped = chunk.overlapped

    @property
    def image_projector(self) -> torch.nn.Module:
        """The projector of images."""
        return cast(torch.nn.Module, self.projector.vision)

    def embed(self, batch: MicroBatch, features: Sequence[torch.Tensor]) -> StageState:
        """Return tokens and media as one sequence."""
        is_medium = batch.feature_index >= 0
        x_BSH = self.language_model.embed(batch.input_ids.masked_fill(is_medium, 0))
        # Features of a blank image would shift those of audio.
        of_media = [of_images if batch.grids else of_images[:0] for of_images in features]
        if self.audio is not None and (batch.audio_frames or self.overlapped):
            of_media.append(self._audio_features(batch, x_BSH.device))
        if of_media:
            x_BSH = place_features(x_BSH, torch.cat(of_media), batch.feature_index)
        return self.first_state(x_BSH)

    def _audio_features(self, batch: MicroBatch, device: torch.device) -> torch.Tensor:
        """Return the features of all clips, [T, H]; without a clip, none, of a blank one."""
        assert self.audio is not None
        frames, lengths = batch.media_inputs.get(AUDIO), batch.audio_frames
        assert (frames is None) != bool(lengths), "clips belong on the stage with their projector"
        if frames is None:
            frames, lengths = torch.zeros(1, self.audio.frame_size), [1]
        frames = frames.to(device, non_blocking=True)
        if isinstance(self.audio, AudioConfig):
            (frames,) = self.audio_tower(frames, lengths)
        (features,) = cast(Projector, self.projector.audio)(frames.to(self.config.params_dtype))
        return features if batch.audio_frames else features[:0]

    def boundary(self, layer: int, batch: MicroBatch) -> Boundary:
        """Return the shapes of hidden states, and of embeddings, keys and values that this and later layers read.

        Before the first layer hidden states are the embeddings.
        """
        boundary, text = super().boundary(layer, batch), self.language_model.text
        carried: dict[str, tuple[int, ...]] = {}
        if text.per_layer_size is not None and 0 < layer < len(text.layers):
            carried[EMBEDDED] = boundary.hidden
        rows, length = batch.input_ids.shape
        read = {later.keys_of_layer for later in text.layers[layer:] if later.keys_of_layer is not None}
        for lender in sorted(lender for lender in read if lender < layer):
            own = text.layers[lender]
            heads = max(1, own.num_key_value_heads // self.groups.tp.size())
            shape = (length, rows, heads, own.head_dim)
            carried |= {keys_name(lender): shape, values_name(lender): shape}
        return replace(boundary, carried=carried)
