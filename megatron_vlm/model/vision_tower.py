"""The base class of every family's vision tower: the layers of one pipeline chunk.

A tower begins on chunk 0 and ends on the chunk of the projector, which is the same one unless
`parallel.vision_pipeline_layout` spreads its layers. Between chunks, patches are the hidden states.

Shapes: P patches of all images that this rank encodes, H vision hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from megatron_vlm.layers.patches import PackedImages
from megatron_vlm.layers.recompute import run_layer
from megatron_vlm.model_configs import ImageEncoderConfig
from megatron_vlm.parallel.chunk_settings import ChunkSettings
from megatron_vlm.parallel.stage_state import Boundary, StageState


class VisionTowerChunk(torch.nn.Module):
    """The tower's layers of one chunk; a family adds what is before the first layer and behind the last.

    The former belongs on the first chunk (`chunk.is_first`), the latter on the projector's (`chunk.has_embedding`).

    Args:
        config: configuration of the tower.
        chunk: settings of the pipeline chunk.
    """

    def __init__(self, config: ImageEncoderConfig, chunk: ChunkSettings) -> None:
        super().__init__()
        assert chunk.tower_layers is not None, "this chunk holds no part of the tower"
        self.layer_ids, self.taps, self.recompute_layers = chunk.tower_layers, config.taps, chunk.recompute == "full"

    def make_layers(self, make_layer: Callable[[], torch.nn.Module]) -> torch.nn.ModuleDict:
        """Build this chunk's layers, by global id."""
        return torch.nn.ModuleDict({str(index): make_layer() for index in self.layer_ids})

    @property
    def layers(self) -> torch.nn.ModuleDict:
        """This chunk's layers, which a family keeps where their names in files say."""
        raise NotImplementedError

    def start(self, pixels: torch.Tensor, images: PackedImages) -> torch.Tensor:
        """Return the input of the first layer, [P, H].

        Args:
            pixels: of the images that this rank encodes, on its device.
            images: these images.
        """
        raise NotImplementedError

    def layer_inputs(self, images: PackedImages, dtype: torch.dtype) -> tuple[Any, ...]:
        """Return each layer's inputs after hidden states."""
        raise NotImplementedError

    def forward(self, state: StageState | torch.Tensor, images: PackedImages) -> StageState:
        """Run this chunk's layers.

        Args:
            state: what the layer before them left; on the first chunk, pixels of the images.
            images: the images that this rank encodes.
        """
        if isinstance(state, torch.Tensor):
            state = StageState(self.start(state, images))
        if not self.layer_ids:
            return state
        inputs = self.layer_inputs(images, state.hidden.dtype)
        for name, layer in self.layers.items():
            x_PH = run_layer(layer, state.hidden, *inputs, recompute=self.recompute_layers)
            tapped = {tap_name(int(name)): x_PH} if int(name) in self.taps else {}
            state = replace(state, hidden=x_PH, carried={**state.carried, **tapped})
        return state

    def finish(self, state: StageState) -> tuple[Any, ...]:
        """Return what the projector takes, from the state behind the last layer; called on the projector's chunk."""
        return (state.hidden,)


def tap_name(layer: int) -> str:
    """Return the name of a layer's output that the projector reads."""
    return f"tower_{layer}"


def tower_boundary(config: ImageEncoderConfig, layer: int, images: PackedImages | None) -> Boundary:
    """Return what is sent to the chunk that begins with a layer of the tower: patches, and outputs of earlier layers.

    Args:
        config: configuration of the tower.
        layer: global id of the layer.
        images: the images that the rank encodes; without any, one row of zeros is sent, which nobody reads.
    """
    size = config.hidden_size
    if images is None:
        return Boundary((1, size))
    taps = [tap for tap in config.taps if tap < layer]
    return Boundary((images.num_patches, size), {tap_name(tap): (images.num_patches, size) for tap in taps})
