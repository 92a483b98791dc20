"""What counting a family's floating-point operations has in common, from exact counts of tokens, keys and patches.

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

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.data.media import Grid


@dataclass(frozen=True)
class ForwardFlops:
    """Forward operations of a micro-batch; without images those of tower and projector are 0.

    Attributes:
        text_linear: linear layers of the language model and its head.
        text_attention: its attention products.
        patch_embedding: the tower's first product, whose input is pixels.
        tower_layers: the tower's layers, attention included.
        projector: from the tower's width to the language model's.
    """

    text_linear: int
    text_attention: int
    patch_embedding: int = 0
    tower_layers: int = 0
    projector: int = 0

    def with_backward(self, frozen: Set[str]) -> float:
        """Operations of the forward and backward pass together.

        Args:
            frozen: parts of which nothing trains; one of which something trains is counted as if all of it did.
        """
        trains_text = "language_model" not in frozen
        trains_tower = "vision_tower" not in frozen
        trains_projector = "projector" not in frozen
        # The projector's norms train with it and come before its products.
        gradient_reaches_projector = self.projector > 0 and (trains_tower or trains_projector)
        gradient_reaches_text = trains_text or gradient_reaches_projector
        return float(
            self.text_linear * (1 + trains_text + gradient_reaches_text)
            + self.text_attention * (1 + 2 * gradient_reaches_text)
            + self.patch_embedding * (1 + trains_tower)
            + self.tower_layers * (1 + 2 * trains_tower)
            + self.projector * (1 + trains_projector + gradient_reaches_projector)
        )


def text_flops(text: Any, batch: MicroBatch, feed_forward_weights: Callable[[Any], int]) -> tuple[int, int]:
    """Forward operations of a language model: its linear layers with the head, and its attention products.

    Args:
        text: the family's record.
        batch: on the host, so that counting waits for no device.
        feed_forward_weights: numbers of a layer's feed-forward weights that each token is multiplied with.
    """
    is_real = batch.document_ids >= 0
    keys = {window: visible_keys(batch, is_real, window) for window in {layer.window for layer in text.layers}}
    weights = text.hidden_size * text.vocab_size
    attention = 0
    for layer in text.layers:
        query_and_output = 2 * text.hidden_size * layer.num_attention_heads * layer.head_dim
        key_and_value = 2 * text.hidden_size * layer.num_key_value_heads * layer.head_dim
        weights += query_and_output + key_and_value + feed_forward_weights(layer)
        # Scores and the sum of values: two products of head_dim multiply-adds per visible pair.
        attention += 2 * 2 * layer.num_attention_heads * layer.head_dim * keys[layer.window]
    return 2 * weights * int(is_real.sum()), attention


def tower_flops(vision: Any, grids: Sequence[Grid]) -> tuple[int, int]:
    """Forward operations of a vision tower: its patch embedding, and its layers, where a frame attends to itself alone.

    Args:
        vision: the family's record.
        grids: frames, height and width in patches of each image or video.
    """
    num_patches = sum(frames * height * width for frames, height, width in grids)
    patch_pairs = sum(frames * (height * width) ** 2 for frames, height, width in grids)
    layer = 2 * num_patches * vision.layer_weights + 2 * 2 * patch_pairs * vision.hidden_size
    return 2 * num_patches * vision.patch_features * vision.hidden_size, vision.num_hidden_layers * layer


def visible_keys(batch: MicroBatch, is_real: torch.Tensor, window: int | None) -> int:
    """Pairs of a real query and a key that it sees in a layer with this window."""
    low = batch.span_low
    if window is not None:
        places = torch.arange(low.shape[1], dtype=low.dtype, device=low.device)
        low = torch.maximum(low, places - (window - 1))
    return int(((batch.span_high - low + 1) * is_real).sum())
