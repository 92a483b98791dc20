"""Mistral3's architecture as frozen configurations, one per decoder layer, read from transformers' configuration.

The language model is Mistral (Mistral-Small-3.1 and 3.2) or Ministral3, which has YaRN positions and scales queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from transformers import Ministral3Config, Mistral3Config, MistralConfig, PixtralVisionConfig, PretrainedConfig

from megatron_vlm.layers.rope import YarnScaling
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
from vlm_kernels.gated import Activation

_require = partial(require, model="Mistral3")


@dataclass(frozen=True)
class QueryScaling:
    """The factor 1 + beta * ln(1 + floor(p / original_length)) on queries at position p, from Llama 4."""

    beta: float
    original_length: int


@dataclass(frozen=True)
class TextConfig(DecoderConfig):
    """The language model; `yarn` and `query_scaling` are None in Mistral."""

    rope_theta: float
    yarn: YarnScaling | None
    query_scaling: QueryScaling | None


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """The Pixtral tower and the projector that merges blocks of its patches."""

    patch_size: int
    rope_theta: float
    activation: Activation
    out_hidden_size: int
    projector_norm_eps: float
    projector_bias: bool
    norm_eps: float = 1e-5  # fixed in transformers

    @property
    def patch_features(self) -> int:
        """Number of values in one flattened patch."""
        return self.num_channels * self.patch_size**2

    @property
    def layer_weights(self) -> int:
        """Number of a layer's weights that each patch is multiplied with."""
        return 4 * self.hidden_size**2 + 3 * self.hidden_size * self.intermediate_size

    @property
    def projector_hidden_size(self) -> int:
        """Width between the projector's two linear layers."""
        return self.out_hidden_size


@dataclass(frozen=True)
class ModelConfig(VisionLanguageConfig):
    """A Mistral3 model."""

    text: TextConfig
    vision: VisionConfig | None


def config_from_hf(hf_config: PretrainedConfig, text_only: bool) -> ModelConfig:
    """Read a `Mistral3Config`, or a text-only `MistralConfig` or `Ministral3Config`.

    Args:
        hf_config: transformers' configuration.
        text_only: take only the language model.

    Raises:
        ConfigError: the configuration asks for something these modules do not compute.
    """
    if isinstance(hf_config, MistralConfig | Ministral3Config):
        return ModelConfig(TEXT_PARTS, _text(hf_config, bool(hf_config.tie_word_embeddings)), None, None)
    assert isinstance(hf_config, Mistral3Config)
    # Only the top-level flag decides; the text configuration has one of its own, which transformers ignores.
    text = _text(hf_config.text_config, bool(hf_config.tie_word_embeddings))
    if text_only:
        return ModelConfig(TEXT_PARTS, text, None, None)
    return ModelConfig(VISION_PARTS, text, _vision(hf_config, text), hf_config.image_token_index)


def _text(hf: Narrowed, tied: bool) -> TextConfig:
    _require(isinstance(hf, MistralConfig | Ministral3Config), f"a language model of type {hf.model_type!r}")
    _require(hf.hidden_act == "silu", f"hidden_act {hf.hidden_act!r}")
    _require(not hf.attention_dropout, f"attention_dropout {hf.attention_dropout}")
    head_dim = hf.head_dim or hf.hidden_size // hf.num_attention_heads
    rope = hf.rope_parameters
    layer = DecoderLayerConfig(
        num_attention_heads=hf.num_attention_heads,
        num_key_value_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        intermediate_size=hf.intermediate_size,
        window=hf.sliding_window,
        softmax_scale=head_dim**-0.5,
        norm_eps=hf.rms_norm_eps,
    )
    return TextConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        layers=(layer,) * hf.num_hidden_layers,
        norm_eps=hf.rms_norm_eps,
        pad_token_id=hf.pad_token_id,
        tie_word_embeddings=tied,
        initializer_range=hf.initializer_range,
        rope_theta=rope["rope_theta"],
        yarn=_yarn(rope, hf.max_position_embeddings),
        query_scaling=_query_scaling(rope) if isinstance(hf, Ministral3Config) else None,
    )


def _yarn(rope: Narrowed, max_position_embeddings: int) -> YarnScaling | None:
    _require(rope.get("partial_rotary_factor", 1.0) == 1, "partial_rotary_factor")
    if rope["rope_type"] == "default":
        return None
    _require(rope["rope_type"] == "yarn", f"rope_type {rope['rope_type']!r}")
    return YarnScaling(
        factor=_given(rope["factor"], max_position_embeddings / rope["original_max_position_embeddings"]),
        original_length=rope["original_max_position_embeddings"],
        beta_fast=_given(rope.get("beta_fast"), 32),
        beta_slow=_given(rope.get("beta_slow"), 1),
        mscale=rope.get("mscale"),
        mscale_all_dim=rope.get("mscale_all_dim"),
        attention_factor=rope.get("attention_factor"),
        truncate=rope.get("truncate", True),
    )


def _given(value: Narrowed, default: float) -> Narrowed:
    return default if value is None else value


def _query_scaling(rope: Narrowed) -> QueryScaling | None:
    beta = rope.get("llama_4_scaling_beta")
    _require(beta is not None, "a Ministral3 without rope_parameters.llama_4_scaling_beta")
    _require(isinstance(beta, int | float) and beta >= 0, f"rope_parameters.llama_4_scaling_beta {beta!r}")
    return QueryScaling(beta, rope["original_max_position_embeddings"]) if beta else None


def _vision(hf: Narrowed, text: TextConfig) -> VisionConfig:
    vision = hf.vision_config
    _require(isinstance(vision, PixtralVisionConfig), f"a vision tower of type {vision.model_type!r}")
    _require(hf.vision_feature_layer == -1, f"vision_feature_layer {hf.vision_feature_layer}")
    _require(hf.projector_hidden_act == "gelu", f"projector_hidden_act {hf.projector_hidden_act!r}")
    _require(vision.hidden_act in ("silu", "gelu"), f"vision hidden_act {vision.hidden_act!r}")
    _require(not vision.attention_dropout, f"vision attention_dropout {vision.attention_dropout}")
    _require(isinstance(vision.patch_size, int), f"vision patch_size {vision.patch_size}")
    rope = vision.rope_parameters
    _require(rope["rope_type"] == "axial", f"vision rope_type {rope['rope_type']!r}")
    head_dim = vision.hidden_size // vision.num_attention_heads
    _require(
        vision.head_dim in (None, head_dim) and head_dim % 4 == 0, f"vision head_dim {vision.head_dim or head_dim}"
    )
    return VisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_hidden_layers,
        num_attention_heads=vision.num_attention_heads,
        num_channels=vision.num_channels,
        patch_size=vision.patch_size,
        rope_theta=rope["rope_theta"],
        activation=vision.hidden_act,
        spatial_merge_size=hf.spatial_merge_size,
        out_hidden_size=text.hidden_size,
        projector_norm_eps=text.norm_eps,
        projector_bias=hf.multimodal_projector_bias,
    )
