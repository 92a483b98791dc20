"""How Gemma 3 writes turns and images.

Source: the chat template and `Gemma3Processor` of the published checkpoints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_vlm.data.rules import PromptRules

if TYPE_CHECKING:
    from megatron_vlm.families.gemma3.config import ModelConfig


def prompt_rules(config: ModelConfig) -> PromptRules:
    """Prompt rules of a Gemma 3 model: "<start_of_turn>model" opens an answer, "<end_of_turn>" is trained as its end.

    Args:
        config: the model's configuration; a text-only one takes no images.
    """
    return PromptRules(
        assistant_start="<start_of_turn>model\n",
        assistant_end="<end_of_turn>",
        image_token_id=None if config.text_only else config.image_token_id,
        tokens_per_image=None if config.text_only else config.mm_tokens_per_image,
        bidirectional_images=not config.text_only,
    )
