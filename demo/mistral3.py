"""The demo's tiny Mistral3: a Pixtral tower before Ministral3's text at 0.8 million parameters, and its own tokenizer.

The directory that `build_model_directory` writes is an ordinary Hugging Face model directory: transformers loads it,
and so does the training command.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import (
    GenerationConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

IMAGE_SIZE_PIXELS = 48
PATCH_SIZE_PIXELS = 8
MERGE_SIZE_PATCHES = 2
TOKENS_PER_SIDE = IMAGE_SIZE_PIXELS // PATCH_SIZE_PIXELS // MERGE_SIZE_PATCHES
TOKENS_PER_IMAGE = TOKENS_PER_SIDE**2  # beside them, each row of the image ends with one token of text
# Published: 16384. Rows of the demo are longer than this, so that queries grow within each of them.
ORIGINAL_LENGTH = 16
# No position is learnt: tower and text distinguish positions only by rotated queries and keys. Measured here: with the
# usual initial values (0.04) attention begins nearly uniform, and "where" is still often wrong after 400 steps.
QUERY_AND_KEY_INITIAL_STD = 0.15
# Their ids come first, as in the published tokenizer: [IMG] is 10, [IMG_BREAK] 12, [IMG_END] 13.
SPECIAL_TOKENS = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    "[IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()
# Words by their case, digits one by one.
PRETOKENIZE_REGEX = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Mistral's chat format without tools: no line breaks; a system prompt anywhere; one image beside one text comes first,
# whichever was written first; an answer without words is refused.
CHAT_TEMPLATE = """\
{%- macro words(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for item in content -%}
            {{- item.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {{- '[SYSTEM_PROMPT]' + words(message.content) + '[/SYSTEM_PROMPT]' -}}
    {%- elif message.role == 'assistant' -%}
        {%- if loop.first or loop.previtem.role == 'assistant' -%}
            {{- raise_exception('an assistant answers a user') -}}
        {%- elif not message.content -%}
            {{- raise_exception('an assistant says something') -}}
        {%- endif -%}
        {{- words(message.content) + eos_token -}}
    {%- elif message.role != 'user' -%}
        {{- raise_exception('only system, user and assistant speak') -}}
    {%- elif message.content is string -%}
        {{- '[INST]' + message.content + '[/INST]' -}}
    {%- else -%}
        {%- set parts = message.content -%}
        {%- if parts | map(attribute='type') | list == ['text', 'image'] -%}
            {%- set parts = parts | reverse -%}
        {%- endif -%}
        {{- '[INST]' -}}
        {%- for item in parts -%}
            {{- '[IMG]' if item.type == 'image' else item.text -}}
        {%- endfor -%}
        {{- '[/INST]' -}}
    {%- endif -%}
{%- endfor -%}
"""


def train_tokenizer(texts: Iterable[str], max_learned_tokens: int) -> PreTrainedTokenizerFast:
    """Returns a Mistral tokenizer (byte-level BPE) learnt from `texts`, with Mistral's control tokens and template.

    It puts "<s>" before a text that does not begin with it. Ids are in the published order: control tokens, the 256
    bytes by their value, what was learnt.

    Args:
        texts: Questions and answers of the training set.
        max_learned_tokens: Largest number of ids beside the special tokens and the 256 bytes.
    """
    pieces = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = pieces
    trainer = trainers.BpeTrainer(
        vocab_size=256 + max_learned_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    characters = bytes_to_unicode()
    words = sorted(learned["vocab"].keys() - characters.values(), key=learned["vocab"].get)
    names = [*SPECIAL_TOKENS, *(characters[value] for value in range(256)), *words]
    vocab = {name: token_id for token_id, name in enumerate(names)}
    tokenizer = Tokenizer(BPE(vocab, [tuple(pair) for pair in learned["merges"]]))
    tokenizer.pre_tokenizer = pieces
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> PixtralProcessor:
    """Returns transformers' own Pixtral processor: limit the longest edge, normalise, write rows of placeholders."""
    return PixtralProcessor(
        image_processor=PixtralImageProcessor(
            size={"longest_edge": IMAGE_SIZE_PIXELS},
            patch_size={"height": PATCH_SIZE_PIXELS, "width": PATCH_SIZE_PIXELS},
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE_PIXELS,
        spatial_merge_size=MERGE_SIZE_PATCHES,
        chat_template=tokenizer.chat_template,
    )


def tiny_config(processor: PixtralProcessor) -> Mistral3Config:
    """Returns a Mistral3 configuration of four Ministral3 layers and three Pixtral layers."""
    tokenizer = processor.tokenizer
    return Mistral3Config(
        text_config={
            "model_type": "ministral3",
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "max_position_embeddings": 8 * ORIGINAL_LENGTH,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "original_max_position_embeddings": ORIGINAL_LENGTH,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
            "initializer_range": 0.04,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": True,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "head_dim": 24,
            "hidden_act": "silu",
            "image_size": IMAGE_SIZE_PIXELS,
            "patch_size": PATCH_SIZE_PIXELS,
            "initializer_range": 0.04,
        },
        image_token_index=processor.image_token_id,
        spatial_merge_size=MERGE_SIZE_PATCHES,
        multimodal_projector_bias=False,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )


def build_model_directory(folder: Path, processor: PixtralProcessor, seed: int) -> int:
    """Writes configuration, processor and random weights in Hugging Face format.

    Returns:
        Number of parameters.
    """
    torch.manual_seed(seed)
    model = Mistral3ForConditionalGeneration(tiny_config(processor))
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            torch.nn.init.normal_(parameter, std=QUERY_AND_KEY_INITIAL_STD)
    model.generation_config = GenerationConfig(
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())
