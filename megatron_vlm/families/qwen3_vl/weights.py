"""Qwen3-VL's weights, dense and mixture of experts: names in Hugging Face files, our names, shapes.

Source: transformers models/qwen3_vl and models/qwen3_vl_moe; the two layouts of experts in its `conversion_mapping`.
Published files hold every expert's matrices transposed ([experts, hidden, 2 ffn] and [experts, ffn, hidden]); files
that transformers saves do not.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vlm.families.qwen3_vl.config import ModelConfig
from megatron_vlm.model.decoder_weights import (
    ATTENTION,
    GATED_MLP,
    LANGUAGE_MODEL_ALONE,
    QUERY_KEY_NORMS,
    decoder_weights,
    head_weights,
)
from megatron_vlm.model.qwen_vision import QwenVisionConfig
from megatron_vlm.model.weight_map import WeightMap
from megatron_vlm.model.weight_tables import Weight, WeightGroup, resolve
from megatron_vlm.model_configs import DecoderLayerConfig, MoEConfig

# Prefixes in files: those of published files and of all that transformers saves; of a model saved without its head.
LANGUAGE_MODEL = ("model.language_model.", "language_model.")
HEAD = ("lm_head.",)
VISION = ("model.visual.", "visual.")

TEXT_LAYER = {
    "input_layernorm.weight": "hidden",
    "post_attention_layernorm.weight": "hidden",
    **ATTENTION,
    **QUERY_KEY_NORMS,
}
EXPERTS = {
    "gate_up_proj": "experts (2 ffn) hidden",
    "down_proj": "experts hidden ffn",
}
VISION_EMBEDDINGS = {
    "patch_embed.proj.weight": "hidden channels frames patch patch",
    "patch_embed.proj.bias": "hidden",
    "pos_embed.weight": "positions hidden",
}
VISION_LAYER = {
    "norm1.weight": "hidden",
    "norm1.bias": "hidden",
    "attn.qkv.weight": "(3 hidden) hidden",
    "attn.qkv.bias": "(3 hidden)",
    "attn.proj.weight": "hidden hidden",
    "attn.proj.bias": "hidden",
    "norm2.weight": "hidden",
    "norm2.bias": "hidden",
    "mlp.linear_fc1.weight": "ffn hidden",
    "mlp.linear_fc1.bias": "ffn",
    "mlp.linear_fc2.weight": "hidden ffn",
    "mlp.linear_fc2.bias": "hidden",
}
MERGER = {
    "norm.weight": "normalised",
    "norm.bias": "normalised",
    "linear_fc1.weight": "merged merged",
    "linear_fc1.bias": "merged",
    "linear_fc2.weight": "text merged",
    "linear_fc2.bias": "text",
}


def weight_map(config: ModelConfig) -> WeightMap:
    """Build the map of all weights of a Qwen3-VL model, multimodal or text-only.

    The text-only model is a Qwen3 model: with equal positions on all axes, the interleaved rotation is the plain one.
    """
    text, vision, alone = config.text, config.vision, config.text_only
    head = head_weights(text, HEAD)
    language_prefixes = (*LANGUAGE_MODEL_ALONE, *LANGUAGE_MODEL) if alone else LANGUAGE_MODEL
    groups = [WeightGroup("language_model.", language_prefixes, tuple(decoder_weights(text, _layer_table)))]
    for index, layer in enumerate(text.layers):
        if layer.moe is not None:
            groups.append(_experts(index, layer.moe, text.hidden_size, language_prefixes))
    if not text.tie_word_embeddings:
        groups.append(head)
    if "vision_tower" in config.parts:
        assert vision is not None
        groups.append(WeightGroup("vision_tower.", VISION, tuple(_vision_tower(vision))))
        groups.append(WeightGroup("projector.", VISION, tuple(_projector(vision))))
    has_experts = any(layer.moe for layer in text.layers)
    return WeightMap(
        groups=tuple(groups),
        tied_groups=((head, "language_model.embed_tokens.weight"),) if text.tie_word_embeddings else (),
        unread_hf_prefixes=VISION if alone else (),
        text_only_class=("Qwen3MoeForCausalLM", "qwen3_moe") if has_experts else ("Qwen3ForCausalLM", "qwen3"),
        text_only_settings={
            "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
            **({"norm_topk_prob": True} if has_experts else {}),
        },
    )


def _layer_table(layer: DecoderLayerConfig) -> dict[str, str]:
    """Return the table of a layer without its experts."""
    return TEXT_LAYER | (GATED_MLP if layer.moe is None else {"mlp.gate.weight": f"{layer.moe.num_experts} hidden"})


def _experts(index: int, moe: MoEConfig, hidden_size: int, language_prefixes: tuple[str, ...]) -> WeightGroup:
    """Return the group of one layer's experts.

    Without an example they are written as published where transformers can detect that layout: it compares the shape of
    each tensor with its own, so it takes the values of a square one as they are. A Qwen3 model never compares.
    """
    sizes = {"experts": moe.num_experts, "ffn": moe.intermediate_size, "hidden": hidden_size}
    is_square = hidden_size in (moe.intermediate_size, 2 * moe.intermediate_size)
    return WeightGroup(
        f"language_model.layers.{index}.mlp.experts.",
        tuple(f"{prefix}layers.{index}.mlp.experts." for prefix in language_prefixes),
        tuple(resolve(EXPERTS, sizes)),
        transposable=True,
        written_transposed=language_prefixes == LANGUAGE_MODEL and not is_square,
    )


def _vision_tower(vision: QwenVisionConfig) -> Iterator[Weight]:
    sizes = {
        "hidden": vision.hidden_size,
        "ffn": vision.intermediate_size,
        "channels": vision.num_channels,
        "frames": vision.temporal_patch_size,
        "patch": vision.patch_size,
        "positions": vision.num_positions_per_side**2,
    }
    yield from resolve(VISION_EMBEDDINGS, sizes)
    for index in range(vision.num_hidden_layers):
        yield from resolve(VISION_LAYER, sizes, f"blocks.{index}.")


def _projector(vision: QwenVisionConfig) -> Iterator[Weight]:
    """Yield the weights of the mergers: the main one normalises patches, those of DeepStack merged vectors."""
    merged = vision.projector_hidden_size
    sizes = {"merged": merged, "text": vision.out_hidden_size}
    yield from resolve(MERGER, sizes | {"normalised": vision.hidden_size}, "merger.")
    for level in range(len(vision.deepstack_layers)):
        yield from resolve(MERGER, sizes | {"normalised": merged}, f"deepstack_merger_list.{level}.")
