"""Gemma 3 for the tests: tiny randomised models of transformers, batches for them, and the entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedModel,
    ProcessorMixin,
    SiglipVisionConfig,
)

from megatron_vlm.data.collate import MicroBatch, spans
from tests.data.tiny_processor import build_processor
from tests.families.entry import DECODER, QUERY_NORMS, TinyFamily
from tests.families.layouts import ALL_RULES, EVERYTHING, FEW_PARITY, FIRST_WEIGHTS, NOTHING, some
from tests.parity.layouts import LAYOUTS
from tests.parity.tiny_batches import Reference, randomise

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


def build(with_vision: bool = True, tied: bool = True, tokenizer: Any = None, **text: object) -> PreTrainedModel:
    """A tiny model; `text` goes to the text configuration, and the ids of a tokenizer stand for those above."""
    if tokenizer is not None:
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        text = {"vocab_size": len(tokenizer)} | special | text
    text_config = Gemma3TextConfig(**(TEXT | text), tie_word_embeddings=tied)
    if with_vision:
        config = Gemma3Config(
            text_config=text_config,
            vision_config=SiglipVisionConfig(**VISION),
            mm_tokens_per_image=TOKENS_PER_IMAGE,
            image_token_index=tokenizer.image_token_id if tokenizer else IMAGE,
            boi_token_index=tokenizer.boi_token_id if tokenizer else BEGIN,
            eoi_token_index=tokenizer.eoi_token_id if tokenizer else END,
            tie_word_embeddings=tied,
        )
        return randomise(Gemma3ForConditionalGeneration(config))
    return randomise(Gemma3ForCausalLM(text_config))


Row = tuple[int, Sequence[int]]
"""Number of real tokens and places where an image begins."""

# What the issue names: text only, one image, several images in one sample, and rows without images among them. The
# rows differ in length and in label tokens; an image is longer than what the window leaves of its past.
ROWS: dict[str, Sequence[Row]] = {
    "text": [(LENGTH, []), (15, []), (18, []), (9, [])],
    "one image": [(LENGTH, [3]), (LENGTH, [1]), (17, [8]), (12, [2])],
    "several images": [(LENGTH, [1, 9]), (20, [2, 8, 14]), (LENGTH, [4, 12]), (16, [0, 7])],
    "mixed": [(LENGTH, [2, 9]), (14, []), (19, []), (10, [2])],
}
# The same in micro-batches of two rows, each row in two of them.
CASES = {name: [[rows[place - 1], rows[place]] for place in range(len(rows))] for name, rows in ROWS.items()}


def make_batch(rows: Sequence[Row], seed: int = 0, length: int = LENGTH) -> MicroBatch:
    """A micro-batch of random tokens; labels are missing at random, on images and on padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, BEGIN, (len(rows), length), generator=generator)
    is_real = torch.arange(length) < torch.tensor([count for count, _ in rows])[:, None]
    ids[:, -3] = 0  # the padding id inside the text: its embedding has no gradient
    for row, (_, begins) in zip(ids, rows, strict=True):
        for begin in begins:
            row[begin] = BEGIN
            row[begin + 1 : begin + 1 + TOKENS_PER_IMAGE] = IMAGE
            row[begin + 1 + TOKENS_PER_IMAGE] = END
    ids[~is_real] = 0
    is_image = ids == IMAGE
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    hidden = torch.rand(ids.shape, generator=generator) < 0.4
    labels[(labels == IMAGE) | hidden | ~is_real] = -100
    labels[torch.arange(len(rows)), torch.tensor([count - 1 for count, _ in rows])] = -100
    low, high = spans(is_real, is_image)
    num_images = sum(len(begins) for _, begins in rows)
    feature_index = torch.where(is_image, is_image.flatten().cumsum(0).view_as(ids) - 1, -1).int()
    pixels = torch.randn((num_images, 3, VISION["image_size"], VISION["image_size"]), generator=generator)
    return MicroBatch(
        input_ids=ids,
        labels=labels,
        position_ids=torch.arange(length).expand(len(rows), -1),
        document_ids=torch.where(is_real, 0, -1).int(),
        span_low=low,
        span_high=high,
        feature_index=feature_index,
        vision_inputs={"pixel_values": pixels} if num_images else {},
        source_ids=torch.zeros(len(rows), dtype=torch.int32),
    )


def split_rows(whole: MicroBatch) -> list[MicroBatch]:
    """One micro-batch per row, with its own images."""
    micro_batches = []
    for row in range(whole.input_ids.shape[0]):
        index = whole.feature_index[row : row + 1]
        images = torch.unique(index[index >= 0] // TOKENS_PER_IMAGE).long()
        fields = {
            name: value[row : row + 1]
            for name, value in vars(whole).items()
            if isinstance(value, torch.Tensor) and name != "label_index"
        }
        if len(images):
            offset = int(images[0]) * TOKENS_PER_IMAGE
            fields["feature_index"] = torch.where(index >= 0, index - offset, -1)
        pixels = {"pixel_values": whole.vision_inputs["pixel_values"][images]} if len(images) else {}
        micro_batches.append(MicroBatch(**fields, vision_inputs=pixels))
    return micro_batches


def transformers_inputs(batch: MicroBatch, with_vision: bool) -> dict[str, torch.Tensor]:
    """What transformers' model takes for a micro-batch."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": (batch.document_ids >= 0).long()}
    if with_vision:
        inputs["token_type_ids"] = (batch.feature_index >= 0).long()
        inputs |= batch.vision_inputs
    return inputs


def reference(model: PreTrainedModel, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, S, V] and the loss, the mean over label tokens, by transformers."""
    logits = model(**transformers_inputs(batch, hasattr(model.config, "vision_config"))).logits
    loss = cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=-100)
    return logits, loss


def _make_reference(rows: Sequence[Row], seed: int) -> Reference:
    batch = make_batch(rows, seed)
    # Padding sees only itself here; transformers' padding sees the row.
    return Reference(batch, transformers_inputs(batch, with_vision=True), [count for count, _ in rows])


def _make_text_reference(rows: Sequence[Row], seed: int) -> Reference:
    reference = _make_reference(rows, seed)
    return replace(reference, inputs=transformers_inputs(reference.batch, with_vision=False))


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
    cases=CASES,
    replicated=REPLICATED,
    build_processor=_write_processor,
    text_class=Gemma3ForCausalLM,
    turn=("<start_of_turn>model\n", "<end_of_turn>"),
    batteries=EVERYTHING,
)
TEXT_ONLY = GEMMA3.variant(
    "text only",
    replace(
        NOTHING,
        parity=some(LAYOUTS, "TP1", "TP2+SP", "TP4", "PP2xVPP2", "TP2xPP2+SP", "DP2, distributed optimizer"),
        rules=some(ALL_RULES, "TP2", "TP2+SP", "TP4"),
        small={"parity": ("PP2xVPP2", "TP2xPP2+SP", "DP2, distributed optimizer"), "rules": ("TP4",)},
    ),
    ["text"],
    with_vision=False,
)
ENTRIES = (
    GEMMA3,
    replace(TEXT_ONLY, make_batch=_make_text_reference),
    GEMMA3.variant("untied", replace(FEW_PARITY, first_weights=FIRST_WEIGHTS), ["mixed"], tied=False),
)
