"""Floating-point operations that Mistral3 needs for a micro-batch; `flop_counts` says what is counted.

A patch attends to those of its own image. Frequencies of positions and the growth of queries are no products.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.data.media import Grid
from megatron_vlm.families.mistral3.config import ModelConfig, VisionConfig
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
    assert vision is not None
    forward = ForwardFlops(linear, attention, *vision_flops(vision, batch.grids))
    return forward.with_backward(frozen)


def vision_flops(vision: VisionConfig, grids: Sequence[Grid]) -> tuple[int, int, int]:
    """Forward operations of images: patch embedding, tower layers, and projector.

    Args:
        vision: the tower and the projector.
        grids: (1, height, width) in patches of each.
    """
    embedding, layers = tower_flops(vision, grids)
    patches_per_feature = vision.spatial_merge_size**2
    num_features = sum(frames * height * width for frames, height, width in grids) // patches_per_feature
    hidden, out = vision.hidden_size, vision.out_hidden_size
    # Merging a block of patches into one vector, and the two linear layers.
    projector = 2 * num_features * (patches_per_feature * hidden**2 + hidden * out + out**2)
    return embedding, layers, projector
