"""Trains the demo's small tokenizer and builds a real Gemma 3 processor around it.

The tokenizer has Gemma's design (BPE, spaces as "▁", byte fallback, the same special tokens) at a few hundred ids.
"""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import Gemma3ImageProcessor, Gemma3Processor, GemmaTokenizer

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
ALPHABET = "\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!:'-"

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
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else '') }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception('Invalid content type') }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], max_learned_tokens: int) -> GemmaTokenizer:
    """Returns a Gemma tokenizer (byte-fallback BPE) learnt from `texts`, with Gemma 3's special tokens and template.

    Args:
        texts: Questions and answers of the training set.
        max_learned_tokens: Largest number of ids beside the special tokens and the 256 bytes.
    """
    learner = Tokenizer(BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    # Pieces of a few hundred ids are kept to single words; Gemma's own may span words.
    learner.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=max_learned_tokens, show_progress=False)
    # Role names, line breaks and the alphabet occur in chats whatever the questions are.
    learner.train_from_iterator([*texts, *["user", "model", "\n\n"] * 100, *ALPHABET], trainer)
    learned = json.loads(learner.to_str())["model"]

    names = [*SPECIAL_TOKENS, *(f"<0x{value:02X}>" for value in range(256))]
    names += sorted(learned["vocab"], key=learned["vocab"].get)
    return GemmaTokenizer(
        vocab={name: token_id for token_id, name in enumerate(names)},
        merges=[tuple(pair) for pair in learned["merges"]],
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
            "sot_token": "<start_of_turn>",
            "eot_token": "<end_of_turn>",
        },
        chat_template=CHAT_TEMPLATE,
    )


def build_processor(tokenizer: GemmaTokenizer, image_size_pixels: int, soft_tokens_per_image: int) -> Gemma3Processor:
    """Returns transformers' own Gemma 3 processor: resize to a square, scale to -1..1, expand the image marker."""
    image_processor = Gemma3ImageProcessor(
        size={"height": image_size_pixels, "width": image_size_pixels},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        do_pan_and_scan=False,
    )
    return Gemma3Processor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        image_seq_length=soft_tokens_per_image,
    )
