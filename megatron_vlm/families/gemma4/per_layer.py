"""The input that each decoder layer of E2B and E4B has of its own, from the token and from its embedding.

Source: `project_per_layer_inputs` and `Gemma4TextDecoderLayer` in transformers models/gemma4.
Shapes: S sequence (a shard of it under sequence parallelism, unless said otherwise), B batch, H hidden, P width of the
input.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import all_to_all_hp2sp, gather_from_tensor_model_parallel_region
from megatron.core.utils import divide
from torch.nn.functional import embedding

from megatron_vlm.families.gemma4.config import TextConfig
from megatron_vlm.layers.linear import Group
from megatron_vlm.layers.norm import norm_and_add
from megatron_vlm.model.language_model import residual_norm
from megatron_vlm.parallel.chunk_settings import ChunkSettings
from megatron_vlm.parallel.parameters import declare, normal, normal_rows
from vlm_kernels.gated import gated
from vlm_kernels.rms_norm import rms_norm


class PerLayerTable(torch.nn.Module):
    """One layer's table of token inputs, [vocabulary, P], whose columns are split over the tensor ranks.

    The padding token gets no gradient. Columns rather than rows, because ranks then exchange what they looked up
    instead of summing it.
    """

    def __init__(self, text: TextConfig, chunk: ChunkSettings, group: Group) -> None:
        super().__init__()
        assert text.per_layer_size is not None
        self.group, self.padding_id = group, text.pad_token_id
        self.sequence_parallel = chunk.mcore_config.sequence_parallel
        columns = divide(text.per_layer_size, group.size())
        weight = torch.nn.Parameter(torch.empty(text.vocab_size, columns, dtype=chunk.mcore_config.params_dtype))
        self.weight = declare(weight, "table", normal_rows(text.vocab_size, text.pad_token_id), tensor_dim=1)

    def forward(self, ids_SB: torch.Tensor) -> torch.Tensor:
        """Return the rows [S, B, P] of token ids, which are those of the full sequence."""
        own_SBP = embedding(ids_SB, self.weight, padding_idx=self.padding_id)
        if self.group.size() == 1:
            return own_SBP
        if not self.sequence_parallel:
            return gather_from_tensor_model_parallel_region(own_SBP, group=self.group)
        rows = all_to_all_hp2sp(own_SBP.flatten(0, 1), group=self.group)
        return rows.unflatten(0, (-1, ids_SB.shape[1]))


class TokenwiseLinear(torch.nn.Linear):
    """A small linear layer without bias, whole on every tensor rank: it acts on tokens that are there already."""

    def __init__(self, in_size: int, out_size: int, chunk: ChunkSettings) -> None:
        super().__init__(in_size, out_size, bias=False, dtype=chunk.mcore_config.params_dtype)
        declare(self.weight, "matrix", normal, partial=chunk.mcore_config.sequence_parallel)


class PerLayerInput(torch.nn.Module):
    """What one layer does with its own input, after its feed-forward layer.

    The linear layers are replicated: split over the tensor ranks, their sums would be exchanged at the width of the
    hidden states, half as much again as the rest of the layer exchanges.
    """

    def __init__(self, text: TextConfig, chunk: ChunkSettings, group: Group) -> None:
        super().__init__()
        assert text.per_layer_size is not None
        size, self.eps = text.per_layer_size, text.norm_eps
        self.table = PerLayerTable(text, chunk, group)
        self.model_projection = TokenwiseLinear(text.hidden_size, size, chunk)
        self.gate = TokenwiseLinear(text.hidden_size, size, chunk)
        self.projection = TokenwiseLinear(size, text.hidden_size, chunk)
        self.post_norm = residual_norm(text, chunk, zero_centered=False)

    def forward(
        self, x_SBH: torch.Tensor, embedded_SBH: torch.Tensor, ids_SB: torch.Tensor, norm_weight_P: torch.Tensor
    ) -> torch.Tensor:
        """Add the layer's own input to its output.

        Args:
            x_SBH: output of the feed-forward layer, residual included.
            embedded_SBH: input of the first decoder layer: embeddings of tokens, and features of media in their place.
            ids_SB: token ids of the full sequence, the padding token's in place of media.
            norm_weight_P: weight of the norm that all layers share.

        Returns:
            A tensor of the shape of `x_SBH`.
        """
        size, hidden_size = norm_weight_P.shape[0], x_SBH.shape[-1]
        # A scale is rounded to the table's dtype first, as in transformers.
        scale = torch.tensor(size**0.5, dtype=x_SBH.dtype).item()
        of_token = self.table(ids_SB) * scale
        of_embedding = rms_norm(self.model_projection(embedded_SBH) * hidden_size**-0.5, norm_weight_P, self.eps)
        own_input = (of_embedding + of_token) * 2.0**-0.5
        added = self.projection(gated(self.gate(x_SBH), own_input, "gelu_tanh"))
        return norm_and_add(added, x_SBH, self.post_norm)
