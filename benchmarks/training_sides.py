"""Two trainers of the same model on the same rows: plain transformers, and a run of this project on a single rank."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from megatron_vlm import platform
from megatron_vlm.config import OptimizerSettings
from megatron_vlm.conversion.running_model import load_hf_into_model
from megatron_vlm.data.collate import LoadedSample, MicroBatch, collate
from megatron_vlm.data.media import Medium
from megatron_vlm.data.prompts import Sample
from megatron_vlm.families import registry
from megatron_vlm.families.build import BuildSettings, build_chunks, wrap_data_parallel
from megatron_vlm.parallel.groups import build_groups, initialize_megatron
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.training.optimizer import apply_gradients, build_optimizer, gradient_norm
from megatron_vlm.training.step import run_global_batch

LEARNING_RATE, CLIP_GRAD = 1e-4, 1.0
SETTINGS = OptimizerSettings(lr=LEARNING_RATE, min_lr=0.0, weight_decay=0.1, clip_grad=CLIP_GRAD)


@dataclass
class Side:
    """One of the two trainers: `step` does one training step and returns its loss."""

    name: str
    step: Callable[[], float]


def auto_class(config: PretrainedConfig) -> Any:
    """Return transformers' auto class for a configuration: with images, or text-only."""
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def record_of(config: PretrainedConfig) -> tuple[registry.Family, Any]:
    """Return the family of a transformers configuration, and the family's own model configuration."""
    family = registry.detect(config)
    return family, family.config_from_hf(config, text_only=not hasattr(config, "vision_config"))


def build_batch(config: PretrainedConfig, num_tokens: int, image_patches: tuple[int, int] | None) -> MicroBatch:
    """Build one row without padding, whose second half is trained.

    Args:
        config: the model's transformers configuration; with an image, one of Qwen3-VL.
        num_tokens: length of the row.
        image_patches: height and width in patches of an image before the text; None for a text-only row.
    """
    family, model_config = record_of(config)
    generator = np.random.default_rng(0)
    ids = generator.integers(1, model_config.text.vocab_size - 100, num_tokens)
    sample = Sample(input_ids=ids, trained=np.arange(num_tokens) >= num_tokens // 2)
    if image_patches is not None:
        rows, columns = image_patches
        vision = config.vision_config
        num_visual = rows * columns // vision.spatial_merge_size**2
        ids[8], ids[9 + num_visual] = config.vision_start_token_id, config.vision_end_token_id
        ids[9 : 9 + num_visual] = config.image_token_id
        features = 3 * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.from_numpy(generator.standard_normal((rows * columns, features), dtype=np.float32))
        sample.media_inputs = {"pixel_values": pixels}
        sample.media = [Medium("image", (1, rows, columns))]
    return collate([[LoadedSample(sample, 0, "row 0")]], family.prompt_rules(model_config), padding_token_id=0)


def transformers_side(
    folder: Path, batches: Sequence[MicroBatch], dtype: torch.dtype, with_liger: bool = False
) -> Side:
    """Build a plain loop around transformers' model: its default attention and experts, its own loss, fused AdamW.

    Args:
        folder: the model directory.
        batches: micro-batches of every step, with equal numbers of labels.
        dtype: dtype of weights, activations and moments.
        with_liger: replace its layers and loss by Liger's kernels, where these can be imported: Liger is installed and
            supports this transformers. The side's name says whether it was done.
    """
    device = platform.current().device
    config = registry.load_hf_config(str(folder))
    model = auto_class(config).from_pretrained(folder, dtype=dtype).to(device).train()
    has_liger = with_liger and _apply_liger(model)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=LEARNING_RATE,
        betas=SETTINGS.betas,
        eps=SETTINGS.eps,
        weight_decay=SETTINGS.weight_decay,
        fused=True,
    )
    inputs = [_transformers_inputs(config, batch, device, dtype) for batch in batches]

    def step() -> float:
        total = 0.0
        for each in inputs:
            loss = model(**each).loss / len(inputs)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)

    return Side("transformers with Liger" if has_liger else "transformers", step)


def _apply_liger(model: torch.nn.Module) -> bool:
    try:
        importlib.import_module("liger_kernel.transformers")._apply_liger_kernel_to_instance(model)
    except ImportError as error:
        print(f"Liger takes no part: {error}", flush=True)
        return False
    return True


def _transformers_inputs(
    config: PretrainedConfig, batch: MicroBatch, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    # transformers shifts labels itself.
    labels = torch.nn.functional.pad(batch.labels[:, :-1], (1, 0), value=-100)
    inputs = {"input_ids": batch.input_ids, "attention_mask": torch.ones_like(batch.input_ids), "labels": labels}
    if batch.media_inputs:
        inputs |= {
            "mm_token_type_ids": (batch.input_ids == config.image_token_id).int(),
            "pixel_values": batch.media_inputs["pixel_values"].to(dtype),
            "image_grid_thw": torch.tensor(batch.grids),
        }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def own_side(folder: Path, batches: Sequence[MicroBatch], dtype: torch.dtype) -> Side:
    """Build the step of a run with one rank, without reading data and logging; torch.distributed must be initialised.

    Args:
        folder: the model directory, whose weights are loaded.
        batches: micro-batches of every step, on the host.
        dtype: dtype of weights and activations; gradients and the optimizer state are fp32.
    """
    family, model_config = record_of(registry.load_hf_config(str(folder)))
    layout = Layout.over(1, num_layers=len(model_config.text.layers))
    groups = build_groups(layout)
    initialize_megatron(1, groups)
    chunks = build_chunks(family, model_config, BuildSettings(layout, dtype), groups)
    load_hf_into_model(chunks, str(folder), family, model_config, groups)
    model = wrap_data_parallel(chunks, groups, use_distributed_optimizer=True)
    optimizer = build_optimizer(model, SETTINGS, dtype, True, groups)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    pinned = [batch.pin_memory() if platform.current().accelerated else batch for batch in batches]
    on_device = [batch.to(platform.current().device, non_blocking=True) for batch in pinned]

    def step() -> float:
        for chunk in model:
            chunk.train()
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        sums = run_global_batch(model, on_device, groups)
        norm = gradient_norm(optimizer)
        (total, count), *_ = sums.tolist()
        apply_gradients(optimizer, norm, CLIP_GRAD)
        return total / count

    return Side("megatron_vlm", step)
