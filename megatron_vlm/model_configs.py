"""Configuration classes of models, which layers and planning read. A family adds its own fields by subclassing."""

from __future__ import annotations

import abc
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_vlm.errors import ConfigError
from vlm_kernels.gated import Activation

ImageMask = Literal["causal", "window", "whole"]
AttentionKind = tuple[int | None, ImageMask]
"""Window and image mask of a decoder layer."""
# transformers declares its fields as unions (of None, dictionaries, pairs) that it narrows when it builds them.
Narrowed = Any


@dataclass(frozen=True)
class MoEConfig:
    """The experts of one layer.

    Attributes:
        top_k: experts per token; their softmax weights are normalised to sum to one.
        intermediate_size: width of one expert.
        activation: activation function of the gate.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    activation: Activation = "silu"


@dataclass(frozen=True, kw_only=True)
class DecoderLayerConfig:
    """One decoder layer.

    Attributes:
        intermediate_size: width of the dense feed-forward layer.
        window: number of keys visible on the past side, the token itself included; None is unlimited.
        image_mask: what tokens of images see, where a family's images see ahead (`PromptRules.bidirectional_images`):
            no later token ("causal"); the tokens of their image, those of the past within the window ("window"); or all
            tokens of their image, whatever the window ("whole").
        softmax_scale: factor on attention scores.
        moe: experts; None for none.
        moe_beside_dense: whether experts stand beside the dense feed-forward layer, not in its place.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    window: int | None
    softmax_scale: float
    norm_eps: float
    image_mask: ImageMask = "window"
    moe: MoEConfig | None = None
    moe_beside_dense: bool = False


@dataclass(frozen=True)
class DecoderConfig:
    """A language model; a family may have its own class of layers."""

    vocab_size: int
    hidden_size: int
    layers: tuple[DecoderLayerConfig, ...]
    norm_eps: float
    pad_token_id: int | None
    tie_word_embeddings: bool
    initializer_range: float

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """Windows and image masks of the layers, each pair once."""
        return tuple(dict.fromkeys((layer.window, layer.image_mask) for layer in self.layers))

    @property
    def sharded_sizes(self) -> Mapping[str, int]:
        """Sizes beside those of layers that are split over the tensor ranks, by the words of a message."""
        return {}


# The parts of a language model without media, and of one with images and videos.
TEXT_PARTS = ("language_model",)
VISION_PARTS = ("language_model", "vision_tower", "projector")


