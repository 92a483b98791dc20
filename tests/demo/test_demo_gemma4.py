"""The Gemma 4 demo's model directory: plain transformers loads it, and the processor follows Gemma 4's rules."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, Gemma4Processor

from demo.dataset import IMAGES_AND_CLIPS
from demo.draw import IMAGE_SIZE_PIXELS
from demo.gemma4 import AUDIO_BINS, SHARED_LAYERS, TOKENS_PER_IMAGE
from demo.launch import RANKS
from demo.recipes import RECIPES
from demo.sounds import synthesise
from megatron_vlm.data.prompts import PromptBuilder
from megatron_vlm.errors import DataError
from megatron_vlm.families import registry
from megatron_vlm.parallel.layout import assign_layers
from tests.data.references import encode
from tests.data.rows import assistant, image, user
from tests.versions import needs_transformers_5_23

ANSWER = {"role": "assistant", "content": "red two"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demo_gemma4")
    RECIPES["gemma4"].build(path, IMAGES_AND_CLIPS.texts(), 3)
    return path


@pytest.fixture(scope="module")
def processor(folder) -> Gemma4Processor:
    return AutoProcessor.from_pretrained(folder)


def test_chat_format(processor):
    assert isinstance(processor, Gemma4Processor)
    assert type(processor.tokenizer).__name__ == "GemmaTokenizer"
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "audio"}, {"type": "text", "text": " What? "}]}
    prompt = "<bos><|turn>user\n\n\n<|image|>\n\n<|audio|>What?<turn|>\n<|turn>model\n"
    assert processor.apply_chat_template([asked], tokenize=False, add_generation_prompt=True) == prompt
    assert processor.apply_chat_template([asked, ANSWER], tokenize=False) == prompt + "red two<turn|>\n"


@needs_transformers_5_23
def test_media_become_placeholders_between_markers(processor, tmp_path):
    clip = synthesise("two", random.Random(0))
    path = tmp_path / f"a{clip.suffix}"
    path.write_bytes(clip.encoded)
    picture = Image.new("RGB", (IMAGE_SIZE_PIXELS, IMAGE_SIZE_PIXELS), (255, 0, 255))
    asked = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "audio", "audio": str(path)}]}
    inputs = processor.apply_chat_template([asked], tokenize=True, return_dict=True, return_tensors="pt")
    ids, tokenizer = inputs["input_ids"][0], processor.tokenizer
    frames = int(inputs["input_features_mask"].sum())
    assert (ids == tokenizer.image_token_id).sum() == TOKENS_PER_IMAGE
    assert (ids == tokenizer.audio_token_id).sum() == -(-frames // 4)
    assert inputs["input_features"].shape[-1] == AUDIO_BINS
    for token in ("<|image>", "<image|>", "<|audio>", "<audio|>"):
        assert (ids == tokenizer.convert_tokens_to_ids(token)).sum() == 1
    patches = inputs["pixel_values"][0][inputs["image_position_ids"][0, :, 0] >= 0]
    assert len(patches) == 4 * TOKENS_PER_IMAGE
    assert np.allclose(patches.view(-1, 3).numpy(), [1, 0, 1])


def test_model_has_every_part_of_e2b(folder):
    config = AutoConfig.from_pretrained(folder)
    text = config.text_config
    assert config.architectures == ["Gemma4ForConditionalGeneration"]
    assert text.hidden_size_per_layer_input and text.use_double_wide_mlp and text.final_logit_softcapping
    assert {*text.layer_types[-SHARED_LAYERS:]} == {"sliding_attention", "full_attention"}
    assert config.vision_config.use_clipped_linears and config.audio_config.use_clipped_linears
    buffers = dict(AutoModelForImageTextToText.from_pretrained(folder).named_buffers())
    bounds = [buffer for name, buffer in buffers.items() if name.endswith(("_min", "_max"))]
    assert bounds and all(torch.isfinite(bound) for bound in bounds)


def test_the_pipeline_is_cut_between_layers_that_share_keys_and_values(folder):
    text = AutoConfig.from_pretrained(folder).text_config
    last_stage = assign_layers(text.num_hidden_layers, RANKS)[-1]
    assert last_stage[0] > text.num_hidden_layers - SHARED_LAYERS


def test_generation_stops_at_the_end_of_a_turn(folder, processor):
    generation = AutoModelForImageTextToText.from_pretrained(folder).generation_config
    assert generation.eos_token_id == processor.tokenizer.convert_tokens_to_ids(["<eos>", "<turn|>"])


def test_images_keep_their_size(folder, tmp_path):
    """The processor knows no smallest image, by which `data.seq_length` could be judged before a row is read."""
    config = AutoConfig.from_pretrained(folder)
    family = registry.detect(config)
    builder = PromptBuilder(folder, family.prompt_rules(family.config_from_hf(config, False, None)))
    assert builder.shortest_image_row_tokens == 0
    for size in ((96, 96), (64, 32)):
        Image.new("RGB", size).save(tmp_path / "a.png")
        sample = encode(builder, [user(image("a.png"), "?"), assistant("One.")], tmp_path)
        width, height = size
        assert [medium.grid for medium in sample.media] == [(1, height // 16, width // 16)]
    Image.new("RGB", (48, 48)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="of 3 x 3 patches, 2 x 2 of which are one token"):
        encode(builder, [user(image("a.png"), "?"), assistant("One.")], tmp_path)
