"""Floating-point operations that Gemma 3 needs for a micro-batch; `flop_counts` says what is counted."""

from __future__ import annotations

from collections.abc import Set

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.families.gemma3.config import ModelConfig
from megatron_vlm.model.flop_counts import ForwardFlops, text_flops, tower_flops


def batch_flops(model_config: ModelConfig, batch: MicroBatch, frozen: Set[str] = frozenset()) -> float:
    """Operations of one forward and backward pass of the whole model, over all ranks that share the micro-batch.

    Args:
        model_config: the model.
        batch: on the host, so that counting waits for no device; images are counted by its grids, which every pipeline
            stage has.
        frozen: parts that do not train.
    """
    text, vision = model_config.text, model_config.vision
    linear, attention = text_flops(text, batch, lambda layer: 3 * text.hidden_size * layer.intermediate_size)
    if model_config.text_only:
        return ForwardFlops(linear, attention).with_backward(frozen)
    assert vision is not None and model_config.mm_tokens_per_image is not None
    embedding, layers = tower_flops(vision, batch.grids)
    projector = len(batch.media) * 2 * model_config.mm_tokens_per_image * vision.hidden_size * text.hidden_size
    return ForwardFlops(linear, attention, embedding, layers, projector).with_backward(frozen)
