"""The router of 26B-A4B, which chooses experts by the residual stream itself.

Source: `Gemma4TextRouter` in transformers models/gemma4. Shapes: T tokens of this rank, H hidden, E experts.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.layers.moe import Routing, TopKRouter
from megatron_vlm.model_configs import MoEConfig
from megatron_vlm.parallel.parameters import declare, ones
from vlm_kernels.rms_norm import rms_norm


class Router(torch.nn.Module):
    """A router of normalised and scaled inputs; each expert has a factor on its weight."""

    def __init__(self, hidden_size: int, moe: MoEConfig, norm_eps: float, mcore_config: TransformerConfig) -> None:
        super().__init__()
        self.eps, is_partial = norm_eps, mcore_config.sequence_parallel
        self.proj = TopKRouter(hidden_size, moe, mcore_config)
        self.scale, self.per_expert_scale = (
            declare(
                torch.nn.Parameter(torch.empty(size, dtype=mcore_config.params_dtype)),
                "vector",
                ones,
                partial=is_partial,
            )
            for size in (hidden_size, moe.num_experts)
        )

    def forward(self, x_TH: torch.Tensor, is_real_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Routing]:
        """Return what `TopKRouter` does: weights [T, E] fp32, choices [T, E] bool, and their sums over real tokens."""
        # One multiplication after another, each rounded, as in transformers.
        scaled_TH = rms_norm(x_TH, None, self.eps) * self.scale * x_TH.shape[-1] ** -0.5
        weights_TE, chosen_TE, routing = self.proj(scaled_TH, is_real_T)
        return weights_TE * self.per_expert_scale, chosen_TE, routing
