"""The common parts of every decoder around its layers: embedding, recomputation, final norm and head.

Shapes: B batch, S sequence (hidden states hold a shard of it under sequence parallelism), H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.layers.context_exchange import spans_of
from megatron_vlm.layers.embedding import TokenEmbedding, padded_vocab_size
from megatron_vlm.layers.expert_use import ExpertUse
from megatron_vlm.layers.linear import ColumnParallelLinear
from megatron_vlm.layers.moe import LocalTokens, Routing
from megatron_vlm.layers.norm import RMSNorm
from megatron_vlm.layers.recompute import run_layer
from megatron_vlm.layers.vocab_parallel_loss import Head, linear_cross_entropy
from megatron_vlm.model_configs import DecoderConfig
from megatron_vlm.parallel.chunk_settings import ChunkSettings
from megatron_vlm.parallel.parameters import declare, normal_rows
from megatron_vlm.parallel.stage_state import StageState
from vlm_kernels.span_attention import Spans


class LanguageModelChunk(torch.nn.Module):
    """The decoder layers of one chunk, the embedding where the decoder begins, and what the head needs on the last.

    The last chunk also holds a tied embedding; the gradients of the copies are summed.

    Args:
        text: configuration of the language model.
        chunk: settings of the pipeline chunk.
        groups: process groups.
        make_layer: function that builds the decoder layer with a global id.
        zero_centered_norm: whether the final norm multiplies by one plus its weight.
        softcap: bound of the logits; None for none.
        embedding_scale: factor on embeddings.
    """

    def __init__(
        self,
        text: DecoderConfig,
        chunk: ChunkSettings,
        groups: ProcessGroupCollection,
        make_layer: Callable[[int], torch.nn.Module],
        zero_centered_norm: bool,
        softcap: float | None = None,
        embedding_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.text, self.embedding_scale = text, embedding_scale
        self.chunk, self.groups, group = chunk, groups, groups.tp
        self.head = Head(text.vocab_size, group, chunk.mcore_config.sequence_parallel, softcap, chunk.loss.chunk_bytes)
        self.z_loss_coeff = chunk.loss.z_loss_coeff
        self.recompute_layers = chunk.recompute == "full"
        has_experts = any(layer.moe is not None for layer in text.layers)
        self.expert_use = ExpertUse(text.layers, chunk, groups) if has_experts else None
        if chunk.has_embedding or (chunk.is_last and text.tie_word_embeddings):
            self.embed_tokens = TokenEmbedding(
                text.vocab_size,
                text.hidden_size,
                text.pad_token_id,
                text.tie_word_embeddings,
                chunk.mcore_config,
                group,
            )
            # The head adds its part of the gradient to `main_grad` itself; megatron-core must then still add that of
            # the lookup, which exists where one chunk has both.
            self.embed_tokens.weight.zero_out_wgrad = chunk.has_embedding and chunk.is_last and text.tie_word_embeddings
        self.layers = torch.nn.ModuleDict({str(index): make_layer(index) for index in chunk.layers})
        if chunk.is_last:
            self.norm = residual_norm(text, chunk, zero_centered_norm)
            if not text.tie_word_embeddings:
                vocab_size = padded_vocab_size(text.vocab_size)
                self.lm_head = ColumnParallelLinear(text.hidden_size, vocab_size, chunk.mcore_config, group)
                declare(self.lm_head.weight, "table", normal_rows(text.vocab_size), tensor_dim=0)

    def embed(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """Return embeddings [B, S, H]; a scale is rounded to the weights' dtype first, as in transformers."""
        embedded: torch.Tensor = self.embed_tokens(ids_BS)
        if self.embedding_scale is None:
            return embedded
        return embedded * torch.tensor(self.embedding_scale, dtype=embedded.dtype).item()

    def run(self, state: StageState, batch: MicroBatch) -> StageState:
        """Run this chunk's layers on the state that the layer before them left."""
        if not self.layers:
            return state
        inputs = self.layer_inputs(batch, state.hidden.dtype)
        for name, layer in self.layers.items():
            index = int(name)
            # Carried tensors are explicit inputs and outputs, so that recomputation reads the same ones and returns
            # their gradients.
            reads = self.layer_reads(index, state)
            output = run_layer(layer, state.hidden, *reads, *inputs, recompute=self.recompute_layers)
            state = self.after_layer(index, output, state, inputs)
        return state

    def layer_inputs(self, batch: MicroBatch, dtype: torch.dtype) -> tuple[Any, ...]:
        """Return each layer's inputs after hidden states and the tensors it reads: rotary tables, spans and so on."""
        raise NotImplementedError

    def layer_reads(self, layer: int, state: StageState) -> tuple[torch.Tensor, ...]:
        """Return the carried tensors that the layer with a global id reads; by default, none."""
        return ()

    def after_layer(self, layer: int, output: Any, state: StageState, inputs: tuple[Any, ...]) -> StageState:
        """Return the state after a layer, from its output; by default, the output is the hidden states.

        Args:
            layer: global id of the layer.
            output: output of the layer.
            state: state before the layer.
            inputs: result of `layer_inputs`.
        """
        return replace(state, hidden=output)

    def spans(self, batch: MicroBatch) -> Spans:
        """Return the visible ranges, and on a context rank, how layers gather keys and values."""
        return spans_of(batch, self.groups.cp, self.chunk.attention_backend)

    def local_tokens(self, batch: MicroBatch) -> LocalTokens | None:
        """Return which tokens count for the experts; None without experts."""
        if self.expert_use is None:
            return None
        num_real = None if batch.context is None else batch.context.num_real
        return LocalTokens.of(batch.document_ids, self.chunk, self.groups, num_real)

    def count_experts(
        self, layer: int, routing: Routing | None, tokens: LocalTokens | None, scalars: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Count where a layer's experts' tokens went, and return the carried scalars after the layer."""
        if self.expert_use is None or routing is None or tokens is None:
            return scalars
        return self.expert_use.add(layer, routing, tokens, scalars)

    def head_weight(self) -> torch.Tensor:
        """Return this rank's rows of the head, [vocabulary / tensor ranks, H]."""
        weight = self.embed_tokens(None) if self.text.tie_word_embeddings else self.lm_head().weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def losses(self, x_SBH: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """Return the loss of every token in fp32, [B, S], 0 without a label; in training mode with the z-loss."""
        z_loss_coeff = self.z_loss_coeff if self.training else 0.0
        x_SBH, weight = self.norm(x_SBH), self.head_weight()
        return linear_cross_entropy(x_SBH, weight, batch.labels, batch.label_index, self.head, z_loss_coeff)


def residual_norm(text: DecoderConfig, chunk: ChunkSettings, zero_centered: bool) -> RMSNorm:
    """Build a norm of the residual stream; under sequence parallelism, each tensor rank normalises its shard."""
    mcore_config = chunk.mcore_config
    return RMSNorm(
        text.hidden_size, text.norm_eps, zero_centered, mcore_config.params_dtype, mcore_config.sequence_parallel
    )
