"""Gemma 4's architecture as frozen configurations, one per decoder layer, read from transformers' configuration.

The variants differ in their layers: 31B is dense, 26B-A4B has experts beside the dense feed-forward layer, and E2B and
E4B have an input of its own for every layer and layers that attend with the keys and values of an earlier one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from transformers import (
    Gemma4Config,
    Gemma4TextConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedTextConfig,
    PretrainedConfig,
)

from megatron_vlm.families.gemma4.audio_config import AudioConfig, RawAudioConfig, audio_config_from_hf
from megatron_vlm.model_configs import (
    TEXT_PARTS,
    DecoderConfig,
    DecoderLayerConfig,
    ImageEncoderConfig,
    ImageMask,
    MoEConfig,
    Narrowed,
    TowerConfig,
    VisionLanguageConfig,
    require,
)

_require = partial(require, model="Gemma 4")


@dataclass(frozen=True, kw_only=True)
class LayerConfig(DecoderLayerConfig):
    """One decoder layer: sliding windows alternate with global attention, whose heads are larger and may be fewer.

    Attributes:
        rope_theta: base of the rotary frequencies.
        rope_angles: number of pairs of a head that rotate; the others stay.
        keys_as_values: values are the projected keys, before the keys' norm.
        keys_of_layer: layer whose keys and values this layer attends with; None where it has its own.
        lends_keys: whether later layers attend with this layer's keys and values.
    """

    rope_theta: float
    rope_angles: int
    keys_as_values: bool
    keys_of_layer: int | None
    lends_keys: bool


@dataclass(frozen=True)
class TextConfig(DecoderConfig):
    """The language model.

    Attributes:
        per_layer_size: width of the input that every layer has of its own; None without.
    """

    layers: tuple[LayerConfig, ...]
    final_logit_softcapping: float | None
    per_layer_size: int | None

    @property
    def sharded_sizes(self) -> Mapping[str, int]:
        """Sizes beside those of layers that are split over the tensor ranks."""
        return {} if self.per_layer_size is None else {"size of a layer's own input": self.per_layer_size}


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """The vision tower.

    Attributes:
        head_dim: width of a head.
        patch_size: height and width of a patch in pixels.
        num_positions_per_side: rows of each of the two tables of positions.
        clips: whether linears clip inputs and outputs (E2B, E4B).
        standardizes: whether the pooled output is shifted and scaled (26B-A4B, 31B).
    """

    head_dim: int
    patch_size: int
    num_positions_per_side: int
    norm_eps: float
    rope_theta: float
    clips: bool
    standardizes: bool

    @property
    def projector_norm_eps(self) -> float:
        """Added to the mean square by the projector's norm."""
        return self.norm_eps

    @property
    def patch_features(self) -> int:
        """Number of values in one flattened patch."""
        return self.num_channels * self.patch_size**2

    @property
    def layer_weights(self) -> int:
        """Number of a layer's weights that each patch is multiplied with."""
        return 4 * self.hidden_size**2 + 3 * self.hidden_size * self.intermediate_size


@dataclass(frozen=True)
class PixelEmbedderConfig(ImageEncoderConfig):
    """What 12B has in place of a tower: an embedding of pixels.

    Attributes:
        patch_size: height and width in pixels of the patch that becomes one token.
        pooling_kernel_size: patches per side that the processor merges into that one.
        num_positions_per_side: rows of each of the two tables of positions.
        norm_eps: of the layer norms.
    """

    patch_size: int
    pooling_kernel_size: int
    num_positions_per_side: int
    norm_eps: float
    projector_norm_eps: float

    @property
    def patch_features(self) -> int:
        """Number of values in one flattened patch."""
        return self.num_channels * self.patch_size**2

    @property
    def layer_weights(self) -> int:
        """Number of weights that each patch is multiplied with."""
        return self.patch_features * self.hidden_size


@dataclass(frozen=True)
class ModelConfig(VisionLanguageConfig):
    """A Gemma 4 model.

    Attributes:
        is_unified: whether it is a gemma4_unified model, which has no towers.
        is_wrapped: whether files have names and configuration of a multimodal model although it takes no media.
        video_token_id: token id of the placeholder of video frames; None where the model takes none.
        audio_token_id: token id of the placeholder of audio; None where the model takes none.
    """

    text: TextConfig
    vision: VisionConfig | PixelEmbedderConfig | None
    is_unified: bool
    is_wrapped: bool = False
    video_token_id: int | None = None
    audio_token_id: int | None = None
    audio: AudioConfig | RawAudioConfig | None = field(default=None, kw_only=True)

    @property
    def bidirectional_images(self) -> bool:
        """Whether tokens of an image see each other in both directions, in some layers."""
        return self.vision is not None and any(layer.image_mask != "causal" for layer in self.text.layers)

    @property
    def image_mask(self) -> str | None:
        """Value of `model.image_mask` that the model has; None for models without a choice."""
        if not self.is_unified or not self.bidirectional_images:
            return None
        return "transformers" if any(layer.image_mask == "whole" for layer in self.text.layers) else "window"


