"""Mistral3 for the tests: tiny randomised models of transformers with either text, batches for them, and the entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import (
    Ministral3Config,
    Ministral3ForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedModel,
)

from tests.data.tiny_processor import build_mistral_processor
from tests.families.layouts import FEW_CONTEXT, FEW_PARITY, PARITY, SMALL, LayoutTables, some, spread_tower
from tests.families.tiny_family import DECODER, TinyFamily
from tests.parity.layouts import LAYOUTS, TestLayout
from tests.parity.tiny_batches import (
    DocumentWriter,
    PackedRows,
    Random,
    Reference,
    Rows,
    collate_documents,
    pieces,
    randomise,
    text_inputs,
)

VOCABULARY = 152  # rows are padded to 192: the last of four tensor ranks holds padding alone
IMAGE, BREAK, END = 140, 141, 142
ORIGINAL_LENGTH = 8  # published: 16384, past which queries grow; rows here are longer

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,  # unlike heads * head_dim
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 3e-3,  # unlike the tower's 1e-5: the projector takes this one; published: the same
    "pad_token_id": 11,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL_LENGTH,
    "max_position_embeddings": 4 * ORIGINAL_LENGTH,
    "beta_fast": 32.0,
    "beta_slow": 0.1,  # the ramp ends between two frequencies, and is rounded up to the next
    "mscale": 1.0,
    "mscale_all_dim": 0.5,  # published: 1, where sines and cosines are not scaled
    "llama_4_scaling_beta": 0.3,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 4,
    "image_size": 64,
    "hidden_act": "silu",
    "head_dim": 8,
}

# Micro-batches of two rows. Rows differ in length and label tokens; images in size; some have none.
CASES: dict[str, list[Rows]] = {
    "text": [[[24], [15]], [[9], [20]], [[17], [3]], [[22], [22]]],
    "images": [
        [[3, (4, 6), 5, (8, 4), 2], [2, (2, 2), 4, (6, 6), 1]],
        [[1, (2, 8), 1, (4, 4), 6], [4, (4, 4), 3, (4, 4), 7]],
        [[(4, 2), 5, (2, 2), 3], [2, (6, 4), 5, (2, 4), 9]],
        [[7, (4, 4), 2, (2, 2), 1], [3, (8, 2), 4, (2, 6), 2]],
    ],
    "mixed": [[[3, (4, 6), 5], [17]], [[12], [9]], [[21], [2, (4, 4), 8]], [[4, (2, 4), 3], [11]]],
}
# Documents that begin or end with images, that are longer than the window and begin past where queries would grow in
# the row; and a micro-batch without images.
PACKED: list[PackedRows] = [
    [[[3, (4, 6), 5], [(2, 4), 4]], [[(2, 2)], [1, (4, 4), 3, (4, 4)]]],
    [[[9], [2, (6, 4)], [4]], [[5, (2, 2), 3, (4, 2)]]],
    [[[17], [3]], [[6], [12]]],
    [[[(4, 4), 2], [(2, 6), 3]], [[2], [14, (2, 4), 1]]],
]


def build_config(ministral: bool = True, tied: bool = False, tokenizer: Any = None, **settings: Any) -> Mistral3Config:
    """`settings` go to the text configuration, and the ids of a tokenizer stand for those above."""
    if tokenizer is not None:
        settings = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | settings
    settings = TEXT | {"tie_word_embeddings": tied} | settings
    text: Any = (
        Ministral3Config(**settings, rope_parameters=dict(YARN))
        if ministral
        else MistralConfig(**settings, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    )
    return Mistral3Config(
        text_config=text,
        vision_config=PixtralVisionConfig(**VISION),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]") if tokenizer else IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )


def build(ministral: bool = True, tied: bool = False, tokenizer: Any = None, **settings: Any) -> PreTrainedModel:
    """A tiny model; see `build_config`."""
    return randomise(Mistral3ForConditionalGeneration(build_config(ministral, tied, tokenizer, **settings)))


def _write_image(frames: int, height: int, width: int, is_video: bool, generator: Random) -> list[int]:
    """Rows of placeholders, each with a break behind it; the last break is the end."""
    rows = [[IMAGE] * (width // 2) + [BREAK] for _ in range(height // 2)]
    return [*(token for row in rows for token in row)][:-1] + [END]


WRITER = DocumentWriter(IMAGE, 3 * VISION["patch_size"] ** 2, _write_image)


def make_batch(
    documents: Rows,
    seed: int = 0,
    pad_to_multiple_of: int = 4,
    documents_per_row: Sequence[int] | None = None,
) -> Reference:
    """A micro-batch of random tokens and pixels."""
    generator = np.random.default_rng(seed)
    written = [WRITER.document(parts, generator) for parts in documents]
    batch = collate_documents(written, build_config(ministral=False), pad_to_multiple_of, documents_per_row)
    inputs = text_inputs(batch)
    pixels = [_image(patches, height, width) for (_, height, width), patches in pieces(written, "image")]
    if pixels:
        height, width = (max(image.shape[side] for image in pixels) for side in (1, 2))
        inputs["image_sizes"] = torch.tensor([image.shape[1:] for image in pixels])
        inputs["pixel_values"] = torch.stack(
            [
                torch.nn.functional.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]))
                for image in pixels
            ]
        )
    return Reference(batch, inputs)


def _image(patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pixels [channels, height, width] of patches in blocks of 2 x 2, raster order inside and out."""
    size = VISION["patch_size"]
    blocks = patches.view(height // 2, width // 2, 2, 2, 3, size, size)
    return blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, height * size, width * size)


