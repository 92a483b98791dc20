"""Gemma 3 as one chunk of a pipeline: embedding and eyes on the first, decoder layers, head and loss on the last.

Source: transformers models/gemma3 (`Gemma3TextModel`, `Gemma3ForConditionalGeneration`).
Shapes: B batch, S sequence (hidden states hold a shard of it under sequence parallelism), H hidden, I images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint

from kernels.span_attention import Spans
from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.families.gemma3.config import LayerConfig, ModelConfig, TextConfig
from megatron_vlm.families.gemma3.vision import Projector, VisionTower
from megatron_vlm.layers.attention import SelfAttention
from megatron_vlm.layers.embedding import TokenEmbedding, padded_vocab_size, token_losses, vocab_parallel_logits
from megatron_vlm.layers.linear import ColumnParallelLinear, Group
from megatron_vlm.layers.mlp import GatedMLP
from megatron_vlm.layers.norm import RMSNorm
from megatron_vlm.layers.rope import rope_table
from megatron_vlm.parallel.chunk import ChunkSettings
from megatron_vlm.parallel.gradients import mark_partial
from megatron_vlm.parallel.images import ImageDivision

RopeTables = Mapping[tuple[int, float, float], tuple[torch.Tensor, torch.Tensor]]


class DecoderLayer(torch.nn.Module):
    """Attention and feed-forward, each between a norm of its input and a norm of its output ("sandwich")."""

    def __init__(self, text: TextConfig, layer: LayerConfig, chunk: ChunkSettings, group: Group) -> None:
        super().__init__()
        self.rope_kind = (layer.head_dim, layer.rope_theta, layer.rope_scaling_factor)
        self.self_attn = SelfAttention(text.hidden_size, layer, chunk.engine, group, chunk.recompute == "selective")
        self.mlp = GatedMLP(text.hidden_size, layer.intermediate_size, chunk.engine, group)
        norms = [_norm(text, chunk) for _ in range(4)]
        self.input_layernorm, self.post_attention_layernorm = norms[:2]
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norms[2:]

    def forward(self, x_SBH: torch.Tensor, rope: RopeTables, spans: Spans) -> torch.Tensor:
        """[S, B, H] to the same."""
        attended = self.self_attn(self.input_layernorm(x_SBH), rope[self.rope_kind], spans)
        x_SBH = x_SBH + self.post_attention_layernorm(attended)
        fed = self.mlp(self.pre_feedforward_layernorm(x_SBH))
        return x_SBH + self.post_feedforward_layernorm(fed)


class LanguageModelChunk(torch.nn.Module):
    """The decoder layers of one chunk, the embedding on the first and what the head needs on the last.

    A tied embedding is held by both; megatron-core keeps the two gradients equal.
    """

    def __init__(self, text: TextConfig, chunk: ChunkSettings, group: Group) -> None:
        super().__init__()
        self.group, self.sequence_parallel, self.text = group, chunk.engine.sequence_parallel, text
        self.recompute_layers = chunk.recompute == "full"
        if chunk.is_first or (chunk.is_last and text.tie_word_embeddings):
            self.embed_tokens = TokenEmbedding(
                text.vocab_size, text.hidden_size, text.pad_token_id, chunk.engine, group
            )
        self.layers = torch.nn.ModuleDict(
            {str(index): DecoderLayer(text, text.layers[index], chunk, group) for index in chunk.layers}
        )
        if chunk.is_last:
            self.norm = _norm(text, chunk)
            if not text.tie_word_embeddings:
                vocab_size = padded_vocab_size(text.vocab_size)
                self.lm_head = ColumnParallelLinear(text.hidden_size, vocab_size, chunk.engine, group)

    def embed(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """Scaled embeddings [B, S, H]; the scale is rounded to the weights' type first, as in transformers."""
        embedded = self.embed_tokens(ids_BS)
        return embedded * torch.tensor(self.text.hidden_size**0.5, dtype=embedded.dtype).item()

    def decode(self, x_SBH: torch.Tensor, positions_BS: torch.Tensor, spans: Spans) -> torch.Tensor:
        """Run this chunk's layers."""
        layers = cast("list[DecoderLayer]", list(self.layers.values()))
        rope = {
            kind: rope_table(positions_BS, *kind, x_SBH.dtype)
            for kind in dict.fromkeys(layer.rope_kind for layer in layers)
        }
        for layer in layers:
            if self.recompute_layers and self.training:
                x_SBH = checkpoint(layer, x_SBH, rope, spans, use_reentrant=False)
            else:
                x_SBH = layer(x_SBH, rope, spans)
        return x_SBH

    def logits(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """This rank's columns of the logits, [S, B, vocabulary / tensor ranks], S whole."""
        weight = self.embed_tokens(None) if self.text.tie_word_embeddings else self.lm_head()[0]
        return vocab_parallel_logits(
            self.norm(x_SBH),
            weight,
            self.text.vocab_size,
            self.text.final_logit_softcapping,
            self.group,
            self.sequence_parallel,
        )


def _norm(text: TextConfig, chunk: ChunkSettings) -> RMSNorm:
    norm = RMSNorm(text.hidden_size, text.norm_eps, zero_centered=True, dtype=chunk.engine.params_dtype)
    mark_partial(norm.parameters(), chunk.engine.sequence_parallel)
    return norm


class Gemma3Chunk(MegatronModule):
    """One pipeline chunk of Gemma 3, called by megatron-core's schedules.

    Args:
        config: the model.
        chunk: which part of it, and how it is held.
        groups: process groups; `tp` and `cp` (of one rank) are read.
    """

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: ModelConfig, chunk: ChunkSettings, groups: ProcessGroupCollection) -> None:
        super().__init__(chunk.engine)
        self.groups = groups
        self.pre_process, self.post_process, self.vp_stage = chunk.is_first, chunk.is_last, chunk.virtual_stage
        self.share_embeddings_and_output_weights = config.text.tie_word_embeddings
        self.divides_images = chunk.vision_parallelism == "data" and groups.tp.size() > 1
        self.language_model = LanguageModelChunk(config.text, chunk, groups.tp)
        self.input_tensor: torch.Tensor | None = None
        if chunk.is_first and config.vision is not None:
            # A micro-batch without images skips the tower, or gives it one whose features nobody reads.
            size = config.vision.image_size
            self.unread_pixels_shape = (1, config.vision.num_channels, size, size) if chunk.overlapped else None
            assert config.mm_tokens_per_image is not None
            group = groups.cp if self.divides_images else groups.tp
            self.vision_tower = VisionTower(config.vision, chunk.tower_engine, group, chunk.recompute == "full")
            self.projector = Projector(
                config.vision,
                config.mm_tokens_per_image,
                config.text.hidden_size,
                chunk.engine.params_dtype,
                group,
            )
            if self.divides_images:
                for parameter in (*self.vision_tower.parameters(), *self.projector.parameters()):
                    parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
                    mark_partial([parameter])

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Receive the hidden states of the previous chunk (called by the schedule)."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        """The tied embedding, whose gradients megatron-core sums over the first and last stage."""
        return self.language_model.embed_tokens.weight

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Hidden states [S, B, H] for the next chunk, or on the last chunk the fp32 loss of every token [B, S]."""
        x_SBH = self.hidden_states(batch)
        if not self.post_process:
            # The schedule frees what was sent: not a view's base, nor the input of a chunk without layers.
            is_own = x_SBH._base is None and x_SBH is not self.input_tensor
            return x_SBH if is_own else x_SBH.clone()
        return token_losses(self.language_model.logits(x_SBH), batch.labels, self.groups.tp)

    def hidden_states(self, batch: MicroBatch) -> torch.Tensor:
        """Output of this chunk's last layer, [S, B, H]."""
        x_SBH = self._embed(batch) if self.pre_process else self.input_tensor
        assert x_SBH is not None
        return self.language_model.decode(x_SBH, batch.position_ids, Spans(batch.span_low, batch.span_high))

    def _embed(self, batch: MicroBatch) -> torch.Tensor:
        """Tokens and images as one sequence, [S, B, H]."""
        is_image = batch.feature_index >= 0
        # Soft image tokens may lie outside the vocabulary; what is looked up for them is replaced.
        x_BSH = self.language_model.embed(batch.input_ids.masked_fill(is_image, 0))
        if hasattr(self, "vision_tower"):
            pixels = batch.vision_inputs.get("pixel_values")
            if pixels is None and self.unread_pixels_shape is not None:
                pixels = x_BSH.new_zeros(self.unread_pixels_shape)
            if pixels is not None:
                features = self._image_features(pixels)
                # Row 0 is for text, whose gradients an embedding leaves out; indexing would sum them all in one row.
                table = torch.nn.functional.pad(features, (0, 0, 1, 0))
                placed = embedding(batch.feature_index + 1, table, padding_idx=0)
                x_BSH = torch.where(is_image.unsqueeze(-1), placed.to(x_BSH.dtype), x_BSH)
        x_SBH = x_BSH.transpose(0, 1).contiguous()
        if self.language_model.sequence_parallel:
            x_SBH = tensor_parallel.scatter_to_sequence_parallel_region(x_SBH, group=self.groups.tp)
        return x_SBH

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Soft tokens of all images in a row, [I * tokens per image, H], whole on every tensor rank."""
        if not self.divides_images:
            return self.projector(self.vision_tower(pixels)).flatten(0, 1)
        ones = [1] * pixels.shape[0]
        division = ImageDivision(rows=ones, costs=ones, group=self.groups.tp)
        features = self.projector(self.vision_tower(division.take(pixels, blank_rows=1)))
        return division.gather(features).flatten(0, 1)
