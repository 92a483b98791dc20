"""Qwen3-VL for the tests: tiny randomised models of transformers, dense and with experts, batches, and the entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from tests.data.tiny_processor import build_qwen_processor
from tests.families.layouts import (
    ADAMW,
    FEW_PARITY,
    PARITY,
    SMALL_OF_EXPERTS,
    WITH_EXPERTS,
    LayoutTables,
    some,
    spread_tower,
    spread_tower_with_experts,
)
from tests.families.rows import VIDEO_ROWS
from tests.families.tiny_family import DECODER, QUERY_NORMS, TinyFamily
from tests.parity.layouts import TestLayout
from tests.parity.tiny_batches import (
    DocumentWriter,
    PackedRows,
    Random,
    Reference,
    Rows,
    by_document,
    collate_documents,
    pieces,
    randomise,
    text_inputs,
)

VOCABULARY = 152  # rows are padded to 192: the last of four tensor ranks holds padding alone
IMAGE, VIDEO, START, END = 140, 141, 142, 143
EXPERTS, TOP_K = 8, 2

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,  # unlike heads * head_dim, and unlike twice the experts' width
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]},
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
MOE = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": 16,
    "mlp_only_layers": [1],
    "router_aux_loss_coef": 0.1,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "depth": 4,
    "num_heads": 4,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": TEXT["hidden_size"],
    "num_position_embeddings": 25,  # frames below stretch and shrink this table of 5 x 5
    "deepstack_visual_indexes": [0, 1, 3],  # features for three of the four decoder layers
}


def build_config(moe: bool, tied: bool = False, tokenizer: Any = None, **text: object) -> Any:
    """`text` goes to the text configuration, and the ids of a tokenizer stand for those above."""
    config_class: Any = Qwen3VLMoeConfig if moe else Qwen3VLConfig
    ids = [IMAGE, VIDEO, START, END]
    if tokenizer is not None:
        ids = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
        text = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | text
    return config_class(
        text_config=TEXT | (MOE if moe else {}) | text,
        vision_config=VISION,
        image_token_id=ids[0],
        video_token_id=ids[1],
        vision_start_token_id=ids[2],
        vision_end_token_id=ids[3],
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )


def build(
    moe: bool, tied: bool = False, tokenizer: Any = None, dtype: torch.dtype = torch.float32, **text: object
) -> PreTrainedModel:
    """A tiny model; see `build_config`."""
    model_class: Any = Qwen3VLMoeForConditionalGeneration if moe else Qwen3VLForConditionalGeneration
    return randomise(model_class(build_config(moe, tied, tokenizer, **text))).to(dtype)


# Micro-batches of two rows. Rows differ in length and label tokens; images and frames in size; some have none.
CASES: dict[str, list[Rows]] = {
    "text": [[[24], [15]], [[9], [20]], [[17], [3]], [[22], [22]]],
    "two images": [
        [[3, (4, 6), 5, (8, 4), 2], [2, (2, 2), 4, (6, 6), 1]],
        [[1, (2, 8), 1, (4, 4), 6], [4, (4, 4), 3, (4, 4), 7]],
        [[(4, 2), 5, (2, 2), 3], [2, (6, 4), 5, (2, 4), 9]],
        [[7, (4, 4), 2, (2, 2), 1], [3, (8, 2), 4, (2, 6), 2]],
    ],
    "image and video": [
        [[3, (4, 6), 4, (2, 4, 4), 5], [2, (1, 4, 6), 3, (6, 2), 4]],
        [[5, (3, 2, 4), 3], [1, (2, 4, 2), 2, (4, 4), 2]],
        [[2, (4, 4), 6, (2, 2, 2), 1], [4, (2, 4, 4), 3]],
        [[6, (2, 6, 2), 3, (4, 2), 5], [3, (8, 4), 8]],
    ],
    "mixed": [[[3, (4, 6), 5], [17]], [[12], [9]], [[21], [2, (2, 4, 4), 8]], [[4, (2, 2), 3], [11]]],
}
# Documents that begin or end with images and videos, and a micro-batch without any.
PACKED: list[PackedRows] = [
    [[[3, (4, 6), 5], [(2, 2, 4), 4]], [[(2, 2)], [1, (4, 4), 3, (2, 4, 4)]]],
    [[[9], [2, (6, 4)], [4]], [[5, (2, 2, 2), 3, (4, 2)]]],
    [[[17], [3]], [[6], [12]]],
    [[[(4, 4), 2], [(3, 2, 2), 3]], [[2], [4, (2, 4), 1]]],
]


def _write(frames: int, height: int, width: int, is_video: bool, generator: Random) -> list[int]:
    """Placeholders between markers; a video has a run for each frame, after the text of its time."""
    placeholder, ids = (VIDEO if is_video else IMAGE), []
    for _ in range(frames):
        if is_video:
            ids += generator.integers(3, IMAGE, 2).tolist()
        ids += [START, *[placeholder] * (height * width // 4), END]
    return ids


WRITER = DocumentWriter(IMAGE, 3 * VISION["temporal_patch_size"] * VISION["patch_size"] ** 2, _write)


def make_batch(
    documents: Rows,
    seed: int = 0,
    pad_to_multiple_of: int = 4,
    moe: bool = False,
    documents_per_row: Sequence[int] | None = None,
) -> Reference:
    """A micro-batch of random tokens and pixels."""
    generator = np.random.default_rng(seed)
    written = [WRITER.document(parts, generator) for parts in documents]
    batch = collate_documents(written, build_config(moe), pad_to_multiple_of, documents_per_row)
    kinds = (batch.input_ids == IMAGE).int() + 2 * (batch.input_ids == VIDEO).int()
    inputs = text_inputs(batch) | {"mm_token_type_ids": by_document(batch, kinds)}
    for kind, suffix in (("image", ""), ("video", "_videos")):
        found = pieces(written, kind)
        if found:
            inputs[f"{kind}_grid_thw"] = torch.tensor([grid for grid, _ in found])
            inputs[f"pixel_values{suffix}"] = torch.cat([patches for _, patches in found])
    return Reference(batch, inputs)


# The language model alone: a Qwen3 model rotates all axes alike, and has a flag of its own for what Qwen3-VL's router
# always does.

TEXT_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "rms_norm_eps pad_token_id"
).split()
MOE_FIELDS = "num_experts num_experts_per_tok moe_intermediate_size mlp_only_layers decoder_sparse_step".split()


def _text_config(config: Any) -> PreTrainedConfig:
    text, has_experts = config.text_config, hasattr(config.text_config, "num_experts_per_tok")
    settings = {name: getattr(text, name) for name in TEXT_FIELDS + (MOE_FIELDS if has_experts else [])}
    settings["tie_word_embeddings"] = config.tie_word_embeddings
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": text.rope_parameters["rope_theta"]}
    return Qwen3MoeConfig(**settings, norm_topk_prob=True) if has_experts else Qwen3Config(**settings)


# DeepStack levels enter after decoder layers 0, 1 and 2; these splits make none, some or all cross stages.
DEEPSTACK_LAYOUTS = {
    "PP2, DeepStack crossing": TestLayout(2, pipeline=2, pipeline_layout=(1, 3)),
    "PP2xVPP2, DeepStack crossing": TestLayout(2, pipeline=2, virtual=2, pipeline_layout=(0, 1, 1, 2)),
    "TP2xPP2+SP, vision alone": TestLayout(
        4, tensor=2, pipeline=2, sequence_parallel=True, pipeline_layout=(0, 4), vision="data"
    ),
    "DP2xPP2, overlapped, DeepStack crossing": TestLayout(
        4, pipeline=2, pipeline_layout=(1, 3), distributed_optimizer=True, overlap=True
    ),
    "DP2, overlapped, full recompute": TestLayout(2, distributed_optimizer=True, overlap=True, recompute="full"),
}
REPLICATED = (
    DECODER
    | QUERY_NORMS
    | {
        r"vision_tower\.(patch_embed\.proj\.(weight|bias)|pos_embed\.weight)": (
            "1 % of the tower; dividing it would need a gather of all patches"
        ),
        r"vision_tower\.blocks\.\d+\.norm[12]\.(weight|bias)": "one vector",
        r"vision_tower\.blocks\.\d+\.(attn\.proj|mlp\.linear_fc2)\.bias": "one vector, added to the whole sum",
        r"projector\.(merger|deepstack_merger_list\.\d+)\.(norm\.(weight|bias)|linear_fc2\.bias)": "one vector",
    }
)
ROUTER = {r"language_model\.layers\.\d+\.mlp\.gate\.weight": "a token is scored against all experts where it is"}
QWEN3_VL = TinyFamily(
    name="qwen3_vl",
    build=partial(build, moe=False, tied=True),
    vocabulary=VOCABULARY,
    make_batch=make_batch,
    cases=CASES | {"packed": PACKED},
    replicated=REPLICATED,
    build_processor=build_qwen_processor,
    text_class=Qwen3ForCausalLM,
    text_config=_text_config,
    turn=("<|im_start|>assistant\n", "<|im_end|>"),
    rows=VIDEO_ROWS,
    tables=LayoutTables(
        parity=PARITY | DEEPSTACK_LAYOUTS | spread_tower(4),
        # The others are as with experts.
        no_images=some(spread_tower(4), "DP2xPP2, overlapped, tower on both"),
        adamw=some(ADAMW, "TP2xPP2+SP", "DP2xTP2, vision DP, overlapped"),
        continued={},
        in_turn=(),
        small={
            "parity": (
                "PP2xVPP2, DeepStack crossing",
                "TP2+SP, selective recompute",
                "TP2xPP2+SP, vision alone",
                "DP2, overlapped, full recompute",
                "DP2xPP2, overlapped, DeepStack crossing",
                "TP2xPP2+SP, vision DP, tower on both",
                "CP4",
                "CP2xTP2, vision DP, selective recompute",
            ),
            "rules": ("TP4+SP",),
            "step": ("PP4",),
            "packed_step": ("PP2xVPP2",),
            "adamw": ("TP2xPP2+SP",),
            "norm": ("TP4, keys and values replicated",),
        },
    ),
)
QWEN3_VL_MOE = replace(
    QWEN3_VL,
    name="qwen3_vl_moe",
    build=partial(build, moe=True),
    make_batch=partial(make_batch, moe=True),
    replicated=REPLICATED | ROUTER,
    text_class=Qwen3MoeForCausalLM,
    tables=replace(
        WITH_EXPERTS,
        parity=WITH_EXPERTS.parity | spread_tower_with_experts(4),
        small=SMALL_OF_EXPERTS
        | {"parity": (*SMALL_OF_EXPERTS["parity"], "TP2xPP2xVPP2+SP, full recompute, tower on three")},
    ),
)
ENTRIES = (QWEN3_VL, QWEN3_VL.variant("untied", FEW_PARITY, ["mixed", "packed"], tied=False), QWEN3_VL_MOE)
