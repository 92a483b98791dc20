"""Gemma 4 for the tests: tiny randomised models of transformers of every variant, batches for them, and the entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import (
    Gemma4AudioConfig,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4UnifiedAudioConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedTextConfig,
    Gemma4UnifiedVisionConfig,
    Gemma4VisionConfig,
    PreTrainedModel,
)

from megatron_vlm.data.media import Grid
from tests.data.tiny_processor import build_gemma4_processor, build_gemma4_unified_processor
from tests.families.layouts import (
    CONTEXT_OF_EXPERTS,
    MOST_STEPS,
    PARITY,
    SMALL_OF_EXPERTS,
    WITH_EXPERTS,
    LayoutTables,
    some,
    spread_tower,
    spread_tower_with_experts,
)
from tests.families.layouts import SMALL as SMALL_LAYOUTS
from tests.families.rows import AUDIO_ROWS, VIDEO_ROWS
from tests.families.tiny_family import DECODER, QUERY_NORMS, TinyFamily
from tests.parity.layouts import LAYOUTS, TestLayout
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
IMAGE, VIDEO, AUDIO, BEGIN, END = 140, 141, 142, 143, 144
POOLED = 2  # patches per side of the block that becomes a token
IMAGE_TOKENS = 70  # of an image at most, which may be one row

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 5,  # shorter than most images
    "final_logit_softcapping": 30.0,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
LARGE = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "use_bidirectional_attention": "vision"}
# Keys and values of layers 0 and 1 serve layers 2 and 3, whose feed-forward layers are twice as wide.
SMALL = {
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
}
EXPERTS = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 24}
VARIANTS: dict[str, dict[str, Any]] = {"E2B": SMALL, "31B": LARGE, "26B-A4B": LARGE | EXPERTS, "12B": LARGE}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,  # the last has the number of a decoder layer without keys
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "patch_size": 4,
    "pooling_kernel_size": POOLED,
    "position_embedding_size": 160,  # thin images of the rows are 140 patches long
}
AUDIO_TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "subsampling_conv_channels": [16, 8],
    "conv_kernel_size": 5,
    "attention_chunk_size": 4,
    "attention_context_left": 5,
    "output_proj_dims": 24,
}
FRAME_SIZE = AUDIO_TOWER["subsampling_conv_channels"][0]  # also the samples that 12B takes for one token


def build_config(variant: str, with_towers: bool = True, tokenizer: Any = None, **text: object) -> Any:
    """`text` goes to the text configuration, and the ids of a tokenizer stand for those above."""
    ids = [IMAGE, VIDEO, AUDIO, BEGIN, END]
    if tokenizer is not None:
        names = ("<|image|>", "<|video|>", "<|audio|>", "<|image>", "<image|>")
        ids = tokenizer.convert_tokens_to_ids(list(names))
        size = len(tokenizer)
        text = {"vocab_size": size, "vocab_size_per_layer_input": size, "pad_token_id": tokenizer.pad_token_id} | text
    is_unified, is_small = variant == "12B", variant == "E2B"
    settings = TEXT | VARIANTS[variant] | text
    if is_unified:
        settings = {name: value for name, value in settings.items() if "per_layer_input" not in name}
    text_config = (Gemma4UnifiedTextConfig if is_unified else Gemma4TextConfig)(**settings)
    if not with_towers:
        return text_config
    vision: Any = Gemma4VisionConfig(
        **VISION, use_clipped_linears=is_small, standardize=not is_small, attn_implementation="eager"
    )
    audio: Any = Gemma4AudioConfig(**AUDIO_TOWER) if is_small else None
    if is_unified:
        size = 24
        vision = Gemma4UnifiedVisionConfig(
            patch_size=4,
            pooling_kernel_size=POOLED,
            mm_embed_dim=size,
            mm_posemb_size=IMAGE_TOKENS,
            output_proj_dims=size,
        )
        audio = Gemma4UnifiedAudioConfig(audio_embed_dim=FRAME_SIZE)
    return (Gemma4UnifiedConfig if is_unified else Gemma4Config)(
        text_config=text_config,
        vision_config=vision,
        audio_config=audio,
        image_token_id=ids[0],
        video_token_id=ids[1],
        audio_token_id=ids[2],
        boi_token_id=ids[3],
        eoi_token_id=ids[4],
        attn_implementation="eager",
    )


def build(variant: str, with_towers: bool = True, tokenizer: Any = None, **text: object) -> PreTrainedModel:
    """A tiny model; see `build_config`."""
    model_class: Any = Gemma4ForConditionalGeneration if with_towers else Gemma4ForCausalLM
    if variant == "12B":
        model_class = Gemma4UnifiedForConditionalGeneration if with_towers else Gemma4UnifiedForCausalLM
    model = randomise(model_class(build_config(variant, with_towers, tokenizer, **text)))
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Scores of normalised heads are not scaled: with weights around one, a softmax would choose a single key,
            # and amplify every rounding.
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter *= parameter.shape[0] ** -0.5
        for name, buffer in model.named_buffers():
            # Most values lie between the bounds of clipped linears, and many do not.
            if name.endswith("_min"):
                buffer.uniform_(-1.5, -0.5, generator=generator)
            elif name.endswith(("_max", "layer_scalar", "std_scale")):
                buffer.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("std_bias"):
                buffer.normal_(0, 1, generator=generator)
    return model


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
    "image and audio": [
        [[3, (4, 6), 4, (13,), 5], [2, (22,), 3, (6, 2), 4]],
        [[5, (7,), 3, (1,), 2], [1, (2, 4, 2), 2, (9,), 2]],
        [[2, (4, 4), 6, (5,), 1], [4, (2, 4, 4), 3]],
        [[6, (17,), 3], [3, (8, 4), 2, (4,)]],
    ],
    "audio only": [[[3, (19,), 4], [2, (6,), 3]], [[7], [1, (11,), 2, (3,), 6]], [[12], [9]], [[(30,), 5], [4]]],
    "mixed": [[[3, (4, 6), 5, (10,), 2], [17]], [[12], [9]], [[21], [2, (2, 4, 4), 8]], [[4, (2, 2), 3], [(14,), 6]]],
}
# Documents that begin or end with images, videos and audio, and a micro-batch without any.
PACKED: list[PackedRows] = [
    [[[3, (4, 6), 5], [(2, 2, 4), 4, (9,)]], [[(2, 2)], [1, (4, 4), 3, (2, 4, 4)]]],
    [[[9], [2, (6, 4)], [4]], [[5, (2, 2, 2), 3, (4, 2)], [(6,)]]],
    [[[17], [3]], [[6], [12]]],
    [[[(4, 4), 2], [(12,), 3]], [[2], [4, (2, 4), 1, (5,)]]],
]


def _without_audio(rows: Any) -> Any:
    """The same rows for a model that takes no audio."""
    if isinstance(rows, list):
        return [_without_audio(part) for part in rows if not (isinstance(part, tuple) and len(part) == 1)] or [1]
    return rows


def _write(is_unified: bool, frames: int, height: int, width: int, is_video: bool, generator: Random) -> list[int]:
    """Placeholders between markers; a video has a run for each frame, after the text of its time."""
    placeholder, ids = (VIDEO if is_video else IMAGE), []
    count = height * width // (1 if is_unified else POOLED**2)
    for _ in range(frames):
        if is_video:
            ids += generator.integers(3, IMAGE, 2).tolist()
        ids += [BEGIN, *[placeholder] * count, END]
    return ids


def _write_audio(is_unified: bool, frames: int) -> list[int]:
    return [BEGIN, *[AUDIO] * (frames if is_unified else -(-frames // 4)), END]


def _writer(variant: str) -> DocumentWriter:
    patch_features = 3 * VISION["patch_size"] ** 2
    is_unified = variant == "12B"
    # In 12B, a block of patches is one patch.
    size = POOLED**2 * patch_features if is_unified else patch_features
    return DocumentWriter(IMAGE, size, partial(_write, is_unified), FRAME_SIZE, partial(_write_audio, is_unified))


def make_batch(
    documents: Rows,
    seed: int = 0,
    pad_to_multiple_of: int = 4,
    variant: str = "E2B",
    with_towers: bool = True,
    documents_per_row: Sequence[int] | None = None,
) -> Reference:
    """A micro-batch of random tokens and pixels."""
    generator = np.random.default_rng(seed)
    writer, merge = _writer(variant), 1 if variant == "12B" else POOLED
    written = [writer.document(parts, generator) for parts in documents]
    for sample in written:
        # The padding token inside the text: its embeddings have no gradient.
        sample.input_ids[np.flatnonzero(sample.input_ids < IMAGE)[1:2]] = 0
    config = build_config(variant, with_towers)
    batch = collate_documents(written, config, pad_to_multiple_of, documents_per_row)
    inputs = text_inputs(batch)
    if not with_towers:
        return Reference(batch, inputs)
    kinds = sum(kind * (batch.input_ids == token).int() for kind, token in ((1, IMAGE), (2, VIDEO), (3, AUDIO)))
    inputs["mm_token_type_ids"] = by_document(batch, kinds)
    for kind, suffix in (("image", ""), ("video", "_videos")):
        found = pieces(written, kind)
        if found:
            patches, places = zip(
                *(frame for grid, patches in found for frame in _frames(patches, grid, merge)), strict=True
            )
            longest = max(len(frame) for frame in patches)
            inputs[f"pixel_values{suffix}"] = torch.stack([_padded(frame, longest, 0.0) for frame in patches])
            inputs[f"{kind}_position_ids"] = torch.stack([_padded(frame, longest, -1) for frame in places])
            if kind == "video":
                inputs["num_frames_per_video"] = torch.tensor([frames for (frames, _, _), _ in found])
    clips = [frames for _, frames in pieces(written, "audio")]
    if clips:
        longest = max(map(len, clips))
        inputs["input_features"] = torch.stack([_padded(clip, longest, 0.0) for clip in clips])
        inputs["input_features_mask"] = torch.stack([torch.arange(longest) < len(clip) for clip in clips])
    return Reference(batch, inputs)


def _frames(patches: torch.Tensor, grid: Grid, merge: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Patches of each frame in raster order, and their (x, y)."""
    frames, height, width = grid
    blocks = patches.view(frames, height // merge, width // merge, merge, merge, -1)
    raster = blocks.transpose(2, 3).reshape(frames, height * width, -1)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return [(frame, torch.stack((x.flatten(), y.flatten()), dim=-1)) for frame in raster]


def _padded(values: torch.Tensor, length: int, value: float) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, 0, 0, length - len(values)), value=value)


