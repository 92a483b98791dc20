"""Tiny randomised Mistral3 checkpoints, written by transformers itself, and rewritten as float8 with scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Ministral3Config, Ministral3ForCausalLM, MistralConfig, MistralForCausalLM

from tests.checkpoint.hf_files import (
    Tensors,
    pad_vocabulary,
    randomise,
    read_config,
    rename,
    rewrite,
    save,
    write_config,
)
from tests.families import mistral3

FLOAT8_MAXIMUM = 448.0
IN_MEMORY_STYLE = rename(
    {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
)


def saved(directory: Path, ministral: bool = True, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Path:
    """What transformers saves: names as published."""
    return save(mistral3.build(ministral, **settings).to(dtype).eval(), directory)


def saved_text_only(directory: Path, ministral: bool, tied: bool, **settings: Any) -> Path:
    """What transformers saves of a language model that never had a tower."""
    text = {**mistral3.TEXT, "tie_word_embeddings": tied, **settings}
    if ministral:
        model: Any = Ministral3ForCausalLM(Ministral3Config(**text, rope_parameters=dict(mistral3.YARN)))
    else:
        model = MistralForCausalLM(MistralConfig(**text))
    return save(randomise(model).to(torch.bfloat16), directory)


def ours(tensors: Tensors) -> Tensors:
    """The tensors that transformers saves under our names and with padded vocabulary, apart from the weight map."""
    prefixes = {
        "language_model.model.": "language_model.",
        "multi_modal_projector.": "projector.",
        "lm_head.": "language_model.lm_head.",
        "model.": "language_model.",
    }
    return pad_vocabulary(rename(prefixes)(tensors))


def is_quantized(name: str) -> bool:
    """Whether published float8 files hold this weight in float8: the linear layers of the language model's layers."""
    return "language_model" in name and name.endswith("_proj.weight")


def quantize(tensors: Tensors, block_size: tuple[int, int] | None, scale_dtype: torch.dtype = torch.float32) -> Tensors:
    """In float8 with static scales, as published Instruct files are (`block_size` None), or with a scale per block."""
    result: Tensors = {}
    for name, weight in tensors.items():
        if not is_quantized(name):
            result[name] = weight
            continue
        rows, columns = block_size or weight.shape
        scales = torch.stack(
            [
                torch.stack([block.float().abs().max() for block in band.split(columns, dim=1)])
                for band in weight.split(rows)
            ]
        )
        scales = (scales / FLOAT8_MAXIMUM).to(scale_dtype)
        whole = scales.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        whole = whole[: weight.shape[0], : weight.shape[1]]
        quantized = (weight.float() / whole).clamp(-FLOAT8_MAXIMUM, FLOAT8_MAXIMUM).to(torch.float8_e4m3fn)
        result |= {name: quantized, name + "_scale_inv": scales if block_size else scales.view(())}
        if block_size is None:
            result[name.removesuffix("weight") + "activation_scale"] = torch.tensor(0.25, dtype=scale_dtype)
    return result


def saved_float8(source: Path, target: Path, block_size: tuple[int, int] | None, **quantization: Any) -> Path:
    """A float8 copy of a saved checkpoint, with the configuration of the published ones."""
    scale_dtype = quantization.pop("scale_dtype", torch.float32)
    rewrite(source, target, lambda tensors: quantize(tensors, block_size, scale_dtype))
    scheme = {
        "quant_method": "fp8",
        "activation_scheme": "static" if block_size is None else "dynamic",
        "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        "weight_block_size": block_size,
    }
    write_config(target, read_config(target) | {"quantization_config": scheme | quantization})
    return target
