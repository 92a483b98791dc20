"""Vocabulary-parallel token embedding, and how features of images and videos replace embeddings of placeholders.

Shapes: B batch, S sequence, H hidden, T feature rows.
"""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.layers.linear import Group
from megatron_vlm.parallel.parameters import Stages, declare, normal_rows

_VOCABULARY_MULTIPLE = 64


def padded_vocab_size(vocab_size: int) -> int:
    """Return the padded number of vocabulary rows: the next multiple of 64.

    It is the same in every layout, so that checkpoints do not depend on the layout. Published vocabularies (131072,
    151936, 262144, 262208) need no padding. Padding rows are zero and outside the softmax.
    """
    return -(-vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


class TokenEmbedding(tensor_parallel.VocabParallelEmbedding):
    """An embedding table whose rows are split over the tensor ranks; `padding_id` gets no gradient through the lookup.

    A tied head still gives that row a gradient. Source: `torch.nn.Embedding(padding_idx=...)` in transformers.

    Args:
        vocab_size: number of rows without padding.
        hidden_size: H.
        padding_id: id of the padding token; None for none.
        is_tied: whether the head of the last stage is a copy.
        mcore_config: megatron-core settings.
        group: the tensor-parallel process group.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        padding_id: int | None,
        is_tied: bool,
        mcore_config: TransformerConfig,
        group: Group,
    ) -> None:
        super().__init__(
            padded_vocab_size(vocab_size),
            hidden_size,
            init_method=lambda weight: None,
            config=mcore_config,
            tp_group=group,
        )
        self.padding_id = padding_id
        stages: Stages = "embedding_and_head" if is_tied else "one"
        declare(self.weight, "table", normal_rows(vocab_size, padding_id), tensor_dim=0, stages=stages)

    def forward(self, ids_BS: torch.Tensor | None) -> torch.Tensor:
        """Return embeddings [B, S, H], full on every tensor rank; without ids, this rank's table for a tied head.

        The head gets the table by a call too, because reading `weight` would bypass the hooks of overlapped parameter
        gathering.
        """
        if ids_BS is None:
            return self.weight
        embedded = super().forward(ids_BS)
        if self.padding_id is None:
            return embedded
        return torch.where((ids_BS == self.padding_id).unsqueeze(-1), embedded.detach(), embedded)


def place_features(x_BSH: torch.Tensor, features_TH: torch.Tensor, feature_index_BS: torch.Tensor) -> torch.Tensor:
    """Return `x` with rows of `features` where the index is not -1."""
    placed = spread_features(features_TH.to(x_BSH.dtype), feature_index_BS)
    return torch.where((feature_index_BS >= 0).unsqueeze(-1), placed, x_BSH)


def spread_features(features_TH: torch.Tensor, feature_index_BS: torch.Tensor) -> torch.Tensor:
    """Return rows of `features` by index, zero where it is -1, [B, S, H]."""
    # Row 0 stands for text, and an embedding computes no gradient for it; indexing would sum all of them in one row.
    table = torch.nn.functional.pad(features_TH, (0, 0, 1, 0))
    return torch.nn.functional.embedding(feature_index_BS + 1, table, padding_idx=0)
