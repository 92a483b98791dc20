"""What every decoder has around its layers: embedding, recomputation, final norm and head.

Shapes: B batch, S sequence (hidden states hold a shard of it under sequence parallelism), H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from megatron_vlm.layers.embedding import TokenEmbedding, padded_vocab_size, vocab_parallel_logits
from megatron_vlm.layers.expert_use import ExpertUse
from megatron_vlm.layers.linear import ColumnParallelLinear, Group
from megatron_vlm.layers.norm import RMSNorm
from megatron_vlm.parallel.chunk import ChunkSettings
from megatron_vlm.parallel.gradients import mark_partial


class TextRecord(Protocol):
    """What a family's record of its language model says about embedding and head."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def pad_token_id(self) -> int | None: ...
    @property
    def tie_word_embeddings(self) -> bool: ...


class LanguageModelChunk(torch.nn.Module):
    """The decoder layers of one chunk, the embedding on the first and what the head needs on the last.

    A tied embedding is held by both; megatron-core keeps the two gradients equal.

    Args:
        text: the family's record.
        chunk: which part of the model, and how it is held.
        group: tensor ranks.
        make_layer: builds the decoder layer with a global id.
        zero_centered_norm: the final norm multiplies by one plus its weight.
        softcap: bound of the logits, None for none.
    """

    def __init__(
        self,
        text: TextRecord,
        chunk: ChunkSettings,
        group: Group,
        make_layer: Callable[[int], torch.nn.Module],
        zero_centered_norm: bool,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.text, self.group, self.softcap = text, group, softcap
        self.sequence_parallel = chunk.engine.sequence_parallel
        self.recompute_layers = chunk.recompute == "full"
        self.expert_use: ExpertUse | None = None
        if chunk.is_first or (chunk.is_last and text.tie_word_embeddings):
            self.embed_tokens = TokenEmbedding(
                text.vocab_size, text.hidden_size, text.pad_token_id, chunk.engine, group
            )
        self.layers = torch.nn.ModuleDict({str(index): make_layer(index) for index in chunk.layers})
        if chunk.is_last:
            self.norm = residual_norm(text, chunk, zero_centered_norm)
            if not text.tie_word_embeddings:
                vocab_size = padded_vocab_size(text.vocab_size)
                self.lm_head = ColumnParallelLinear(text.hidden_size, vocab_size, chunk.engine, group)

    def embed(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, S, H]."""
        embedded: torch.Tensor = self.embed_tokens(ids_BS)
        return embedded

    def logits(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """This rank's columns of the logits, [S, B, vocabulary / tensor ranks], S whole."""
        weight = self.embed_tokens(None) if self.text.tie_word_embeddings else self.lm_head()[0]
        return vocab_parallel_logits(
            self.norm(x_SBH), weight, self.text.vocab_size, self.softcap, self.group, self.sequence_parallel
        )


def residual_norm(text: TextRecord, chunk: ChunkSettings, zero_centered: bool) -> RMSNorm:
    """A norm of the residual stream; each tensor rank normalises its shard under sequence parallelism."""
    norm = RMSNorm(text.hidden_size, text.norm_eps, zero_centered=zero_centered, dtype=chunk.engine.params_dtype)
    mark_partial(norm.parameters(), chunk.engine.sequence_parallel)
    return norm