def config_from_hf(
    hf_config: PretrainedConfig, text_only: bool, image_mask: Literal["window", "transformers"] | None = None
) -> ModelConfig:
    """Read a `Gemma4Config`, a `Gemma4UnifiedConfig`, or the configuration of their language models alone.

    Args:
        hf_config: transformers' configuration.
        text_only: take only the language model of a multimodal one.
        image_mask: what tokens of images see in a model of which transformers 5.23 has two rules: that of the other
            sizes, by which it generates too (None or "window"), or that of its forward pass.

    Raises:
        ConfigError: the configuration asks for something these modules do not compute.
    """
    is_unified = isinstance(hf_config, Gemma4UnifiedConfig | Gemma4UnifiedTextConfig)
    as_transformers = image_mask == "transformers"
    if isinstance(hf_config, Gemma4TextConfig | Gemma4UnifiedTextConfig):
        text = _text(hf_config, hf_config.tie_word_embeddings, as_transformers)
        return ModelConfig(TEXT_PARTS, text, None, None, is_unified)
    assert isinstance(hf_config, Gemma4Config | Gemma4UnifiedConfig)
    text = _text(hf_config.text_config, hf_config.tie_word_embeddings, as_transformers)
    has_images, has_audio = hf_config.vision_config is not None, hf_config.audio_config is not None
    if text_only or not (has_images or has_audio):
        return ModelConfig(TEXT_PARTS, text, None, None, is_unified, is_wrapped=not (has_images or has_audio))
    # transformers puts it in place of media.
    _require(text.pad_token_id is not None, "pad_token_id null")
    vision, audio = None, None
    if has_images:
        vision = _pixel_embedder(hf_config.vision_config) if is_unified else _vision(hf_config.vision_config)
    if has_audio:
        audio = audio_config_from_hf(hf_config.audio_config)
    towers = {"vision_tower": has_images, "audio_tower": isinstance(audio, AudioConfig)}
    return ModelConfig(
        ("language_model", *(name for name, is_there in towers.items() if is_there), "projector"),
        text,
        vision,
        hf_config.image_token_id if has_images else None,
        is_unified,
        video_token_id=hf_config.video_token_id if has_images else None,
        audio_token_id=hf_config.audio_token_id if has_audio else None,
        audio=audio,
    )


def _text(hf: Narrowed, tied: bool, as_transformers: bool) -> TextConfig:
    _require(hf.hidden_activation == "gelu_pytorch_tanh", f"hidden_activation {hf.hidden_activation!r}")
    _require(not hf.attention_bias, "attention_bias true")
    _require(not hf.attention_dropout, f"attention_dropout {hf.attention_dropout}")
    mask = hf.use_bidirectional_attention
    _require(mask in (None, "vision"), f"use_bidirectional_attention {mask!r}")
    keys_of = [_producer(hf, index) for index in range(hf.num_hidden_layers)]
    per_layer_size = getattr(hf, "hidden_size_per_layer_input", None) or None
    if per_layer_size is not None:
        size = hf.vocab_size_per_layer_input
        _require(size == hf.vocab_size, f"vocab_size_per_layer_input {size} with vocab_size {hf.vocab_size}")
    else:
        # transformers 5.23 fails on such a model.
        shared = hf.num_kv_shared_layers
        _require(not shared, f"num_kv_shared_layers {shared} without hidden_size_per_layer_input")
    return TextConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        layers=tuple(_layer(hf, index, keys_of, as_transformers) for index in range(hf.num_hidden_layers)),
        norm_eps=hf.rms_norm_eps,
        pad_token_id=hf.pad_token_id,
        tie_word_embeddings=tied,
        initializer_range=hf.initializer_range,
        final_logit_softcapping=hf.final_logit_softcapping,
        per_layer_size=per_layer_size,
    )


