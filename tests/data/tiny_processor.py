"""Small but real processors, built offline: byte-level BPE, the family's chat template, image and video processors."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma4AudioFeatureExtractor,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4UnifiedAudioFeatureExtractor,
    Gemma4UnifiedImageProcessor,
    Gemma4UnifiedProcessor,
    Gemma4UnifiedVideoProcessor,
    Gemma4VideoProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from demo.gemma3 import CHAT_TEMPLATE
from demo.gemma4 import CHAT_TEMPLATE as GEMMA4_TEMPLATE
from demo.gemma4 import MEDIA_TOKENS as GEMMA4_MEDIA_TOKENS
from demo.mistral3 import CHAT_TEMPLATE as MISTRAL_TEMPLATE
from demo.mistral3 import PRETOKENIZE_REGEX as TEKKEN_PATTERN
from demo.mistral3 import SPECIAL_TOKENS as MISTRAL_SPECIAL_TOKENS
from demo.mistral3 import train_tokenizer as train_mistral_tokenizer
from demo.qwen3_vl import CHAT_TEMPLATE as QWEN3_VL_TEMPLATE
from demo.qwen3_vl import train_tokenizer

# The demos' templates with generation tags around an assistant's text and its end-of-turn token, so that transformers'
# own assistant mask can judge ours.
GEMMA3_GENERATION_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{- words(message['content']) + '<end_of_turn>' -}}",
    "{%- generation -%}{{- words(message['content']) + '<end_of_turn>' -}}{%- endgeneration -%}",
    1,
)
QWEN3_VL_GENERATION_TEMPLATE = QWEN3_VL_TEMPLATE.replace(
    "{{- words(message.content) + '<|im_end|>' -}}",
    "{%- generation -%}{{- words(message.content) + '<|im_end|>' -}}{%- endgeneration -%}",
    1,
)
MISTRAL_GENERATION_TEMPLATE = MISTRAL_TEMPLATE.replace(
    "{{- words(message.content) + eos_token -}}",
    "{%- generation -%}{{- words(message.content) + eos_token -}}{%- endgeneration -%}",
)

# Gemma's control tokens; <pad> must be id 0 because the embedding keeps row 0 out of the lookup's gradient.
SPECIAL_TOKENS = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)

CORPUS = (
    "user model assistant system What colour is the shape? The shape is red, green, blue or yellow.",
    "Where is the circle? It is at the top left of the picture. How many squares are there? There are three.",
    "Describe this image in detail. Answer with one word. Hello, how are you today? I am fine, thank you.",
)


def train_bpe(special_tokens: tuple[str, ...]) -> Tokenizer:
    """A byte-level BPE tokenizer of about 400 ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def build_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 ids with Gemma 3's control tokens and chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(SPECIAL_TOKENS),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        chat_template=chat_template,
    )


def build_processor(
    directory: str | Path,
    image_size: int = 16,
    soft_tokens: int = 4,
    chat_template: str | None = CHAT_TEMPLATE,
) -> ProcessorMixin:
    """Write a Gemma 3 processor into `directory` and return it.

    Args:
        directory: receives tokenizer, processor and chat template files.
        image_size: height and width to which the image processor resizes, in pixels.
        soft_tokens: tokens that stand for one image.
        chat_template: template to store; None stores none.
    """
    image_processor = Gemma3ImageProcessor(size={"height": image_size, "width": image_size})
    processor = Gemma3Processor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(chat_template),
        chat_template=chat_template,
        image_seq_length=soft_tokens,
    )
    processor.save_pretrained(directory)
    return processor


GEMMA4_GENERATION_TEMPLATE = GEMMA4_TEMPLATE.replace(
    "{{- words(message.content) + '<turn|>' -}}",
    "{%- generation -%}{{- words(message.content) + '<turn|>' -}}{%- endgeneration -%}",
)


def build_gemma4_tokenizer(chat_template: str | None = GEMMA4_TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer of about 400 ids with Gemma 4's control tokens."""
    turns = ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>")
    special = ("<pad>", "<eos>", "<bos>", "<unk>", *turns, *GEMMA4_MEDIA_TOKENS.values(), "<|video|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(special),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens=GEMMA4_MEDIA_TOKENS,
        chat_template=chat_template,
    )


def build_gemma4_processor(
    directory: str | Path,
    patch_size: int = 4,
    pooling_size: int = 2,
    image_tokens: int = 140,
    video_tokens: int = 70,
    bins: int = 16,
    chat_template: str | None = GEMMA4_TEMPLATE,
) -> ProcessorMixin:
    """Write a Gemma 4 processor into `directory` and return it.

    Args:
        directory: receives tokenizer, processor and chat template files.
        patch_size: height and width of a patch, in pixels.
        pooling_size: patches on each side of what one token stands for.
        image_tokens: most tokens of an image, one of the numbers that the image processor accepts.
        video_tokens: most tokens of a frame of a video, likewise.
        bins: features of a frame of audio.
        chat_template: template to store; None stores none.
    """
    sizes = {"patch_size": patch_size, "pooling_kernel_size": pooling_size}
    processor = Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(feature_size=bins),
        image_processor=Gemma4ImageProcessor(max_soft_tokens=image_tokens, **sizes),
        tokenizer=build_gemma4_tokenizer(chat_template),
        video_processor=Gemma4VideoProcessor(max_soft_tokens=video_tokens, **sizes),
        chat_template=chat_template,
    )
    processor.save_pretrained(directory)
    return processor


