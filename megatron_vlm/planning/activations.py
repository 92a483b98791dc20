"""Activations that a pipeline rank keeps between forward and backward passes: an estimate from shapes.

It adds up what autograd saves per layer and token, for rows of `data.seq_length` tokens, times the micro-batches that
the pipeline schedule keeps alive. Attention is taken to save its inputs and its result, as FlexAttention does; experts
to get equally many tokens; images of varying size to be as large as `data.max_pixels` and the row allow.
tests/training/test_memory.py compares with what autograd saves.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vlm.config import Config
from megatron_vlm.model.trainable import Trainable
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.planning.expert_checks import experts_of

FP32_BYTES, INDEX_BYTES = 4, 8


def value_bytes(config: Config) -> int:
    """Bytes of a parameter or an activation."""
    return FP32_BYTES if config.train.precision == "fp32" else 2


@dataclass(frozen=True)
class Structure:
    """What decides how much a layer keeps, told by names and shapes of the model's parameters.

    Attributes:
        decoder_norms: of a decoder layer, as wide as the residual stream.
        has_query_norms: decoder layers norm queries and keys.
        tower_norms: of the whole tower.
        tower_has_gates: its feed-forward layers have.
        tower_joins_queries: queries, keys and values of the tower are one product.
        frozen_parts: of which nothing trains; what a partly frozen one keeps is counted as if all of it trained.
    """

    decoder_norms: int
    has_query_norms: bool
    tower_norms: int
    tower_has_gates: bool
    tower_joins_queries: bool
    frozen_parts: frozenset[str]


def structure_of(shapes: Mapping[str, tuple[int, ...]], hidden_size: int, freeze: Iterable[str] = ()) -> Structure:
    """Read it off the model's parameters; all decoder layers have the same norms.

    Args:
        shapes: whole, by our names.
        hidden_size: of the language model.
        freeze: `model.freeze`.
    """
    norms_of_layer: Counter[str] = Counter()
    query_norms_of_layer: Counter[str] = Counter()
    for name, shape in shapes.items():
        if name.startswith("language_model.layers."):
            index = name.split(".")[2]
            norms_of_layer[index] += shape == (hidden_size,)
            query_norms_of_layer[index] += ".q_norm." in name
    ((decoder_norms, query_norms),) = {(norms_of_layer[index], query_norms_of_layer[index]) for index in norms_of_layer}
    tower = [name for name in shapes if name.startswith("vision_tower.")]
    return Structure(
        decoder_norms=decoder_norms,
        has_query_norms=bool(query_norms),
        tower_norms=sum(name.endswith(".weight") and len(shapes[name]) == 1 for name in tower),
        tower_has_gates=any(".gate_proj." in name for name in tower),
        tower_joins_queries=any(".qkv." in name for name in tower),
        frozen_parts=frozenset(Trainable(freeze).frozen_parts(shapes)),
    )


def activation_bytes(
    config: Config,
    model_config: Any,
    layout: Layout,
    pipeline_rank: int,
    structure: Structure,
    images_per_row: float,
) -> int:
    """What one pipeline rank keeps, at most.

    Args:
        config: a validated configuration.
        model_config: the family's record of the model.
        layout: from `check_layout`.
        pipeline_rank: of the rank.
        structure: from `structure_of`.
        images_per_row: images in an average row.
    """
    recompute = config.model.recompute
    kept, recomputed = [], [0.0]
    for chunk in layout.chunks_of(pipeline_rank):
        parts, whole = (
            chunk_bytes(config, model_config, layout, chunk, structure, images_per_row, kind)
            for kind in (recompute, "none")
        )
        kept.append(sum(parts))
        recomputed += [after - before for before, after in zip(parts, whole, strict=True)]
    return math.ceil(_chunk_passes_alive(config, layout, pipeline_rank) * sum(kept) / len(kept) + max(recomputed))


def chunk_bytes(
    config: Config,
    model_config: Any,
    layout: Layout,
    chunk: int,
    structure: Structure,
    images_per_row: float,
    recompute: str,
) -> list[float]:
    """What each part of a global chunk keeps of one micro-batch; parameters as in `activation_bytes`."""
    text, vision, rows = model_config.text, model_config.vision, config.train.micro_batch_size
    tokens = rows * config.data.seq_length
    layers = [text.layers[index] for index in layout.chunks[chunk]]
    kept = [
        tokens * _text_layer_bytes(config, layout, text.hidden_size, layer, structure, recompute) for layer in layers
    ]
    if chunk == 0 and "vision_tower" in model_config.parts:
        patches = rows * patches_per_row(config, vision, images_per_row)
        kept += _vision_bytes(config, layout, vision, structure, patches, recompute)
    if chunk > 0:
        kept.append(tokens * _received_bytes(config, layout, text.hidden_size, vision, chunk))
    if chunk == len(layout.chunks) - 1:
        # The final norm's input and result; logits are no activations (see `memory`).
        kept.append(tokens * text.hidden_size / _sequence_share(config, layout) * 2 * value_bytes(config))
    return kept


def patches_per_row(config: Config, vision: Any, images_per_row: float) -> float:
    """Patches of all images of a row: exact for towers of one image size, else the most that can be."""
    image_size = getattr(vision, "image_size", None)
    if image_size is not None:
        return images_per_row * (image_size // vision.patch_size) ** 2
    most = config.data.seq_length * vision.spatial_merge_size**2 if images_per_row else 0
    if config.data.max_pixels is None:
        return most
    return min(most, images_per_row * config.data.max_pixels / vision.patch_size**2)


def _chunk_passes_alive(config: Config, layout: Layout, pipeline_rank: int) -> int:
    """Forward passes of one chunk whose backward pass has not run, at most (1F1B; megatron-core's warm-up rule)."""
    virtual_size = layout.virtual_size
    passes = config.train.num_micro_batches(layout.data_size) * virtual_size
    ahead = layout.pipeline_size - pipeline_rank - 1
    warm_up = ahead if virtual_size == 1 else 2 * ahead + (virtual_size - 1) * layout.pipeline_size
    return min(passes, warm_up + 1)


def _sequence_share(config: Config, layout: Layout) -> int:
    """Ranks over which residual stream and norms are divided."""
    return layout.tensor_size if config.parallel.sequence_parallel else 1


def _text_layer_bytes(
    config: Config, layout: Layout, hidden_size: int, layer: Any, structure: Structure, recompute: str
) -> float:
    """Bytes per token of a micro-batch that one decoder layer keeps."""
    value, size = value_bytes(config), layout.tensor_size
    hidden = hidden_size / _sequence_share(config, layout)
    if recompute == "full":
        return hidden * value
    # Every norm keeps its input; attention and feed-forward layer keep what they are given.
    kept = hidden * (structure.decoder_norms + 2) * value
    queries = layer.num_attention_heads * layer.head_dim / size
    keys = max(1, layer.num_key_value_heads / size) * layer.head_dim  # one head where there are more ranks than heads
    kept += (queries + keys) * (value + FP32_BYTES / layer.head_dim) * structure.has_query_norms
    kept += (queries + 2 * keys) * value + queries * value  # inputs of attention, and its result as the output's input
    if recompute == "none":
        kept += queries * (value + FP32_BYTES / layer.head_dim)  # its result and log-sum-exp
    moe = experts_of(layer)
    if moe is None:
        return kept + 3 * layer.intermediate_size / size * value  # gate, up, product
    return kept + _experts_bytes(moe, hidden_size, layout.expert_tensor_size, value) / _sequence_share(config, layout)


def _experts_bytes(moe: Any, hidden_size: int, expert_tensor_size: int, value: int) -> float:
    """Bytes that each token which a rank routes makes ranks keep, when all experts get equally many."""
    router = moe.num_experts * FP32_BYTES
    # Ranks that share an expert all get its tokens. Gate and up, weighted product.
    row = hidden_size * expert_tensor_size + 3 * moe.intermediate_size
    return router + moe.top_k * (row * value + 4 * INDEX_BYTES)


def _received_bytes(config: Config, layout: Layout, hidden_size: int, vision: Any, chunk: int) -> float:
    """Bytes per token of what a chunk receives: hidden states, and features that layers from here on add."""
    layers_before = sum(map(len, layout.chunks[:chunk]))
    levels = max(0, _deepstack_levels(vision) - layers_before)
    return (1 + levels) * hidden_size / _sequence_share(config, layout) * value_bytes(config)


def _deepstack_levels(vision: Any) -> int:
    """Features that are added to hidden states inside the language model."""
    return len(getattr(vision, "deepstack_layers", ()))


def _vision_bytes(
    config: Config, layout: Layout, vision: Any, structure: Structure, patches: float, recompute: str
) -> list[float]:
    """Bytes that each layer of tower and projector keeps for a micro-batch; none of what needs no gradient."""
    value, size, hidden = value_bytes(config), layout.tensor_size, vision.hidden_size
    width_share, image_share = (size, 1) if config.model.vision_parallelism == "tensor" else (1, size)
    patches /= image_share
    trains_tower = "vision_tower" not in structure.frozen_parts
    layers: list[float] = []
    if trains_tower:
        norm = 2 * hidden * value  # its input and result
        kept = hidden * value
        if recompute != "full":
            # Queries, keys, values (once more what one product made), the result, and it as the output's input; what
            # the feed-forward layer's first products make, and what follows from them.
            attention = (7 if structure.tower_joins_queries else 5) * hidden
            feed_forward = (3 if structure.tower_has_gates else 2) * vision.intermediate_size
            kept = 2 * norm + (attention + feed_forward) / width_share * value
        layers += [patches * kept] * vision.num_hidden_layers
        # Norms before the first layer or after the last, and pixels in the tower's type.
        outside = structure.tower_norms - 2 * vision.num_hidden_layers
        layers += [patches * outside * norm, patches * vision.patch_features * value]
    if hasattr(vision, "spatial_merge_size") and (trains_tower or "projector" not in structure.frozen_parts):
        # Each merger's norm and its GELU keep their input and result; a tapped layer's output is the next one's input.
        widened = vision.projector_hidden_size / vision.spatial_merge_size**2 / width_share
        merger = 2 * (hidden + widened) * value
        layers += [patches * merger] + [patches * (merger - trains_tower * hidden * value)] * _deepstack_levels(vision)
    return layers
