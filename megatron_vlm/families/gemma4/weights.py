"""Gemma 4's weights: names in Hugging Face files, our names, shapes.

Source: transformers models/gemma4. Published files have the names that modules have in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_vlm.families.gemma4.audio_config import AudioConfig
from megatron_vlm.families.gemma4.config import LayerConfig, ModelConfig, TextConfig, VisionConfig
from megatron_vlm.families.gemma4.tower_weights import (
    BOUNDS,
    audio_tower_weights,
    pixel_embedder_weights,
    vision_tower_weights,
)
from megatron_vlm.model.decoder_weights import (
    ATTENTION,
    GATED_MLP,
    LANGUAGE_MODEL_ALONE,
    QUERY_KEY_NORMS,
    decoder_weights,
    head_weights,
)
from megatron_vlm.model.weight_map import WeightMap
from megatron_vlm.model.weight_tables import PartOf, Table, Weight, WeightGroup

LANGUAGE_MODEL = ("model.language_model.",)
HEAD = ("lm_head.",)
VISION_TOWER = ("model.vision_tower.",)
VISION_PROJECTOR = ("model.embed_vision.",)
# 12B's, in files and in memory.
PIXEL_EMBEDDER = ("model.vision_embedder.", "model.embed_vision.")
PATCH_PROJECTOR = ("model.embed_vision.", "model.embed_vision.multimodal_embedder.")
AUDIO_TOWER = ("model.audio_tower.",)
AUDIO_PROJECTOR = ("model.embed_audio.",)
MEDIA = (*VISION_TOWER, *PIXEL_EMBEDDER, *AUDIO_TOWER, *AUDIO_PROJECTOR)

TEXT_LAYER = {
    "input_layernorm.weight": "hidden",
    "post_attention_layernorm.weight": "hidden",
    "pre_feedforward_layernorm.weight": "hidden",
    "post_feedforward_layernorm.weight": "hidden",
    **ATTENTION,
    **QUERY_KEY_NORMS,
    **GATED_MLP,
    "layer_scalar": "1",
}
EXPERT_NORMS = {
    "post_feedforward_layernorm_1.weight": "hidden",
    "post_feedforward_layernorm_2.weight": "hidden",
    "pre_feedforward_layernorm_2.weight": "hidden",
}
# Parts of the layer here, which stand beside each other in files.
PER_LAYER_INPUT = {
    "per_layer_input_gate.weight": ("gate.weight", "{size} hidden"),
    "per_layer_projection.weight": ("projection.weight", "hidden {size}"),
    "post_per_layer_input_norm.weight": ("post_norm.weight", "hidden"),
}
EXPERTS = {
    "router.scale": ("gate.scale", "hidden"),
    "router.per_expert_scale": ("gate.per_expert_scale", "{experts}"),
    "router.proj.weight": ("gate.proj.weight", "{experts} hidden"),
    "experts.gate_up_proj": ("experts.gate_up_proj", "{experts} (2 {width}) hidden"),
    "experts.down_proj": ("experts.down_proj", "{experts} hidden {width}"),
}
BUFFERS = (
    r"language_model\.layers\.\d+\.layer_scalar",
    rf"(vision|audio)_tower\..*\.({'|'.join(BOUNDS)})",
    r"vision_tower\.std_(bias|scale)",
)
# The language model by itself: architecture and model_type, of a model with towers and of a unified one.
CLASSES_ALONE = {
    False: ("Gemma4ForCausalLM", "gemma4_text"),
    True: ("Gemma4UnifiedForCausalLM", "gemma4_unified_text"),
}
OF_KEYS = ("self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.k_norm.weight")


def weight_map(config: ModelConfig) -> WeightMap:
    """Build the map of all weights of a Gemma 4 model, multimodal or text-only."""
    text, alone = config.text, config.text_only
    has_own_names = alone and not config.is_wrapped
    language_prefixes = (*LANGUAGE_MODEL_ALONE, *LANGUAGE_MODEL) if has_own_names else LANGUAGE_MODEL
    head = head_weights(text, HEAD)
    weights = (*decoder_weights(text, lambda layer: _layer_table(layer, text)), *_per_layer_inputs(text))
    groups = [WeightGroup("language_model.", language_prefixes, weights)]
    if not text.tie_word_embeddings:
        groups.append(head)
    groups += _media_groups(config)
    borrowers = "|".join(str(index) for index, layer in enumerate(text.layers) if layer.keys_of_layer is not None)
    unread_keys = rf"^model\.(language_model\.)?layers\.({borrowers})\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\."
    return WeightMap(
        groups=tuple(groups),
        tied_groups=((head, "language_model.embed_tokens.weight"),) if text.tie_word_embeddings else (),
        passthrough=(unread_keys,) if borrowers else (),
        # A directory that says multimodal without towers must have none.
        unread_hf_prefixes=MEDIA if has_own_names else (),
        text_only_class=None if config.is_wrapped else CLASSES_ALONE[config.is_unified],
        buffer_patterns=BUFFERS,
    )


def _media_groups(config: ModelConfig) -> Iterator[WeightGroup]:
    """Yield the groups of towers and projectors; what has no tower is projected as it is."""
    vision, audio, size = config.vision, config.audio, config.text.hidden_size
    if isinstance(vision, VisionConfig):
        yield WeightGroup("vision_tower.", VISION_TOWER, tuple(vision_tower_weights(vision)))
        yield WeightGroup("projector.vision.", VISION_PROJECTOR, (_projection(vision.hidden_size, size),))
    elif vision is not None:
        yield WeightGroup("vision_tower.", PIXEL_EMBEDDER, tuple(pixel_embedder_weights(vision)))
        yield WeightGroup("projector.vision.", PATCH_PROJECTOR, (_projection(vision.hidden_size, size),))
    if audio is not None:
        if isinstance(audio, AudioConfig):
            yield WeightGroup("audio_tower.", AUDIO_TOWER, tuple(audio_tower_weights(audio)))
        yield WeightGroup("projector.audio.", AUDIO_PROJECTOR, (_projection(audio.output_size, size),))


def _projection(in_size: int, out_size: int) -> Weight:
    return Weight("embedding_projection.weight", (out_size, in_size))


def _layer_table(layer: LayerConfig, text: TextConfig) -> Table:
    table: dict[str, str | Mapping[str, str]] = {**TEXT_LAYER}
    absent = OF_KEYS if layer.keys_of_layer is not None else OF_KEYS[1:2] if layer.keys_as_values else ()
    for suffix in absent:
        del table[suffix]
    if layer.moe is not None:
        sizes = {"experts": layer.moe.num_experts, "width": layer.moe.intermediate_size}
        table |= {**EXPERT_NORMS, **_renamed(EXPERTS, "moe.", sizes)}
    if text.per_layer_size is not None:
        table |= _renamed(PER_LAYER_INPUT, "per_layer_input.", {"size": text.per_layer_size})
    return table


def _renamed(tensors: dict[str, tuple[str, str]], prefix: str, sizes: dict[str, int]) -> dict[str, dict[str, str]]:
    """Return the table of tensors that have other names here than in files."""
    return {suffix: {prefix + name: dimensions.format(**sizes)} for suffix, (name, dimensions) in tensors.items()}


def _per_layer_inputs(text: TextConfig) -> Iterator[Weight]:
    """Yield what files hold in one tensor for all layers, and the norm that all layers share."""
    size = text.per_layer_size
    if size is None:
        return
    for index in range(len(text.layers)):
        columns = PartOf("embed_tokens_per_layer.weight", 1, index * size, (index + 1) * size)
        name = f"layers.{index}.per_layer_input.table.weight"
        yield Weight(name, (text.vocab_size, size), part_of=columns)
    for index in range(len(text.layers)):
        rows = PartOf("per_layer_model_projection.weight", 0, index * size, (index + 1) * size)
        name = f"layers.{index}.per_layer_input.model_projection.weight"
        yield Weight(name, (size, text.hidden_size), part_of=rows)
    yield Weight("per_layer_projection_norm.weight", (size,))
