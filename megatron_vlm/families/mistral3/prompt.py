"""How Mistral3 writes turns and images.

Source: the chat templates of the published checkpoints and `PixtralProcessor`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_vlm.data.prompts import PromptRules
from megatron_vlm.data.visuals import PatchSizes

if TYPE_CHECKING:
    from megatron_vlm.families.mistral3.config import ModelConfig


def prompt_rules(config: ModelConfig) -> PromptRules:
    """Prompt rules of a Mistral3 model: "[/INST]" opens an answer, "</s>" is trained as its end.

    Images vary in size. The processor writes each as rows of placeholders with a break after each row, the last of
    which is the image's end.

    Args:
        config: the model's configuration; a text-only one takes no images.
    """
    vision, sizes = config.vision, None
    if vision is not None:
        sizes = PatchSizes(vision.patch_size, 1, vision.spatial_merge_size)
    return PromptRules(
        assistant_start="[/INST]",
        assistant_end="</s>",
        image_token_id=config.image_token_id,
        tokens_per_image=None,
        fixed_image_size=False,
        bidirectional_images=False,
        vision_keys=() if sizes is None else ("pixel_values",),
        patch_sizes=sizes,
    )
