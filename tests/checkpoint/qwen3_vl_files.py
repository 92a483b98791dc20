"""Tiny randomised Qwen3-VL checkpoints, written by transformers itself, and rewritten as the published ones are."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.checkpoint.hf_files import Tensors, pad_vocabulary, rename, rewrite, save
from tests.families import qwen3_vl

# Experts as wide as the model, or half as wide: one of the two matrices is square, and its shape tells nothing.
SQUARE_DOWN = {"moe_intermediate_size": qwen3_vl.TEXT["hidden_size"]}
SQUARE_GATE_UP = {"moe_intermediate_size": qwen3_vl.TEXT["hidden_size"] // 2}


def saved(directory: Path, moe: bool = True, dtype: torch.dtype = torch.bfloat16, **settings: object) -> Path:
    """What transformers saves."""
    return save(qwen3_vl.build(moe, dtype=dtype, **settings).eval(), directory)


def transpose_experts(tensors: Tensors) -> Tensors:
    """From what transformers saves to what is published, or back."""
    return {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor for name, tensor in tensors.items()
    }


def published(source: Path, target: Path) -> Path:
    """The same model as published files hold it."""
    return rewrite(source, target, transpose_experts)


def ours(tensors: Tensors) -> Tensors:
    """The tensors that transformers saves under our names and in our shapes, independently of the weight map."""
    prefixes = {
        "model.language_model.": "language_model.",
        "lm_head.": "language_model.lm_head.",
        "model.visual.merger.": "projector.merger.",
        "model.visual.deepstack_merger_list.": "projector.deepstack_merger_list.",
        "model.visual.": "vision_tower.",
    }
    result = pad_vocabulary(rename(prefixes)(tensors))
    for name, tensor in result.items():
        if name.endswith("gate_up_proj"):
            result[name] = torch.stack(tensor.chunk(2, dim=1), dim=1)
        elif ".attn.qkv." in name:
            result[name] = torch.stack(tensor.chunk(3))
    return result
