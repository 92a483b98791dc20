"""Learns tokenizers of Gemma's design (BPE, spaces as "▁", byte fallback) with a few hundred ids."""

import json
from collections.abc import Iterable, Mapping, Sequence

from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import GemmaTokenizer

ALPHABET = "\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!:'-"


def train_gemma_tokenizer(
    texts: Iterable[str],
    max_learned_tokens: int,
    special_tokens: Sequence[str],
    named_tokens: Mapping[str, str],
    chat_template: str,
) -> GemmaTokenizer:
    """Returns a Gemma tokenizer (byte-fallback BPE) learnt from `texts`.

    Args:
        texts: Questions and answers of the training set.
        max_learned_tokens: Largest number of ids beside the special tokens and the 256 bytes.
        special_tokens: Tokens that no text contains, in the order of their ids; "<pad>" comes first.
        named_tokens: Attributes of the tokenizer, such as "image_token", with their tokens.
        chat_template: Template that goes with it.
    """
    learner = Tokenizer(BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    # Pieces of a few hundred ids are kept to single words; Gemma's own may span words.
    learner.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=max_learned_tokens, show_progress=False)
    # Role names, line breaks and the alphabet occur in chats whatever the questions are.
    learner.train_from_iterator([*texts, *["user", "model", "\n\n"] * 100, *ALPHABET], trainer)
    learned = json.loads(learner.to_str())["model"]

    names = [*special_tokens, *(f"<0x{value:02X}>" for value in range(256))]
    names += sorted(learned["vocab"], key=learned["vocab"].get)
    return GemmaTokenizer(
        vocab={name: token_id for token_id, name in enumerate(names)},
        merges=[tuple(pair) for pair in learned["merges"]],
        extra_special_tokens=dict(named_tokens),
        chat_template=chat_template,
    )
