"""What the data pipeline needs to know about a family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vlm.data.media import MediaRules, Medium

PositionFunction = Callable[[np.ndarray, Sequence[Medium]], np.ndarray]


@dataclass(frozen=True)
class PromptRules:
    """What the data pipeline needs to know about a family's prompts."""

    assistant_start: str
    """Text after which the template puts an assistant's words."""
    assistant_end: str
    """End-of-turn token, which the template puts after them; it is trained."""
    image_token_id: int | None
    """Id of the token that stands for one feature of an image; None for a text-only model."""
    other_starts: tuple[str, ...] = ()
    """Tokens that stand before an assistant's words in place of `assistant_start`, where that ends a user's turn and
    the message before is another's."""
    turn_tokens: tuple[str, ...] = ()
    """Further tokens with which the family's format writes turns and tools; in a text they would forge one."""
    media_tokens: tuple[str, ...] = ()
    """Tokens that processors write around media and in their place, also where the model takes none; in a text they
    would forge one."""
    vocab_size: int | None = None
    """Rows of the model's embedding; None where no model is known, as in tests of prompts alone."""
    bidirectional_images: bool = False
    """Tokens of one image attend to each other in both directions."""
    video_token_id: int | None = None
    """Id of the token that stands for one feature of a video; None where the model takes none."""
    audio_token_id: int | None = None
    """Id of the token that stands for one feature of audio; None where the model takes none."""
    media: MediaRules | None = None
    """How images, videos and audio are processed; None for a text-only model."""
    position_ids: PositionFunction | None = None
    """Returns a document's positions on several axes, [axes, S] int64, from (input_ids, media); None counts tokens."""

    @property
    def media_token_ids(self) -> list[int]:
        """Ids of all tokens that stand for features of media."""
        return [token for tokens in self.tower_token_ids for token in tokens]

    @property
    def tower_token_ids(self) -> tuple[list[int], list[int]]:
        """Ids of the tokens that stand for features of the vision tower, and of the audio tower."""
        vision, audio = (self.image_token_id, self.video_token_id), (self.audio_token_id,)
        return [token for token in vision if token is not None], [token for token in audio if token is not None]
