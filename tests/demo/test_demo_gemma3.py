"""The demo's model directory: plain transformers loads it, and the processor follows Gemma 3's rules."""

from pathlib import Path

import pytest
import torch
from jinja2.exceptions import TemplateError
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, Gemma3Processor

from demo.dataset import IMAGES
from demo.draw import COLOURS, PLACES, QUESTIONS, SHAPES
from demo.gemma3 import IMAGE_SIZE_PIXELS, SOFT_TOKENS_PER_IMAGE
from demo.recipes import RECIPES

QUESTION = QUESTIONS["colour"][0]
ANSWERS = [*COLOURS, *SHAPES, *PLACES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demo_model")
    RECIPES["gemma3"].build(path, IMAGES.texts(), 3)
    return path


@pytest.fixture(scope="module")
def processor(folder) -> Gemma3Processor:
    return AutoProcessor.from_pretrained(folder)


def render(processor: Gemma3Processor, messages: list[dict], **options) -> str:
    return processor.apply_chat_template(messages, tokenize=False, **options)


def test_auto_processor_is_gemma3s_own(processor):
    assert isinstance(processor, Gemma3Processor)
    assert type(processor.tokenizer).__name__ == "GemmaTokenizer"


def test_chat_format(processor):
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " What? "}]}
    answer = {"role": "assistant", "content": "red"}
    assert render(processor, [user, answer]) == (
        "<bos><start_of_turn>user\n<start_of_image>What?<end_of_turn>\n<start_of_turn>model\nred<end_of_turn>\n"
    )
    assert render(processor, [user], add_generation_prompt=True).endswith("<end_of_turn>\n<start_of_turn>model\n")


@pytest.mark.parametrize("system", ["Be brief.", [{"type": "text", "text": "Be brief."}]])
def test_system_text_goes_before_the_first_user_turn_only(processor, system):
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user")]
    assert render(processor, [{"role": "system", "content": system}, *turns]) == (
        "<bos><start_of_turn>user\nBe brief.\n\nu<end_of_turn>\n"
        "<start_of_turn>model\na<end_of_turn>\n<start_of_turn>user\nu<end_of_turn>\n"
    )


@pytest.mark.parametrize("roles", [("user", "user"), ("assistant",), ("user", "assistant", "assistant")])
def test_roles_must_alternate(processor, roles):
    with pytest.raises(TemplateError, match="alternate"):
        render(processor, [{"role": role, "content": "x"} for role in roles])


def test_image_becomes_soft_tokens_and_scaled_pixels(processor):
    image = Image.new("RGB", (96, 96), (255, 0, 255))
    user = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}
    inputs = processor.apply_chat_template([user], tokenize=True, return_dict=True, return_tensors="pt")
    soft = inputs["input_ids"] == processor.tokenizer.image_token_id
    assert soft.sum() == SOFT_TOKENS_PER_IMAGE
    assert torch.equal(soft.long(), inputs["token_type_ids"])
    assert (inputs["input_ids"] == processor.tokenizer.bos_token_id).sum() == 1
    assert inputs["pixel_values"].shape == (1, 3, IMAGE_SIZE_PIXELS, IMAGE_SIZE_PIXELS)
    # (x / 255 - 0.5) / 0.5: exactly 1 and -1 but for one rounding of each operation.
    assert inputs["pixel_values"][0, :, 0, 0].tolist() == pytest.approx([1.0, -1.0, 1.0], abs=1e-6)


def test_model_has_every_part_of_gemma3(folder):
    config = AutoConfig.from_pretrained(folder)
    assert config.architectures == ["Gemma3ForConditionalGeneration"]
    assert set(config.text_config.layer_types) == {"sliding_attention", "full_attention"}
    assert not config.vision_config.vision_use_head
    assert config.text_config.tie_word_embeddings
    assert config.vision_config.image_size // config.vision_config.patch_size == 6  # pooled 2 x 2 to 3 x 3 tokens
    model = AutoModelForImageTextToText.from_pretrained(folder)
    names = [name for name, _ in model.named_parameters()]
    assert any("vision_tower" in name for name in names)
    # transformers starts the projector at zero, which would leave the tower without gradient on the first step.
    assert model.model.multi_modal_projector.mm_input_projection_weight.abs().min() > 0


def test_generation_stops_at_the_end_of_a_turn(folder, processor):
    generation = AutoModelForImageTextToText.from_pretrained(folder).generation_config
    assert generation.eos_token_id == processor.tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
