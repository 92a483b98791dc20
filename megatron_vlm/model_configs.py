"""Configuration classes of models, which layers and planning read. A family adds its own fields by subclassing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_vlm.errors import ConfigError
from vlm_kernels.gated import Activation

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
        softmax_scale: factor on attention scores.
        moe: experts instead of the dense feed-forward layer; None for none.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    window: int | None
    softmax_scale: float
    norm_eps: float
    moe: MoEConfig | None = None


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


# The parts of a language model without media, and of one with images and videos.
TEXT_PARTS = ("language_model",)
VISION_PARTS = ("language_model", "vision_tower", "projector")


@dataclass(frozen=True)
class TowerConfig:
    """A vision tower."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int


@dataclass(frozen=True)
class VisionLanguageConfig:
    """A model; `text` and `vision` are of a family's own classes.

    Attributes:
        parts: parts of the model, by the first words of its parameters' names.
        vision: configuration of the vision tower and projector; None where the model has none.
        image_token_id: token id of image placeholders; None where the model takes no images.
    """

    parts: tuple[str, ...]
    text: DecoderConfig
    vision: TowerConfig | None
    image_token_id: int | None

    @property
    def text_only(self) -> bool:
        """Whether the model is text-only: a language model that takes no media."""
        return self.parts == TEXT_PARTS


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