@dataclass(frozen=True)
class ImageEncoderConfig(abc.ABC):
    """What turns images into features: a tower, or linear layers alone.

    Attributes:
        spatial_merge_size: patches per side of the block that becomes one token.
    """

    hidden_size: int
    num_channels: int
    spatial_merge_size: int

    @property
    @abc.abstractmethod
    def patch_features(self) -> int:
        """Number of values in one flattened patch."""

    @property
    @abc.abstractmethod
    def layer_weights(self) -> int:
        """Number of a layer's weights that each patch is multiplied with."""

    @property
    def blank_frame(self) -> tuple[int, int, int]:
        """The smallest frame that can be encoded: 1, and its rows and columns of patches."""
        return 1, self.spatial_merge_size, self.spatial_merge_size

    @property
    def blank_pixels(self) -> tuple[int, ...]:
        """Shape of the pixels of that frame."""
        return math.prod(self.blank_frame), self.patch_features

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers whose outputs the projector reads, beside that of the last."""
        return ()


@dataclass(frozen=True)
class TowerConfig(ImageEncoderConfig):
    """A vision tower."""

    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int


@dataclass(frozen=True)
class AudioEncoderConfig(abc.ABC):
    """What turns audio into features: a tower, or a projector alone."""

    @property
    @abc.abstractmethod
    def frame_size(self) -> int:
        """Number of values in a frame."""

    @property
    @abc.abstractmethod
    def frames_per_token(self) -> int:
        """Frames of a clip that one token stands for; the last token may stand for fewer."""

    @property
    @abc.abstractmethod
    def most_tokens(self) -> int | None:
        """Tokens of the longest clip; None where only rows limit it."""

    @property
    @abc.abstractmethod
    def sharded_sizes(self) -> Mapping[str, int]:
        """Sizes that are split over the tensor ranks, by the words of a message."""


@dataclass(frozen=True)
class VisionLanguageConfig:
    """A model; `text` and `vision` are of a family's own classes.

    Attributes:
        parts: parts of the model, by the first words of its parameters' names.
        vision: configuration of the vision tower, or of what stands in its place, and projector; None where the model
            takes no images.
        image_token_id: token id of image placeholders; None where the model takes no images.
        audio: configuration of the audio tower, or of what stands in its place; None where the model takes no audio.
    """

    parts: tuple[str, ...]
    text: DecoderConfig
    vision: ImageEncoderConfig | None
    image_token_id: int | None
    audio: AudioEncoderConfig | None = field(default=None, kw_only=True)

    @property
    def text_only(self) -> bool:
        """Whether the model is text-only: a language model that takes no media."""
        return self.parts == TEXT_PARTS

    @property
    def num_tower_layers(self) -> int:
        """Number of layers of the vision tower; 0 where the model has no such tower."""
        return self.vision.num_hidden_layers if isinstance(self.vision, TowerConfig) else 0

    @property
    def image_mask(self) -> str | None:
        """Value of `model.image_mask` that the model has; None for models without a choice."""
        return None

    @property
    def media(self) -> str:
        """What media the model takes, and its image mask where it has a choice, in words."""
        taken = [kind for kind, part in (("images", self.vision), ("audio", self.audio)) if part is not None]
        mask = f" (image_mask {self.image_mask})" if self.image_mask else ""
        return f"with {' and '.join(taken)}{mask}" if taken else "text only"


# Far above any published size; planning makes lists and tensors without memory of these lengths.
LARGEST_SIZE = 2**24
MOST_LAYERS = 10_000
_FROM_ZERO = (
    "pad_token_id image_token_id video_token_id audio_token_id keys_of_layer deepstack_layers mscale mscale_all_dim"
).split()
_SCALES = ("factor", "rope_scaling_factor", "attention_factor", "beta_fast", "beta_slow")
_RANGES: dict[str, tuple[float, float]] = {
    "norm_eps": (1e-12, 0.1),
    "projector_norm_eps": (1e-12, 0.1),
    "rope_theta": (1.0, 2.0**53),
    **dict.fromkeys(_FROM_ZERO, (0, LARGEST_SIZE)),
    **dict.fromkeys(_SCALES, (1e-3, LARGEST_SIZE)),
}


def check_raw_config(content: dict[str, Any], path: str) -> None:
    """Refuse numbers of a config.json that would keep transformers busy, or that no number is like.

    Args:
        content: the file's object.
        path: of the file, for the message.

    Raises:
        ConfigError: a number is not finite or absurdly large, or there are too many layers.
    """
    waiting: list[tuple[str, Any]] = [("", content)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{key}.{name}" if key else str(name), item) for name, item in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{key}[{index}]", item) for index, item in enumerate(value)]
        elif isinstance(value, int | float):
            counts_layers = key.endswith(("num_hidden_layers", "depth", "num_layers"))
            if not math.isfinite(value) or abs(value) > (MOST_LAYERS if counts_layers else 2**53):
                raise ConfigError(f"{key} is {value}", path, "use a published configuration")


def check_numbers(config: Any, model: str, part: str = "") -> None:
    """Refuse sizes and factors that no model can have: of another type, zero, negative, not finite, absurdly large.

    Args:
        config: a model configuration, or a part of one.
        model: name of the family, for the message.
        part: where the part is.

    Raises:
        ConfigError: names the first such number by its part and field.
    """
    for attribute, kind in typing.get_type_hints(type(config)).items():
        value, name = getattr(config, attribute), f"{part}{attribute}"
        kinds = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
        if value is None and type(None) in kinds:
            continue
        items = value if isinstance(value, tuple) else (value,)
        if typing.get_origin(kind) is tuple:
            kinds = typing.get_args(kind)
        for item in items:
            if dataclasses.is_dataclass(item):
                check_numbers(item, model, f"{name}.")
            elif int in kinds or float in kinds:
                require(_is_possible(item, attribute, float in kinds), f"{name} {item!r}", model)
    if isinstance(config, DecoderConfig):
        require(config.layers != (), f"{part}num_hidden_layers 0", model)
        padding, size = config.pad_token_id, config.vocab_size
        require(padding is None or padding < size, f"{part}pad_token_id {padding} with vocab_size {size}", model)
    if isinstance(config, DecoderLayerConfig):
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        require(heads % groups == 0, f"{part}num_attention_heads {heads} with num_key_value_heads {groups}", model)
        require(config.head_dim % 2 == 0, f"{part}head_dim {config.head_dim}, an odd number,", model)
    if isinstance(config, TowerConfig):
        size, heads = config.hidden_size, config.num_attention_heads
        require(size % heads == 0, f"{part}hidden_size {size} with num_attention_heads {heads}", model)


def _is_possible(value: Any, field: str, may_be_fraction: bool) -> bool:
    """Return whether a value is a number of the field's kind and range."""
    if isinstance(value, bool) or not isinstance(value, int | float if may_be_fraction else int):
        return False
    least, most = _RANGES.get(
        field, (math.ulp(0.0) if may_be_fraction else 1, 2.0**53 if may_be_fraction else LARGEST_SIZE)
    )
    return least <= value <= most  # false for a value that is no number


def require(condition: bool, what: str, model: str) -> None:
    """Refuse configurations that a family's modules do not compute.

    Args:
        condition: condition that must hold.
        what: setting that is refused where the condition does not hold.
        model: name of the family, for the message.

    Raises:
        ConfigError: unless `condition`.
    """
    if not condition:
        raise ConfigError(f"{what} is not supported for {model}", "config.json", "use a published configuration")
