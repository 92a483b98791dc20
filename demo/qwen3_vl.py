"""The demo's tiny Qwen3-VL-MoE: every part of the real architecture at 1.6 million parameters, and its own tokenizer.

The directory that `build_model_directory` writes is an ordinary Hugging Face model directory: transformers loads it,
and so does the training command.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

IMAGE_SIZE_PIXELS = 48
PATCH_SIZE_PIXELS = 8
MERGE_SIZE_PATCHES = 2
TOKENS_PER_IMAGE = (IMAGE_SIZE_PIXELS // PATCH_SIZE_PIXELS // MERGE_SIZE_PATCHES) ** 2
NUM_EXPERTS, EXPERTS_PER_TOKEN = 8, 2
# Measured here: with the usual initial position embeddings (0.02) "where" stays at chance for 300 steps.
POSITION_EMBEDDING_INITIAL_STD = 0.5
# Their ids come after all learned ones, as in the published tokenizer.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# Qwen3-VL's chat format without tools: only a user's message may hold images and videos, each a marked placeholder that
# the processor expands; parts are joined as they are, and roles are free.
CHAT_TEMPLATE = """\
{%- macro words(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for item in content -%}
            {{- item.text if 'text' in item else '' -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.role == 'assistant' -%}
        {{- words(message.content) + '<|im_end|>' -}}
    {%- elif message.role == 'user' and message.content is not string -%}
        {%- for item in message.content -%}
            {%- if item.type == 'image' -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif item.type == 'video' -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- else -%}
                {{- item.text -}}
            {%- endif -%}
        {%- endfor -%}
        {{- '<|im_end|>' -}}
    {%- else -%}
        {{- words(message.content) + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], max_learned_tokens: int) -> Qwen2Tokenizer:
    """Returns a Qwen tokenizer (byte-level BPE) learnt from `texts`, with Qwen3-VL's control tokens and template.

    Like the published one it names no image token; the processor knows it.

    Args:
        texts: Questions and answers of the training set.
        max_learned_tokens: Largest number of ids beside the special tokens and the 256 bytes.
    """
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=256 + max_learned_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator([*texts, *["system", "user", "assistant"] * 100], trainer)
    learned = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def build_processor(tokenizer: Qwen2Tokenizer) -> Qwen3VLProcessor:
    """Returns transformers' own Qwen3-VL processor: resize by area, scale to -1..1, cut into patches."""
    half = [0.5, 0.5, 0.5]
    sizes = {"patch_size": PATCH_SIZE_PIXELS, "merge_size": MERGE_SIZE_PATCHES, "temporal_patch_size": 2}
    # A square image of any size becomes IMAGE_SIZE_PIXELS on each side; others keep their aspect ratio.
    area = {"shortest_edge": IMAGE_SIZE_PIXELS**2, "longest_edge": IMAGE_SIZE_PIXELS**2}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=area, image_mean=half, image_std=half, **sizes),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(image_mean=half, image_std=half, **sizes),
        chat_template=tokenizer.chat_template,
    )


def tiny_config(processor: Qwen3VLProcessor) -> Qwen3VLMoeConfig:
    """Returns a Qwen3-VL-MoE configuration of three text layers with eight experts each and three vision layers."""
    tokenizer = processor.tokenizer
    return Qwen3VLMoeConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "intermediate_size": 256,
            "moe_intermediate_size": 96,
            "num_experts": NUM_EXPERTS,
            "num_experts_per_tok": EXPERTS_PER_TOKEN,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 4, 4],
                "mrope_interleaved": True,
            },
            "initializer_range": 0.04,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "patch_size": PATCH_SIZE_PIXELS,
            "spatial_merge_size": MERGE_SIZE_PATCHES,
            "temporal_patch_size": 2,
            "out_hidden_size": 96,
            "num_position_embeddings": (IMAGE_SIZE_PIXELS // PATCH_SIZE_PIXELS) ** 2,
            "deepstack_visual_indexes": [0, 1],
            "initializer_range": 0.04,
        },
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=processor.vision_start_token_id,
        vision_end_token_id=processor.vision_end_token_id,
        tie_word_embeddings=True,
    )


def build_model_directory(folder: Path, processor: Qwen3VLProcessor, seed: int) -> int:
    """Writes configuration, processor and random weights in Hugging Face format.

    Returns:
        Number of parameters.
    """
    config = tiny_config(processor)
    torch.manual_seed(seed)
    model = Qwen3VLMoeForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.visual.pos_embed.weight, std=POSITION_EMBEDDING_INITIAL_STD)
    model.generation_config = GenerationConfig(
        eos_token_id=[processor.tokenizer.eos_token_id, processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")],
        pad_token_id=processor.tokenizer.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())
