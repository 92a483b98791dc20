"""What the training tests need to know of a family: a tiny random model, its processor and rows, names and markers.

Another family takes part in them by one more `TinyFamily`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Ministral3Config,
    Ministral3ForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
)

from tests.data.rows import assistant, image, row, user, video
from tests.data.tiny_processor import build_mistral_processor, build_processor, build_qwen_processor
from tests.parity import gemma3_tiny, mistral3_tiny, qwen3_vl_tiny

GLOBAL_BATCH = 8
# Height and width of "0.png", "1.png", ...
IMAGE_SIZES = ((16, 16), (40, 24), (9, 31), (20, 20), (20, 20), (20, 20))

Rows = tuple[dict[str, Any], ...]
# Unequal answers, so that a mean of means is far from the mean over label tokens. Rows 0 and 4 are the share of one of
# four data ranks, which so has no image at all.
MIXED_ROWS: Rows = (
    row(user("Hello, how are you today?"), assistant("I am fine, thank you. How are you?")),
    row(user(image("0.png"), "What colour is the shape?"), assistant("red")),
    row(user(image("1.png"), image("2.png"), "Describe these."), assistant("A red circle, then three squares.")),
    row(user("Answer with one word."), assistant("Yes")),
    row(user("Hi"), assistant("Hello there."), user("Where is the circle?"), assistant("It is at the top left of it.")),
    row(user("Is it ", image("3.png"), " or ", image("0.png"), "?"), assistant("left")),
    row(user(image("2.png"), "How many squares are there?"), assistant("There are three squares, I am sure of it.")),
    row(user(image("1.png")), assistant("blue"), user("And now?", image("3.png")), assistant("yellow or green")),
)
FRAMES = ["3.png", "4.png", "5.png"]
# The same with a video beside an image and one alone, of an odd number of frames.
VIDEO_ROWS: Rows = (
    *MIXED_ROWS[:5],
    row(user("Is it ", video(FRAMES[:2]), " or ", image("1.png"), "?"), assistant("left")),
    row(user(video(FRAMES, fps=2), "How many squares are there?"), assistant("There are three squares, I am sure.")),
    *MIXED_ROWS[7:],
)
TEXT_ROWS: Rows = tuple(
    row(user(f"Say the colour {count} times."), assistant(" ".join(["red", "green", "blue"] * count)))
    for count in (1, 4, 2, 1, 3, 2, 1, 4)
)


@dataclass(frozen=True, eq=False)
class TinyFamily:
    """A family in its smallest form.

    Attributes:
        name: for test names.
        build_processor: writes processor and tokenizer into a directory.
        model_class: of transformers.
        build_config: of a tiny model for a processor.
        text_class: of transformers, for the language model alone.
        build_text_config: of the language model alone, from the whole model's configuration.
        turn: text after which an assistant speaks, and the token that ends it.
        parts: prefixes of transformers' parameter names, and the part that each belongs to; the first that fits counts,
            and what fits none is the language model's.
        rows: a global batch.
    """

    name: str
    build_processor: Callable[[Path], ProcessorMixin]
    model_class: Any
    build_config: Callable[[ProcessorMixin], PreTrainedConfig]
    text_class: Any
    build_text_config: Callable[[Any], PreTrainedConfig]
    turn: tuple[str, str]
    parts: tuple[tuple[str, str], ...]
    rows: Rows

    def build_model(self, processor: ProcessorMixin) -> PreTrainedModel:
        """A tiny model with every parameter random."""
        return randomise(self.model_class(self.build_config(processor)))

    def language_model_of(self, model: PreTrainedModel) -> PreTrainedModel:
        """The language model of a vision-language model, alone."""
        alone: PreTrainedModel = self.text_class(self.build_text_config(model.config))
        alone.model.load_state_dict(model.model.language_model.state_dict())
        alone.lm_head.load_state_dict(model.lm_head.state_dict())
        alone.tie_weights()
        return alone.train()

    def part_of(self, name: str) -> str:
        """The part that a parameter of transformers belongs to."""
        return next((part for prefix, part in self.parts if name.startswith(prefix)), "language_model")


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Noise on every vector and random matrices: norms of one or zero, and zero biases and projectors, hide errors."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() <= 3 else parameter[0].numel()
            std = 0.3 if parameter.dim() == 1 else fan_in**-0.5
            noise = torch.empty_like(parameter).normal_(0.0, std, generator=generator)
            parameter.copy_(parameter + noise if parameter.dim() == 1 else noise)
    return model


# Gemma 3


def _gemma3_processor(folder: Path) -> ProcessorMixin:
    return build_processor(folder, gemma3_tiny.VISION["image_size"], gemma3_tiny.TOKENS_PER_IMAGE)


def _gemma3_config(processor: ProcessorMixin) -> PreTrainedConfig:
    tokenizer = processor.tokenizer
    return Gemma3Config(
        text_config=gemma3_text_config(tokenizer),
        vision_config=SiglipVisionConfig(**gemma3_tiny.VISION),
        mm_tokens_per_image=gemma3_tiny.TOKENS_PER_IMAGE,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )


def gemma3_text_config(tokenizer: Any) -> Gemma3TextConfig:
    """A language model alone."""
    return Gemma3TextConfig(
        **(gemma3_tiny.TEXT | {"vocab_size": len(tokenizer)}),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )


GEMMA3 = TinyFamily(
    "gemma3",
    _gemma3_processor,
    Gemma3ForConditionalGeneration,
    _gemma3_config,
    Gemma3ForCausalLM,
    lambda config: config.text_config,
    ("<start_of_turn>model\n", "<end_of_turn>"),
    (("model.vision_tower.", "vision_tower"), ("model.multi_modal_projector.", "projector")),
    MIXED_ROWS,
)

# Qwen3-VL


def _qwen3_vl_config(config_class: Any, text: dict[str, Any], tied: bool) -> Callable[[ProcessorMixin], Any]:
    def build(processor: ProcessorMixin) -> PreTrainedConfig:
        tokenizer = processor.tokenizer
        ids = tokenizer.convert_tokens_to_ids(
            ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|endoftext|>"]
        )
        return config_class(
            text_config=qwen3_vl_tiny.TEXT | text | {"vocab_size": len(tokenizer), "pad_token_id": ids[4]},
            vision_config=qwen3_vl_tiny.VISION,
            image_token_id=ids[0],
            video_token_id=ids[1],
            vision_start_token_id=ids[2],
            vision_end_token_id=ids[3],
            tie_word_embeddings=tied,
        )

    return build


# A Qwen3 model rotates all axes alike, and has a flag of its own for what Qwen3-VL's router always does.
QWEN3_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "rms_norm_eps pad_token_id"
).split()
QWEN3_MOE_FIELDS = "num_experts num_experts_per_tok moe_intermediate_size mlp_only_layers decoder_sparse_step".split()


def _qwen3_text_config(config: Any) -> PreTrainedConfig:
    text, has_experts = config.text_config, hasattr(config.text_config, "num_experts_per_tok")
    settings = {name: getattr(text, name) for name in QWEN3_FIELDS + (QWEN3_MOE_FIELDS if has_experts else [])}
    settings["tie_word_embeddings"] = config.tie_word_embeddings
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": text.rope_parameters["rope_theta"]}
    return Qwen3MoeConfig(**settings, norm_topk_prob=True) if has_experts else Qwen3Config(**settings)


_QWEN3_VL_TURN = ("<|im_start|>assistant\n", "<|im_end|>")
_QWEN3_VL_PARTS = (
    ("model.visual.merger.", "projector"),
    ("model.visual.deepstack_merger_list.", "projector"),
    ("model.visual.", "vision_tower"),
)
QWEN3_VL = TinyFamily(
    "qwen3_vl",
    build_qwen_processor,
    Qwen3VLForConditionalGeneration,
    _qwen3_vl_config(Qwen3VLConfig, {}, tied=True),
    Qwen3ForCausalLM,
    _qwen3_text_config,
    _QWEN3_VL_TURN,
    _QWEN3_VL_PARTS,
    VIDEO_ROWS,
)
QWEN3_VL_MOE = TinyFamily(
    "qwen3_vl_moe",
    build_qwen_processor,
    Qwen3VLMoeForConditionalGeneration,
    _qwen3_vl_config(Qwen3VLMoeConfig, qwen3_vl_tiny.MOE, tied=False),
    Qwen3MoeForCausalLM,
    _qwen3_text_config,
    _QWEN3_VL_TURN,
    _QWEN3_VL_PARTS,
    VIDEO_ROWS,
)

# Mistral3


def _mistral3_config(processor: ProcessorMixin) -> PreTrainedConfig:
    tokenizer = processor.tokenizer
    text = mistral3_tiny.TEXT | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    return Mistral3Config(
        # Rows are longer than YaRN's original length: queries grow.
        text_config=Ministral3Config(**text, rope_parameters=dict(mistral3_tiny.YARN), tie_word_embeddings=False),
        vision_config=PixtralVisionConfig(**mistral3_tiny.VISION),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


MISTRAL3 = TinyFamily(
    "mistral3",
    build_mistral_processor,
    Mistral3ForConditionalGeneration,
    _mistral3_config,
    Ministral3ForCausalLM,
    lambda config: config.text_config,
    ("[/INST]", "</s>"),
    (("model.vision_tower.", "vision_tower"), ("model.multi_modal_projector.", "projector")),
    MIXED_ROWS,
)
FAMILIES = {family.name: family for family in (GEMMA3, QWEN3_VL, QWEN3_VL_MOE, MISTRAL3)}