def build_gemma4_unified_processor(
    directory: str | Path,
    patch_size: int = 4,
    pooling_size: int = 2,
    image_tokens: int = 140,
    video_tokens: int = 70,
    samples_per_token: int = 16,
    chat_template: str | None = GEMMA4_TEMPLATE,
) -> ProcessorMixin:
    """Write a processor of Gemma 4 12B, which has no towers, into `directory` and return it.

    It takes audio at 1600 samples per second: as many features per second as Gemma 4's own has frames.

    Args:
        directory: receives tokenizer, processor and chat template files.
        patch_size: height and width of a patch before patches are merged, in pixels.
        pooling_size: patches on each side of what one token stands for.
        image_tokens: most tokens of an image, one of the numbers that the image processor accepts.
        video_tokens: most tokens of a frame of a video, likewise.
        samples_per_token: samples of a frame of audio, which is one token.
        chat_template: template to store; None stores none.
    """
    sizes = {"patch_size": patch_size, "pooling_kernel_size": pooling_size}
    processor = Gemma4UnifiedProcessor(
        feature_extractor=Gemma4UnifiedAudioFeatureExtractor(
            feature_size=samples_per_token, audio_samples_per_token=samples_per_token, sampling_rate=1600
        ),
        image_processor=Gemma4UnifiedImageProcessor(max_soft_tokens=image_tokens, **sizes),
        tokenizer=build_gemma4_tokenizer(chat_template),
        video_processor=Gemma4UnifiedVideoProcessor(max_soft_tokens=video_tokens, **sizes),
        chat_template=chat_template,
    )
    processor.save_pretrained(directory)
    return processor


def build_qwen_tokenizer(chat_template: str | None = QWEN3_VL_TEMPLATE) -> Qwen2Tokenizer:
    """A Qwen tokenizer of about 400 ids with Qwen3-VL's control tokens."""
    tokenizer = train_tokenizer(CORPUS, max_learned_tokens=144)
    tokenizer.chat_template = chat_template
    return tokenizer


def build_qwen_processor(
    directory: str | Path,
    patch_size: int = 4,
    merge_size: int = 2,
    image_pixels: tuple[int, int] = (8 * 8, 32 * 32),
    video_pixels: tuple[int, int] = (2 * 8 * 8, 4 * 32 * 32),
    chat_template: str | None = QWEN3_VL_TEMPLATE,
) -> ProcessorMixin:
    """Write a Qwen3-VL processor into `directory` and return it.

    Args:
        directory: receives tokenizer, processor and chat template files.
        patch_size: height and width of a patch, in pixels.
        merge_size: patches on each side of what one token stands for.
        image_pixels: fewest and most pixels of an image.
        video_pixels: fewest and most pixels of all frames of a video together.
        chat_template: template to store; None stores none.
    """
    sizes = {"patch_size": patch_size, "merge_size": merge_size, "temporal_patch_size": 2}
    half = [0.5, 0.5, 0.5]
    limits = [{"shortest_edge": low, "longest_edge": high} for low, high in (image_pixels, video_pixels)]
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=limits[0], image_mean=half, image_std=half, **sizes),
        tokenizer=build_qwen_tokenizer(chat_template),
        video_processor=Qwen3VLVideoProcessor(size=limits[1], image_mean=half, image_std=half, **sizes),
        chat_template=chat_template,
    )
    processor.save_pretrained(directory)
    return processor


# How byte-level tokenizers write bytes in their vocabularies.
BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}


def build_mistral_tokenizer(chat_template: str | None = MISTRAL_TEMPLATE) -> PreTrainedTokenizerFast:
    """The demo's Mistral tokenizer with 400 ids, learnt from other texts."""
    tokenizer = train_mistral_tokenizer(CORPUS, 400 - 256 - len(MISTRAL_SPECIAL_TOKENS))
    tokenizer.chat_template = chat_template
    return tokenizer


def build_mistral_processor(
    directory: str | Path,
    patch_size: int = 4,
    merge_size: int = 2,
    longest_edge: int = 48,
    chat_template: str | None = MISTRAL_TEMPLATE,
) -> ProcessorMixin:
    """Write a Pixtral processor into `directory` and return it.

    Args:
        directory: receives tokenizer, processor and chat template files.
        patch_size: height and width of a patch, in pixels.
        merge_size: patches on each side of what one token stands for.
        longest_edge: largest height and width to which the image processor resizes, in pixels.
        chat_template: template to store; None stores none.
    """
    processor = PixtralProcessor(
        image_processor=PixtralImageProcessor(
            patch_size={"height": patch_size, "width": patch_size}, size={"longest_edge": longest_edge}
        ),
        tokenizer=build_mistral_tokenizer(chat_template),
        patch_size=patch_size,
        spatial_merge_size=merge_size,
        chat_template=chat_template,
    )
    processor.save_pretrained(directory)
    return processor


def keep_tekken_alone(directory: str | Path) -> dict[str, Any]:
    """Replace the Mistral tokenizer in `directory` by a tekken.json of the same vocabulary; returns what it says."""
    tokenizer = json.loads(Path(directory, "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    words = sorted(vocab, key=vocab.get)[len(MISTRAL_SPECIAL_TOKENS) :]
    as_bytes = [bytes(BYTE_OF_CHARACTER[character] for character in word) for word in words]
    tekken = {
        "config": {
            "pattern": TEKKEN_PATTERN,
            "num_vocab_tokens": len(words),
            "default_vocab_size": len(vocab),
            "default_num_special_tokens": len(MISTRAL_SPECIAL_TOKENS),
            "version": "v7",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": word.decode(errors="replace")}
            for rank, word in enumerate(as_bytes)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(MISTRAL_SPECIAL_TOKENS)
        ],
    }
    Path(directory, "tekken.json").write_text(json.dumps(tekken))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path(directory, name).unlink()
    return tekken
