"""A small but real Gemma 3 processor, built offline: byte-level BPE, Gemma 3's chat template, image processor."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Gemma3ImageProcessor, Gemma3Processor, PreTrainedTokenizerFast, ProcessorMixin

from demo.tokenizer import CHAT_TEMPLATE

# The demo's prompt with generation tags around an assistant's text and its end-of-turn token, so that transformers'
# own assistant mask can judge ours.
GEMMA3_GENERATION_TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- macro body(message) -%}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in loop_messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{ '<start_of_turn>model
' }}{% generation %}{{ body(message) + '<end_of_turn>' }}{% endgeneration %}{{ '
' }}
    {%- else -%}
        {{ '<start_of_turn>' + message['role'] + '
' + (first_user_prefix if loop.first else "") + body(message) + '<end_of_turn>
' }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""

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


def build_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 ids with Gemma 3's control tokens and chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
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
