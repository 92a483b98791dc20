"""Activations that are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def run_layer(layer: torch.nn.Module, *inputs: Any, recompute: bool) -> Any:
    """Output of a layer, which while it trains keeps only its inputs if `recompute`."""
    if recompute and layer.training:
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)