TOWER = {
    r"vision_tower\.patch_embedder\.(input_proj\.weight|position_embedding_table)": (
        "0.1 to 0.3 % of the model; dividing it would need a gather of all patches"
    ),
    r"vision_tower\.encoder\.layers\.\d+\.\w+_layernorm\.weight": "one vector",
    r"vision_tower\.encoder\.layers\.\d+\.self_attn\.[qk]_norm\.weight": "one vector, shared by all heads",
    r"vision_tower\.std_(bias|scale)": "one vector, which never trains",
}
AUDIO_REPLICATED = {
    r"audio_tower\.subsample_conv_projection\..*": "half a percent of the tower",
    r"audio_tower\.output_proj\.(weight|bias)": "half a percent of the tower; the norm behind it takes whole vectors",
    r"audio_tower\.layers\.\d+\.(norm_\w+|\w+\.(pre|post)_layer_norm)\.weight": "one vector",
    r"audio_tower\.layers\.\d+\.self_attn\.per_dim_scale": "one vector, shared by all heads",
    r"audio_tower\..*_(min|max)": "a scalar, which never trains",
}
BLOCK = {
    r"language_model\.layers\.\d+\.(pre|post)_feedforward_layernorm(_[12])?\.weight": "one vector",
    r"language_model\.layers\.\d+\.layer_scalar": "a scalar, which never trains",
}
OWN_INPUT = {
    r"language_model\.per_layer_projection_norm\.weight": "one vector",
    r"language_model\.layers\.\d+\.per_layer_input\.post_norm\.weight": "one vector",
    r"language_model\.layers\.\d+\.per_layer_input\.(model_projection|gate|projection)\.weight": (
        "2 % of a layer; dividing it would exchange sums as wide as the hidden states"
    ),
}
ROUTER = {
    r"language_model\.layers\.\d+\.moe\.gate\.(proj\.weight|scale|per_expert_scale)": (
        "a token is scored against all experts where it is"
    )
}
# Layers 0 and 1 lend keys and values to 2 and 3; embeddings go to every stage with layers.
ON_STAGES = {
    "PP4, no layers beside the tower and the head": LAYOUTS["PP4, no layers beside the tower and the head"],
    "DP2xPP2, overlapped, no layers beside the head": TestLayout(
        4, pipeline=2, pipeline_layout=(4, 0), distributed_optimizer=True, overlap=True
    ),
    "TP2xPP2+SP, keys crossing": TestLayout(4, tensor=2, pipeline=2, sequence_parallel=True, pipeline_layout=(3, 1)),
    "TP4+SP": LAYOUTS["TP4+SP"],
}
GEMMA4 = TinyFamily(
    name="gemma4",
    build=partial(build, "E2B"),
    vocabulary=VOCABULARY,
    make_batch=make_batch,
    cases=CASES | {"packed": PACKED},
    replicated=DECODER
    | QUERY_NORMS
    | BLOCK
    | OWN_INPUT
    | {name: reason for name, reason in TOWER.items() if "bias" not in name}
    | {r"vision_tower\..*_(min|max)": "a scalar, which never trains"}
    | AUDIO_REPLICATED,
    build_processor=partial(build_gemma4_processor, image_tokens=IMAGE_TOKENS, bins=FRAME_SIZE),
    text_class=Gemma4ForCausalLM,
    turn=("<|turn>model\n", "<turn|>"),
    rows=AUDIO_ROWS,
    tables=LayoutTables(
        parity=PARITY | ON_STAGES | spread_tower(3),
        step=MOST_STEPS | some(spread_tower(3), "PP2, tower on both"),
        small=SMALL_LAYOUTS
        | {
            "parity": (
                *ON_STAGES,
                "PP2xVPP2",
                "TP2+SP, selective recompute",
                "TP2xPP2+SP, full recompute",
                "PP4, tower on two",
                "CP2xPP2xVPP2, full recompute",
            ),
            # Clips are read where the projector is, pixels where the tower begins.
            "step": (*SMALL_LAYOUTS["step"], "PP2, tower on both"),
        },
    ),
)
SILENT = {name: _without_audio(rows) for name, rows in (CASES | {"packed": PACKED}).items() if name != "audio only"}
# A packed step is that of E2B.
OF_A_VARIANT = LayoutTables(small=SMALL_LAYOUTS | {"packed_step": ()})
DENSE = replace(
    GEMMA4,
    name="gemma4 31B",
    build=partial(build, "31B"),
    make_batch=partial(make_batch, variant="31B"),
    cases=SILENT,
    rows=VIDEO_ROWS,
    replicated=DECODER | QUERY_NORMS | BLOCK | TOWER,
    tables=OF_A_VARIANT,
)
WITH_MOE = replace(
    DENSE,
    name="gemma4 26B-A4B",
    build=partial(build, "26B-A4B"),
    make_batch=partial(make_batch, variant="26B-A4B"),
    replicated=DENSE.replicated | ROUTER,
    tables=replace(
        WITH_EXPERTS,
        parity=WITH_EXPERTS.parity | spread_tower_with_experts(3),
        # Qwen3-VL with experts runs the others.
        small=SMALL_OF_EXPERTS
        | {
            "parity": (
                *(name for name in SMALL_OF_EXPERTS["parity"] if name not in CONTEXT_OF_EXPERTS),
                "TP2xPP2+SP, vision DP, tower on both",
                "CP4, EP2, all-gather",
                "CP2xTP2+SP, EP4",
                "CP2, random blocks",
            ),
            "packed_step": (),
        },
    ),
)
UNIFIED = replace(
    GEMMA4,
    name="gemma4_unified",
    build=partial(build, "12B"),
    make_batch=partial(make_batch, variant="12B"),
    replicated=DECODER
    | QUERY_NORMS
    | BLOCK
    | {
        r"vision_tower\.(patch_ln[12]|pos_norm)\.(weight|bias)": "one vector",
        r"vision_tower\.pos_embedding": "a thousandth of the model; dividing it would need a gather of all patches",
    },
    build_processor=partial(build_gemma4_unified_processor, image_tokens=IMAGE_TOKENS, samples_per_token=FRAME_SIZE),
    text_class=Gemma4UnifiedForCausalLM,
    tables=OF_A_VARIANT,
)
ENTRIES = (GEMMA4, DENSE, WITH_MOE, UNIFIED)
