"""Gemma 3 for the tests: tiny randomised models of transformers, batches for them, and the entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedModel,
    ProcessorMixin,
    SiglipVisionConfig,
)

from megatron_vlm.data.collate import MicroBatch
from megatron_vlm.data.media import Medium
from megatron_vlm.data.prompts import Sample
from tests.data.tiny_processor import build_processor
from tests.families.layouts import ALL_RULES, EVERYTHING, FEW_PARITY, FIRST_WEIGHTS, NOTHING, some
from tests.families.tiny_family import DECODER, QUERY_NORMS, TinyFamily
from tests.parity.layouts import LAYOUTS
from tests.parity.tiny_batches import Reference, by_document, collate_documents, randomise, text_inputs
from tests.parity.tiny_batches import reference as reference_of

VOCABULARY = 250  # rows are padded to 256: the last tensor rank holds padding
BEGIN, IMAGE, END = 200, 201, 202
TOKENS_PER_IMAGE = 4
LENGTH = 24  # divides by every tensor size, for sequence parallelism

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 5,
    "query_pre_attn_scalar": 24,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "attn_implementation": "eager",
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "vision_use_head": False,
    "attn_implementation": "eager",
}


def build_config(with_vision: bool = True, tied: bool = True, tokenizer: Any = None, **text: object) -> Any:
    """`text` goes to the text configuration, and the ids of a tokenizer stand for those above."""
    if tokenizer is not None:
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        text = {"vocab_size": len(tokenizer)} | special | text
    text_config = Gemma3TextConfig(**(TEXT | text), tie_word_embeddings=tied)
    if not with_vision:
        return text_config
    return Gemma3Config(
        text_config=text_config,
        vision_config=SiglipVisionConfig(**VISION),
        mm_tokens_per_image=TOKENS_PER_IMAGE,
        image_token_index=tokenizer.image_token_id if tokenizer else IMAGE,
        boi_token_index=tokenizer.boi_token_id if tokenizer else BEGIN,
        eoi_token_index=tokenizer.eoi_token_id if tokenizer else END,
        tie_word_embeddings=tied,
    )


def build(with_vision: bool = True, tied: bool = True, tokenizer: Any = None, **text: object) -> PreTrainedModel:
    """A tiny model; see `build_config`."""
    model_class: Any = Gemma3ForConditionalGeneration if with_vision else Gemma3ForCausalLM
    return randomise(model_class(build_config(with_vision, tied, tokenizer, **text)))


Document = tuple[int, Sequence[int]]
"""Number of tokens, and places of the tokens that begin an image (-1: before the document, whose first token is then
the image's)."""

# What the issue names: text only, one image, several images in one sample, and rows without images among them. The
# rows differ in length and in label tokens; an image is longer than what the window leaves of its past.
ROWS: dict[str, Sequence[Document]] = {
    "text": [(LENGTH, []), (15, []), (18, []), (9, [])],
    "one image": [(LENGTH, [3]), (LENGTH, [1]), (17, [8]), (12, [2])],
    "several images": [(LENGTH, [1, 9]), (20, [2, 8, 14]), (LENGTH, [4, 12]), (16, [0, 7])],
    "mixed": [(LENGTH, [2, 9]), (14, []), (19, []), (10, [2])],
}
# The same in micro-batches of two rows, each row in two of them.
CASES = {name: [[rows[place - 1], rows[place]] for place in range(len(rows))] for name, rows in ROWS.items()}


# Several documents in each row: images end documents, begin them, and touch those of the document before.
PACKED: list[Sequence[Sequence[Document]]] = [
    [[(LENGTH, [1, 9]), (13, [8])], [(15, [4]), (20, [2, 8, 14])]],
    [[(9, [4]), (12, [-1, 6]), (7, [])], [(17, [12]), (6, [-1])]],
    [[(LENGTH, []), (5, [])], [(11, []), (3, [])]],
    [[(7, [0]), (10, [2])], [(14, []), (8, [3]), (5, [-1])]],
]
PACKED_TEXT = [[[(count, ()) for count, _ in row] for row in rows] for rows in PACKED]


def draw(documents: Sequence[Document], seed: int = 0) -> list[Sample]:
    """Random tokens and pixels; some tokens that are no placeholders are trained."""
    generator = torch.Generator().manual_seed(seed)
    length = max(LENGTH, *(count for count, _ in documents))
    ids = torch.randint(3, BEGIN, (len(documents), length), generator=generator)
    ids[:, -3] = 0  # the padding id inside the text: its embedding has no gradient
    for row, (_, begins) in zip(ids, documents, strict=True):
        for begin in begins:
            end = begin + 1 + TOKENS_PER_IMAGE
            row[max(begin, 0)] = BEGIN
            row[begin + 1 : end] = IMAGE
            row[end] = END
    is_target = torch.nn.functional.pad(torch.rand(ids.shape, generator=generator) >= 0.4, (1, -1)) & (ids != IMAGE)
    size, patches = VISION["image_size"], VISION["image_size"] // VISION["patch_size"]
    pixels = torch.randn((sum(len(begins) for _, begins in documents), 3, size, size), generator=generator)
    return [
        Sample(
            row[:count].numpy(),
            trained[:count].numpy(),
            [Medium("image", (1, patches, patches))] * len(begins),
            {"pixel_values": images} if begins else {},
        )
        for row, trained, images, (count, begins) in zip(
            ids, is_target, pixels.split([len(begins) for _, begins in documents]), documents, strict=True
        )
    ]


def collate_drawn(
    drawn: Sequence[Sample], pad_to_multiple_of: int = LENGTH, documents_per_row: Sequence[int] | None = None
) -> MicroBatch:
    """The micro-batch of documents, by our own pipeline."""
    return collate_documents(drawn, build_config(), pad_to_multiple_of, documents_per_row)


def make_batch(documents: Sequence[Document], seed: int = 0, **options: Any) -> MicroBatch:
    """A micro-batch of random tokens; `options` go to `collate_drawn`."""
    return collate_drawn(draw(documents, seed), **options)


def transformers_inputs(batch: MicroBatch, with_vision: bool) -> dict[str, torch.Tensor]:
    """What transformers' model takes for a micro-batch."""
    inputs = text_inputs(batch)
    if with_vision:
        inputs["token_type_ids"] = by_document(batch, (batch.feature_index >= 0).long())
        inputs |= batch.media_inputs
    return inputs


def reference(model: PreTrainedModel, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [documents, longest, V] and the loss, the mean over label tokens, by transformers."""
    inputs = transformers_inputs(batch, hasattr(model.config, "vision_config"))
    logits, loss_sum = reference_of(model, Reference(batch, inputs))
    return logits, loss_sum / len(batch.label_index)


def _make_reference(documents: Sequence[Document], seed: int, **options: Any) -> Reference:
    batch = make_batch(documents, seed, **options)
    return Reference(batch, transformers_inputs(batch, with_vision=True))


def _make_text_reference(documents: Sequence[Document], seed: int, **options: Any) -> Reference:
    batch = make_batch(documents, seed, **options)
    return Reference(batch, transformers_inputs(batch, with_vision=False))


def _write_processor(folder: Path) -> ProcessorMixin:
    return build_processor(folder, VISION["image_size"], TOKENS_PER_IMAGE)


REPLICATED = (
    DECODER
    | QUERY_NORMS
    | {
        r"language_model\.layers\.\d+\.(pre|post)_feedforward_layernorm\.weight": "one vector",
        r"vision_tower\.embeddings\.(patch_embedding\.(weight|bias)|position_embedding\.weight)": (
            "1 % of the tower; dividing it would need a gather of all patches"
        ),
        r"vision_tower\.encoder\.layers\.\d+\.layer_norm[12]\.(weight|bias)": "one vector",
        r"vision_tower\.encoder\.layers\.\d+\.(self_attn\.out_proj|mlp\.fc2)\.bias": (
            "one vector, added to the whole sum"
        ),
        r"vision_tower\.post_layernorm\.(weight|bias)": "one vector",
        r"projector\.mm_soft_emb_norm\.weight": "one vector",
    }
)
GEMMA3 = TinyFamily(
    name="gemma3",
    build=build,
    vocabulary=VOCABULARY,
    make_batch=_make_reference,
    cases=CASES | {"packed": PACKED},
    replicated=REPLICATED,
    build_processor=_write_processor,
    text_class=Gemma3ForCausalLM,
    turn=("<start_of_turn>model\n", "<end_of_turn>"),
    tables=EVERYTHING,
)
TEXT_ONLY = GEMMA3.variant(
    "text only",
    replace(
        NOTHING,
        parity=some(LAYOUTS, "TP1", "TP2+SP", "TP4", "PP2xVPP2", "TP2xPP2+SP", "DP2, distributed optimizer"),
        rules=some(ALL_RULES, "TP2", "TP2+SP", "TP4"),
        small={"parity": ("TP2xPP2+SP", "PP2xVPP2", "DP2, distributed optimizer"), "rules": ("TP4",)},
    ),
    ["text", "packed"],
    with_vision=False,
)
ENTRIES = (
    GEMMA3,
    replace(TEXT_ONLY, make_batch=_make_text_reference, cases=TEXT_ONLY.cases | {"packed": PACKED_TEXT}),
    GEMMA3.variant("with windows shorter than an image", FEW_PARITY, ["mixed", "packed"], sliding_window=3),
    GEMMA3.variant("untied", replace(FEW_PARITY, first_weights=FIRST_WEIGHTS), ["mixed", "packed"], tied=False),
)
