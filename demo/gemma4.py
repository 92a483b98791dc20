"""The demo's tiny Gemma 4: E2B's architecture under a million parameters, and its own tokenizer.

It has what E2B has: an input of its own for every layer, layers that attend with the keys and values of earlier ones
and have feed-forward layers twice as wide, a vision tower and an audio tower whose linear layers clip. The directory
that `build_model_directory` writes is an ordinary Hugging Face model directory: transformers loads it, and so does the
training command.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import (
    Gemma4AudioConfig,
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4TextConfig,
    Gemma4VideoProcessor,
    Gemma4VisionConfig,
    GemmaTokenizer,
    GenerationConfig,
)

from demo.draw import IMAGE_SIZE_PIXELS
from demo.gemma_tokenizer import train_gemma_tokenizer

PATCH_SIZE_PIXELS = 16
POOLING_SIZE_PATCHES = 2
TOKENS_PER_IMAGE = (IMAGE_SIZE_PIXELS // PATCH_SIZE_PIXELS // POOLING_SIZE_PATCHES) ** 2
MOST_TOKENS_PER_IMAGE = 70  # the smallest limit that the processor knows
AUDIO_BINS = 32
SHARED_LAYERS = 3
# The published bounds are measured on activations; these are wide enough for nearly all of them here.
CLIPPING_BOUND = 6.0
# All ones in transformers, with which no patch knows its place. Measured here: with 0.5, "where" stays at chance for
# 400 steps, while colours and shapes are learnt; with 1.5 and patches at 0.08, shapes do.
POSITION_EMBEDDING_INITIAL_STD = 1.0
PATCH_EMBEDDING_INITIAL_STD = 0.1
# Gemma 4 does not scale the scores of its normalised heads: weights of one, as in transformers, would begin with nearly
# one key per query, and size^-0.25 with the usual 1 / sqrt(size). Measured here: somewhat sharper learns images faster.
SHARPNESS_EXPONENT = 0.1
# Weights of the norms behind attention and feed-forward layers, ones in transformers, with which each branch begins as
# large as what it is added to. Measured here: then colours, shapes or places stay at chance, another one in every run.
BRANCH_NORM_INITIAL = 0.3
BRANCH_NORMS = (
    "post_attention_layernorm.weight",
    "post_feedforward_layernorm.weight",
    "post_per_layer_input_norm.weight",
)
MEDIA_TOKENS = {
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "image_token": "<|image|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "audio_token": "<|audio|>",
}
VIDEO_TOKEN = "<|video|>"
TURN_TOKENS = {"sot_token": "<|turn>", "eot_token": "<turn|>"}
SPECIAL_TOKENS = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *TURN_TOKENS.values(), "<|channel>", "<channel|>", "<|think|>"),
    *MEDIA_TOKENS.values(),
    VIDEO_TOKEN,
)

# Gemma 4's chat format without tools: a turn for every message, and a placeholder for every medium.
CHAT_TEMPLATE = """\
{%- macro words(content) -%}
    {%- if content is string -%}
        {{- content | trim -}}
    {%- else -%}
        {%- for item in content -%}
            {%- if item.type == 'text' -%}
                {{- item.text | trim -}}
            {%- elif item.type in ('image', 'video') -%}
                {{- '\\n\\n<|' + item.type + '|>\\n\\n' -}}
            {%- elif item.type == 'audio' -%}
                {{- '<|audio|>' -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- '<|turn>model\\n' -}}
        {{- words(message.content) + '<turn|>' -}}
    {%- else -%}
        {{- '<|turn>' + message.role + '\\n' + words(message.content) + '<turn|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], max_learned_tokens: int) -> GemmaTokenizer:
    """Returns a Gemma tokenizer learnt from `texts`, with Gemma 4's special tokens and template."""
    named = {**MEDIA_TOKENS, **TURN_TOKENS, "video_token": VIDEO_TOKEN}
    return train_gemma_tokenizer(texts, max_learned_tokens, SPECIAL_TOKENS, named, CHAT_TEMPLATE)


def build_processor(tokenizer: GemmaTokenizer) -> Gemma4Processor:
    """Returns transformers' own Gemma 4 processor with few bins, which leaves images as they are.

    Scaled up to as many tokens as the processor's smallest limit allows, an image would have 64.
    """
    sizes = {"patch_size": PATCH_SIZE_PIXELS, "pooling_kernel_size": POOLING_SIZE_PATCHES}
    return Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(feature_size=AUDIO_BINS),
        image_processor=Gemma4ImageProcessor(do_resize=False, max_soft_tokens=MOST_TOKENS_PER_IMAGE, **sizes),
        tokenizer=tokenizer,
        video_processor=Gemma4VideoProcessor(max_soft_tokens=MOST_TOKENS_PER_IMAGE, **sizes),
        chat_template=tokenizer.chat_template,
        image_seq_length=MOST_TOKENS_PER_IMAGE,
    )


def tiny_config(processor: Gemma4Processor) -> Gemma4Config:
    """Returns a configuration of five text layers and two layers in each tower, for the processor's vocabulary."""
    tokenizer = processor.tokenizer
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)), strict=True))
    text = Gemma4TextConfig(
        vocab_size=len(tokenizer),
        vocab_size_per_layer_input=len(tokenizer),
        hidden_size=96,
        hidden_size_per_layer_input=16,
        intermediate_size=128,
        use_double_wide_mlp=True,
        num_hidden_layers=5,
        num_kv_shared_layers=SHARED_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        global_head_dim=48,
        max_position_embeddings=512,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        final_logit_softcapping=30.0,
        initializer_range=0.04,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    vision = Gemma4VisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        patch_size=PATCH_SIZE_PIXELS,
        pooling_kernel_size=POOLING_SIZE_PATCHES,
        position_embedding_size=MOST_TOKENS_PER_IMAGE * POOLING_SIZE_PATCHES,  # as many as a thin image is long
        use_clipped_linears=True,
        initializer_range=0.04,
    )
    audio = Gemma4AudioConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        subsampling_conv_channels=[AUDIO_BINS, 8],
        attention_chunk_size=8,
        attention_context_left=9,
        output_proj_dims=64,
        initializer_range=0.04,
    )
    return Gemma4Config(
        text_config=text,
        vision_config=vision,
        audio_config=audio,
        boi_token_id=ids["<|image>"],
        eoi_token_id=ids["<image|>"],
        image_token_id=ids["<|image|>"],
        video_token_id=ids[VIDEO_TOKEN],
        boa_token_id=ids["<|audio>"],
        eoa_token_index=ids["<audio|>"],
        audio_token_id=ids["<|audio|>"],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, ids["<turn|>"]],
        tie_word_embeddings=True,
        initializer_range=0.04,
    )


def build_model_directory(folder: Path, processor: Gemma4Processor, seed: int) -> int:
    """Writes configuration, processor and random weights in Hugging Face format.

    Returns:
        Number of parameters.
    """
    config = tiny_config(processor)
    torch.manual_seed(seed)
    model = Gemma4ForConditionalGeneration(config)
    with torch.no_grad():
        patch_embedder = model.model.vision_tower.patch_embedder
        patch_embedder.position_embedding_table.normal_(std=POSITION_EMBEDDING_INITIAL_STD)
        patch_embedder.input_proj.weight.normal_(std=PATCH_EMBEDDING_INITIAL_STD)
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter *= parameter.shape[0] ** -SHARPNESS_EXPONENT
            elif name.endswith(BRANCH_NORMS):
                parameter.fill_(BRANCH_NORM_INITIAL)
        for name, buffer in model.named_buffers():
            if name.endswith(("input_min", "output_min", "input_max", "output_max")):
                buffer.fill_(-CLIPPING_BOUND if name.endswith("min") else CLIPPING_BOUND)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())
