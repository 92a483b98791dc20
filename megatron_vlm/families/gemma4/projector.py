"""The projector of images and of audio into Gemma 4's language model.

Source: transformers models/gemma4 (`Gemma4MultimodalEmbedder`).
Shapes: T tokens of the language model, H width of what is projected.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.layers.linear import ColumnParallelLinear, Group, column_parallel
from vlm_kernels.rms_norm import rms_norm


class Projector(torch.nn.Module):
    """A norm without weight and a linear map into the language model, whose rows are split over `group`.

    Args:
        in_size: H.
        out_size: width of the language model.
        norm_eps: added to the mean square.
        mcore_config: megatron-core settings without sequence parallelism.
        group: process group over which the linear map is sharded.
    """

    def __init__(
        self, in_size: int, out_size: int, norm_eps: float, mcore_config: TransformerConfig, group: Group
    ) -> None:
        super().__init__()
        self.group, self.eps = group, norm_eps
        self.embedding_projection = ColumnParallelLinear(in_size, out_size, mcore_config, group)

    def forward(self, x_TH: torch.Tensor) -> list[torch.Tensor]:
        """Map [T, H] to features [T, text hidden], full on every rank."""
        (part,) = column_parallel(rms_norm(x_TH, None, self.eps), (self.embedding_projection,), self.group, False)
        return [gather_from_tensor_model_parallel_region(part, group=self.group)]
