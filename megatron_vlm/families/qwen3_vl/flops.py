"""Floating-point operations that Qwen3-VL needs for a micro-batch; `flop_counts` says what is counted.

A token passes through its `top_k` experts and the router, whatever experts there are besides. A patch attends to those
of its own frame. Positions of the tower are interpolated, not multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.data.media import Grid
from megatron_vlm.families.qwen3_vl.config import ModelConfig
from megatron_vlm.model.flop_counts import ForwardFlops, text_flops, tower_flops
from megatron_vlm.model.qwen_vision import QwenVisionConfig
from megatron_vlm.model_configs import DecoderLayerConfig


def batch_flops(model_config: ModelConfig, batch: MicroBatch, frozen: Set[str] = frozenset()) -> float:
    """Operations of one forward and backward pass of the whole model, over all ranks that share the micro-batch.

    Args:
        model_config: the model.
        batch: on the host, so that counting waits for no device; images and videos are counted by its grids, which
            every pipeline stage has.
        frozen: parts that do not train.
    """
    text, vision = model_config.text, model_config.vision
    linear, attention = text_flops(text, batch, lambda layer: _feed_forward_weights(layer, text.hidden_size))
    if model_config.text_only:
        return ForwardFlops(linear, attention).with_backward(frozen)
    assert vision is not None
    forward = ForwardFlops(linear, attention, *vision_flops(vision, batch.grids))
    return forward.with_backward(frozen)


def _feed_forward_weights(layer: DecoderLayerConfig, hidden_size: int) -> int:
    """Numbers that a token is multiplied with: gate, up and down, of each of its experts, and the router."""
    if layer.moe is None:
        return 3 * hidden_size * layer.intermediate_size
    return hidden_size * (layer.moe.num_experts + 3 * layer.moe.top_k * layer.moe.intermediate_size)


def vision_flops(vision: QwenVisionConfig, grids: Sequence[Grid]) -> tuple[int, int, int]:
    """Forward operations of images and videos: patch embedding, tower layers, and all mergers.

    Args:
        vision: the tower.
        grids: frames, height and width in patches of each.
    """
    embedding, layers = tower_flops(vision, grids)
    patches_per_feature = vision.spatial_merge_size**2
    num_features = sum(frames * height * width for frames, height, width in grids) // patches_per_feature
    joined_size = vision.projector_hidden_size  # also what goes in
    merger = 2 * num_features * joined_size * (joined_size + vision.out_hidden_size)
    mergers = 1 + len(vision.deepstack_layers)
    return embedding, layers, mergers * merger