MISTRAL3 = TinyFamily(
    name="mistral3",
    build=build,
    vocabulary=VOCABULARY,
    make_batch=make_batch,
    cases=CASES | {"packed": PACKED},
    replicated=DECODER
    | {
        r"vision_tower\.patch_conv\.weight": (
            "a thousandth of the tower; dividing it would need a gather of all patches"
        ),
        r"vision_tower\.(ln_pre|transformer\.layers\.\d+\.(attention|ffn)_norm)\.weight": "one vector",
        r"projector\.norm\.weight": "one vector",
        r"projector\.patch_merger\.merging_layer\.weight": (
            "a thousandth of the model; its input and output are whole, for the column-parallel layer behind it"
        ),
    },
    build_processor=build_mistral_processor,
    text_class=Ministral3ForCausalLM,
    turn=("[/INST]", "</s>"),
    tables=LayoutTables(
        parity=PARITY | spread_tower(3),
        in_turn=(
            (TestLayout(2, tensor=2, sequence_parallel=True, distributed_optimizer=True), 2),
            (TestLayout(2, pipeline=2, vision_pipeline_layout=(1, 2), distributed_optimizer=True), 2),
            (TestLayout(2, pipeline=2, distributed_optimizer=True), 2),
        ),
        small=SMALL | {"parity": (*SMALL["parity"], "DP2xPP2, overlapped, tower on both")},
    ),
)
MISTRAL_TEXT = replace(FEW_PARITY, parity=some(LAYOUTS, "TP1", "TP4", "TP2xPP2+SP") | FEW_CONTEXT)
ENTRIES = (
    MISTRAL3,
    MISTRAL3.variant("tied", FEW_PARITY, ["mixed", "packed"], tied=True),
    MISTRAL3.variant("with Mistral's text", MISTRAL_TEXT, ["images", "mixed", "packed"], ministral=False),
    MISTRAL3.variant("with a window", FEW_PARITY, ["mixed", "packed"], sliding_window=6),
    MISTRAL3.variant(
        "with Mistral's text and a window", FEW_PARITY, ["mixed", "packed"], ministral=False, sliding_window=6
    ),
)
