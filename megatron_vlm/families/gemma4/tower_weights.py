"""The weights of Gemma 4's towers: names, in files and in our model, and shapes.

Source: transformers models/gemma4 and models/gemma4_unified.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_vlm.families.gemma4.audio_config import AudioConfig
from megatron_vlm.families.gemma4.config import PixelEmbedderConfig, VisionConfig
from megatron_vlm.model.decoder_weights import QUERY_KEY_NORMS
from megatron_vlm.model.weight_tables import Table, Weight, resolve

VISION_EMBEDDER = {
    "patch_embedder.input_proj.weight": "hidden patch",
    "patch_embedder.position_embedding_table": "2 positions hidden",
}
VISION_LAYER = {
    "input_layernorm.weight": "hidden",
    "post_attention_layernorm.weight": "hidden",
    "pre_feedforward_layernorm.weight": "hidden",
    "post_feedforward_layernorm.weight": "hidden",
    **QUERY_KEY_NORMS,
}
PIXEL_EMBEDDER = {
    "patch_ln1.weight": "patch",
    "patch_ln1.bias": "patch",
    "patch_dense.weight": "hidden patch",
    "patch_dense.bias": "hidden",
    "patch_ln2.weight": "hidden",
    "patch_ln2.bias": "hidden",
    "pos_embedding": "positions 2 hidden",
    "pos_norm.weight": "hidden",
    "pos_norm.bias": "hidden",
}
VISION_LINEARS = {
    **{f"self_attn.{name}_proj": "hidden hidden" for name in "qkvo"},
    "mlp.gate_proj": "ffn hidden",
    "mlp.up_proj": "ffn hidden",
    "mlp.down_proj": "hidden ffn",
}
AUDIO_SUBSAMPLING = {
    "subsample_conv_projection.layer0.conv.weight": "first 1 3 3",
    "subsample_conv_projection.layer0.norm.weight": "first",
    "subsample_conv_projection.layer1.conv.weight": "second first 3 3",
    "subsample_conv_projection.layer1.norm.weight": "second",
    "subsample_conv_projection.input_proj_linear.weight": "hidden subsampled",
}
AUDIO_LAYER = {
    "feed_forward1.pre_layer_norm.weight": "hidden",
    "feed_forward1.post_layer_norm.weight": "hidden",
    "norm_pre_attn.weight": "hidden",
    "self_attn.relative_k_proj.weight": "hidden hidden",
    "self_attn.per_dim_scale": "head_dim",
    "norm_post_attn.weight": "hidden",
    "lconv1d.pre_layer_norm.weight": "hidden",
    "lconv1d.depthwise_conv1d.weight": "hidden 1 kernel",
    "lconv1d.conv_norm.weight": "hidden",
    "feed_forward2.pre_layer_norm.weight": "hidden",
    "feed_forward2.post_layer_norm.weight": "hidden",
    "norm_out.weight": "hidden",
}
AUDIO_LINEARS = {
    "feed_forward1.ffw_layer_1": "ffn hidden",
    "feed_forward1.ffw_layer_2": "hidden ffn",
    "self_attn.q_proj": "hidden hidden",
    "self_attn.k_proj": "hidden hidden",
    "self_attn.v_proj": "hidden hidden",
    "self_attn.post": "hidden hidden",
    "lconv1d.linear_start": "(2 hidden) hidden",
    "lconv1d.linear_end": "hidden hidden",
    "feed_forward2.ffw_layer_1": "ffn hidden",
    "feed_forward2.ffw_layer_2": "hidden ffn",
}
AUDIO_OUTPUT = {
    "output_proj.weight": "output hidden",
    "output_proj.bias": "output",
}
BOUNDS = ("input_min", "input_max", "output_min", "output_max")


def clipped_linears(dimensions: Mapping[str, str], clips: bool) -> dict[str, str]:
    """Return the table of weights of clipped linears.

    Args:
        dimensions: the dimensions of the weight of each layer, by the layer's name.
        clips: whether there are bounds.
    """
    table = {}
    for name, shape in dimensions.items():
        table[f"{name}.linear.weight"] = shape
        table |= dict.fromkeys((f"{name}.{bound}" for bound in BOUNDS), "") if clips else {}
    return table


def vision_tower_weights(vision: VisionConfig) -> Iterator[Weight]:
    """Yield the weights of the vision tower, with clip bounds where its linear layers clip."""
    sizes = {
        "hidden": vision.hidden_size,
        "ffn": vision.intermediate_size,
        "patch": vision.patch_features,
        "positions": vision.num_positions_per_side,
        "head": vision.head_dim,
    }
    layer: Table = VISION_LAYER | clipped_linears(VISION_LINEARS, vision.clips)
    yield from resolve(VISION_EMBEDDER, sizes)
    for index in range(vision.num_hidden_layers):
        yield from resolve(layer, sizes, f"encoder.layers.{index}.")
    if vision.standardizes:
        yield from resolve({"std_bias": "hidden", "std_scale": "hidden"}, sizes)


def pixel_embedder_weights(vision: PixelEmbedderConfig) -> Iterator[Weight]:
    """Yield the weights of what 12B has in place of a vision tower."""
    sizes = {
        "hidden": vision.hidden_size,
        "patch": vision.patch_features,
        "positions": vision.num_positions_per_side,
    }
    yield from resolve(PIXEL_EMBEDDER, sizes)


def audio_tower_weights(config: AudioConfig) -> Iterator[Weight]:
    """Yield the weights of the tower, with clip bounds where its linear layers clip."""
    first, second = config.subsampling_channels
    sizes = {
        "first": first,
        "second": second,
        "subsampled": config.num_bins // 4 * second,
        "hidden": config.hidden_size,
        "head_dim": config.head_dim,
        "ffn": 4 * config.hidden_size,
        "kernel": config.conv_kernel_size,
        "output": config.output_size,
    }
    yield from resolve(AUDIO_SUBSAMPLING, sizes)
    layer: Table = AUDIO_LAYER | clipped_linears(AUDIO_LINEARS, config.clips)
    for index in range(config.num_hidden_layers):
        yield from resolve(layer, sizes, f"layers.{index}.")
    yield from resolve(AUDIO_OUTPUT, sizes)
