"""The MoE demo's model directory: plain transformers loads it, and the processor follows Qwen3-VL's rules."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, Qwen3VLProcessor

from demo.dataset import IMAGES
from demo.draw import IMAGE_SIZE_PIXELS, QUESTIONS
from demo.launch import RANKS
from demo.qwen3_vl import NUM_EXPERTS, PATCH_SIZE_PIXELS, SPECIAL_TOKENS, TOKENS_PER_IMAGE
from demo.recipes import RECIPES

QUESTION = QUESTIONS["colour"][0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demo_moe")
    RECIPES["qwen3_vl_moe"].build(path, IMAGES.texts(), 3)
    return path


@pytest.fixture(scope="module")
def processor(folder) -> Qwen3VLProcessor:
    return AutoProcessor.from_pretrained(folder)


def test_auto_processor_is_qwen3_vls_own(processor):
    assert isinstance(processor, Qwen3VLProcessor)
    assert type(processor.tokenizer).__name__ == "Qwen2Tokenizer"
    last_ids = range(len(processor.tokenizer) - len(SPECIAL_TOKENS), len(processor.tokenizer))
    assert {*processor.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))} == {*last_ids}


def test_chat_format(processor):
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What? "}]}
    prompt = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What? <|im_end|>\n<|im_start|>assistant\n"
    assert processor.apply_chat_template([user], tokenize=False, add_generation_prompt=True) == prompt
    answer = {"role": "assistant", "content": "red"}
    assert processor.apply_chat_template([user, answer], tokenize=False) == prompt + "red<|im_end|>\n"


def test_image_becomes_placeholders_and_scaled_patches(processor):
    image = Image.new("RGB", (IMAGE_SIZE_PIXELS, IMAGE_SIZE_PIXELS), (255, 0, 255))
    user = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}
    inputs = processor.apply_chat_template([user], tokenize=True, return_dict=True, return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == TOKENS_PER_IMAGE
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 6]]
    channels = inputs["pixel_values"].view(36, 3, 2 * PATCH_SIZE_PIXELS**2)
    # (x / 255 - 0.5) / 0.5: exactly 1 and -1 but for one rounding of each operation.
    torch.testing.assert_close(channels, torch.tensor([1.0, -1.0, 1.0])[None, :, None].expand_as(channels))


def test_model_has_every_part_of_qwen3_vl_moe(folder):
    config = AutoConfig.from_pretrained(folder)
    assert config.architectures == ["Qwen3VLMoeForConditionalGeneration"]
    assert len(config.vision_config.deepstack_visual_indexes) == 2
    assert NUM_EXPERTS % RANKS == 0
    names = [name for name, _ in AutoModelForImageTextToText.from_pretrained(folder).named_parameters()]
    for part in ("deepstack_merger_list.1", "layers.0.mlp.experts.gate_up_proj", "layers.2.mlp.gate.weight"):
        assert any(part in name for name in names), part


def test_generation_stops_at_the_end_of_a_turn(folder, processor):
    generation = AutoModelForImageTextToText.from_pretrained(folder).generation_config
    assert generation.eos_token_id == processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
