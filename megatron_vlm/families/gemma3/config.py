"""Gemma 3's architecture as frozen configurations, one per decoder layer, read from transformers' configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from transformers import Gemma3Config, Gemma3TextConfig, PretrainedConfig

from megatron_vlm.model_configs import (
    TEXT_PARTS,
    VISION_PARTS,
    DecoderConfig,
    DecoderLayerConfig,
    Narrowed,
    TowerConfig,
    VisionLanguageConfig,
    require,
)

_require = partial(require, model="Gemma 3")


@dataclass(frozen=True, kw_only=True)
class LayerConfig(DecoderLayerConfig):
    """One decoder layer: windows alternate with global attention; scores are scaled by query_pre_attn_scalar ** -0.5
    (27B: 168, though its head dimension is 128).

    Attributes:
        rope_theta: base of the rotary frequencies.
        rope_scaling_factor: linear scaling of positions (global layers from 4B on: 8).
    """

    rope_theta: float
    rope_scaling_factor: float


@dataclass(frozen=True)
class TextConfig(DecoderConfig):
    """The language model."""

    layers: tuple[LayerConfig, ...]
    final_logit_softcapping: float | None


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """The SigLIP tower, without its pooling head."""

    image_size: int
    patch_size: int
    norm_eps: float

    @property
    def patch_features(self) -> int:
        """Number of values in one flattened patch."""
        return self.num_channels * self.patch_size**2

    @property
    def blank_frame(self) -> tuple[int, int, int]:
        """An image, which all have one size: 1, and its rows and columns of patches."""
        side = self.image_size // self.patch_size
        return 1, side, side

    @property
    def blank_pixels(self) -> tuple[int, ...]:
        """Shape of the pixels of one image."""
        return 1, self.num_channels, self.image_size, self.image_size

    @property
    def layer_weights(self) -> int:
        """Number of a layer's weights that each patch is multiplied with."""
        return 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size


@dataclass(frozen=True)
class ModelConfig(VisionLanguageConfig):
    """A Gemma 3 model."""

    text: TextConfig
    vision: VisionConfig | None
    mm_tokens_per_image: int | None


def config_from_hf(hf_config: PretrainedConfig, text_only: bool) -> ModelConfig:
    """Read a `Gemma3Config` or `Gemma3TextConfig`.

    Args:
        hf_config: transformers' configuration, which has normalised old key styles of published files.
        text_only: take only the language model of a multimodal one.

    Raises:
        ConfigError: the configuration asks for something these modules do not compute.
    """
    if isinstance(hf_config, Gemma3TextConfig):
        return ModelConfig(TEXT_PARTS, _text(hf_config, hf_config.tie_word_embeddings), None, None, None)
    assert isinstance(hf_config, Gemma3Config)
    text = _text(hf_config.text_config, bool(hf_config.tie_word_embeddings))
    if text_only:
        return ModelConfig(TEXT_PARTS, text, None, None, None)
    # transformers' multimodal class never caps its logits, whatever the text configuration has.
    text = replace(text, final_logit_softcapping=None)
    vision = _vision(hf_config.vision_config, hf_config.mm_tokens_per_image)
    return ModelConfig(VISION_PARTS, text, vision, hf_config.image_token_id, hf_config.mm_tokens_per_image)


def _text(hf: Narrowed, tied: bool) -> TextConfig:
    _require(hf.hidden_activation == "gelu_pytorch_tanh", f"hidden_activation {hf.hidden_activation!r}")
    _require(not hf.attention_bias, "attention_bias true")
    _require(not hf.use_bidirectional_attention, "use_bidirectional_attention true (embedding models)")
    _require(not hf.attention_dropout, f"attention_dropout {hf.attention_dropout}")
    return TextConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        layers=tuple(_layer(hf, layer_type) for layer_type in hf.layer_types),
        norm_eps=hf.rms_norm_eps,
        pad_token_id=hf.pad_token_id,
        tie_word_embeddings=tied,
        initializer_range=hf.initializer_range,
        final_logit_softcapping=hf.final_logit_softcapping,
    )


def _layer(hf: Narrowed, layer_type: str) -> LayerConfig:
    rope = hf.rope_parameters[layer_type]
    _require(rope["rope_type"] in ("default", "linear"), f"rope_type {rope['rope_type']!r}")
    return LayerConfig(
        num_attention_heads=hf.num_attention_heads,
        num_key_value_heads=hf.num_key_value_heads,
        head_dim=hf.head_dim,
        intermediate_size=hf.intermediate_size,
        window=hf.sliding_window if layer_type == "sliding_attention" else None,
        softmax_scale=hf.query_pre_attn_scalar**-0.5,
        rope_theta=rope["rope_theta"],
        rope_scaling_factor=rope.get("factor", 1.0) if rope["rope_type"] == "linear" else 1.0,
        norm_eps=hf.rms_norm_eps,
    )


def _vision(hf: Narrowed, tokens_per_image: Narrowed) -> VisionConfig:
    # `vision_use_head` is ignored: Gemma 3 reads the patch features, and no published file holds a head.
    _require(hf.hidden_act == "gelu_pytorch_tanh", f"vision hidden_act {hf.hidden_act!r}")
    _require(not hf.attention_dropout, f"vision attention_dropout {hf.attention_dropout}")
    return VisionConfig(
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_hidden_layers=hf.num_hidden_layers,
        num_attention_heads=hf.num_attention_heads,
        num_channels=hf.num_channels,
        spatial_merge_size=_merge_size(hf.image_size // hf.patch_size, tokens_per_image),
        image_size=hf.image_size,
        patch_size=hf.patch_size,
        norm_eps=hf.layer_norm_eps,
    )


def _merge_size(patches_per_side: int, tokens_per_image: int) -> int:
    """Return the patches per side of the block that the projector averages."""
    side = round(tokens_per_image**0.5)
    _require(
        side >= 1 and side * side == tokens_per_image and patches_per_side >= 1 and patches_per_side % side == 0,
        f"mm_tokens_per_image {tokens_per_image} with {patches_per_side} x {patches_per_side} patches",
    )
    return patches_per_side // side
