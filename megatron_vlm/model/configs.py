"""What the records of every family have in common. A family adds its own fields by subclassing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_vlm.errors import ConfigError

# transformers declares its fields as unions (of None, dictionaries, pairs) that it narrows when it builds them.
Narrowed = Any


@dataclass(frozen=True)
class DecoderLayerConfig:
    """One decoder layer.

    Attributes:
        window: keys visible on the past side, the token itself included; None is unlimited.
        softmax_scale: factor on attention scores.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    window: int | None
    softmax_scale: float
    norm_eps: float


@dataclass(frozen=True)
class DecoderConfig:
    """A language model; `layers` has a family's own records."""

    vocab_size: int
    hidden_size: int
    layers: tuple[Any, ...]
    norm_eps: float
    pad_token_id: int | None
    tie_word_embeddings: bool
    initializer_range: float


# The parts of a language model without media, and of one with images and videos.
TEXT_PARTS = ("language_model",)
VISION_PARTS = ("language_model", "vision_tower", "projector")


@dataclass(frozen=True)
class VisionLanguageConfig:
    """A model; `text` and `vision` are a family's own records.

    Attributes:
        parts: that the model has, by the first words of its parameters' names.
        vision: the tower and the projector; None where the model has none.
        image_token_id: of the placeholders of images; None where the model takes none.
    """

    parts: tuple[str, ...]
    text: Any
    vision: Any
    image_token_id: int | None

    @property
    def text_only(self) -> bool:
        """The model is a language model alone, which takes no media."""
        return self.parts == TEXT_PARTS


def require(condition: bool, what: str, model: str) -> None:
    """Refuse what a family's modules do not compute.

    Args:
        condition: what must hold.
        what: is refused where it does not.
        model: the family, for the message.

    Raises:
        ConfigError: unless `condition`.
    """
    if not condition:
        raise ConfigError(f"{what} is not supported for {model}", "config.json", "use a published configuration")
