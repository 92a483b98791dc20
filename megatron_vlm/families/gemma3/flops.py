"""Floating-point operations that Gemma 3 needs for a micro-batch, from exact counts of tokens, visible keys and images.

Counted are matrix products, at two operations per multiply-add; norms, activations, softmax, rotary positions and
look-ups are not. Padding is not counted, nor keys that a query cannot see, nor what recomputation repeats.

A product x W costs F forward, F for the gradient of W if W trains, and F for the gradient of x if anything that x was
computed from trains. Hence, in units of the forward count:
- language model: linear layers, head and attention 3;
- frozen language model below which the tower or the projector trains: linear layers and head 2, attention 3 (both of
  its products have two inputs that need gradients); 1 in a micro-batch without images, where no gradient is needed;
- projector 3; frozen above a tower that trains 2; frozen above a frozen tower 1;
- tower 3, except its patch embedding 2 (pixels need no gradient); frozen 1.
"""

from __future__ import annotations

from collections.abc import Set

import torch

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.families.gemma3.config import ModelConfig, TextConfig, VisionConfig


def batch_flops(model_config: ModelConfig, batch: MicroBatch, frozen: Set[str] = frozenset()) -> float:
    """Operations of one forward and backward pass of the whole model, over all ranks that share the micro-batch.

    Args:
        model_config: the model.
        batch: on the host, so that counting waits for no device; images are counted by its counters, because pipeline
            stages other than the first read no pixels.
        frozen: parts that do not train.
    """
    num_images = 0 if model_config.vision is None else batch.counters["images"]
    trains_tower = "vision_tower" not in frozen
    trains_projector = "projector" not in frozen
    trains_text = "language_model" not in frozen
    gradient_reaches_text = trains_text or (num_images > 0 and (trains_tower or trains_projector))
    linear, attention = text_flops(model_config.text, batch)
    total = linear * (1 + trains_text + gradient_reaches_text) + attention * (1 + 2 * gradient_reaches_text)
    if model_config.vision is not None and num_images:
        assert model_config.mm_tokens_per_image is not None
        patches, layers = vision_flops(model_config.vision)
        hidden = model_config.vision.hidden_size * model_config.text.hidden_size
        projector = 2 * model_config.mm_tokens_per_image * hidden
        # The projector's norm trains with it and comes before its product.
        gradient_reaches_projector = trains_tower or trains_projector
        total += num_images * (
            patches * (1 + trains_tower)
            + layers * (1 + 2 * trains_tower)
            + projector * (1 + trains_projector + gradient_reaches_projector)
        )
    return float(total)


def text_flops(text: TextConfig, batch: MicroBatch) -> tuple[int, int]:
    """Forward operations of the language model: its linear layers with the head, and its attention products."""
    is_real = batch.document_ids >= 0
    keys = {window: visible_keys(batch, is_real, window) for window in {layer.window for layer in text.layers}}
    weights = text.hidden_size * text.vocab_size
    attention = 0
    for layer in text.layers:
        query_and_output = 2 * text.hidden_size * layer.num_attention_heads * layer.head_dim
        key_and_value = 2 * text.hidden_size * layer.num_key_value_heads * layer.head_dim
        weights += query_and_output + key_and_value + 3 * text.hidden_size * layer.intermediate_size
        # Scores and the sum of values: two products of head_dim multiply-adds per visible pair.
        attention += 2 * 2 * layer.num_attention_heads * layer.head_dim * keys[layer.window]
    return 2 * weights * int(is_real.sum()), attention


def visible_keys(batch: MicroBatch, is_real: torch.Tensor, window: int | None) -> int:
    """Pairs of a real query and a key that it sees in a layer with this window."""
    low = batch.span_low
    if window is not None:
        places = torch.arange(low.shape[1], dtype=low.dtype, device=low.device)
        low = torch.maximum(low, places - (window - 1))
    return int(((batch.span_high - low + 1) * is_real).sum())


def vision_flops(vision: VisionConfig) -> tuple[int, int]:
    """Forward operations of one image in the tower: its patch embedding, and its encoder layers."""
    num_patches = (vision.image_size // vision.patch_size) ** 2
    pixels_per_patch = vision.num_channels * vision.patch_size**2
    embedding = 2 * num_patches * pixels_per_patch * vision.hidden_size
    weights = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    attention = 2 * 2 * num_patches**2 * vision.hidden_size
    return embedding, vision.num_hidden_layers * (2 * num_patches * weights + attention)
