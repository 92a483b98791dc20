"""The Mistral3 demo's model directory: plain transformers loads it, and the processor follows Mistral's rules."""

from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PixtralProcessor

from demo.dataset import IMAGES
from demo.draw import IMAGE_SIZE_PIXELS, QUESTIONS
from demo.mistral3 import ORIGINAL_LENGTH, TOKENS_PER_IMAGE, TOKENS_PER_SIDE
from demo.recipes import RECIPES

QUESTION = {"type": "text", "text": QUESTIONS["colour"][0]}
ANSWER = {"role": "assistant", "content": "red"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demo_mistral3")
    RECIPES["mistral3"].build(path, IMAGES.texts(), 3)
    return path


@pytest.fixture(scope="module")
def processor(folder) -> PixtralProcessor:
    return AutoProcessor.from_pretrained(folder)


def test_chat_format(processor):
    assert isinstance(processor, PixtralProcessor)
    system = {"role": "system", "content": "Be brief."}
    for content in ([{"type": "image"}, QUESTION], [QUESTION, {"type": "image"}]):
        assert processor.apply_chat_template(
            [system, {"role": "user", "content": content}, ANSWER], tokenize=False
        ) == (f"<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST][IMG]{QUESTION['text']}[/INST]red</s>")
    with pytest.raises(TemplateError, match="answers a user"):
        processor.apply_chat_template([ANSWER], tokenize=False)


def test_image_becomes_rows_of_placeholders_with_the_published_ids(processor):
    image = Image.new("RGB", (IMAGE_SIZE_PIXELS, IMAGE_SIZE_PIXELS), (255, 0, 255))
    user = {"role": "user", "content": [{"type": "image", "image": image}, QUESTION]}
    inputs = processor.apply_chat_template([user], tokenize=True, return_dict=True, return_tensors="pt")
    row = [10] * TOKENS_PER_SIDE
    image_ids = inputs["input_ids"][0, : 2 + TOKENS_PER_IMAGE + TOKENS_PER_SIDE].tolist()
    assert image_ids == [1, 3, *row, 12, *row, 12, *row, 13]
    assert inputs["image_sizes"].tolist() == [[48, 48]] and inputs["pixel_values"].shape == (1, 3, 48, 48)


def test_model_has_every_part_of_ministral3(folder, processor):
    config = AutoConfig.from_pretrained(folder)
    assert config.architectures == ["Mistral3ForConditionalGeneration"]
    assert (config.text_config.model_type, config.vision_config.model_type) == ("ministral3", "pixtral")
    rope = config.text_config.rope_parameters
    assert rope["rope_type"] == "yarn" and rope["llama_4_scaling_beta"] > 0
    image_and_chat = TOKENS_PER_IMAGE + TOKENS_PER_SIDE + len(processor.tokenizer(QUESTION["text"]).input_ids)
    assert image_and_chat > ORIGINAL_LENGTH, "queries would be scaled by one in every row"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("</s>")
