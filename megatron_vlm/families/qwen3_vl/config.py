"""Qwen3-VL's architecture as frozen configurations, one per decoder layer, read from transformers' configuration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from transformers import PretrainedConfig, Qwen3VLConfig, Qwen3VLMoeConfig

from megatron_vlm.model.qwen_vision import QwenVisionConfig
from megatron_vlm.model_configs import (
    TEXT_PARTS,
    VISION_PARTS,
    DecoderConfig,
    DecoderLayerConfig,
    MoEConfig,
    Narrowed,
    VisionLanguageConfig,
    require,
)

_require = partial(require, model="Qwen3-VL")


@dataclass(frozen=True)
class TextConfig(DecoderConfig):
    """The language model.

    Attributes:
        mrope_section: numbers of frequencies of the time, height and width axes, interleaved; they sum to head_dim / 2.
    """

    rope_theta: float
    mrope_section: tuple[int, int, int]


@dataclass(frozen=True)
class ModelConfig(VisionLanguageConfig):
    """A Qwen3-VL model."""

    text: TextConfig
    vision: QwenVisionConfig | None
    video_token_id: int | None


def config_from_hf(hf_config: PretrainedConfig, text_only: bool) -> ModelConfig:
    """Read a `Qwen3VLConfig` or `Qwen3VLMoeConfig`.

    Args:
        hf_config: transformers' configuration.
        text_only: take only the language model.

    Raises:
        ConfigError: the configuration asks for something these modules do not compute.
    """
    assert isinstance(hf_config, Qwen3VLConfig | Qwen3VLMoeConfig)
    # Only the top-level flag decides; the text configuration has one of its own, which transformers ignores.
    text = _text(hf_config.text_config, bool(hf_config.tie_word_embeddings))
    if text_only:
        return ModelConfig(TEXT_PARTS, text, None, None, None)
    vision = _vision(hf_config.vision_config)
    _require(
        vision.out_hidden_size == text.hidden_size,
        f"vision_config.out_hidden_size {vision.out_hidden_size} with text hidden_size {text.hidden_size}",
    )
    _require(
        len(vision.deepstack_layers) <= len(text.layers),
        f"{len(vision.deepstack_layers)} deepstack_visual_indexes with {len(text.layers)} decoder layers",
    )
    return ModelConfig(VISION_PARTS, text, vision, hf_config.image_token_id, hf_config.video_token_id)


def _text(hf: Narrowed, tied: bool) -> TextConfig:
    _require(hf.hidden_act == "silu", f"hidden_act {hf.hidden_act!r}")
    _require(not hf.attention_bias, "attention_bias true")
    _require(not hf.attention_dropout, f"attention_dropout {hf.attention_dropout}")
    rope = hf.rope_parameters
    _require(rope["rope_type"] == "default", f"rope_type {rope['rope_type']!r}")
    head_dim = hf.head_dim or hf.hidden_size // hf.num_attention_heads
    # transformers' default, whatever head_dim is.
    section = tuple(rope.get("mrope_section", (24, 20, 20)))
    _require(
        len(section) == 3 and sum(section) == head_dim // 2 and 3 * max(section[1:]) <= head_dim // 2 + 1,
        f"mrope_section {list(section)} with head_dim {head_dim}",
    )
    return TextConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        layers=tuple(_layer(hf, head_dim, index) for index in range(hf.num_hidden_layers)),
        norm_eps=hf.rms_norm_eps,
        pad_token_id=hf.pad_token_id,
        tie_word_embeddings=tied,
        initializer_range=hf.initializer_range,
        rope_theta=rope["rope_theta"],
        mrope_section=section,
    )


def _layer(hf: Narrowed, head_dim: int, index: int) -> DecoderLayerConfig:
    num_experts = getattr(hf, "num_experts", None) or getattr(hf, "num_local_experts", None)
    moe = None
    sparse_step = getattr(hf, "decoder_sparse_step", 1)
    _require(sparse_step >= 1, f"decoder_sparse_step {sparse_step}")
    if num_experts and index not in hf.mlp_only_layers and (index + 1) % hf.decoder_sparse_step == 0:
        _require(
            1 <= hf.num_experts_per_tok <= num_experts,
            f"num_experts_per_tok {hf.num_experts_per_tok} of {num_experts} experts",
        )
        moe = MoEConfig(num_experts, hf.num_experts_per_tok, hf.moe_intermediate_size)
    return DecoderLayerConfig(
        num_attention_heads=hf.num_attention_heads,
        num_key_value_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        intermediate_size=hf.intermediate_size,
        window=None,
        softmax_scale=head_dim**-0.5,
        norm_eps=hf.rms_norm_eps,
        moe=moe,
    )


def _vision(hf: Narrowed) -> QwenVisionConfig:
    _require(hf.hidden_act == "gelu_pytorch_tanh", f"vision hidden_act {hf.hidden_act!r}")
    # transformers' tower reads these keys; no published model has other values.
    rope = hf.rope_parameters
    _require(rope["rope_type"] == "axial" and rope["rope_theta"] == 10_000, f"vision rope_parameters {dict(rope)}")
    head_dim = getattr(hf, "head_dim", None)
    _require(head_dim in (None, hf.hidden_size // hf.num_heads), f"vision head_dim {head_dim}")
    _require(
        isinstance(hf.patch_size, int) and isinstance(hf.temporal_patch_size, int),
        f"vision patch_size {hf.patch_size}, temporal_patch_size {hf.temporal_patch_size}",
    )
    _require(hf.hidden_size % (4 * hf.num_heads) == 0, f"vision hidden_size {hf.hidden_size}, {hf.num_heads} heads")
    side = round(hf.num_position_embeddings**0.5)
    _require(side**2 == hf.num_position_embeddings, f"num_position_embeddings {hf.num_position_embeddings}, no square")
    taps = tuple(hf.deepstack_visual_indexes)
    _require(
        list(taps) == sorted(set(taps)) and all(0 <= tap < hf.depth for tap in taps),
        f"deepstack_visual_indexes {list(taps)} of {hf.depth} tower layers",
    )
    return QwenVisionConfig(
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_hidden_layers=hf.depth,
        num_attention_heads=hf.num_heads,
        num_channels=hf.in_channels,
        patch_size=hf.patch_size,
        temporal_patch_size=hf.temporal_patch_size,
        spatial_merge_size=hf.spatial_merge_size,
        num_positions_per_side=side,
        out_hidden_size=hf.out_hidden_size,
        deepstack_layers=taps,
    )
