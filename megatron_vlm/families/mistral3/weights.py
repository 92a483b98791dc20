"""Mistral3's weights: names in Hugging Face files, our names, shapes.

Source: transformers models/mistral3 and models/pixtral; name styles in its `conversion_mapping`. Whether embedding and
head are tied is read from the files (`registry.load_hf_config`): published configurations do not state it.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vlm.families.mistral3.config import ModelConfig, VisionConfig
from megatron_vlm.model.decoder_weights import (
    ATTENTION,
    GATED_MLP,
    LANGUAGE_MODEL_ALONE,
    decoder_weights,
    head_weights,
)
from megatron_vlm.model.weight_map import WeightMap
from megatron_vlm.model.weight_tables import Weight, WeightGroup, resolve

# Prefixes in files: published ones, then the names that modules have in memory.
LANGUAGE_MODEL = ("language_model.model.", "model.language_model.")
HEAD = ("language_model.lm_head.", "lm_head.")
VISION_TOWER = ("vision_tower.", "model.vision_tower.")
PROJECTOR = ("multi_modal_projector.", "model.multi_modal_projector.")

TEXT_LAYER = {
    "input_layernorm.weight": "hidden",
    "post_attention_layernorm.weight": "hidden",
    **ATTENTION,
    **GATED_MLP,
}
VISION_EMBEDDINGS = {
    "patch_conv.weight": "hidden channels patch patch",
    "ln_pre.weight": "hidden",
}
VISION_LAYER = {
    "attention_norm.weight": "hidden",
    "attention.q_proj.weight": "hidden hidden",
    "attention.k_proj.weight": "hidden hidden",
    "attention.v_proj.weight": "hidden hidden",
    "attention.o_proj.weight": "hidden hidden",
    "ffn_norm.weight": "hidden",
    "feed_forward.gate_proj.weight": "ffn hidden",
    "feed_forward.up_proj.weight": "ffn hidden",
    "feed_forward.down_proj.weight": "hidden ffn",
}
PROJECTOR_WEIGHTS = {
    "norm.weight": "hidden",
    "patch_merger.merging_layer.weight": "hidden merged",
    "linear_1.weight": "text hidden",
    "linear_2.weight": "text text",
}
PROJECTOR_BIASES = {"linear_1.bias": "text", "linear_2.bias": "text"}


def weight_map(config: ModelConfig) -> WeightMap:
    """Build the map of all weights of a Mistral3 model, multimodal or text-only."""
    text, vision, alone = config.text, config.vision, config.text_only
    head = head_weights(text, HEAD[::-1] if alone else HEAD)
    language_prefixes = (*LANGUAGE_MODEL_ALONE, *LANGUAGE_MODEL) if alone else LANGUAGE_MODEL
    groups = [WeightGroup("language_model.", language_prefixes, tuple(decoder_weights(text, lambda _: TEXT_LAYER)))]
    if not text.tie_word_embeddings:
        groups.append(head)
    if "vision_tower" in config.parts:
        assert vision is not None
        groups.append(WeightGroup("vision_tower.", VISION_TOWER, tuple(_vision_tower(vision))))
        groups.append(WeightGroup("projector.", PROJECTOR, tuple(_projector(vision))))
    return WeightMap(
        groups=tuple(groups),
        tied_groups=((head, "language_model.embed_tokens.weight"),) if text.tie_word_embeddings else (),
        unread_hf_prefixes=(*VISION_TOWER, *PROJECTOR) if alone else (),
        # The two classes differ in the scaling of queries only.
        text_only_class=("Ministral3ForCausalLM", "ministral3")
        if text.query_scaling
        else ("MistralForCausalLM", "mistral"),
    )


def _vision_tower(vision: VisionConfig) -> Iterator[Weight]:
    sizes = {
        "hidden": vision.hidden_size,
        "ffn": vision.intermediate_size,
        "channels": vision.num_channels,
        "patch": vision.patch_size,
    }
    yield from resolve(VISION_EMBEDDINGS, sizes)
    for index in range(vision.num_hidden_layers):
        yield from resolve(VISION_LAYER, sizes, f"transformer.layers.{index}.")


def _projector(vision: VisionConfig) -> Iterator[Weight]:
    merged = vision.hidden_size * vision.spatial_merge_size**2
    sizes = {"hidden": vision.hidden_size, "merged": merged, "text": vision.out_hidden_size}
    yield from resolve(PROJECTOR_WEIGHTS | (PROJECTOR_BIASES if vision.projector_bias else {}), sizes)