def _layer(hf: Narrowed, index: int, keys_of: list[int | None], as_transformers: bool) -> LayerConfig:
    # Heads of sliding and global layers are in `per_layer_config` alone, and transformers reads nothing else there.
    own, layer_type = hf.per_layer_config[index], hf.layer_types[index]
    is_sliding = layer_type == "sliding_attention"
    double_wide = hf.use_double_wide_mlp and keys_of[index] is not None
    rope = hf.rope_parameters[layer_type]
    return LayerConfig(
        num_attention_heads=own.num_attention_heads,
        num_key_value_heads=own.num_key_value_heads,
        head_dim=own.head_dim,
        intermediate_size=hf.intermediate_size * (2 if double_wide else 1),
        window=hf.sliding_window if is_sliding else None,
        image_mask=_image_mask(hf, is_sliding, as_transformers),
        softmax_scale=1.0,
        norm_eps=hf.rms_norm_eps,
        moe=_experts(hf) if getattr(hf, "enable_moe_block", False) else None,
        moe_beside_dense=True,
        rope_theta=rope["rope_theta"],
        rope_angles=_rope_angles(rope, own.head_dim),
        keys_as_values=bool(hf.attention_k_eq_v) and not is_sliding,
        keys_of_layer=keys_of[index],
        lends_keys=index in keys_of,
    )


def _image_mask(hf: Narrowed, is_sliding: bool, as_transformers: bool) -> ImageMask:
    """Return what tokens of images see: images are seen in both directions on sliding layers only.

    transformers' forward pass of a unified model shows them whole on every layer.
    """
    if hf.use_bidirectional_attention is None:
        return "causal"
    if as_transformers:
        return "whole"
    return "window" if is_sliding else "causal"


def _rope_angles(rope: Narrowed, head_dim: int) -> int:
    """Return how many pairs of a head rotate: all, or a fraction of them ("proportional")."""
    kind, factor, part = rope["rope_type"], rope.get("factor", 1.0), rope.get("partial_rotary_factor", 1.0)
    _require(kind in ("default", "proportional") and factor == 1.0, f"rope_type {kind!r} with factor {factor}")
    _require(0 < part <= 1, f"partial_rotary_factor {part}")
    return head_dim // 2 if kind == "default" else int(part * head_dim // 2)


def _producer(hf: Narrowed, index: int) -> int | None:
    """Return the layer whose keys and values a layer shares: the last of its type that has its own."""
    first_consumer = hf.num_hidden_layers - hf.num_kv_shared_layers
    if index < first_consumer:
        return None
    own_type = hf.layer_types[index]
    producers = [layer for layer in range(first_consumer) if hf.layer_types[layer] == own_type]
    _require(producers != [], f"num_kv_shared_layers {hf.num_kv_shared_layers}, more than leave a {own_type} layer,")
    return producers[-1]


def _experts(hf: Narrowed) -> MoEConfig:
    _require(
        hf.num_experts is not None and hf.top_k_experts is not None and 1 <= hf.top_k_experts <= hf.num_experts,
        f"top_k_experts {hf.top_k_experts} of num_experts {hf.num_experts}",
    )
    return MoEConfig(hf.num_experts, hf.top_k_experts, hf.moe_intermediate_size, activation="gelu_tanh")


def _vision(hf: Narrowed) -> VisionConfig:
    _require(hf.hidden_activation == "gelu_pytorch_tanh", f"vision hidden_activation {hf.hidden_activation!r}")
    _require(not hf.attention_bias, "vision attention_bias true")
    _require(not hf.attention_dropout, f"vision attention_dropout {hf.attention_dropout}")
    heads, groups, size = hf.num_attention_heads, hf.num_key_value_heads, hf.head_dim
    _require(groups == heads, f"vision num_key_value_heads {groups} with num_attention_heads {heads}")
    _require(heads * size == hf.hidden_size, f"vision head_dim {size} of {heads} heads, hidden_size {hf.hidden_size}")
    _require(size % 4 == 0, f"vision head_dim {size}, no multiple of 4,")
    rope, pooling = hf.rope_parameters, hf.pooling_kernel_size
    _require(rope["rope_type"] == "axial", f"vision rope_type {rope['rope_type']!r}")
    # transformers 5.23 would return the padding.
    _require(pooling >= 2, f"pooling_kernel_size {pooling}")
    return VisionConfig(
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_hidden_layers=hf.num_hidden_layers,
        num_attention_heads=heads,
        num_channels=3,
        head_dim=size,
        patch_size=hf.patch_size,
        spatial_merge_size=pooling,
        num_positions_per_side=hf.position_embedding_size,
        norm_eps=hf.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        clips=hf.use_clipped_linears,
        standardizes=hf.standardize,
    )


def _pixel_embedder(hf: Narrowed) -> PixelEmbedderConfig:
    size, out_size = hf.mm_embed_dim, hf.output_proj_dims
    _require(size == out_size, f"vision output_proj_dims {out_size} with mm_embed_dim {size}")
    return PixelEmbedderConfig(
        hidden_size=size,
        num_channels=3,
        spatial_merge_size=1,
        patch_size=hf.patch_size * hf.pooling_kernel_size,
        pooling_kernel_size=hf.pooling_kernel_size,
        num_positions_per_side=hf.mm_posemb_size,
        norm_eps=1e-5,  # torch's own
        projector_norm_eps=hf.rms_norm_eps,
    )
