"""The processor of a model directory, checked against the model and given the run's limits."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

from transformers import AutoProcessor, AutoTokenizer

from megatron_vlm.errors import ConfigError

if TYPE_CHECKING:
    from megatron_vlm.data.prompts import PromptRules


def load_processor(hf_path: str, rules: PromptRules, min_pixels: int | None, max_pixels: int | None) -> Any:
    """The processor of a directory; of a text-only model its tokenizer.

    Args:
        hf_path: directory with tokenizer and processor files.
        rules: the family's rules.
        min_pixels: see `PromptBuilder`.
        max_pixels: see `PromptBuilder`.

    Raises:
        ConfigError: it cannot be loaded, or does not fit the model or the limits.
    """
    _check_pixel_limits(rules, min_pixels, max_pixels)
    processor = _load(hf_path, has_images=rules.image_token_id is not None)
    _check_tokens_and_patches(processor, hf_path, rules)
    if rules.visuals is not None and (min_pixels, max_pixels) != (None, None):
        rules.visuals.limit_pixels(processor, min_pixels, max_pixels)
    return processor


def _load(hf_path: str, has_images: bool) -> Any:
    loader = AutoProcessor if has_images else AutoTokenizer
    try:
        processor = loader.from_pretrained(hf_path, local_files_only=True)
    # transformers raises many types on incomplete directories; all mean that this one cannot be used.
    except Exception as error:
        raise ConfigError(
            f"no {'processor' if has_images else 'tokenizer'} can be loaded from {hf_path}: {error}",
            "model.hf_path",
            "add the tokenizer and processor files of the model",
        ) from None
    if has_images and not hasattr(processor, "image_processor"):
        raise ConfigError(
            f"{hf_path} has a tokenizer but no image processor",
            "model.hf_path",
            "add processor_config.json or preprocessor_config.json, or set model.text_only to true",
        )
    video_processor = getattr(processor, "video_processor", None)
    if getattr(video_processor, "cap_pixels_per_frame", False) is None:
        # What leaving it unset means, without the warning that transformers gives for that.
        video_processor.cap_pixels_per_frame = False
    return processor


def _check_tokens_and_patches(processor: Any, hf_path: str, rules: PromptRules) -> None:
    """The processor's placeholders and patches must be those that the model was configured with."""
    tokenizer = getattr(processor, "tokenizer", processor)
    for kind, expected in (("image", rules.image_token_id), ("video", rules.video_token_id)):
        # Some processors call the mark that they expand their image token; some tokenizers name none.
        own_ids = [getattr(owner, f"{kind}_token_id", None) for owner in (tokenizer, processor)]
        own_id = next((token for token in own_ids if token is not None), None)
        if expected is not None and own_id != expected:
            raise ConfigError(
                f"the tokenizer's {kind} token is {own_id}, config.json says {expected}",
                hf_path,
                "take config.json and the tokenizer's files from one model",
            )
    for name, expected in rules.visuals.sizes.items() if rules.visuals is not None else ():
        own = attrgetter(name)(processor)
        if own != expected:
            raise ConfigError(
                f"the processor's {name} is {own}, config.json says {expected}",
                hf_path,
                "take config.json and the processor's files from one model",
            )


def _check_pixel_limits(rules: PromptRules, min_pixels: int | None, max_pixels: int | None) -> None:
    given = {"data.min_pixels": min_pixels, "data.max_pixels": max_pixels}
    for key, value in given.items():
        if value is not None and rules.visuals is None:
            reason = "scales every image to one size" if rules.image_token_id is not None else "takes no images"
            raise ConfigError(f"{key} is {value}, but this model {reason}", key, "set it to null")
