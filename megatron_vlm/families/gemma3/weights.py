"""Gemma 3's weights: names in Hugging Face files, our names, shapes.

Source: transformers models/gemma3 and models/siglip; name styles in its `conversion_mapping`. The language model's
head is tied to the embedding in all published sizes; some files carry it nevertheless.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vlm.families.gemma3.config import ModelConfig, VisionConfig
from megatron_vlm.model.decoder_weights import (
    ATTENTION,
    GATED_MLP,
    LANGUAGE_MODEL_ALONE,
    QUERY_KEY_NORMS,
    decoder_weights,
    head_weights,
)
from megatron_vlm.model.weight_map import WeightMap
from megatron_vlm.model.weight_tables import Weight, WeightGroup, resolve

# Prefixes in files: published and re-saved, in memory, text-only; the vision tower has one more when freshly saved.
LANGUAGE_MODEL = ("language_model.model.", "model.language_model.")
HEAD = ("language_model.lm_head.", "lm_head.")
VISION_TOWER = (
    "vision_tower.vision_model.",
    "vision_tower.",
    "model.vision_tower.vision_model.",
    "model.vision_tower.",
)
PROJECTOR = ("multi_modal_projector.", "model.multi_modal_projector.")

TEXT_LAYER = {
    "input_layernorm.weight": "hidden",
    "post_attention_layernorm.weight": "hidden",
    "pre_feedforward_layernorm.weight": "hidden",
    "post_feedforward_layernorm.weight": "hidden",
    **ATTENTION,
    **QUERY_KEY_NORMS,
    **GATED_MLP,
}
VISION_EMBEDDINGS = {
    "embeddings.patch_embedding.weight": "hidden channels patch patch",
    "embeddings.patch_embedding.bias": "hidden",
    "embeddings.position_embedding.weight": "positions hidden",
}
VISION_LAYER = {
    "layer_norm1.weight": "hidden",
    "layer_norm1.bias": "hidden",
    **{f"self_attn.{name}_proj.weight": "hidden hidden" for name in ("q", "k", "v", "out")},
    **{f"self_attn.{name}_proj.bias": "hidden" for name in ("q", "k", "v", "out")},
    "layer_norm2.weight": "hidden",
    "layer_norm2.bias": "hidden",
    "mlp.fc1.weight": "ffn hidden",
    "mlp.fc1.bias": "ffn",
    "mlp.fc2.weight": "hidden ffn",
    "mlp.fc2.bias": "hidden",
}


def weight_map(config: ModelConfig) -> WeightMap:
    """Build the map of all weights of a Gemma 3 model, multimodal or text-only."""
    text, vision, alone = config.text, config.vision, config.text_only
    language_prefixes = (*LANGUAGE_MODEL_ALONE, *LANGUAGE_MODEL) if alone else LANGUAGE_MODEL
    head = head_weights(text, HEAD[::-1] if alone else HEAD)
    groups = [WeightGroup("language_model.", language_prefixes, tuple(decoder_weights(text, lambda _: TEXT_LAYER)))]
    if not text.tie_word_embeddings:
        groups.append(head)
    if "vision_tower" in config.parts:
        assert vision is not None
        projector = (
            Weight("mm_input_projection_weight", (vision.hidden_size, text.hidden_size)),
            Weight("mm_soft_emb_norm.weight", (vision.hidden_size,)),
        )
        groups.append(WeightGroup("vision_tower.", VISION_TOWER, tuple(_vision_tower(vision))))
        groups.append(WeightGroup("projector.", PROJECTOR, projector))
    return WeightMap(
        groups=tuple(groups),
        tied_groups=((head, "language_model.embed_tokens.weight"),) if text.tie_word_embeddings else (),
        unread_hf_prefixes=(*VISION_TOWER, *PROJECTOR) if alone else (),
        text_only_class=("Gemma3ForCausalLM", "gemma3_text"),
    )


def _vision_tower(vision: VisionConfig) -> Iterator[Weight]:
    sizes = {
        "hidden": vision.hidden_size,
        "ffn": vision.intermediate_size,
        "channels": vision.num_channels,
        "patch": vision.patch_size,
        "positions": (vision.image_size // vision.patch_size) ** 2,
    }
    yield from resolve(VISION_EMBEDDINGS, sizes)
    for index in range(vision.num_hidden_layers):
        yield from resolve(VISION_LAYER, sizes, f"encoder.layers.{index}.")
    yield from resolve({"post_layernorm.weight": "hidden", "post_layernorm.bias": "hidden"}, sizes)
