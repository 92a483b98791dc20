"""The demo's tiny Gemma 3: every part of the real architecture, under a million parameters, and its own tokenizer.

The tokenizer has Gemma's design (BPE, spaces as "▁", byte fallback, the same special tokens) at a few hundred ids. The
directory that `build_model_directory` writes is an ordinary Hugging Face model directory: transformers loads it, and so
does the training command.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GemmaTokenizer,
    GenerationConfig,
)

from demo.gemma_tokenizer import train_gemma_tokenizer

IMAGE_SIZE_PIXELS = 48
PATCH_SIZE_PIXELS = 8
SOFT_TOKENS_PER_IMAGE = 9  # 6 x 6 patches, pooled 2 x 2
# Gemma 3 starts from a trained SigLIP and a zero projector; from scratch both initial values stall for hundreds of
# steps. Measured here: with the usual position embeddings (0.1) "where" stays at chance, with 0.5 it is learnt early.
PROJECTOR_INITIAL_STD = 0.05
POSITION_EMBEDDING_INITIAL_STD = 0.5
SPECIAL_TOKENS = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<mask>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)

# The rules of the Gemma 3 chat format: the system text is put before the first user turn, roles must alternate, the
# assistant is called "model", an image is one marker that the processor expands.
CHAT_TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = '' -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- macro words(content) -%}
    {%- if content is string -%}
        {{ content | trim }}
    {%- elif content is iterable -%}
        {%- for item in content -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception('Invalid content type') }}
    {%- endif -%}
{%- endmacro -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '<start_of_turn>model\\n' -}}
        {{- words(message['content']) + '<end_of_turn>' -}}
    {%- else -%}
        {{- '<start_of_turn>' + message['role'] + '\\n' + (first_user_prefix if loop.first else '') -}}
        {{- words(message['content']) + '<end_of_turn>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], max_learned_tokens: int) -> GemmaTokenizer:
    """Returns a Gemma tokenizer learnt from `texts`, with Gemma 3's special tokens and template."""
    names = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
        "sot_token": "<start_of_turn>",
        "eot_token": "<end_of_turn>",
    }
    return train_gemma_tokenizer(texts, max_learned_tokens, SPECIAL_TOKENS, names, CHAT_TEMPLATE)


def build_processor(tokenizer: GemmaTokenizer) -> Gemma3Processor:
    """Returns transformers' own Gemma 3 processor: resize to a square, scale to -1..1, expand the image marker."""
    image_processor = Gemma3ImageProcessor(
        size={"height": IMAGE_SIZE_PIXELS, "width": IMAGE_SIZE_PIXELS},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        do_pan_and_scan=False,
    )
    return Gemma3Processor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        image_seq_length=SOFT_TOKENS_PER_IMAGE,
    )


def tiny_config(processor: Gemma3Processor) -> Gemma3Config:
    """Returns a Gemma 3 configuration of four text layers and three SigLIP layers, for the processor's vocabulary."""
    tokenizer = processor.tokenizer
    end_of_turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    return Gemma3Config(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "query_pre_attn_scalar": 24,
            "max_position_embeddings": 512,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "initializer_range": 0.04,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": True,
        },
        vision_config={
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE_PIXELS,
            "patch_size": PATCH_SIZE_PIXELS,
            "vision_use_head": False,
        },
        mm_tokens_per_image=SOFT_TOKENS_PER_IMAGE,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, end_of_turn],
        tie_word_embeddings=True,
        initializer_range=0.04,
    )


def build_model_directory(folder: Path, processor: Gemma3Processor, seed: int) -> int:
    """Writes configuration, processor and random weights in Hugging Face format.

    Returns:
        Number of parameters.
    """
    config = tiny_config(processor)
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(config)
    position_embedding = model.model.vision_tower.embeddings.position_embedding.weight
    torch.nn.init.normal_(position_embedding, std=POSITION_EMBEDDING_INITIAL_STD)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=PROJECTOR_INITIAL_STD)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())
