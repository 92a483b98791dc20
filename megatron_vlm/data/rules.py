"""What the data pipeline needs to know about a family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vlm.data.visuals import VisionGrid, VisualRules

PositionFunction = Callable[[np.ndarray, Sequence[VisionGrid]], np.ndarray]


@dataclass(frozen=True)
class PromptRules:
    """What the data pipeline needs to know about a family's prompts."""

    assistant_start: str
    """Text after which the template puts an assistant's words."""
    assistant_end: str
    """End-of-turn token, which the template puts after them; it is trained."""
    image_token_id: int | None
    """Id of the token that stands for one vision feature; None for a text-only model."""
    tokens_per_image: int | None = None
    """Features of one image where all are scaled to one size."""
    bidirectional_images: bool = False
    """Tokens of one image see each other in both directions."""
    video_token_id: int | None = None
    """Id of the token that stands for one feature of a video; None where the model takes none."""
    visuals: VisualRules | None = None
    """What is done with images that vary in size; None where all are scaled to one, or there are none."""
    position_ids: PositionFunction | None = None
    """Gives positions on several axes, [axes, S] int64, from (input_ids, vision_grids); None counts tokens."""

    @property
    def vision_token_ids(self) -> list[int]:
        """Ids of all tokens that stand for vision features."""
        return [token for token in (self.image_token_id, self.video_token_id) if token is not None]
