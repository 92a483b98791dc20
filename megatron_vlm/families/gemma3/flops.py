"""Floating-point operations that Gemma 3 needs for a micro-batch; `flop_counts` says what is counted."""

from __future__ import annotations

from collections.abc import Set

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.families.flop_counts import ForwardFlops, text_flops
from megatron_vlm.families.gemma3.config import ModelConfig, VisionConfig


def batch_flops(model_config: ModelConfig, batch: MicroBatch, frozen: Set[str] = frozenset()) -> float:
    """Operations of one forward and backward pass of the whole model, over all ranks that share the micro-batch.

    Args:
        model_config: the model.
        batch: on the host, so that counting waits for no device; images are counted by its counters, because pipeline
            stages other than the first read no pixels.
        frozen: parts that do not train.
    """
    text, vision = model_config.text, model_config.vision
    linear, attention = text_flops(text, batch, lambda layer: 3 * text.hidden_size * layer.intermediate_size)
    if vision is None:
        return ForwardFlops(linear, attention).with_backward(frozen)
    assert model_config.mm_tokens_per_image is not None
    num_images = batch.counters["images"]
    patches, layers = vision_flops(vision)
    projector = 2 * model_config.mm_tokens_per_image * vision.hidden_size * text.hidden_size
    forward = ForwardFlops(linear, attention, num_images * patches, num_images * layers, num_images * projector)
    return forward.with_backward(frozen)


def vision_flops(vision: VisionConfig) -> tuple[int, int]:
    """Forward operations of one image in the tower: its patch embedding, and its encoder layers."""
    num_patches = (vision.image_size // vision.patch_size) ** 2
    pixels_per_patch = vision.num_channels * vision.patch_size**2
    embedding = 2 * num_patches * pixels_per_patch * vision.hidden_size
    weights = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    attention = 2 * 2 * num_patches**2 * vision.hidden_size
    return embedding, vision.num_hidden_layers * (2 * num_patches * weights + attention)
